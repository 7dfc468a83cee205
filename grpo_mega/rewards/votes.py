"""Which completions of a problem are correct, and what each of the others votes for: what pass@k and maj@k count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from grpo_mega.config.reward import OPTIONS, PartConfig
from grpo_mega.rewards import exact, math_verify, reasoning_gym, regex
from grpo_mega.rewards.bounded import BoundedError
from grpo_mega.types import Group

# (texts of a problem's completions, its reference answer, its row) -> the answer that each votes for, in the words of
# the first with an equal one; None: it has none, and does not vote
Voter = Callable[[Sequence[str], str | None, Mapping[str, Any]], list[str | None]]
CORRECT = 1.0  # the value of the deciding part from which on a completion is correct


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one problem's completions: which are correct, and the answers that the others vote for (None: no vote).

    Correct ones vote for the right answer, however they write it.
    """

    correct: tuple[bool, ...]
    votes: tuple[str | None, ...]

    @property
    def counts(self) -> tuple[int, tuple[int, ...], int]:
        """Completions that are correct; with each of the wrong answers, most first; without an answer."""
        wrong = [vote for right, vote in zip(self.correct, self.votes, strict=True) if not right]
        others = Counter(vote for vote in wrong if vote is not None)
        return sum(self.correct), tuple(sorted(others.values(), reverse=True)), wrong.count(None)


def voter(part: PartConfig) -> Voter:
    """How completions vote where this part says what is correct: by the answer that it compares with the reference.

    An answer that cannot be read within the part's time limit does not vote.
    """
    assert part.function is not None, "a model's score finds no answer"
    options: Any = OPTIONS[part.function].model_validate(part.options)
    if part.function == "math_verify":
        return lambda texts, answer, row: math_verify.votes(options, texts)
    if part.function == "regex":
        return partial(_one_by_one, partial(regex.vote, options))
    return partial(_one_by_one, {"exact": exact.vote, "reasoning_gym": reasoning_gym.vote}[part.function])


def _one_by_one(
    one: Callable[..., tuple[Hashable, str] | None], texts: Sequence[str], answer: str | None, row: Mapping[str, Any]
) -> list[str | None]:
    words: dict[Hashable, str] = {}
    result: list[str | None] = []
    for text in texts:
        try:
            found = one(text, answer, row)
        except BoundedError:
            found = None
        result.append(None if found is None else words.setdefault(*found))
    return result


def judge(group: Group, name: str | None, vote: Voter | None) -> Verdict:
    """The verdict about a scored group by the reward's part `name` (None: no completion is called correct).

    A completion is correct from a value of CORRECT on. One whose part failed, or was not asked (cut by the length limit
    under `reward.truncated: penalize`), is not, and does not vote. vote None: nobody votes.
    """
    values = [dict(rollout.parts).get(name) if name is not None else None for rollout in group.rollouts]
    correct = tuple(value is not None and value >= CORRECT for value in values)
    votes: list[str | None] = [None] * len(values)
    wrong = [n for n, value in enumerate(values) if value is not None and value < CORRECT]
    if vote is not None and wrong:
        texts = [group.rollouts[n].completion.text for n in wrong]
        for n, word in zip(wrong, vote(texts, group.prompt.answer, group.prompt.row), strict=True):
            votes[n] = word
    return Verdict(correct, tuple(votes))
