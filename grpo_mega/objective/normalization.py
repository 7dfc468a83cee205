"""How token losses become one number: loss = sum_t w_t * loss_t / D, with w_t and D known before the forward.

Four papers, four averages. With |o_i| the counted tokens of completion i, q its prompt, and G_q the completions of q
that count:

    name          w_t, for t in o_i          D: a count over the global batch     source
    sequence      1 / (G_q |o_i|)            prompts with a counted completion    DeepSeekMath, arXiv:2402.03300, eq. 3
    group_token   1 / sum_{i in q} |o_i|     prompts with a counted completion    DAPO, arXiv:2503.14476, eq. 8
    token         1                          counted tokens                       verl's and TRL's reading of DAPO
    constant      1 / max_completion_tokens  counted completions                  Dr. GRPO, arXiv:2503.20783

What counts is a matter of lengths alone. A group whose advantages are all zero still counts: leaving it out would
multiply the learning rate by how often the policy is of two minds. Dr. GRPO also drops the division by std; that
belongs to the advantages and is not done here.
"""

from __future__ import annotations

from collections.abc import Sequence

from grpo_mega.errors import ConfigError

NORMALIZATIONS = ("sequence", "group_token", "token", "constant")


def completion_weights(
    name: str, lengths: Sequence[Sequence[int]], max_completion_tokens: int
) -> tuple[list[list[float]], int]:
    """w of each completion (the same for all its tokens) and what these prompts add to the denominator D.

    lengths[q][i] = |o_i| in tokens, the sampled end-of-sequence token included; 0 for a completion that must not count.
    Returns weights of the same nesting, 0.0 where the length is 0, and an integer: the sum over data-parallel ranks of
    that integer is D. Whole groups are on one rank, so the weights need no communication.

    Raises ConfigError for an unknown name, a negative length, or one beyond max_completion_tokens.
    """
    if name not in NORMALIZATIONS:
        raise ConfigError(f"grpo.normalization={name!r} is unknown; use one of {', '.join(NORMALIZATIONS)}")
    _check_lengths(lengths, max_completion_tokens)
    weights = [[_weight(name, n, group, max_completion_tokens) if n else 0.0 for n in group] for group in lengths]
    if name == "token":
        return weights, sum(map(sum, lengths))
    if name == "constant":
        return weights, sum(n > 0 for group in lengths for n in group)
    return weights, sum(any(group) for group in lengths)


def _weight(name: str, length: int, group: Sequence[int], max_completion_tokens: int) -> float:
    match name:
        case "sequence":
            return 1.0 / (sum(n > 0 for n in group) * length)
        case "group_token":
            return 1.0 / sum(group)
        case "constant":
            return 1.0 / max_completion_tokens
        case _:
            return 1.0


def _check_lengths(lengths: Sequence[Sequence[int]], max_completion_tokens: int) -> None:
    for prompt, group in enumerate(lengths):
        for completion, length in enumerate(group):
            if not 0 <= length <= max_completion_tokens:
                raise ConfigError(
                    f"completion {completion} of prompt {prompt} has length {length}; lengths go from 0 (does not "
                    f"count) to sampling.max_completion_tokens={max_completion_tokens}"
                )
