"""Rollouts of a step or of an evaluation as Parquet, a row a completion: for pandas, datasets, duckdb and others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from grpo_mega.rewards.votes import Verdict
from grpo_mega.types import Group

# rewards is a list of pairs, not a map: Hugging Face's datasets know no map
_BEFORE = {
    "step": pa.int64(),  # the first is 1
    "prompt_index": pa.int64(),  # position in the endless prompt stream; -1, -2, ... of held-out problems
    "completion": pa.int32(),  # its number in the group
    "prompt": pa.string(),
    "messages": pa.string(),  # the conversation that prompt_token_ids render, {role, content} each, as JSON
    "prompt_token_ids": pa.list_(pa.int32()),
    "text": pa.string(),  # the completion's
    "token_ids": pa.list_(pa.int32()),  # with the stop token, if it was sampled
    "sampler_logprobs": pa.list_(pa.float64()),  # ln q of each token, nats
    "finish_reason": pa.string(),  # stop, length
    "answer": pa.string(),
    "reward": pa.float64(),
    "rewards": pa.list_(pa.struct({"name": pa.string(), "value": pa.float64()})),  # the parts, not yet weighted
}
_BEHIND = {
    "error": pa.string(),  # of the reward function
    "near_boundary": pa.int32(),  # draws that rounding could have decided otherwise
}
SCHEMA = pa.schema(
    {
        **_BEFORE,
        "advantage": pa.float64(),  # of the first token; before a KL penalty in the reward; null: not trained on
        "steps": pa.list_(pa.struct({"end": pa.int32(), "reward": pa.float64()})),  # of process supervision
        "counts": pa.bool_(),  # false: no part in the loss
        **_BEHIND,
    }
)
OF_EVALUATION = pa.schema(
    {
        **_BEFORE,
        "correct": pa.bool_(),
        "vote": pa.string(),  # of a wrong one: the answer that it votes for under maj@k; null: it has no vote
        **_BEHIND,
    }
)


def rollout_bytes(step: int, groups: Sequence[Group]) -> bytes:
    """The file of one step, rows in the order of the groups and their rollouts."""
    return _file(SCHEMA, [row for group in groups for row in _trained(step, group)])


def evaluation_bytes(step: int, groups: Sequence[Group], verdicts: Sequence[Verdict]) -> bytes:
    """The file of an evaluation, rows in the order of the problems and their completions."""
    rows = [
        {**row, "correct": correct, "vote": _text(vote)}
        for group, verdict in zip(groups, verdicts, strict=True)
        for row, correct, vote in zip(_rows(step, group), verdict.correct, verdict.votes, strict=True)
    ]
    return _file(OF_EVALUATION, rows)


def _file(schema: pa.Schema, rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _trained(step: int, group: Group) -> list[dict[str, Any]]:
    return [
        {
            **row,
            "advantage": rollout.advantage[0] if isinstance(rollout.advantage, tuple) else rollout.advantage,
            "steps": [{"end": end, "reward": reward} for end, reward in rollout.steps],
            "counts": rollout.counts,
        }
        for row, rollout in zip(_rows(step, group), group.rollouts, strict=True)
    ]


def _rows(step: int, group: Group) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "prompt_index": group.prompt.index,
            "completion": number,
            "prompt": _text(group.prompt.text),
            "messages": json.dumps(group.prompt.messages),
            "prompt_token_ids": group.prompt.token_ids,
            "text": _text(rollout.completion.text),
            "token_ids": rollout.completion.token_ids,
            "sampler_logprobs": rollout.completion.sampler_logprobs,
            "finish_reason": rollout.completion.finish_reason,
            "answer": _text(group.prompt.answer),
            "reward": rollout.reward,
            "rewards": [{"name": name, "value": value} for name, value in rollout.parts],
            "error": _text(rollout.error),
            "near_boundary": rollout.completion.near_boundary,
        }
        for number, rollout in enumerate(group.rollouts)
    ]


def _text(text: str | None) -> str | None:
    """With ? for half a surrogate pair, which a JSON file or an exception can hold and UTF-8 cannot."""
    return None if text is None else text.encode("utf-8", "replace").decode("utf-8")
