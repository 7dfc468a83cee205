"""The loss in one sweep: the gradients of plain autograd, at every option, cut over ranks, in less work and memory."""

from __future__ import annotations

import weakref
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vocabulary import crossings, problem, same_bits, some_kept

from grpo_mega.errors import GrpoMegaError
from grpo_mega.objective.grpo import Terms, grpo_loss
from grpo_mega.parallel import head as head_module
from grpo_mega.parallel import row_kernels
from grpo_mega.parallel.mesh import initialize, world_size_from_environment
from grpo_mega.parallel.vocab import logprobs_and_entropies, one_sweep_loss
from grpo_mega.types import Mean, TokenBatch, add_metrics

FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16
PER_TOKEN = "a number a token"


# ---- objectives, as sums over tokens


def grpo(tokens, kl_coef, logprobs, entropies, where):
    return grpo_loss(logprobs, entropies, tokens.at(where), Terms(clip_low=0.2, clip_high=0.3, kl_coef=kl_coef))


def with_entropy(tokens, logprobs, entropies, where):
    """Not linear in either, so that a wrong coefficient of one chunk shows."""
    weights = tokens.loss_weights[where]
    value = weights * (logprobs.square() - 0.3 * entropies * logprobs - 0.1 * entropies.square())
    return value.sum(), {"square": Mean(logprobs.detach().double().square().sum(), logprobs.numel())}


def nothing(logprobs, entropies, where):
    return logprobs.new_zeros(()), {}


def objectives(count, dtype):
    """{name: objective}: old log-probs near the policy's, so that some tokens are clipped and some are not."""
    generator = torch.Generator().manual_seed(7)
    random = partial(torch.randn, count, generator=generator, dtype=FP64)
    weights, advantages, old = random().abs().to(dtype), random().to(dtype), (random() - 3).to(dtype)
    on_policy = TokenBatch(weights, advantages, old, old_logprobs=None, ref_logprobs=None)
    off_policy = TokenBatch(weights, advantages, old, old_logprobs=old, ref_logprobs=old + 0.3)
    return {
        "grpo on policy": partial(grpo, on_policy, 0.0),
        "grpo with kl": partial(grpo, off_policy, 0.2),
        "entropy": partial(with_entropy, on_policy),
        "nothing": nothing,
    }


# ---- three ways to one gradient


def densely(x, weight, targets, objective, *, vocab_size, rows, temperature=1.0, scale=1.0, softcap=None, kept=None):
    """Plain autograd over full logits: loss, metrics, gradients."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    z = scale * (x[rows] @ weight[:vocab_size].t())
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z / (temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature)
    left_out = torch.zeros_like(z, dtype=torch.bool)
    if kept is not None:
        left_out[:] = True
        left_out[kept.rows, kept.tokens] = False
    logp = torch.log_softmax(z.masked_fill(left_out, -torch.inf), dim=1)
    logprobs = logp.gather(1, targets[:, None])[:, 0]
    loss, metrics = objective(logprobs, -(logp.exp() * logp.masked_fill(left_out, 0.0)).sum(dim=1), slice(None))
    if not loss.requires_grad:
        loss = loss + 0 * x.sum() + 0 * weight[:vocab_size].sum()
    loss.backward()
    return loss.detach(), metrics, x.grad, weight.grad


def in_two_sweeps(x, weight, targets, objective, **options):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, metrics = objective(*logprobs_and_entropies(x, weight, targets, **options), slice(None))
    (loss + 0 * x.sum()).backward()
    return loss.detach(), metrics, x.grad, torch.zeros_like(weight) if weight.grad is None else weight.grad


def in_one_sweep(x, weight, targets, objective, upstream=1.0, **options):
    x, weight, reported = x.clone().requires_grad_(), weight.clone().requires_grad_(), []
    placeholder = one_sweep_loss(x, weight, targets, objective, lambda *both: reported.append(both), **options)
    assert placeholder.item() == 0 and not reported  # forward writes nothing and knows nothing
    (placeholder * upstream).backward()
    ((loss, metrics),) = reported
    return loss, metrics, x.grad, weight.grad


def assert_same(found, wanted, tolerance):
    """Relative to the largest number of each; weights of padded tokens have no gradient."""
    loss, metrics, grad_hidden, grad_weight = found
    assert loss.item() == pytest.approx(wanted[0].item(), rel=tolerance, abs=tolerance)
    assert metrics.keys() == wanted[1].keys()
    for name, mean in metrics.items():
        assert float(mean.count) == float(wanted[1][name].count)
        assert mean.value() == pytest.approx(wanted[1][name].value(), rel=tolerance, abs=tolerance)
    for mine, theirs in ((grad_hidden, wanted[2]), (grad_weight, wanted[3])):
        theirs = theirs.nan_to_num()
        assert (mine - theirs).abs().max() <= tolerance * max(1.0, theirs.abs().max().item())


TOTAL, VOCAB, PADDED = 17, 13, 16  # rows of hidden states, of which every trained one enters
ROWS = torch.tensor([0, 2, 3, 4, 7, 8, 9, 11, 12, 13, 16])


def case(dtype=FP64, vocab=VOCAB, padded=PADDED, total=TOTAL):
    """x of `total` rows; ROWS of them enter, with one target each."""
    x, weight, _, _ = problem(total, vocab, padded, dtype)
    _, _, targets, _ = problem(len(ROWS), vocab, padded)
    return x, weight, targets


OPTIONS = {
    "as it is": {},
    "cold": {"temperature": 0.6},
    "hot": {"temperature": 1.3},
    PER_TOKEN: {"temperature": torch.linspace(0.6, 1.3, len(ROWS), dtype=FP64)},
    "soft-capped": {"scale": 1.7, "softcap": 2.0, "temperature": 0.7},
    "scaled": {"scale": 0.25},
    "truncated": {"temperature": 0.7, "kept": "some"},
}


def options_of(name, targets, vocab=VOCAB):
    options = dict(OPTIONS[name])
    return options | {"kept": some_kept(targets, vocab)} if "kept" in options else options


@pytest.mark.parametrize("chunk_rows", [None, 1, 4])
@pytest.mark.parametrize("name", OPTIONS)
def test_one_sweep_is_two_sweeps_is_autograd(name, chunk_rows):
    x, weight, targets = case()
    options = {"vocab_size": VOCAB, "rows": ROWS, **options_of(name, targets)}
    for objective in objectives(len(ROWS), FP64).values():
        wanted = densely(x, weight, targets, objective, **options)
        for way in (in_one_sweep, in_two_sweeps):
            assert_same(way(x, weight, targets, objective, chunk_rows=chunk_rows, **options), wanted, 1e-12)


def test_the_upstream_gradient_scales_gradients_and_nothing_else():
    x, weight, targets = case()
    objective = objectives(len(ROWS), FP64)["entropy"]
    once, often = (
        in_one_sweep(x, weight, targets, objective, upstream, vocab_size=VOCAB, rows=ROWS) for upstream in (1.0, 8.0)
    )
    assert once[0] == often[0] and once[1] == often[1]
    assert torch.equal(8 * once[2], often[2]) and torch.equal(8 * once[3], often[3])


@pytest.mark.parametrize("name", ["grpo with kl", "entropy"])
def test_no_trained_token(name):
    x, weight, targets = case()
    objective = objectives(0, FP64)[name]
    loss, metrics, grad_hidden, grad_weight = in_one_sweep(
        x, weight, targets[:0], objective, vocab_size=VOCAB, rows=ROWS[:0]
    )
    assert loss == 0 and metrics and all(float(mean.count) == 0 for mean in metrics.values())
    assert not grad_hidden.any() and not grad_weight.any()


def test_no_backward_no_work():
    x, weight, targets = case()
    with torch.no_grad():
        one_sweep_loss(x, weight, targets, nothing, pytest.fail, vocab_size=VOCAB, rows=ROWS)


# ---- bf16 operands


def test_bf16_operands_are_multiplied_as_exactly_as_they_can_be():
    """Log-probs to 1e-5 of exact arithmetic on the same operands; gradients at least as good as dense float32's."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(40, 64, generator=generator).bfloat16(),
        torch.randn(500, 64, generator=generator).bfloat16(),
    )
    targets = torch.randint(500, (40,), generator=generator)
    weights = torch.randn(40, generator=generator, dtype=FP64)

    def objective(logprobs, entropies, where):
        return (weights[where].to(logprobs.dtype) * logprobs).sum(), {}

    options = {"vocab_size": 500, "rows": torch.arange(40)}
    exact = densely(x.double(), weight.double(), targets, objective, **options)
    logprobs = logprobs_and_entropies(x, weight, targets, **options)[0]
    logp = torch.log_softmax(x.double() @ weight.double().t(), dim=1).gather(1, targets[:, None])[:, 0]
    assert (logprobs - logp).abs().mean() < 1e-5
    found = in_one_sweep(x, weight, targets, objective, chunk_rows=7, **options)
    # what dense code does: float32 log_softmax of bf16 logits
    a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
    logp = torch.log_softmax((a @ b.t()).float(), dim=1)
    (weights.float() * logp.gather(1, targets[:, None])[:, 0]).sum().backward()
    for mine, dense, wanted in ((found[2], a.grad, exact[2]), (found[3], b.grad, exact[3])):
        assert mine.dtype == BF16
        assert (mine - wanted).norm() <= (dense - wanted).norm() and (mine - wanted).norm() < 3e-3 * wanted.norm()


# ---- cut over ranks


def on_ranks(vocab, rows_a_rank, dtype):
    """[(loss, metrics, gradients, what crossed) of each way, sequence parallelism and objective] on this rank."""
    mesh = initialize(tensor=world_size_from_environment())
    rank, ranks = mesh.tensor.rank, mesh.tensor.size
    total = 4 * ranks + 8 - 8 % ranks  # sequence parallelism cuts rows evenly
    x, weight, targets = case(dtype, vocab, rows_a_rank * ranks, max(TOTAL, total) // ranks * ranks + ranks)
    part = slice(rank * rows_a_rank, (rank + 1) * rows_a_rank)
    share = len(x) // ranks
    answers = []
    for sharded in (False, True):
        mine = x[rank * share : (rank + 1) * share] if sharded else x
        for way in (in_one_sweep, in_two_sweeps):
            for objective in objectives(len(ROWS), dtype).values():
                options = {"vocab_size": vocab, "rows": ROWS, "group": mesh.tensor.group, "sequence_parallel": sharded}
                with crossings() as crossed:
                    found = way(mine, weight[part], targets, objective, temperature=0.7, chunk_rows=4, **options)
                answers.append((found, crossed))
    return x, answers


@pytest.mark.parametrize(("dtype", "tolerance"), [(FP64, 1e-12), (FP32, 1e-6)])
@pytest.mark.parametrize(("world", "vocab", "rows_a_rank"), [(2, 259, 136), (4, 259, 72), (4, 5, 2)])
def test_a_cut_vocabulary_changes_nothing(ranks, world, vocab, rows_a_rank, dtype, tolerance):
    by_rank = ranks(world, on_ranks, vocab, rows_a_rank, dtype)
    x = by_rank[0][0]
    _, weight, targets = case(dtype, vocab, rows_a_rank * world, len(x))
    several = zip(*(answers for _, answers in by_rank), strict=True)
    for number, answers in enumerate(several):
        sharded, one_sweep = number >= 8, number % 8 < 4
        name, objective = list(objectives(len(ROWS), dtype).items())[number % 4]
        wanted = densely(x, weight, targets, objective, vocab_size=vocab, rows=ROWS, temperature=0.7)
        (loss, metrics, hidden, _), sent = answers[0]
        hiddens = [found[2] for found, _ in answers]
        assert sharded or same_bits(hiddens)
        whole = torch.cat(hiddens) if sharded else hidden
        assert_same((loss, metrics, whole, torch.cat([found[3] for found, _ in answers])), wanted, tolerance)
        # 11 rows in chunks of 4, four numbers each; then the gradient of the 11 rows, or of all rows to their owners
        statistics = [("all_gather", 16), ("all_gather", 16), ("all_gather", 12)]
        gathered = [("all_gather", len(x) // world * 6)] if sharded else []
        gradient = [("reduce_scatter_tensor", len(x) * 6)] if sharded else [("all_reduce", len(ROWS) * 6)]
        if one_sweep:
            assert sent == gathered + statistics + gradient
        else:
            backward = [] if name == "nothing" else gathered + gradient
            assert sent == gathered + statistics + backward


# ---- work and memory, counted


class Ledger(TorchDispatchMode):
    """Operations of matrix products, and the bytes that tensors made inside held at most at a time."""

    def __init__(self):
        super().__init__()
        self.operations, self.live, self.peak, self.known = 0, 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:] if name == "mm" else args[1:3]
            self.operations += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage):
        if storage._cdata in self.known:
            return
        self.known.add(storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())

    def forget(self, key, size):
        self.known.discard(key)
        self.live -= size


TILE = 64 * 1000 * 4  # bytes


def measured(way, rows, vocab=1000, width=16):
    x, weight = torch.randn(rows, width), torch.randn(vocab, width)
    targets = torch.randint(vocab, (rows,))
    objective = objectives(rows, FP32)["grpo with kl"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(head_module.TILE_BYTES, "cpu", TILE)
        patch.setattr(row_kernels, "BLOCK_ELEMENTS", 4000)  # of the real size against the real tile, an eighth
        with Ledger() as ledger:
            way(x, weight, targets, objective, vocab_size=vocab)
    return ledger, rows * vocab * width


@pytest.mark.parametrize(("way", "operations"), [(in_one_sweep, 6), (in_two_sweeps, 8)])
def test_six_operations_in_one_sweep_and_eight_in_two(way, operations):
    ledger, unit = measured(way, 500)
    assert ledger.operations == operations * unit


@pytest.mark.parametrize("way", [in_one_sweep, in_two_sweeps])
def test_memory_is_one_tile_whatever_the_number_of_rows(way):
    """Beside the operands' copies, gradients and sums, and some numbers a row (two dozen tensors of [n])."""
    held = {}
    for rows in (500, 2000):
        ledger, _ = measured(way, rows)
        held[rows] = ledger.peak - 3 * (rows + 1000) * 16 * 4
        assert held[rows] + 2 * (rows + 1000) * 16 * 4 > TILE and held[rows] < 1.3 * TILE + rows * 24 * 8, held
    assert held[2000] - held[500] < 1500 * 24 * 8, held


# ---- bad input


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"temperature": torch.tensor([1.0] * 10 + [-1.0])}, "temperature=-1.0 must be positive"),
        ({"temperature": torch.ones(3)}, "temperature (3,) for 11 targets"),
        ({"softcap": 0.0}, "softcap=0.0 must be positive"),
        ({"rows": ROWS[:5]}, "targets (11,)"),
        ({"rows": None}, "17 rows of hidden states, 11 targets"),
        ({"x": torch.zeros(17, 5, dtype=FP64)}, "hidden (17, 5), weight (16, 6)"),
        ({"x": torch.zeros(17, 6, dtype=FP32)}, "hidden is torch.float32, weight torch.float64"),
        ({"targets": torch.zeros(11)}, "targets torch.float32: targets must be int64"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(changes, says):
    x, weight, targets = case()
    options = {"vocab_size": VOCAB, "rows": ROWS} | {k: v for k, v in changes.items() if k not in ("x", "targets")}
    x, targets = changes.get("x", x), changes.get("targets", targets)
    for way in (partial(one_sweep_loss, objective=nothing, report=pytest.fail), logprobs_and_entropies):
        with pytest.raises(ValueError) as caught:
            way(x, weight, targets, **options)
        assert says in str(caught.value)


def broken(kind):
    x, weight, targets = case()
    if kind == "targets":
        targets = targets.clone()
        targets[3] = VOCAB
    else:
        x[ROWS[3]] = float(kind)
    return x, weight, targets


@pytest.mark.parametrize("kind", ["nan", "inf", "targets"])
def test_what_cannot_be_computed_with_is_said(kind):
    x, weight, targets = broken(kind)
    says = "target 13 of trained token 3 is outside" if kind == "targets" else "1 of 11 trained tokens are nan or inf"
    for way in (partial(one_sweep_loss, objective=nothing, report=pytest.fail), logprobs_and_entropies):
        with pytest.raises(GrpoMegaError, match=says):
            way(x, weight, targets, vocab_size=VOCAB, rows=ROWS)


def broken_on_ranks(sharded):
    """What every rank says, and what had crossed when it did."""
    mesh = initialize(tensor=2)
    answers = []
    for kind in ("nan", "targets"):
        x, weight, targets = broken(kind)
        x = torch.cat((x, x[:1]))  # 18 rows: 9 a rank
        mine = x[9 * mesh.tensor.rank :][:9] if sharded else x
        half = weight[8 * mesh.tensor.rank :][:8]
        for way in (in_one_sweep, in_two_sweeps):
            options = {"vocab_size": VOCAB, "rows": ROWS, "group": mesh.tensor.group, "sequence_parallel": sharded}
            with crossings() as crossed:
                try:
                    way(mine, half, targets, nothing, **options)
                except GrpoMegaError as error:
                    answers.append((str(error), [name for name, _ in crossed]))
    return answers


@pytest.mark.parametrize("sharded", [False, True])
def test_every_rank_says_the_same_before_the_operators_collectives(ranks, sharded):
    first, second = ranks(2, broken_on_ranks, sharded)
    assert first == second and len(first) == 4
    assert all(crossed == ["all_gather"] * sharded for _, crossed in first)  # the rows of sequence parallelism


def test_metrics_add_up_over_chunks():
    x, weight, targets = case()
    objective = objectives(len(ROWS), FP64)["grpo with kl"]
    whole, cut = (
        in_one_sweep(x, weight, targets, objective, vocab_size=VOCAB, rows=ROWS, chunk_rows=rows)[1]
        for rows in (None, 3)
    )
    assert whole.keys() == cut.keys() and add_metrics(cut).keys() == cut.keys()
    for name in whole:
        assert cut[name].value() == pytest.approx(whole[name].value(), rel=1e-13)
