"""What a rank reads alone: a recipe of several sources, as the loop will draw them."""

from __future__ import annotations

import json

import datasets
import pyarrow as pa
import pytest
import tiny
from pyarrow import parquet
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from grpo_mega.config import validate_recipe
from grpo_mega.errors import DataError
from grpo_mega.trainer.setup import read_inputs


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("setup") / "model"
    shape = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4}
    return tiny.make_model(folder, num_key_value_heads=2, **shape)


@pytest.fixture
def read(model, tmp_path):
    """read(data keys, **other sections) -> the Inputs of 4 JSONL sums and 3 Parquet chats, one of each over-long."""
    sums = [{"prompt": text, "answer": 2} for text in ("1+1", "0+2", "1+1+0", "1+1" + "+0" * 60)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in sums))
    (tmp_path / "test.jsonl").write_text('{"prompt": "0+2", "answer": 2}\n')
    chats = [[{"role": "user", "content": text}] for text in ("2*1", "1*2", "2" + "*1" * 60)]
    gold = [{"ground_truth": "2"}] * 3
    parquet.write_table(pa.table({"prompt": chats, "reward_model": gold}), tmp_path / "products.parquet")
    sources = [
        {"jsonl": str(tmp_path / "sums.jsonl"), "weight": 3},
        {"parquet": str(tmp_path / "products.parquet"), "answer_field": "reward_model.ground_truth"},
    ]
    data = {"sources": sources, "heldout_source": {"jsonl": str(tmp_path / "test.jsonl")}, "overlong": "skip"}
    tree = {
        "model": {"path": str(model)},
        "sampling": {"max_completion_tokens": 28},  # of a context of 128
        "run": {"directory": str(tmp_path / "run")},
    }
    return lambda keys=None, **sections: read_inputs(
        validate_recipe({**tree, "data": data | (keys or {}), **sections}), 1
    )


def test_prompts_of_both_sources_in_proportion_and_what_became_of_the_rows(read):
    inputs = read()
    drawn = inputs.prompts.next(40)
    sums = [prompt for prompt in drawn if "+" in prompt.text]
    assert len(sums) == 30 and {prompt.text for prompt in sums} == {"1+1", "1+1+0"}
    assert {prompt.text for prompt in drawn} - {"1+1", "1+1+0"} == {"2*1", "1*2"}
    assert {prompt.answer for prompt in drawn} == {"2"}
    assert [(prompt.index, prompt.text) for prompt in inputs.heldout] == [(-1, "0+2")]
    assert inputs.data.record() == {
        "training_prompts": 4, "heldout_prompts": 1, "overlong_prompts": 2, "training_rows_held_out": 1,
    }  # fmt: skip
    assert read().prompts.next(40) == drawn  # the next rank's


def test_an_over_long_prompt_is_an_error_unless_the_recipe_says_otherwise(read):
    with pytest.raises(DataError, match=r"sums.jsonl:4: the prompt has \d+ tokens, .*or set data.overlong to skip"):
        read({"overlong": "refuse"})
    assert max(len(prompt.token_ids) for prompt in read({"overlong": "truncate_left"}).prompts.next(40)) == 100


def test_an_answer_missing_in_any_source(read, tmp_path):
    with pytest.raises(DataError, match=r"products.parquet\[0\] has no answer, which reward.function=exact compares"):
        read({"sources": [{"parquet": str(tmp_path / "products.parquet")}]})


def test_a_tokenizer_of_more_tokens_than_the_model(read, model, tmp_path):
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(tiny.VOCABULARY + 1)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "large")
    with pytest.raises(
        DataError, match=r"large has 260 tokens and .* embedding 259 rows: 'w259' \(259\) have none; use"
    ):
        read(model={"path": str(model), "tokenizer": str(tmp_path / "large")})


def test_demonstrations_of_every_kind_of_source(model, tmp_path):
    """A field of a JSONL file, the last word of a Parquet file's conversations, a number in a folder that datasets
    saved; and held-out rows without any."""
    (tmp_path / "sums.jsonl").write_text('{"prompt": "1+1", "shown": {"text": "two"}}\n')
    chat = [{"role": "user", "content": "2*1"}, {"role": "assistant", "content": "2."}]
    parquet.write_table(pa.table({"prompt": [chat, chat]}), tmp_path / "chats.parquet")
    datasets.Dataset.from_list([{"prompt": "9-2", "gold": 7}]).save_to_disk(tmp_path / "saved")
    (tmp_path / "test.jsonl").write_text('{"prompt": "0+2", "answer": 2}\n')
    (tmp_path / "turns.jinja").write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
    )
    sources = [
        {"jsonl": str(tmp_path / "sums.jsonl"), "completion_field": "shown.text"},
        {"parquet": str(tmp_path / "chats.parquet")},
        {"dataset": str(tmp_path / "saved"), "completion_field": "gold"},
    ]
    tree = {
        "preset": "sft", "model": {"path": str(model)}, "run": {"directory": str(tmp_path / "run")},
        "sampling": {"max_completion_tokens": 28},
    }  # fmt: skip
    data = {"sources": sources, "chat_template": str(tmp_path / "turns.jinja"), "heldout": 0}
    inputs = read_inputs(validate_recipe(tree | {"data": data}), 1)
    assert {(prompt.text, prompt.demonstration.text) for prompt in inputs.prompts.next(12)} == {
        ("1+1", "two"), ("2*1", "2."), ("9-2", "7"),
    }  # fmt: skip
    assert inputs.reward == () and inputs.heldout == []
    held = data | {"heldout": 1, "heldout_source": {"jsonl": str(tmp_path / "test.jsonl")}}
    inputs = read_inputs(validate_recipe(tree | {"data": held}), 1)
    assert [(prompt.text, prompt.demonstration) for prompt in inputs.heldout] == [("0+2", None)] and inputs.reward
    held = data | {"heldout": 1, "sources": sources[1:2] + sources[1:2]}
    (tmp_path / "chats.parquet").unlink()
    parquet.write_table(
        pa.table({"prompt": [chat, [{**chat[0], "content": "1*2"}, chat[1]]]}), tmp_path / "chats.parquet"
    )
    with pytest.raises(
        DataError, match=r"has no answer, which reward.function=exact compares with; .*it is held out; d"
    ):
        read_inputs(validate_recipe(tree | {"data": held}), 1)
