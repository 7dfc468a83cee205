from __future__ import annotations

import pytest

from grpo_mega.data.tokenizer import load_tokenizer
from grpo_mega.errors import DataError


def rendered(tokenizer, ids):
    return tokenizer._tokenizer.decode(list(ids), skip_special_tokens=False)


def test_the_template_wraps_the_message_and_asks_for_an_answer(save_tokenizer):
    tokenizer = load_tokenizer(save_tokenizer("default"))
    ids = tokenizer.prompt_ids("2+2")
    assert ids[0] == 257 and ids.count(257) == 3 and ids.count(258) == 2
    assert rendered(tokenizer, ids) == (
        "<|im_start|>system\nDefault<|im_end|>\n<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_system_message_replaces_the_templates_own_and_an_empty_one_silences_it(save_tokenizer):
    tokenizer = load_tokenizer(save_tokenizer("default"))
    assert rendered(tokenizer, tokenizer.prompt_ids("2+2", "Be brief.")) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n"
    )
    assert rendered(tokenizer, tokenizer.prompt_ids("2+2", "")) == (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n"
    )


def test_without_a_template_the_text_is_encoded_as_it_stands(save_tokenizer):
    tokenizer = load_tokenizer(save_tokenizer())
    ids = tokenizer.prompt_ids("2+2")
    assert len(ids) == 3 and tokenizer.decode(ids) == "2+2"
    assert tokenizer.prompt_ids("2+2", "") == ids
    with pytest.raises(DataError, match=r"data.system='Be brief.'.*no chat template.*data.instruction"):
        tokenizer.prompt_ids("2+2", "Be brief.")


def test_a_template_that_refuses_system_messages_is_one_sentence(save_tokenizer):
    tokenizer = load_tokenizer(save_tokenizer("no_system"))
    assert rendered(tokenizer, tokenizer.prompt_ids("2+2")) == "<|im_start|>2+2"
    with pytest.raises(DataError, match=r"failed \(System role not supported\); leave data.system out"):
        tokenizer.prompt_ids("2+2", "Be brief.")


def test_decode_drops_special_tokens_and_keeps_every_space(save_tokenizer):
    tokenizer = load_tokenizer(save_tokenizer("default"))
    ids = (*tokenizer._tokenizer.encode(" a , b  . π"), 258)
    assert tokenizer.decode(ids) == " a , b  . π"
    assert tokenizer.vocab_size == 259


@pytest.mark.parametrize(
    ("generation_config", "stops"),
    [(None, (256,)), ({}, (256,)), ({"eos_token_id": 258}, (256, 258)), ({"eos_token_id": [258, 256]}, (256, 258))],
)
def test_stop_tokens_are_end_of_sequence_and_what_generation_config_adds(save_tokenizer, generation_config, stops):
    assert load_tokenizer(save_tokenizer(generation_config=generation_config)).stop_token_ids == stops


@pytest.mark.parametrize("stops", ["</s>", [1, "2"], -1, True])
def test_a_damaged_generation_config_is_refused(save_tokenizer, stops):
    with pytest.raises(DataError, match=r"generation_config.json: eos_token_id=.*; write one token id or a list"):
        load_tokenizer(save_tokenizer(generation_config={"eos_token_id": stops}))


def test_generation_config_that_is_no_json_object(save_tokenizer):
    folder = save_tokenizer(generation_config=[1])
    with pytest.raises(DataError, match=r"generation_config.json cannot be read .*mend it or delete it"):
        load_tokenizer(folder)


def test_a_folder_that_is_missing_or_holds_no_tokenizer(tmp_path):
    with pytest.raises(DataError, match=r"gone is no folder; give one with tokenizer.json"):
        load_tokenizer(tmp_path / "gone")
    with pytest.raises(DataError, match=r"holds no tokenizer that transformers can load .*; put tok") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
