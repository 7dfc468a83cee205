"""Marks in the text -> tokens, with tokens that hold a byte, a piece of a mark, or several of them."""

from __future__ import annotations

from itertools import pairwise

import pytest

from grpo_mega.rewards.steps import Marks, steps_of
from grpo_mega.types import Completion


def of_pieces(*pieces, delimiter="\n", stop=True, **marks):
    """Token i is piece i; the stop token, which has no text, is the last."""

    def decode(ids):
        return b"".join(p if isinstance(p, bytes) else p.encode() for i in ids for p in (pieces[i],)).decode(
            errors="replace"
        )

    pieces = (*pieces, "") if stop else pieces
    ids = tuple(range(len(pieces)))
    completion = Completion(ids, (0.0,) * len(ids), "stop", decode(ids))
    return steps_of(completion, Marks(decode, **(marks or {"delimiter": delimiter})))


@pytest.mark.parametrize(
    ("pieces", "delimiter", "texts", "ends"),
    [
        (("a", "\n", "b", "\n", "c"), "\n", ["a\n", "b\n", "c"], [1, 3, 5]),
        (("a\n", "b\nc"), "\n", ["a\n", "b\n", "c"], [0, 1, 2]),  # a mark in the middle of a token
        (("a\nb\nc", "d"), "\n", ["a\n", "b\ncd"], [0, 2]),  # a token that holds two ends one step
        (("a\n\n", "b"), "\n", ["a\n\n", "b"], [0, 2]),  # several marks are one
        (("a\n", " \n", "b"), "\n", ["a\n \n", "b"], [1, 3]),  # and blank text between them
        (("\n", "a", "\n", "b"), "\n", ["\na\n", "b"], [2, 4]),  # nothing was said before the first
        (("a", "\n", "b", "\n"), "\n", ["a\n", "b\n"], [1, 4]),  # nor after the last: the stop token is its step's
        (("a", "b"), "\n", ["ab"], [2]),
        (("a", "\n", "\n", "b"), "\n\n", ["a\n\n", "b"], [2, 4]),  # the mark is whole with its second token
        (("a<", "st", "ep>", "b"), "<step>", ["a<step>", "b"], [2, 4]),
        (("é", b"\xe2\x82", b"\xac\n", "b"), "\n", ["é€\n", "b"], [2, 4]),  # a character in two tokens
        ((b"\xf0", b"\x9f", b"\x98", b"\x80", "\n", "b"), "\n", ["😀\n", "b"], [4, 6]),  # ... in four
        (("", ""), "\n", [""], [2]),
    ],
)
def test_by_hand(pieces, delimiter, texts, ends):
    assert of_pieces(*pieces, delimiter=delimiter) == (texts, ends)


def test_steps_of_so_many_tokens():
    assert of_pieces("a", "b", "c", "d", every=2) == (["ab", "cd", ""], [1, 3, 4])
    assert of_pieces("a", "b", "c", stop=False, every=2) == (["ab", "c"], [1, 2])
    assert of_pieces("a", stop=False, every=2) == (["a"], [0])


def test_a_completion_that_was_cut_ends_with_its_last_token():
    assert of_pieces("a", "\n", "b", stop=False) == (["a\n", "b"], [1, 2])
    assert of_pieces("a", "\n", stop=False) == (["a\n"], [1])


def test_steps_of_a_byte_tokenizer_at_random():
    import random

    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choice("ab\n é€😀") for _ in range(rng.randrange(30)))
        raw = text.encode()
        cuts = sorted({0, len(raw), *(rng.randrange(len(raw) + 1) for _ in range(8))})
        pieces = [raw[a:b] for a, b in pairwise(cuts)] or [b""]
        texts, ends = of_pieces(*pieces)
        assert "".join(texts) == text and len(texts) == len(ends)
        assert ends == sorted(set(ends)) and ends[-1] == len(pieces)
        for step, end in zip(texts[:-1], ends[:-1], strict=True):  # what the tokens up to the end hold begins with it
            head = text[: text.index(step) + len(step)] if texts.count(step) == 1 else ""
            assert b"".join(pieces[: end + 1]).decode(errors="replace").startswith(head)
