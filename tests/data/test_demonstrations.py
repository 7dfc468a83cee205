"""What a row demonstrates, in tokens: by hand, under templates that agree with their prompts and templates that do not.

Every byte is a token; 256 is <|endoftext|>, the tokenizer's end of sequence, 257 <|im_start|>, 258 <|im_end|>.
"""

from __future__ import annotations

import json
import shutil

import pytest
from pieces import path_of
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo_mega.data.demonstrations import demonstration
from grpo_mega.data.tokenizer import load_tokenizer
from grpo_mega.errors import DataError

BYTE = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}  # "4" -> its token
NEWLINE, SPACE = "Ċ", "Ġ"  # how a byte-level tokenizer spells them
USER = [{"role": "user", "content": "2+2"}]
TRIMMING = (  # as Llama 3's and Llama 2's do, together: trims, and sets a space before the answer
    "{% for m in messages %}<|im_start|>{% if m.role == 'assistant' %} {% endif %}{{ m.content | trim }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
THINKING = (  # as Qwen 3's does: an answer without thoughts gets empty ones
    "{% for m in messages %}<|im_start|>{% if m.role == 'assistant' and '</think>' not in m.content %}<think></think>"
    "{% endif %}{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
FORGETFUL = (  # as DeepSeek-R1's does: the prompt opens thoughts that a finished conversation does not show
    "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|><think>{% endif %}"
)


@pytest.fixture
def shown(save_tokenizer, tmp_path):
    """shown(text, template, more stop tokens) -> the Completion of USER's prompt; template: a key or Jinja."""

    def make(text, template="default", stops=(258,), messages=USER, generation_config=None):
        folder, own = save_tokenizer("default" if template else None, generation_config), tmp_path / "own.jinja"
        own.write_text(template or " ")
        given = str(own) if template not in ("default", None) else None
        tokenizer = load_tokenizer(folder, chat_template=given)
        all_stops = (*tokenizer.stop_token_ids, *stops)
        return demonstration(tokenizer, messages, tokenizer.prompt_ids(messages), text, all_stops)

    return make


def test_a_turn_ends_with_the_stop_token_that_the_template_puts_there(shown):
    completion = shown("4.\n")
    # the template goes on with a new line, which the policy never writes
    assert completion.token_ids == (BYTE["4"], BYTE["."], BYTE[NEWLINE], 258)
    assert completion.sampler_logprobs == (0.0,) * 4 and not completion.drawn
    assert (completion.finish_reason, completion.text) == ("stop", "4.\n")
    later = [*USER, {"role": "assistant", "content": "4"}, {"role": "user", "content": "3+3"}]
    assert shown("6", messages=later).token_ids == (BYTE["6"], 258)  # and not the stop token of the first turn


def test_without_a_template_the_end_of_sequence_follows_the_text(shown):
    assert shown(" 4", None).token_ids == (BYTE[SPACE], BYTE["4"], 256)
    assert shown("4", None, generation_config={"eos_token_id": [256, 258]}).token_ids == (BYTE["4"], 256)


def test_a_template_may_trim_the_text_and_space_it(shown):
    assert shown(" 4\n", TRIMMING).token_ids == (BYTE[SPACE], BYTE["4"], 258)


@pytest.mark.parametrize(
    ("text", "template", "stops", "message"),
    [
        ("4<|im_end|>", "default", (258,), r"token 2 of the demonstration is '<\|im_end\|>' \(258\), at which the pol"),
        ("4\n5", "default", (258, BYTE[NEWLINE]), r"token 2 of the demonstration is 'Ċ' \(\d+\), at which the policy "),
        ("4", "default", (), r"ends the demonstration with '4' \(\d+\), '<\|im_end\|>' \(258\), 'Ċ' \(\d+\), of which "
         r"none is a token that the policy stops at \('<\|endoftext\|>' \(256\)\); add the one that ends a turn to sa"),
        ("4", THINKING, (258,), r"the chat template writes the demonstration '4' as '<think></think>4', so that the p"),
        ("4", FORGETFUL, (258,), r"token 7 of the prompt is '<' \(\d+\), and '4' \(\d+\) where the conversation is re"),
        ("4", "{% for m in messages[:1] %}<|im_start|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}!"
         "{% endif %}", (), r"token 5 of the prompt is '!' \(\d+\), and nothing where the conversation is rendered"),
    ],
    ids=["spelled", "newline", "no stop", "altered", "another prompt", "dropped"],
)  # fmt: skip
def test_what_the_policy_could_not_have_sampled_is_refused(shown, text, template, stops, message):
    with pytest.raises(DataError, match=message):
        shown(text, template, stops)


def test_thoughts_that_the_row_writes_out_are_the_templates(shown):
    ids = shown("<think></think>4", THINKING).token_ids
    assert ids == (*(BYTE[char] for char in "<think></think>4"), 258)


def test_a_token_across_the_border_of_prompt_and_text_is_not_trained(tmp_path):
    """ "assistant\\n" and " 4" render as one text in which \\n and the space are one token, which no policy that was
    given the prompt's \\n could write: it would write the space."""
    raw = Tokenizer(models.BPE(vocab=BYTE | {NEWLINE + SPACE: 256}, merges=[(NEWLINE, SPACE)]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<|im_start|>", "<|im_end|>"])  # 257, 258
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>")
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    fast.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    prompt = tokenizer.prompt_ids(USER)
    whole = tokenizer.conversation_ids(USER, " 4")
    assert prompt[-1] == BYTE[NEWLINE] and whole[len(prompt) - 1 :] == (256, BYTE["4"], 258)
    assert demonstration(tokenizer, USER, prompt, " 4", (258,)).token_ids == (BYTE[SPACE], BYTE["4"], 258)
    assert demonstration(tokenizer, USER, prompt, "4\n 4", (258,)).token_ids == (BYTE["4"], 256, BYTE["4"], 258)


def test_sentencepiece_and_its_own_control_pieces(tmp_path):
    """By sentencepiece itself: 4 is prefixed behind [/INST], as Mistral's code does, and not within a plain text."""
    shutil.copy(path_of("v3"), tmp_path / "tokenizer.model")
    peer = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    plain = load_tokenizer(tmp_path)
    prompt = plain.prompt_ids(USER)
    assert demonstration(plain, USER, prompt, " 4", plain.stop_token_ids).token_ids == (
        *peer.encode("2+2 4")[len(prompt) - 1 :], peer.eos_id()  # the prompt has <s> before it
    )  # fmt: skip
    (tmp_path / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
        "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    chat = load_tokenizer(tmp_path)
    prompt = chat.prompt_ids(USER)
    ids = demonstration(chat, USER, prompt, "4</s>", chat.stop_token_ids).token_ids
    assert ids == (*chat.text_ids("4</s>")[1:], peer.eos_id()) and ids.count(peer.eos_id()) == 1  # a row cannot stop it


def test_a_tokenizer_without_an_end_needs_exactly_one_stop_token(save_tokenizer):
    folder = save_tokenizer()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    tokenizer = load_tokenizer(folder)
    prompt = tokenizer.prompt_ids(USER)
    assert tokenizer.end_token_id is None and tokenizer.stop_token_ids == ()
    assert demonstration(tokenizer, USER, prompt, "4", (258,)).token_ids == (BYTE["4"], 258)
    for stops, found in (((), "nothing"), ((256, 258), r"'<\|endoftext\|>' \(256\), '<\|im_end\|>' \(258\)")):
        with pytest.raises(DataError, match=rf"the policy stops at {found}: no one token ends a demonstration; give"):
            demonstration(tokenizer, USER, prompt, "4", stops)
