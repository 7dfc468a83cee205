"""Conversations as rows: which tokens are scored, what a group shares, and where its scores are found again."""

from __future__ import annotations

import pytest
import torch

from grpo_mega.data.conversations import Reader, Reading, samples_of, separator_token
from grpo_mega.data.packing import bundle_rows, pack
from grpo_mega.errors import DataError


class Letters:
    """A token a letter; <s> before a text, and a conversation is question|answer."""

    chat_template = None

    def __init__(self):
        self.special_tokens = {"<s>": 0}

    def text_ids(self, text):
        return (0, *map(ord, text))

    def conversation_ids(self, messages, answer):
        return self.text_ids(f"{messages[-1]['content']}|{answer}.")


MESSAGES = ({"role": "user", "content": "a#b"},)


def test_the_last_token_that_is_no_padding_is_scored():
    reader = Reader(Letters(), 10)
    assert reader.whole(MESSAGES, "c") == Reading((0, *b"a#b|c."), (6,))
    assert Reader(Letters(), 10, pad=ord(".")).whole(MESSAGES, "c.") == Reading((0, *b"a#b|c"), (5,))
    with pytest.raises(DataError, match="the conversation has 11 tokens, more than the 10 of the reward model"):
        reader.whole(MESSAGES, "c" * 5)


def test_steps_are_scored_at_their_separators():
    """The prompt's own separator is none of them."""
    reader = Reader(Letters(), 20, separator="#")
    assert reader.steps(MESSAGES, ["c", "de"]) == Reading((0, *b"a#b|c#de#"), (6, 9))
    with pytest.raises(DataError, match="the completion holds the separator '#'"):
        reader.steps(MESSAGES, ["c#", "d"])
    assert separator_token(Letters(), "<s>") == 0
    with pytest.raises(DataError, match="separator='ab' is 2 tokens"):
        separator_token(Letters(), "ab")


def test_a_group_shares_what_all_begin_with_up_to_the_first_score():
    """Common are a, b; the second reading scores b already, whose row then is each one's own."""
    common = samples_of([(0, 7, Reading((1, 2, 3, 4), (3,))), (1, 7, Reading((1, 2, 3, 5, 6), (4,)))])
    assert [sample.prompt_tokens for sample in common] == [3, 3]
    assert bundle_rows(common) == 2 + 2 + 3  # two shared, then token 3 and what follows, of each
    scored = samples_of([(0, 7, Reading((1, 2, 3, 4), (3,))), (1, 7, Reading((1, 2, 3, 5), (1, 3)))])
    assert [sample.prompt_tokens for sample in scored] == [2, 2]
    alike = samples_of([(0, 7, Reading((1, 2), (1,))), (1, 7, Reading((1, 2), (1,)))])
    assert [sample.prompt_tokens for sample in alike] == [2, 2] and bundle_rows(alike) == 3
    apart = samples_of([(0, 1, Reading((1, 2), (1,))), (1, 2, Reading((3,), (0,)))])
    assert [sample.prompt_tokens for sample in apart] == [2, 1]


def test_scored_rows_read_the_scored_tokens_and_carry_their_slot():
    readings = [(0, 7, Reading((1, 2, 3, 4), (1, 3))), (2, 7, Reading((1, 2, 9), (2,))), (3, 8, Reading((5,), (0,)))]
    one, two, three = samples_of(readings)
    batch = pack([[one, two], [three]], 12, scale=1.0, dtype=torch.float64, device="cpu")
    rows = batch.loss_weights.nonzero().squeeze(1)
    assert batch.input_ids[rows].tolist() == [2, 4, 9, 5]
    assert batch.advantages[rows].tolist() == [0, 0, 2, 3]
    assert batch.position_ids[rows].tolist() == [1, 3, 2, 0]
