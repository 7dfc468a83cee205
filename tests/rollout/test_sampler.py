"""Sampling on the training weights: the same completions under every layout, with the trainer's own log-probs.

The oracle is transformers in one process: given what a row has drawn so far, its next token is where the row's uniform
number falls in the cumulative distribution of transformers' logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import tiny
import torch
from families import make_family

from grpo_mega.config import ParallelConfig
from grpo_mega.data.packing import pack
from grpo_mega.parallel.collectives import max_int
from grpo_mega.parallel.mesh import initialize, temporary_groups
from grpo_mega.rollout.noise import uniforms
from grpo_mega.types import Prompt, Sample

SEED, STEP, GROUP, LONGEST = 20, 3, 3, 10
STOP = range(0, tiny.VOCABULARY, 8)  # about one token in eight ends a row
LENGTHS = (1, 7, 3, 12, 5)


@dataclass(frozen=True)
class Case:
    model: str = "tied"
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence: bool = False
    stages: tuple[int, ...] | None = None
    temperature: float = 1.0
    max_rows: int = 100
    order: tuple[int, ...] = (0, 1, 2, 3, 4)  # of the prompts
    top_k: int = 0
    top_p: float = 1.0
    own: tuple[int, ...] | None = None  # tensor, pipeline (and expert) ranks of a copy to sample from
    expert: int = 1
    expert_tensor: int | None = None
    virtual: int = 1
    context: int = 1  # ranks that are data ranks in sampling

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def what(self) -> Case:
        """The case without its layout: what one process would do."""
        return Case(self.model, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


K, P, BOTH = {"top_k": 5}, {"top_p": 0.8, "temperature": 0.7}, {"top_k": 20, "top_p": 0.6}
CASES = (
    Case(),
    Case(temperature=0.7),
    Case(**K),
    Case(**P),
    Case(**BOTH),
    Case("few"),
    Case(top_k=1),  # greedy
    Case(max_rows=2, order=(4, 2, 0, 1, 3)),  # less than a group
    Case(max_rows=3, order=(4, 2, 0, 1, 3)),  # one prompt a wave
    Case(max_rows=7, order=(3, 0, 4, 1, 2)),  # two, two and one
    Case(tensor=2),
    Case(tensor=2, temperature=0.7),
    Case(tensor=2, sequence=True),
    Case(pipeline=2),
    Case(pipeline=2, max_rows=7, order=(3, 0, 4, 1, 2), temperature=0.7),
    Case(pipeline=2, max_rows=2),
    Case(data=2),
    Case(tensor=3),
    Case(pipeline=3, stages=(1, 3, 1)),
    Case("few", tensor=4),
    Case(tensor=2, pipeline=2),
    Case(tensor=2, pipeline=2, sequence=True, max_rows=7),
    Case(pipeline=2, data=2),
    Case(tensor=2, **K),
    Case(tensor=3, **P),
    Case(pipeline=2, **BOTH),
    Case(tensor=2, pipeline=2, max_rows=7, **BOTH),
    Case(pipeline=2, own=(1, 1)),
    Case(tensor=2, own=(1, 1), **P),
    Case(pipeline=2, own=(2, 1), max_rows=7, order=(3, 0, 4, 1, 2)),
    Case(data=2, own=(2, 1)),
    Case(pipeline=3, stages=(1, 3, 1), own=(1, 1), temperature=0.7),
    Case(tensor=2, pipeline=2, own=(1, 1)),
    Case("few", tensor=2, data=2, own=(4, 1)),
    Case(tensor=2, sequence=True, data=2, own=(1, 2), **BOTH),
    Case(data=4, own=(2, 2)),
    Case(pipeline=2, virtual=2),
    Case(context=2),
    Case(pipeline=2, virtual=2, stages=(1, 2, 1, 1), own=(2, 1), temperature=0.7),
    Case(tensor=2, context=2, sequence=True),
    Case(pipeline=2, virtual=2, context=2, max_rows=7, order=(3, 0, 4, 1, 2), **BOTH),
    Case("mixture"),
    Case("mixture", data=2, expert=2),  # three prompts and two
    Case("mixture", data=2, expert=2, max_rows=3),  # three waves and two
    Case("mixture", data=2, expert_tensor=2, order=(3, 0, 4, 1, 2)),
    Case("mixture", tensor=2, expert=2, expert_tensor=1),
    Case("mixture", data=2, expert=2, own=(2, 1, 1)),
    Case("mixture", tensor=2, sequence=True, own=(1, 1, 2)),
    Case("mixture", pipeline=2, data=2, expert=2, max_rows=7),
    Case("mixture", tensor=2, data=2, sequence=True, expert=2),
    Case("mixture", data=4, expert=4, order=(3, 0, 4, 1, 2)),
    Case("windows"),
    Case("windows", tensor=2, sequence=True),
    Case("windows", pipeline=2, max_rows=7, order=(3, 0, 4, 1, 2)),
    Case("windows", context=2),
    Case("latent"),
    Case("latent", tensor=2),
    Case("latent", tensor=2, sequence=True, own=(1, 1, 2)),
    Case("latent", pipeline=2, stages=(1, 2)),
    Case("latent", data=2, expert=2, max_rows=3),
    Case("latent", context=2, own=(2, 1)),
)


def prompts():
    generator = torch.Generator().manual_seed(2)
    return [
        Prompt(index, "", tuple(torch.randint(tiny.VOCABULARY, (length,), generator=generator).tolist()))
        for index, length in zip((-1, 0, 5, 6, 40), LENGTHS, strict=True)
    ]


# ---- on the ranks


def sampled(folders, cases, dtype):
    return [sample(folders[case.model], case, dtype) for case in cases]


@temporary_groups()
def sample(folder, case, dtype):
    """{prompt index: completions}, the trainer's log-probs of them (last stage), and the rows of every forward."""
    from megatron.core import parallel_state

    from grpo_mega.model.build import build_model
    from grpo_mega.model.copy import WeightCopy
    from grpo_mega.model.decode import Decoder
    from grpo_mega.model.families import read_architecture
    from grpo_mega.model.layout import layers_per_stage
    from grpo_mega.parallel.mesh import another_layout
    from grpo_mega.parallel.truncation import Truncation
    from grpo_mega.rollout.in_process import InProcessSampler
    from grpo_mega.trainer.heads import TokenHead
    from grpo_mega.trainer.policy import Scorer

    parallel_state.destroy_model_parallel()  # of the case before
    arch = read_architecture(folder)
    parallel = ParallelConfig(
        tensor=case.tensor, pipeline=case.pipeline, virtual_pipeline=case.virtual, context=case.context,
        sequence=case.sequence, pipeline_layout=case.stages, expert=case.expert, expert_tensor=case.expert_tensor,
    )  # fmt: skip
    mesh = initialize(**parallel.sizes)
    model = build_model(arch, mesh, parallel, dtype=dtype).eval()
    current, weights = mesh, lambda: model
    if case.own:
        layout = ParallelConfig(**dict(zip(("tensor", "pipeline", "expert"), case.own, strict=False)))
        current = another_layout(mesh, **layout.sizes)
        with current.active():
            copy = build_model(arch, current, layout, dtype=dtype, loaded=False).eval()
        stages = [layers_per_stage(arch, p.stages, p.pipeline_layout) for p in (parallel, layout)]
        weights = WeightCopy(arch, (model, mesh, stages[0]), (copy, current, stages[1])).refresh
    elif case.context > 1:
        current = another_layout(mesh, **parallel.sizes | {"context": 1})
    rows = []
    counter = model[0].register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].numel()))
    truncation = Truncation.of(case.top_k, case.top_p)
    sampler = InProcessSampler(
        lambda: Decoder(weights(), arch.vocab_size, current, case.temperature, truncation=truncation),
        current,
        seed=SEED,
        max_completion_tokens=LONGEST,
        stop_token_ids=STOP,
        max_rows=case.max_rows,
        decode=lambda ids: " ".join(map(str, ids)),
        routes=current is not mesh,
    )
    everything = [prompts()[place] for place in case.order]
    places = mesh.share(len(everything))
    groups = sampler.sample(everything, places, GROUP, STEP)
    mine = [everything[place] for place in places]
    counter.remove()
    batches = [
        pack([bundle(*pair)], 64, scale=1.0, dtype=dtype, device="cpu") for pair in zip(mine, groups, strict=True)
    ]
    # a mixture's ranks score equally many, an interleaved pipeline whole rounds, as the trainer's do
    count = -(-max_int(len(batches), mesh.data.group) // case.pipeline) * case.pipeline
    batches += [pack([], 64, scale=1.0, dtype=dtype, device="cpu")] * (count - len(batches))
    scores = Scorer(TokenHead(model, arch.vocab_size, mesh, case.temperature)).logprobs(batches)
    scores = [s if s is None else s[b.loss_weights != 0].tolist() for s, b in zip(scores, batches, strict=True)]
    scores = scores[: len(mine)]
    return {
        "groups": {prompt.index: group for prompt, group in zip(mine, groups, strict=True)},
        "scores": scores if mesh.pipeline.last else None,
        "rows": rows,
    }


def bundle(prompt, group):
    """The group as training samples that share their prompt."""
    n = len(prompt.token_ids)
    return [
        Sample(
            order=i, group=0, prompt_tokens=n, token_ids=prompt.token_ids + c.token_ids, advantage=1.0, weight=1.0,
            loss_mask=(False,) * n + (True,) * len(c.token_ids), sampler_logprobs=(0.0,) * n + c.sampler_logprobs,
            kept=c.kept,
        )
        for i, c in enumerate(group)
    ]  # fmt: skip


# ---- in the parent


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    few = tiny.make_model(root / "few", tied=False, num_key_value_heads=2)  # fewer than tensor ranks
    mixture = tiny.make_model(root / "mixture", tied=False, num_local_experts=4, intermediate_size=32)
    windows = make_family(root / "windows", "gemma3", sliding_window=4)  # shorter than prompts and than completions
    latent = make_family(root / "latent", "deepseek_v3", initializer_range=0.2)
    more = {"mixture": mixture, "windows": windows, "latent": latent}
    return {"tied": tiny.make_model(root / "tied"), "few": few, **more}


DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 3e-5)], ids=["fp64", "fp32"]
)
_ALONE = {}


@pytest.fixture
def alone(ranks, folders, dtype):
    """What one process samples: {case: answer}."""
    if dtype not in _ALONE:
        cases = [case for case in CASES if case.world == 1]
        _ALONE[dtype] = dict(zip(cases, ranks(1, sampled, folders, cases, dtype)[0], strict=True))
    return _ALONE[dtype]


@DTYPES
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_no_layout_changes_a_completion(ranks, folders, alone, world, dtype, tolerance):
    """Token by token, for every layout, size of wave and order of prompts; and the trainer's log-probs are theirs."""
    cases = [case for case in CASES if case.world == world]
    by_rank = [list(alone.values())] if world == 1 else ranks(world, sampled, folders, cases, dtype, timeout=150)
    for n, case in enumerate(cases):
        wanted = alone[case.what]["groups"]
        seen = set()
        for rank in by_rank:
            answer = rank[n]
            for index, group in answer["groups"].items():
                same(group, wanted[index], tolerance, case)
            seen |= set(answer["groups"])
            if answer["scores"] is not None:
                for scores, group in zip(answer["scores"], answer["groups"].values(), strict=True):
                    theirs = [lp for completion in group for lp in completion.sampler_logprobs]
                    assert theirs == pytest.approx(scores, abs=tolerance), case
        assert seen == {prompt.index for prompt in prompts()}


def same(group, wanted, tolerance, case):
    for mine, theirs in zip(group, wanted, strict=True):
        assert mine.token_ids == theirs.token_ids, case
        models = ("tied", "few", "mixture", "windows", "latent")
        untruncated = (*map(Case, models), Case(temperature=0.7))
        assert (mine.kept is None) == (theirs.kept is None) == (case.what in untruncated)
        for sets in zip(mine.kept or (), theirs.kept or (), strict=True):
            assert sets[0].tolist() == sets[1].tolist(), case
        assert mine.sampler_logprobs == pytest.approx(theirs.sampler_logprobs, abs=tolerance), case
        assert (mine.finish_reason, mine.text) == (theirs.finish_reason, theirs.text)


@DTYPES
def test_tokens_are_where_their_uniform_falls_in_transformers_distribution(alone, folders, dtype, tolerance):
    from transformers import AutoModelForCausalLM

    for case in (
        Case(),
        Case(temperature=0.7),
        Case("few"),
        Case("windows"),
        Case(**K),
        Case(**P),
        Case(**BOTH),
        Case(top_k=1),
    ):
        model = AutoModelForCausalLM.from_pretrained(folders[case.model]).double()
        for prompt in prompts():
            for number, completion in enumerate(alone[case]["groups"][prompt.index]):
                ids = torch.tensor(prompt.token_ids + completion.token_ids)
                with torch.no_grad():
                    logits = model(ids[None, :-1]).logits[0, len(prompt.token_ids) - 1 :]
                logits = truncated(logits / case.temperature, case)
                logp = torch.log_softmax(logits, dim=1)
                noise = uniforms(SEED, STEP, prompt.index, number, LONGEST)[: len(logp), None]
                tokens = torch.searchsorted(logp.exp().cumsum(dim=1), noise, right=True)
                assert completion.token_ids == tuple(tokens[:, 0].tolist())
                if completion.kept is not None:
                    kept = [row.isfinite().nonzero()[:, 0].tolist() for row in logits]
                    assert [sets.tolist() for sets in completion.kept] == kept
                wanted = logp.gather(1, tokens)[:, 0].tolist()
                assert completion.sampler_logprobs == pytest.approx(wanted, abs=2e-5)  # its norms round to float32


def truncated(logits, case):
    """-inf where top-k, then top-p leave a token out: sorted, as the definitions say."""
    for row in logits:
        if case.top_k:
            row[row < row.sort(descending=True).values[case.top_k - 1]] = -torch.inf
        values = row.sort(descending=True).values
        before = values.softmax(dim=0).cumsum(dim=0) - values.softmax(dim=0)  # mass of those that are likelier
        row[row < values[before < case.top_p].min()] = -torch.inf
    return logits


@DTYPES
def test_rows_end_at_a_stop_token_or_at_the_limit(alone, dtype, tolerance):
    completions = [c for group in alone[Case()]["groups"].values() for c in group]
    assert len(completions) == len(LENGTHS) * GROUP
    for completion in completions:
        *before, last = completion.token_ids
        assert not set(before) & set(STOP) and len(completion.sampler_logprobs) == len(completion.token_ids) <= LONGEST
        stopped = last in STOP
        assert completion.finish_reason == ("stop" if stopped else "length")
        assert stopped or len(completion.token_ids) == LONGEST
        assert completion.text == " ".join(map(str, completion.token_ids))  # the stop token is kept
    lengths = {len(c.token_ids) for c in completions if c.finish_reason == "stop"}
    assert min(lengths) <= 2 and max(lengths) >= 6 and any(c.finish_reason == "length" for c in completions)


@DTYPES
def test_a_prompt_runs_once_and_a_finished_row_not_at_all(alone, dtype, tolerance):
    """Rows of every forward: the wave's prompts once each, then one a row that has still a token to draw."""
    for case, wave_size in ((Case(), 5), (Case(max_rows=3, order=(4, 2, 0, 1, 3)), 1)):
        groups = list(alone[case]["groups"].values())
        prompt_rows = [LENGTHS[place] for place in case.order]
        wanted = []
        for start in range(0, 5, wave_size):
            wave = slice(start, start + wave_size)
            lengths = [len(completion.token_ids) for group in groups[wave] for completion in group]
            alive = [sum(length > step for length in lengths) for step in range(1, LONGEST)]
            wanted += [sum(prompt_rows[wave]), *filter(None, alive)]
        assert alone[case]["rows"] == wanted


# ---- the cache


def cache_against_lists(seed, window):
    """A cache through random steps and departures, against one list of positions a row; the rows that left. One of its
    layers sees the last `window` positions only."""
    from grpo_mega.model.decode import CachedRows, KVCache, PromptRows

    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    layers, kv_heads, per_group, d = (3, 4), 2, 3, 4  # a later stage's layers
    windows = {3: None, 4: window}
    chunks = [PromptRows(None, None, (3, 1)), PromptRows(None, None, (5,))]
    for chunk, rows in zip(chunks, (4, 7), strict=True):  # 7: two rows of padding
        for layer in layers:
            chunk.store[layer] = (random(rows, kv_heads, d), random(rows, kv_heads, d))
    where = {0: (0, 0, 3), 1: (0, 3, 4), 2: (1, 0, 5)}  # prompt: chunk and its rows
    prompt_of_row = [2, 0, 0, 1, 2, 0, 1]
    cache = KVCache(chunks, prompt_of_row, capacity=5 + 8)
    model = {
        row: {layer: [chunks[c].store[layer][kind][a:b] for kind in (0, 1)] for layer in layers}
        for row, (c, a, b) in enumerate(where[prompt] for prompt in prompt_of_row)
    }
    alive, left = list(model), 0
    while alive:
        cache.begin_step()
        assert cache.lengths[: cache.count].tolist() == [len(model[row][layers[0]][0]) for row in alive]
        for layer in layers:
            query, key, value = random(len(alive) + 1, kv_heads * per_group, d), *random(2, len(alive) + 1, kv_heads, d)
            context = CachedRows(None, None, cache).attend(layer, query, key, value, windows[layer])
            for slot, row in enumerate(alive):
                keys, values = (torch.cat((old, new[slot][None])) for old, new in
                                zip(model[row][layer], (key, value), strict=True))  # fmt: skip
                model[row][layer] = [keys, values]
                keys, values = (x[-(windows[layer] or len(x)) :] for x in (keys, values))
                for head in range(kv_heads * per_group):
                    scores = keys[:, head // per_group] @ query[slot, head] / d**0.5
                    wanted = torch.softmax(scores, dim=0) @ values[:, head // per_group]
                    torch.testing.assert_close(context[slot, head], wanted, rtol=0, atol=1e-12)
            assert len(context) == len(query)
        cache.end_step()
        going = [slot for slot in range(len(alive)) if torch.rand((), generator=generator) < 0.8]
        order = cache.keep(going)
        assert sorted(order) == going and cache.count == len(going)
        assert all(new == old for new, old in enumerate(order) if old < len(going))  # only freed slots are refilled
        left += len(alive) - len(going)
        alive = [alive[old] for old in order]
        if len(alive) and max(len(model[row][layers[0]][0]) for row in alive) == 13:
            break
    return left


@pytest.mark.parametrize(("seed", "window"), [(0, None), (1, 1), (2, 4), (3, 7), (4, 100)])
def test_the_cache_against_lists(ranks, seed, window):
    (left,) = ranks(1, cache_against_lists, seed, window)
    assert left >= 4
