"""From a recipe to the parts that the loop puts to work. What needs no other rank is checked before any collective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from grpo_mega.config import Recipe
from grpo_mega.data.corpus import load_corpus
from grpo_mega.data.mixture import PromptStream
from grpo_mega.data.prompts import DataCounts, Renderer, prompts_of
from grpo_mega.data.tokenizer import ChatTokenizer, load_tokenizer
from grpo_mega.errors import ConfigError, DataError
from grpo_mega.model.architecture import Architecture, read_architecture
from grpo_mega.model.build import DTYPES, build_model
from grpo_mega.model.decode import Decoder
from grpo_mega.model.layout import layers_per_stage
from grpo_mega.objective.grpo import grpo_loss
from grpo_mega.parallel.mesh import Mesh
from grpo_mega.rewards.resolve import RewardFunction, resolve_reward
from grpo_mega.rollout.in_process import InProcessSampler
from grpo_mega.rollout.sampler import Sampler
from grpo_mega.trainer.check import check_cheaply
from grpo_mega.trainer.policy import Objective, Policy, Scorer
from grpo_mega.trainer.progress import Progress
from grpo_mega.trainer.records import RunDirectory
from grpo_mega.types import Metrics, Prompt, TokenBatch


@dataclass(frozen=True)
class Inputs:
    """Everything a rank can read and check alone."""

    arch: Architecture
    tokenizer: ChatTokenizer
    prompts: PromptStream
    heldout: list[Prompt]
    data: DataCounts
    reward: RewardFunction
    directory: RunDirectory
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """The parts of a run, built."""

    recipe: Recipe
    inputs: Inputs
    mesh: Mesh
    policy: Policy
    reference: Scorer | None
    sampler: Sampler
    objective: Objective
    progress: Progress


def read_inputs(recipe: Recipe, world_size: int) -> Inputs:
    """Read and check all inputs; every rank does it alone and fails alike. Raises GrpoMegaError."""
    arch = check_cheaply(recipe, world_size)
    reward = resolve_reward(recipe.reward.function)
    corpus = load_corpus(recipe.data, recipe.run.seed)
    for row in corpus.rows():
        if recipe.reward.function == "exact" and row["answer"] is None:
            raise DataError(
                f"{row['origin']} has no {recipe.data.answer_field!r}, which reward.function=exact compares with; name "
                "the field that holds the answer in data.answer_field, or use a reward function of your own"
            )
    tokenizer = load_tokenizer(recipe.model.path, recipe.model.tokenizer, recipe.data.chat_template)
    if tokenizer.vocab_size > arch.vocab_size:
        raise ConfigError(
            f"the tokenizer of {recipe.model.tokenizer or recipe.model.path} has {tokenizer.vocab_size} tokens, the "
            f"model {arch.vocab_size}; use the tokenizer that the model was made with"
        )
    render = Renderer(recipe.data, tokenizer, recipe.sampling.max_completion_tokens, arch.context_length)
    directory = RunDirectory(recipe)
    directory.check()
    prompts, heldout, counts = prompts_of(corpus, render, seed=recipe.run.seed)
    return Inputs(
        arch=arch,
        tokenizer=tokenizer,
        prompts=prompts,
        heldout=heldout,
        data=counts,
        reward=reward,
        directory=directory,
        layers=layers_per_stage(arch, recipe.parallel.pipeline, recipe.parallel.pipeline_layout),
    )


def build_run(recipe: Recipe, inputs: Inputs, mesh: Mesh, progress: Progress) -> Run:
    """Load policy and (with a KL term) reference onto the mesh, and put the sampler on the policy's weights."""
    dtype = DTYPES[recipe.precision.dtype]
    temperature = recipe.sampling.temperature
    build = partial(build_model, mesh=mesh, parallel=recipe.parallel, dtype=dtype)
    model = build(inputs.arch, recompute=recipe.model.recompute)
    vocab_size = inputs.arch.vocab_size
    policy = Policy(model, vocab_size, mesh, temperature, recipe.optimizer, recipe.run.num_steps)
    reference = None
    if recipe.grpo.kl_coef > 0:
        frozen = build(read_architecture(recipe.reference_path), trainable=False)
        reference = Scorer(frozen, vocab_size, mesh, temperature)

    def decoder() -> Decoder:
        model.eval()
        return Decoder(model, vocab_size, mesh, temperature, progress.tick)

    sampler = InProcessSampler(
        decoder,
        mesh,
        seed=recipe.run.seed,
        max_completion_tokens=recipe.sampling.max_completion_tokens,
        stop_token_ids=(*inputs.tokenizer.stop_token_ids, *recipe.sampling.stop_token_ids),
        max_rows=recipe.sampling.max_rows,
        decode=inputs.tokenizer.decode,
    )
    return Run(recipe, inputs, mesh, policy, reference, sampler, objective_of(recipe), progress)


def objective_of(recipe: Recipe) -> Objective:
    """The recipe's GRPO loss as a function of log-probs, entropies and the tokens' weights and advantages."""
    grpo = recipe.grpo

    def objective(logprobs: Tensor, entropies: Tensor, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        return grpo_loss(
            logprobs,
            entropies,
            old_logprobs=batch.old_logprobs,
            ref_logprobs=batch.ref_logprobs,
            advantages=batch.advantages,
            loss_weights=batch.loss_weights,
            sampler_logprobs=batch.sampler_logprobs,
            clip_low=grpo.clip_low,
            clip_high=grpo.clip_high,
            kl_coef=grpo.kl_coef,
        )

    return objective


def share(items: Sequence, mesh: Mesh) -> list[int]:
    """Which of the step's items (by position) belong to this data-parallel rank: every size-th, so that each minibatch,
    a run of positions, spreads over all ranks."""
    return list(range(mesh.data.rank, len(items), mesh.data.size))
