from __future__ import annotations

import pyarrow as pa
import pytest
from pyarrow import parquet

from grpo_mega.data.rows import Fields
from grpo_mega.data.sources.parquet import read_parquet
from grpo_mega.errors import DataError

CHAT = [{"role": "user", "content": "2+2", "name": None}]


@pytest.fixture
def read(tmp_path):
    """read(columns or bytes, prompt field, answer field) -> the rows of a Parquet file of them."""

    def read(columns, prompt="prompt", answer="answer"):
        path = tmp_path / "train.parquet"
        if isinstance(columns, bytes):
            path.write_bytes(columns)
        else:
            parquet.write_table(pa.table(columns), path, row_group_size=2)
        return read_parquet(str(path), Fields(prompt, answer, "data"), "data.parquet")

    return read


def test_rows_count_from_nought_and_keep_every_column(read):
    rows = read({"q": ["a", "b", "c"], "a": [1, None, 3], "level": [0.5, 1.5, 2.5]}, "q", "a")
    assert [(row["prompt"], row["answer"]) for row in rows] == [("a", "1"), ("b", None), ("c", "3")]
    assert [row["origin"] for row in rows] == ["train.parquet[0]", "train.parquet[1]", "train.parquet[2]"]
    assert rows[2]["fields"] == {"q": "c", "a": 3, "level": 2.5}


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_text_is_text_in_whatever_type_it_is_kept(read, kind):
    column = pa.array(["a", "π", "a"]).cast(kind)
    assert [row["prompt"] for row in read({"prompt": column})] == ["a", "π", "a"]


def test_chats_and_answers_within_a_struct(read):
    gold = [{"ground_truth": "4", "style": "rule"}]
    (row,) = read({"prompt": [[{"role": "system", "content": "Go."}, *CHAT]], "reward_model": gold},
                  answer="reward_model.ground_truth")  # fmt: skip
    assert (row["prompt"], row["answer"]) == ("2+2", "4")
    assert row["messages"] == ({"role": "system", "content": "Go."}, {"role": "user", "content": "2+2"})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (b"", r"data.parquet=.*train.parquet cannot be read as Parquet \(.*0 bytes.*\); write the file anew"),
        (b"PAR1" + b"x" * 40 + b"PAR1", r"train.parquet cannot be read as Parquet \(.*\); write the file anew"),
        ({"prompt": pa.array([], pa.string())}, r"data.parquet=.*train.parquet holds no rows; give at least one"),
        ({"prompt": [1, 2], "text": ["a", "b"]}, r"train.parquet: column 'prompt' is of type int64, not text; set data."
         r"prompt_field to one of the columns of text or messages \(text\), or write the column as text"),
        ({"prompt": [b"a"]}, r"column 'prompt' is of type binary, not text; set data.prompt_field to a column of text"),
        ({"q": ["a"]}, r"train.parquet\[0\]: there is no field 'prompt' \(found: 'q'\); set data.prompt_field"),
        ({"prompt": ["a", None]}, r"train.parquet\[1\]: 'prompt' is None, not a text"),
        ({"prompt": ["a"], "answer": [[1]]}, r"train.parquet\[0\]: 'answer' is \[1\]; write the answer as a string"),
        ({"prompt": ["a"], "answer": [float("nan")]}, r"train.parquet\[0\]: 'answer' is nan; write the answer"),
    ],
)  # fmt: skip
def test_a_bad_file_column_or_row_is_named(read, columns, message):
    with pytest.raises(DataError, match=message):
        read(columns)


def test_a_string_column_whose_bytes_are_no_text(read):
    bad = pa.array([b"fine", b"caf\xe9"]).view(pa.string())
    with pytest.raises(DataError, match=r"train.parquet\[1\]: 'note' has byte 0xe9, which is not UTF-8; write the col"):
        read({"prompt": ["a", "b"], "note": bad})


def test_a_missing_file_and_a_folder(tmp_path):
    for name, found in (("gone.parquet", "cannot be read"), (".", "is a folder")):
        with pytest.raises(DataError, match=rf"data.parquet=.* {found}.*; give a Parquet file \(data.dataset takes fo"):
            read_parquet(str(tmp_path / name), Fields("prompt", "answer", "data"), "data.parquet")
