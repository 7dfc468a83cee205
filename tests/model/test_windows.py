"""Windows in every kind of rows, forward and gradient, against a masked softmax of all pairs in float64."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import families
import pytest
import torch

from grpo_mega.model.families import architecture_of
from grpo_mega.parallel.context import places_of
from grpo_mega.parallel.mesh import initialize

HEADS, KV_HEADS, WIDTH = 6, 2, 4
# a sequence, two that share a prompt of nine rows, one row alone, a prompt of two with three that go on from it
LENGTHS = (7, 9, 4, 6, 1, 2, 11, 3, 1)
PREFIXES = (-1, -1, 1, 1, -1, -1, 5, 5, 5)
ROWS = 48  # four of them padding
WINDOWS = (None, 1, 2, 3, 5, 9, 10, 12, 100)


def rows_of(seed=0):
    """query, key, value and the loss's weights on the context: [ROWS, heads, WIDTH] each."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return [torch.randn(ROWS, heads, WIDTH, generator=generator, dtype=torch.float64) for heads in shapes]


def oracle(window):
    """[context, gradient of query, of key, of value], each pair of rows judged by the definition."""
    query, key, value, weights = rows_of()
    leaves = [x.requires_grad_() for x in (query, key, value)]
    places = []  # of each row: its segment and its position, counted through the prefix
    for segment, (length, prefix) in enumerate(zip(LENGTHS, PREFIXES, strict=True)):
        begin = LENGTHS[prefix] if prefix >= 0 else 0
        places += [(segment, begin + n) for n in range(length)]
    context = torch.zeros_like(query)
    for row, (segment, position) in enumerate(places):
        seen = [
            other
            for other, (theirs, before) in enumerate(places)
            if theirs in (segment, PREFIXES[segment]) and 0 <= position - before < (window or ROWS)
        ]
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            scores = key[seen, group] @ query[row, head] / WIDTH**0.5
            context[row, head] = scores.softmax(dim=0) @ value[seen, group]
    (context * weights).sum().backward()
    return [context.detach(), *(x.grad for x in leaves)]


# ---- on the ranks


def attended(windows, size, block):
    """[which rows, context and gradients of this rank's rows] for each window; a context rank of `size`, or alone."""
    with mock.patch("grpo_mega.model.attention.BLOCK", block), mock.patch("grpo_mega.model.context.BLOCK", block):
        mesh = initialize(context=size)
        return [one(window, mesh.context) for window in windows]


def one(window, axis):
    from grpo_mega.model.attention import PackedRows
    from grpo_mega.model.context import ContextRows

    mine = places_of(ROWS, axis)
    query, key, value, weights = (x[mine] for x in rows_of())
    leaves = [x.requires_grad_() for x in (query, key, value)]
    rows = (
        ContextRows(None, None, LENGTHS, PREFIXES, axis) if axis.size > 1 else PackedRows(None, None, LENGTHS, PREFIXES)
    )
    context = rows.attend(1, *leaves, window)
    (context * weights).sum().backward()
    return mine, [context.detach(), *(x.grad for x in leaves)]


def fast_path_only(windows):
    """Whether rows that a window reaches over go the way of rows without one: no mask is made."""
    from grpo_mega.model.attention import PackedRows

    query, key, value, _ = rows_of()
    with mock.patch("grpo_mega.model.attention._band", side_effect=AssertionError("a mask")):
        found = [PackedRows(None, None, (20, 24)).attend(1, query, key, value, window) for window in windows]
    return all(torch.equal(each, found[0]) for each in found)


# ---- in the parent


@pytest.mark.parametrize(("size", "block"), [(1, 1024), (1, 4), (2, 1024), (2, 4)])
def test_a_row_sees_its_window_and_nothing_else(ranks, size, block):
    by_rank = ranks(size, attended, WINDOWS, size, block)
    for n, window in enumerate(WINDOWS):
        wanted = oracle(window)
        for rank in by_rank:
            mine, found = rank[n]
            for what, mine_of_it, whole in zip(("context", "query", "key", "value"), found, wanted, strict=True):
                assert (mine_of_it - whole[mine]).abs().max() <= 1e-12, (window, what)
        told = wanted[3:] if window == 1 else wanted  # a row that sees itself alone does not ask for its key
        assert all(tensor.abs().max() > 0.1 for tensor in told)


def test_every_window_is_another_attention():
    contexts = [oracle(window)[0] for window in WINDOWS]
    for n, context in enumerate(contexts[:-1]):
        same = n == 0  # a window of 100 reaches over everything
        assert torch.equal(context, contexts[-1]) == same, WINDOWS[n]


def test_a_window_over_everything_costs_nothing(ranks):
    assert ranks(1, fast_path_only, (None, 24, 1000)) == [True]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mistral", {}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 9}),
        ("mixtral", {}),
        ("mixtral", {"sliding_window": 9}),
        ("qwen2", {"sliding_window": 9, "max_window_layers": 1}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
        ("qwen2", {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"] * 2}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
        ("qwen3_moe", {"sliding_window": 9, "max_window_layers": 1}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    ],
)
def test_windows_are_read_as_transformers_reads_them(name, settings):
    import transformers

    kind, others = families.MODELS[name]
    raw = families.COMMON | others | {"num_hidden_layers": 4, "architectures": [f"{kind}ForCausalLM"]}
    raw.pop("sliding_window", None)
    arch = architecture_of(raw | settings, Path("folder"))
    config = getattr(transformers, f"{kind}Config")(**raw | settings)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * 4
    wanted = [config.sliding_window if each == "sliding_attention" else None for each in kinds]
    assert [arch.window(layer) for layer in range(4)] == wanted
