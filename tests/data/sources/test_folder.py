from __future__ import annotations

import json

import pyarrow as pa
import pytest
import yaml
from pyarrow import parquet

from grpo_mega.data.rows import Fields
from grpo_mega.data.sources.folder import read_folder
from grpo_mega.errors import DataError

datasets = pytest.importorskip("datasets")


def rows(texts):
    return datasets.Dataset.from_dict({"prompt": list(texts), "answer": [text.upper() for text in texts]})


def read(folder, split=None):
    return read_folder(str(folder), split, Fields("prompt", "answer", "data"))


def declaring(**subsets):
    """A README.md that gives each subset its data_files."""
    configs = [{"config_name": name, "data_files": files} for name, files in subsets.items()]
    return f"---\n{yaml.safe_dump({'configs': configs})}---\n".encode()


def prompts(folder, split=None):
    return "".join(row["prompt"] for row in read(folder, split))


@pytest.fixture
def plain(tmp_path):
    """plain({file name: texts or bytes}) -> a folder of those files."""

    def write(files):
        for name, content in files.items():
            path = tmp_path / "set" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif path.suffix == ".parquet":
                parquet.write_table(pa.table({"prompt": list(content)}), path)
            else:
                path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in content))
        return tmp_path / "set"

    return write


def test_a_saved_data_set_in_its_own_order(tmp_path):
    rows("abcd").select([3, 1, 0]).save_to_disk(tmp_path / "set")
    found = read(tmp_path / "set")
    assert [(row["prompt"], row["answer"]) for row in found] == [("d", "D"), ("b", "B"), ("a", "A")]
    assert [row["origin"] for row in found] == ["set[0]", "set[1]", "set[2]"]
    with pytest.raises(
        DataError, match=r"data.dataset=.*set is one data set without splits; leave data.split=test out"
    ):
        read(tmp_path / "set", "test")


def test_a_saved_split_is_asked_for_by_name(tmp_path):
    datasets.DatasetDict({"train": rows("ab"), "test": rows("c")}).save_to_disk(str(tmp_path / "set"))
    assert (prompts(tmp_path / "set", "train"), prompts(tmp_path / "set", "test")) == ("ab", "c")
    assert read(tmp_path / "set", "test")[0]["origin"] == "test[0]"
    with pytest.raises(DataError, match=r"data.split=tst is no split of .*set; did you mean 'test'\?"):
        read(tmp_path / "set", "tst")
    with pytest.raises(DataError, match=r"set holds the splits train, test; name one in data.split"):
        read(tmp_path / "set")


def test_the_only_split_needs_no_name(tmp_path):
    datasets.DatasetDict({"train": rows("ab")}).save_to_disk(str(tmp_path / "set"))
    assert prompts(tmp_path / "set") == "ab"


def test_a_damaged_or_empty_saved_data_set(tmp_path):
    rows("ab").save_to_disk(tmp_path / "set")
    (tmp_path / "set" / "data-00000-of-00001.arrow").write_bytes(b"no arrow")
    with pytest.raises(
        DataError, match=r"data.dataset=.*set cannot be loaded by datasets \(.*\); save it anew"
    ) as caught:
        read(tmp_path / "set")
    assert "\n" not in str(caught.value)
    rows("ab").select([]).save_to_disk(tmp_path / "none")
    with pytest.raises(DataError, match=r"data.dataset=.*none cannot be loaded by datasets \(.*\); save it anew"):
        read(tmp_path / "none")


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        ({"train.jsonl": "ab", "test.jsonl": "c", "README.md": b"# A set"}, {"train": "ab", "test": "c"}),
        (
            {"data/train-00001-of-00002.parquet": "b", "data/train-00000-of-00002.parquet": "a",
             "data/hard-00000-of-00001.parquet": "c", ".gitattributes": b"x"},
            {"train": "ab", "hard": "c"},
        ),
        ({"train/one.parquet": "a", "validation/two.jsonl": "b"}, {"train": "a", "validation": "b"}),
        ({"some.jsonl": "a", "more.jsonl": "b"}, {"train": "ba", None: "ba"}),
        ({"README.md": declaring(main=[{"split": "mine", "path": "x/*.parquet"}]),
          "x/1.parquet": "a", "x/2.parquet": "b", "train.jsonl": "c"}, {"mine": "ab", None: "ab"}),
    ],
)  # fmt: skip
def test_a_folder_of_files_has_the_splits_that_their_names_say(plain, files, splits):
    folder = plain(files)
    for split, texts in splits.items():
        assert prompts(folder, split) == texts


def test_errors_of_a_folder_name_file_and_line(plain):
    with pytest.raises(DataError, match=r"set/train.jsonl:2: 'x' is not JSON"):
        read(plain({"train.jsonl": b'{"prompt": "a"}\nx\n'}))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"README.md": b"# Nothing"}, r"data.dataset=.*set holds no data files; give a folder of Parquet or JSONL"),
        ({"train.csv": b"a,b"}, r"set has train.csv, which is neither Parquet nor JSONL; convert or move it"),
        ({"a/train.jsonl": "a", "README.md": declaring(main="m/*", alt="a/*")},
         r"set holds the subsets main, alt \(README.md\); give the folder of one of them"),
        ({"a.jsonl": "a", "README.md": declaring(main="m/*")},
         r"set: README.md declares files of train that are not there; mend it"),
        ({"a.jsonl": "a", "README.md": b"---\nconfigs: [\n---\n"}, r"README.md: its metadata cannot be read \(.*\); m"),
    ],
)  # fmt: skip
def test_a_folder_that_gives_nothing_to_read(plain, files, message):
    with pytest.raises(DataError, match=message):
        read(plain(files))


def test_no_folder(tmp_path):
    with pytest.raises(
        DataError, match=r"data.dataset=.*gone is no folder; give one that datasets' save_to_disk wrote"
    ):
        read(tmp_path / "gone")
