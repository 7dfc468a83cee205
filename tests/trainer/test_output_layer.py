"""The output layer's weight between our operator and megatron: its gradient arrives in every arrangement of buffers.

Two training steps of a tiny model, in float32, whose gradients after each are those of plain autograd over full logits
(megatron's own linear and log_softmax) in the plainest buffers: tied and untied, with and without pipeline stages (also
interleaved), gradients reduced while the backward runs, weights gathered while the forward runs, scaled losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from unittest import mock

import pytest
import tiny
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from ranks import RankError

from grpo_mega.config import ParallelConfig
from grpo_mega.model.architecture import padded_vocab_size
from grpo_mega.model.attention import PackedRows, Rope
from grpo_mega.model.build import transformer_config
from grpo_mega.model.families import read_architecture
from grpo_mega.model.rotary import rope_inverse_frequencies
from grpo_mega.model.specs import TrunkModel, block_spec
from grpo_mega.parallel import mesh
from grpo_mega.parallel.vocab import one_sweep_loss

ROWS, LAYERS = 12, 4


@dataclass(frozen=True)
class Arrangement:
    tied: bool
    pipeline: int = 1
    interleaved: bool = False
    reduce: bool = False  # overlap_grad_reduce
    gather: bool = False  # overlap_param_gather
    scale: float = 1.0

    @property
    def plain(self) -> Arrangement:
        """With plain autograd's gradients."""
        return Arrangement(self.tied, self.pipeline, self.interleaved)

    def __str__(self) -> str:
        words = ("tied" if self.tied else "untied", f"pp{self.pipeline}", "interleaved" * self.interleaved,
                 "reduce" * self.reduce, "gather" * self.gather, f"x{self.scale:g}")  # fmt: skip
        return "-".join(filter(None, words))


SHAPES = [(1, False), (2, False), (2, True)]
ARRANGEMENTS = [
    Arrangement(tied, pipeline, interleaved, reduce, gather, scale)
    for tied in (True, False)
    for pipeline, interleaved in SHAPES
    for reduce, gather in (
        (False, False),
        (True, False),
        (True, True),
    )  # megatron gathers late only if it reduces early
    for scale in (1.0, 8.0)
]


# ---- on the ranks


def chunks_of(folder, arrangement, grid):
    """This rank's model chunks: weights are seeded by place, the embedding's copies alike."""
    arch = read_architecture(folder)
    stages = arrangement.pipeline * (2 if arrangement.interleaved else 1)
    chunks = []
    for chunk in range(2 if arrangement.interleaved else 1):
        config = transformer_config(arch, ParallelConfig(), torch.float32, grid.device)
        config.pipeline_model_parallel_size, config.pipeline_dtype = arrangement.pipeline, torch.float32
        if arrangement.interleaved:
            config.virtual_pipeline_model_parallel_size = 2
            config.microbatch_group_size_per_vp_stage = arrangement.pipeline
            config.overlap_p2p_comm, config.batch_p2p_comm = True, False
        stage = chunk * arrangement.pipeline + grid.pipeline.rank
        model = TrunkModel(
            config=config,
            transformer_layer_spec=block_spec(arch, stage * (LAYERS // stages), LAYERS // stages),
            vocab_size=padded_vocab_size(arch.vocab_size, 1),
            max_sequence_length=64,
            pre_process=stage == 0,
            post_process=stage == stages - 1,
            share_embeddings_and_output_weights=arrangement.tied,
            position_embedding_type="none",
            vp_stage=chunk if arrangement.interleaved else None,
        )
        model.rope = Rope([rope_inverse_frequencies(arch)], grid.device, torch.float32)
        for name, parameter in model.named_parameters():
            ends = "embedding" in name or (arrangement.tied and "output_layer" in name)
            generator = torch.Generator().manual_seed(1 if ends else 2 + stage)
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        chunks.append(model)
    return arch, chunks


def wrapped(model, arrangement):
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=arrangement.gather,
        overlap_grad_reduce=arrangement.reduce,
        overlap_param_gather=arrangement.gather,
        bucket_size=1,  # a bucket a parameter: nobody else waits for the output layer's
    )
    return DistributedDataParallel(config=model.config, ddp_config=settings, module=model)


def token_loss(logprobs, entropies, where):
    return (logprobs.square() * torch.arange(1.0, ROWS + 1)[where]).sum() / ROWS + 0.1 * entropies.sum(), {}


def by_operator(model, vocab_size, hidden, targets):
    refuse = mock.Mock(side_effect=AssertionError("full logits"))
    with mock.patch.object(type(model.output_layer), "forward", refuse):
        return one_sweep_loss(
            hidden[:, 0],
            model.output_weight(),
            targets,
            token_loss,
            lambda *_: None,
            vocab_size=vocab_size,
            chunk_rows=5,
        )


def by_autograd(model, vocab_size, hidden, targets):
    shared = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
    logits = model.output_layer(hidden, weight=shared)[0][:, 0, :vocab_size]
    logp = torch.log_softmax(logits, dim=1)
    logprobs = logp.gather(1, targets[:, None])[:, 0]
    return token_loss(logprobs, -(logp.exp() * logp).sum(dim=1), slice(None))[0]


@mesh.temporary_groups()
def two_steps(folder, arrangement, way):
    """{name: gradient} of this rank after each of two steps, between which the weights have moved."""
    parallel_state.destroy_model_parallel()
    grid = mesh.initialize(pipeline=arrangement.pipeline)
    if arrangement.interleaved:
        parallel_state.set_virtual_pipeline_model_parallel_world_size(2)
    arch, models = chunks_of(folder, arrangement, grid)
    buffers = [wrapped(model, arrangement) for model in models]
    for model in models:
        model.config.grad_scale_func = lambda loss: loss * arrangement.scale
        no_syncs = [buffer.no_sync for buffer in buffers]
        model.config.no_sync_func = no_syncs if arrangement.interleaved else no_syncs[0]
        model.config.finalize_model_grads_func = finalize_model_grads
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=0.5,
            adam_eps=1.0,
            clip_grad=0.0,
            use_distributed_optimizer=arrangement.gather,
            overlap_param_gather=arrangement.gather,
        ),
        buffers,
    )  # fmt: skip  (so large an eps that an update is no mere sign of the gradient)
    generator = torch.Generator().manual_seed(3 + grid.data.rank)
    tokens = torch.randint(arch.vocab_size, (2, 4, 2, ROWS), generator=generator)  # step, microbatch, input or target

    def forward(iterator, model):
        inputs, targets = next(iterator)
        trunk = model.module
        rows = PackedRows(*trunk.rope(torch.arange(ROWS)), (ROWS,))
        hidden = model(inputs[None], torch.arange(ROWS)[None], None, packed_seq_params=rows)

        def loss(hidden):
            return way(trunk, arch.vocab_size, hidden, targets), torch.tensor(ROWS, dtype=torch.int), {}

        return hidden, loss

    found = []
    for step in tokens:
        for buffer in buffers:
            buffer.zero_grad_buffer()
        optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter(step) for _ in models] if arrangement.interleaved else iter(step),
            model=buffers if arrangement.interleaved else buffers[0],
            num_microbatches=len(step),
            seq_length=ROWS,
            micro_batch_size=1,
            forward_only=False,
        )
        for part in (part for buffer in buffers for part in buffer.buffers):
            part.grad_data.div_(arrangement.scale)  # as a loss scaler would before the optimizer's step
        found.append(gradients(models, buffers, arrangement, grid))
        optimizer.step()
    return found


def gradients(models, buffers, arrangement, grid):
    """Summed over data ranks; the distributed optimizer's buffers hold that for a part of each bucket on each rank."""
    result = {}
    for number, (model, buffer) in enumerate(zip(models, buffers, strict=True)):
        for name, parameter in model.named_parameters():
            value = parameter.main_grad.clone()
            if arrangement.gather and grid.data.size > 1:
                value = whole_bucket(buffer, parameter, value, grid)
            result[f"{number}.{name}"] = value
    return result


def whole_bucket(buffer, parameter, value, grid):
    """A bucket of one parameter (and padding), reduce-scattered: this rank's part is summed, the others' are not."""
    group = buffer.param_to_bucket_group[parameter]
    bucket = next(bucket for bucket in group.buckets if parameter in bucket.params)
    part = bucket.grad_data.numel() // grid.data.size
    mine = torch.zeros_like(bucket.grad_data)
    here = slice(grid.data.rank * part, (grid.data.rank + 1) * part)
    mine[here] = bucket.grad_data[here]
    torch.distributed.all_reduce(mine, group=grid.data.group)
    start = bucket.param_to_index[parameter][0]
    return mine[start : start + value.numel()].view_as(value)


def compared(folder, arrangements):
    """Largest difference of each arrangement's gradients, relative to the largest gradient of that name."""
    plain, differences = {}, []
    for arrangement in arrangements:
        if arrangement.plain not in plain:
            plain[arrangement.plain] = two_steps(folder, arrangement.plain, by_autograd)
        found = two_steps(folder, arrangement, by_operator)
        worst = {}
        for step, (mine, wanted) in enumerate(zip(found, plain[arrangement.plain], strict=True)):
            assert mine.keys() == wanted.keys()
            for name, gradient in wanted.items():
                assert gradient.any(), name
                worst[f"step {step} {name}"] = ((mine[name] - gradient).abs().max() / gradient.abs().max()).item()
        differences.append(max(worst.items(), key=lambda item: item[1]))
    return differences


# ---- the tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("output") / "model", num_hidden_layers=LAYERS)


@pytest.mark.parametrize("shape", SHAPES, ids=["data 2", "pipeline 2", "interleaved"])
def test_every_arrangement_has_autograds_gradients(ranks, folder, shape):
    some = [a for a in ARRANGEMENTS if (a.pipeline, a.interleaved) == shape]
    for by_rank in ranks(2, compared, folder, some, timeout=200):
        for arrangement, (name, off) in zip(some, by_rank, strict=True):
            assert off < 2e-5, f"{arrangement}: {name} is off by {off:.1e}"


def without_waiting(folder, arrangement):
    """The same with an output layer that nobody waits for."""
    with mock.patch.object(TrunkModel, "output_weight", lambda model: model.output_layer.weight):
        return compared(folder, [arrangement])


def test_the_weight_that_is_still_on_its_way_is_waited_for(ranks, folder):
    """The test above sees it: megatron finds a gather that nobody has waited for when it begins the next."""
    arrangement = Arrangement(tied=False, reduce=True, gather=True)
    with pytest.raises(RankError, match=r"start_param_sync[\s\S]*AssertionError"):
        ranks(2, without_waiting, folder, arrangement)
