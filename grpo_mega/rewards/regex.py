"""The `regex` reward: 1.0 if the completion matches a pattern, or if a group of the last match equals the answer.

Python's `re`, which backtracks: "(a+)+b" over a long run of a's takes for ever, within one C call. So the match runs
under `rewards/bounded`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from grpo_mega.config.reward import RegexOptions
from grpo_mega.errors import RewardError
from grpo_mega.rewards.bounded import bounded


def regex(options: RegexOptions) -> Callable[[str, str | None, Mapping[str, Any]], float]:
    """The reward function; it raises RewardError where a group must equal an answer and there is none, BoundedError
    when a match takes longer than `options.time_limit`."""
    find = bounded(f"{__name__}:last_match")

    def score(completion: str, answer: str | None, row: Mapping[str, Any]) -> float:
        if options.group is not None and answer is None:
            raise RewardError("the prompt has no reference answer for regex's group; check data.answer_field")
        groups = find(options.time_limit, options.pattern, options.match == "fullmatch", options.group, completion)
        if groups is None or options.group is None:
            return float(groups is not None)
        return float(groups[0] is not None and groups[0].strip() == str(answer).strip())

    return score


def vote(
    options: RegexOptions, completion: str, answer: str | None, row: Mapping[str, Any]
) -> tuple[Hashable, str] | None:
    """The text of the group that is compared with the answer, twice; None if nothing matches. Raises BoundedError."""
    find = bounded(f"{__name__}:last_match")
    groups = find(options.time_limit, options.pattern, options.match == "fullmatch", options.group, completion)
    found = groups[0].strip() if groups is not None and groups[0] is not None else ""
    return (found, found) if found else None


def last_match(pattern: str, whole: bool, group: int | str | None, text: str) -> list[str | None] | None:
    """[the group's text] of the last match, in reading order, or of the match of the whole text; None if there is none.

    The last one: of several candidates only the final one can be paid. Without a group the first match decides.
    """
    compiled = re.compile(pattern)
    match = None
    if whole:
        match = compiled.fullmatch(text)
    else:
        for match in compiled.finditer(text):  # noqa: B007
            if group is None:
                break
    return None if match is None else [match.group(group or 0)]
