from __future__ import annotations

import pytest

from grpo_mega.data.sentence_piece import SentencePieceTokenizer
from grpo_mega.data.tokenizer import export_tokenizer, load_tokenizer
from grpo_mega.errors import DataError


def rendered(tokenizer, ids):
    return tokenizer._tokenizer.decode(list(ids), skip_special_tokens=False)


def chat(user, system=None):
    return [*([] if system is None else [{"role": "system", "content": system}]), {"role": "user", "content": user}]


def test_the_template_wraps_the_message_and_asks_for_an_answer(save_tokenizer):
    tokenizer = load_tokenizer(save_tokenizer("default"))
    ids = tokenizer.prompt_ids(chat("2+2"))
    assert ids[0] == 257 and ids.count(257) == 3 and ids.count(258) == 2
    assert rendered(tokenizer, ids) == (
        "<|im_start|>system\nDefault<|im_end|>\n<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_system_message_replaces_the_templates_own_and_an_empty_one_silences_it(save_tokenizer):
    tokenizer = load_tokenizer(save_tokenizer("default"))
    assert rendered(tokenizer, tokenizer.prompt_ids(chat("2+2", "Be brief."))) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n"
    )
    assert rendered(tokenizer, tokenizer.prompt_ids(chat("2+2", ""))) == (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n"
    )


def test_without_a_template_the_text_is_encoded_as_it_stands(save_tokenizer):
    tokenizer = load_tokenizer(save_tokenizer())
    ids = tokenizer.prompt_ids(chat("2+2"))
    assert len(ids) == 3 and tokenizer.decode(ids) == "2+2"
    assert tokenizer.prompt_ids(chat("2+2", "")) == ids
    with pytest.raises(
        DataError, match=r"system message \('Be brief.'\).*no chat template.*data.instruction, or give a"
    ):
        tokenizer.prompt_ids(chat("2+2", "Be brief."))
    with pytest.raises(
        DataError, match=r"a chat of 2 messages needs a chat template, and .*model has none; give one in"
    ):
        tokenizer.prompt_ids([*chat("2+2"), *chat("3+3")])


def test_a_template_that_refuses_system_messages_is_one_sentence(save_tokenizer):
    tokenizer = load_tokenizer(save_tokenizer("no_system"))
    assert rendered(tokenizer, tokenizer.prompt_ids(chat("2+2"))) == "<|im_start|>2+2"
    with pytest.raises(
        DataError, match=r"failed \(System role not supported\); leave the system message \(data.system"
    ):
        tokenizer.prompt_ids(chat("2+2", "Be brief."))


def test_a_template_of_the_recipes_own(save_tokenizer, tmp_path):
    folder, mine = save_tokenizer("default"), tmp_path / "mine.jinja"
    mine.write_text("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}!")
    assert (
        rendered(*(t := load_tokenizer(folder, chat_template=str(mine)), t.prompt_ids(chat("π")))) == "<|im_start|>π!"
    )
    mine.write_text("a\n{% for m in messages %}\n{{ m.content }")
    with pytest.raises(DataError, match=r"the chat template of .*mine.jinja:3 failed \(.*\); mend the template"):
        load_tokenizer(folder, chat_template=str(mine)).prompt_ids(chat("π"))
    for content, message in (
        (b" \n", "is empty; write the template"),
        (b"caf\xe9", r"is not UTF-8 \(byte 3\); save it"),
    ):
        mine.write_bytes(content)
        with pytest.raises(DataError, match=rf"data.chat_template=.*mine.jinja {message}"):
            load_tokenizer(folder, chat_template=str(mine))
    with pytest.raises(DataError, match=r"data.chat_template=.*gone.jinja cannot be read \(.*\); give a Jinja file"):
        load_tokenizer(folder, chat_template=str(tmp_path / "gone.jinja"))


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
    (tmp_path / "config.json").write_text("{}")
    for gone in (tmp_path / "gone", tmp_path / "config.json"):
        with pytest.raises(DataError, match=r"model.path=.* is no folder; give one with tokenizer.json"):
            load_tokenizer(gone)
    with pytest.raises(DataError, match=r"holds no tokenizer that transformers can load .*; put tok") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_from_another_folder_with_the_models_stop_tokens(save_tokenizer, tmp_path):
    other, model = save_tokenizer("default"), tmp_path / "weights"
    model.mkdir()
    (model / "generation_config.json").write_text('{"eos_token_id": 258}')
    tokenizer = load_tokenizer(model, tokenizer=str(other))
    assert tokenizer.stop_token_ids == (256, 258)
    assert tokenizer.prompt_ids(chat("a")) == load_tokenizer(other).prompt_ids(chat("a"))
    with pytest.raises(DataError, match=r"model.tokenizer=.*gone is no folder; .*, or a sentencepiece .model file"):
        load_tokenizer(model, tokenizer=str(tmp_path / "gone"))


def test_an_exported_model_gets_the_tokenizer_and_the_template_of_the_recipe(save_tokenizer, tmp_path):
    other, hf = save_tokenizer("default"), tmp_path / "hf"
    hf.mkdir()
    for name in ("tokenizer.model", "vocab.json", "config.json", "chat_template.jinja"):
        (hf / name).write_text("{}")
    export_tokenizer(hf, None, None)
    assert (hf / "tokenizer.model").exists()
    export_tokenizer(hf, str(other), None)
    assert {path.name for path in hf.iterdir()} == {path.name for path in other.iterdir()} | {"config.json"}
    assert load_tokenizer(hf).prompt_ids(chat("a")) == load_tokenizer(other).prompt_ids(chat("a"))
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}!")
    export_tokenizer(hf, None, str(tmp_path / "t.jinja"))
    assert rendered(*(t := load_tokenizer(hf), t.prompt_ids(chat("a")))) == "a!"
    (tmp_path / "my.model.v3").write_bytes(b"pieces")
    export_tokenizer(hf, str(tmp_path / "my.model.v3"), None)
    assert {path.name for path in hf.iterdir()} == {"config.json", "tokenizer.model"}
    assert (hf / "tokenizer.model").read_bytes() == b"pieces"


def test_a_folder_of_tokenizer_json_is_hugging_faces_even_beside_a_sentencepiece_model(save_tokenizer):
    folder = save_tokenizer("default")
    (folder / "tokenizer.model").write_bytes(b"of another kind")
    assert not isinstance(load_tokenizer(folder), SentencePieceTokenizer)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizerFast"}')
    with pytest.raises(DataError, match=r"tokenizer.model is no sentencepiece model"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "XLMRobertaTokenizer"}')
    with pytest.raises(DataError, match=r"holds no tokenizer that transformers can load"):
        load_tokenizer(folder)
