"""Against sentencepiece itself, on the models that mistral_common ships: v1 (32000 pieces) and v3 (32768)."""

from __future__ import annotations

import json
import random
import shutil

import pytest
from pieces import FILES, path_of
from sentencepiece import SentencePieceProcessor

from grpo_mega.data.tokenizer import load_tokenizer
from grpo_mega.errors import DataError

CHAT = (  # as mistral_common writes v3: the pieces [INST] and [/INST] around the text, no space of the template's
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(params=FILES)
def pair(request, tmp_path):
    """(our tokenizer of the bare .model file, sentencepiece's own processor of it)."""
    path = path_of(request.param)
    return load_tokenizer(tmp_path, tokenizer=str(path)), SentencePieceProcessor(model_file=str(path))


@pytest.fixture
def folder(tmp_path):
    """folder(version, template, **tokenizer_config keys) -> (the tokenizer of a model folder, sentencepiece's own)."""

    def make(version="v3", template=CHAT, **settings):
        shutil.copy(path_of(version), tmp_path / "tokenizer.model")
        if template is not None:
            (tmp_path / "chat_template.jinja").write_text(template)
        if settings:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        return load_tokenizer(tmp_path), SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))

    return make


def user(text):
    return [{"role": "user", "content": text}]


def texts():
    rng = random.Random(0)
    alphabet = [" ", " ", "a", "é", "\n", "\t", "3", "漢", "🙂", "<", "/s>", "[INST]", "<s>", "\u2581", "\U000e0001"]
    yield from (
        "Hello world",
        " leading",
        "two  spaces",
        "trailing ",
        "a\nb\n\n",
        "  ",
        "<s> x</s>",
        "[INST] hi [/INST]",
    )
    for _ in range(300):
        yield "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 14)))


def test_ids_are_sentencepieces_own_behind_the_beginning_of_sequence(pair):
    ours, theirs = pair
    for text in texts():
        assert ours.prompt_ids(user(text)) == tuple(theirs.encode(text, add_bos=True)), text


def test_decoding_is_sentencepieces_own_without_control_pieces(pair):
    ours, theirs = pair
    for text in texts():
        ids = theirs.encode(text)
        assert ours.decode([1, *ids, 2]) == theirs.decode(ids)
    # a character that has no piece is its bytes, one broken in the middle the replacement character
    smile = theirs.encode("🧿")
    assert len(smile) == 5 and ours.decode(smile) == "🧿" and ours.decode(smile[:-1]).endswith("\ufffd")


def test_known_ids():
    # Mistral-7B-Instruct-v0.1's prompt, as its model card gives it: [INST] is text there
    ours = load_tokenizer(".", tokenizer=str(path_of("v1")))
    assert ours.prompt_ids(user("[INST] Hello [/INST]"))[:4] == (1, 733, 16289, 28793)
    assert (ours.vocab_size, ours.stop_token_ids) == (32000, (2,))
    assert load_tokenizer(".", tokenizer=str(path_of("v3"))).vocab_size == 32768


def test_a_templates_control_pieces_become_their_ids(folder):
    ours, theirs = folder()
    chat = [*user("Hi"), {"role": "assistant", "content": "Hello"}, *user("2+2?")]
    hi, hello, question = (theirs.encode(text) for text in ("Hi", "Hello", "2+2?"))
    assert ours.prompt_ids(chat) == (1, 3, *hi, 4, *hello, 2, 3, *question, 4)
    assert ours.decode(ours.prompt_ids(chat)) == theirs.decode([*hi, *hello, *question])


def test_a_row_cannot_write_a_control_piece(folder):
    ours, theirs = folder()
    for text in ("</s>[INST]", "x[/INST]y", "[/IN[/INST]ST]", "<<s>s>"):
        assert ours.prompt_ids(user(text)) == (1, 3, *theirs.encode(text), 4)
    with pytest.raises(DataError, match=r"the prompt holds '\\ufdd0', a code point that Unicode keeps out of texts"):
        ours.prompt_ids(user("a\ufdd0b"))


def test_a_template_that_trims_sees_the_text_as_it_is(folder):
    ours, theirs = folder(template="{{ messages[0].content | trim }}{{ messages[0].content | length }}")
    assert ours.prompt_ids(user(" ab ")) == tuple(theirs.encode("ab4"))


def test_a_space_that_the_template_writes_is_the_only_one_where_legacy_is_false(folder):
    template = "<s>[INST] {{ messages[0].content }}[/INST]"
    legacy, theirs = folder(template=template)
    assert legacy.prompt_ids(user("Hi")) == (1, 3, *theirs.encode(" Hi"), 4)
    ours, _ = folder(template=template, legacy=False)
    assert ours.prompt_ids(user("Hi")) == (1, 3, theirs.piece_to_id("▁Hi"), 4) != legacy.prompt_ids(user("Hi"))
    assert folder(template="Hi<s>", legacy=False)[0].prompt_ids(user("x")) == (theirs.piece_to_id("▁Hi"), 1)


def test_tokenizer_config_gives_template_end_of_turn_and_beginning(folder, tmp_path):
    added = {
        "2": {"content": "</s>", "special": True},
        "32000": {"content": "<|im_end|>", "special": True},
        "32001": {"content": "<think>", "special": False},
    }
    template = [
        {"name": "tool", "template": "no"},
        {"name": "default", "template": "{{ messages[0].content }}<|im_end|>"},
    ]
    keys = {"added_tokens_decoder": added, "eos_token": {"content": "<|im_end|>"}, "chat_template": template}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2}')
    ours, theirs = folder("v1", None, **keys)
    assert (ours.vocab_size, ours.stop_token_ids) == (32002, (2, 32000))
    # a token that is not special is part of the language: a row may write it, and decoding shows it
    a, b = theirs.encode("a"), theirs.encode("b")
    assert ours.prompt_ids(user("a<think>b")) == (*a, 32001, *b, 32000)
    assert ours.decode([*a, 32001, *b, 32000]) == "a<think> b"
    bare, _ = folder("v1", None, **{**keys, "chat_template": None, "add_bos_token": False})
    assert bare.prompt_ids(user("a<|im_end|>")) == tuple(theirs.encode("a<|im_end|>"))


def test_the_recipes_template_comes_first(folder, tmp_path):
    folder()
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}</s>")
    ours = load_tokenizer(tmp_path, chat_template=str(tmp_path / "mine.jinja"))
    assert ours.prompt_ids(user("x"))[-1] == 2 and 3 not in ours.prompt_ids(user("x"))
    (tmp_path / "mine.jinja").write_text("{{ raise_exception('no such role') }}")
    with pytest.raises(
        DataError, match=r"the chat template of .*mine.jinja failed \(no such role\); mend the template"
    ):
        load_tokenizer(tmp_path, chat_template=str(tmp_path / "mine.jinja")).prompt_ids(user("x"))


def test_ids_beyond_the_vocabulary_decode_to_nothing(pair):
    ours, theirs = pair
    assert ours.decode([*theirs.encode("ab"), 40000]) == "ab"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is no sentencepiece model \(the file is empty\); give one, or the folder of a Hugging Face tokenizer"),
        (b"IQ== 0\nIg== 1\n", r"my.model is no sentencepiece model \(.*\); give one"),
        (None, r"my.model is no sentencepiece model \(.*\); give one"),
    ],
)
def test_a_file_that_is_no_sentencepiece_model(tmp_path, content, message):
    (tmp_path / "my.model").write_bytes(path_of("v1").read_bytes()[:4000] if content is None else content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path, tokenizer=str(tmp_path / "my.model"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"eos_token": "<|end|>"},
            r"tokenizer_config.json names eos_token='<\|end\|>', which .*tokenizer.model does no",
        ),
        (
            {"added_tokens_decoder": {"x": {"content": "y"}}},
            r"added_tokens_decoder in tokenizer_config.json .* damaged",
        ),
        (
            {"added_tokens_decoder": {"7": "y"}},
            r"added_tokens_decoder in tokenizer_config.json .* is damaged \(.*\); me",
        ),
        ({"chat_template": 3}, r"tokenizer_config.json: chat_template is not a text; mend it"),
    ],
)
def test_settings_that_do_not_fit(folder, settings, message):
    with pytest.raises(DataError, match=message):
        folder(template=None, **settings)
