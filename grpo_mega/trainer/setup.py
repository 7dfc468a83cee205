"""From a recipe to the parts that the loop puts to work. What needs no other rank is checked before any collective."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

from grpo_mega.config import Recipe, SamplingConfig
from grpo_mega.data.corpus import load_corpus
from grpo_mega.data.mixture import PromptStream
from grpo_mega.data.prompts import DataCounts, Renderer, prompts_of
from grpo_mega.data.tokenizer import ChatTokenizer, check_vocabulary, load_tokenizer
from grpo_mega.errors import DataError
from grpo_mega.model import bridge
from grpo_mega.model.architecture import Architecture
from grpo_mega.model.build import DTYPES, build_model
from grpo_mega.model.copy import WeightCopy
from grpo_mega.model.decode import Decoder
from grpo_mega.model.layout import layers_per_stage
from grpo_mega.model.optimizer import start_main_weights
from grpo_mega.model.specs import ModelParts
from grpo_mega.parallel.mesh import Mesh, another_layout
from grpo_mega.parallel.truncation import Truncation
from grpo_mega.rewards.resolve import Part, check_row, resolve_reward
from grpo_mega.rollout.demonstrations import Demonstrations
from grpo_mega.rollout.in_process import InProcessSampler
from grpo_mega.rollout.sampler import Sampler
from grpo_mega.trainer.check import check_cheaply, sampling_layout
from grpo_mega.trainer.heads import TokenHead
from grpo_mega.trainer.objective import StepObjective
from grpo_mega.trainer.policy import Policy
from grpo_mega.trainer.progress import Progress
from grpo_mega.trainer.records import RunDirectory
from grpo_mega.trainer.reference import Reference, build_reference
from grpo_mega.trainer.reward_model import Judge, RewardModel, build_reward_models, check_conversations, read_judges
from grpo_mega.trainer.scoring import Scoring
from grpo_mega.types import Prompt


@dataclass(frozen=True)
class Inputs:
    """Everything a rank can read and check alone."""

    arch: Architecture
    tokenizer: ChatTokenizer
    prompts: PromptStream
    heldout: list[Prompt]
    data: DataCounts
    reward: tuple[Part, ...]
    directory: RunDirectory
    layers: tuple[int, ...]
    judges: Mapping[str, Judge] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """The parts of a run, built. What the sampler gives is trained on; the examiner's answers held-out problems."""

    recipe: Recipe
    inputs: Inputs
    mesh: Mesh
    policy: Policy
    reference: Reference | None
    scoring: Scoring
    sampler: Sampler
    examiner: Sampler  # of held-out problems
    objective: StepObjective
    progress: Progress

    @property
    def reward_models(self) -> Mapping[str, RewardModel]:
        return self.scoring.models


def read_inputs(recipe: Recipe, world_size: int) -> Inputs:
    """Read and check all inputs; every rank does it alone and fails alike. Raises GrpoMegaError."""
    arch = check_cheaply(recipe, world_size)
    demonstrated, limit = recipe.sampling.source == "data", recipe.sampling.max_completion_tokens
    asked = not demonstrated or recipe.data.heldout > 0  # demonstrations have no reward, held-out answers do
    reward = resolve_reward(recipe.reward, limit) if asked else ()
    corpus = load_corpus(recipe.data, recipe.run.seed, demonstrated=demonstrated)
    for row in corpus.heldout if demonstrated else corpus.rows():
        try:
            check_row(recipe.reward, row["origin"], row["answer"], row["fields"])
        except DataError as error:
            aside = (
                " (it is held out; data.heldout=0 trains on every row and evaluates on none)" if demonstrated else ""
            )
            raise DataError(f"{error}{aside}") from None
    tokenizer = load_tokenizer(recipe.model.path, recipe.model.tokenizer, recipe.data.chat_template)
    check_vocabulary(tokenizer, recipe.model.tokenizer or recipe.model.path, arch.vocab_size)
    render = Renderer(recipe.data, tokenizer, limit, arch.context_length)
    if demonstrated:
        stops = stop_tokens(tokenizer, recipe.sampling)
        render = Renderer(recipe.data, tokenizer, limit, arch.context_length, stops=stops)
    directory = RunDirectory(recipe)
    directory.check()
    prompts, heldout, counts = prompts_of(
        corpus, render, seed=recipe.run.seed, render_heldout=heldout_renderer(recipe, tokenizer, arch)
    )
    judges = read_judges(recipe)
    check_conversations(judges, [*([] if demonstrated else prompts.everything()), *heldout])
    return Inputs(
        arch=arch,
        tokenizer=tokenizer,
        prompts=prompts,
        heldout=heldout,
        data=counts,
        reward=reward,
        judges=judges,
        directory=directory,
        layers=layers_per_stage(arch, recipe.parallel.stages, recipe.parallel.pipeline_layout),
    )


def heldout_renderer(recipe: Recipe, tokenizer: ChatTokenizer, arch: Architecture) -> Renderer:
    """What puts held-out problems: beside completions of evaluation's own length, if it has one."""
    own = recipe.evaluation.max_completion_tokens is not None
    key = f"{'evaluation' if own else 'sampling'}.max_completion_tokens"
    limit = recipe.evaluation_sampling.max_completion_tokens
    return Renderer(recipe.data, tokenizer, limit, arch.context_length, key)


def stop_tokens(tokenizer: ChatTokenizer, rule: SamplingConfig) -> tuple[int, ...]:
    """The tokens that end a completion."""
    return (*tokenizer.stop_token_ids, *rule.stop_token_ids)


def build_run(recipe: Recipe, inputs: Inputs, mesh: Mesh, progress: Progress) -> Run:
    """Load policy and (with a KL term) reference onto the mesh, and put the sampler, if one is needed, on the policy's
    weights."""
    arch, dtype = inputs.arch, DTYPES[recipe.precision.dtype]
    model = build_model(
        arch, mesh, recipe.parallel, dtype=dtype, recompute=recipe.model.recompute, moe=recipe.moe, tick=progress.tick
    )
    policy = Policy(
        TokenHead(model, arch.vocab_size, mesh, recipe.sampling.temperature),
        recipe.optimizer,
        recipe.run.num_steps,
        overlap=recipe.parallel.overlap,
        replays=recipe.moe.routing_replay,
    )
    if dtype == torch.bfloat16:
        fine = bridge.tensors(model, arch, bridge.Place.of(mesh, inputs.layers), torch.float32)
        start_main_weights(policy.optimizer, fine)
    reference = build_reference(recipe, mesh, progress.tick) if recipe.grpo.kl_coef > 0 else None
    models = build_reward_models(recipe, inputs.judges, mesh)
    scoring = Scoring(recipe.reward, inputs.reward, models, inputs.tokenizer.decode, mesh, progress.tick)
    sampler: Sampler = Demonstrations()
    examiner = sampler  # which nobody asks unless problems are held out
    if recipe.sampling.source == "policy" or inputs.heldout:
        sampler_of = build_samplers(recipe, inputs, mesh, policy, progress)
        examiner = sampler_of(recipe.evaluation_sampling)
        if recipe.sampling.source == "policy":
            sampler = sampler_of(recipe.sampling)
    return Run(recipe, inputs, mesh, policy, reference, scoring, sampler, examiner, StepObjective(recipe), progress)


def build_samplers(
    recipe: Recipe, inputs: Inputs, mesh: Mesh, policy: Policy, progress: Progress
) -> Callable[[SamplingConfig], Sampler]:
    """Samplers on the training weights, or on one copy where sampling has a layout or a dtype of its own.

    Context ranks, which share rows in training, are data ranks in sampling: every rank has the same weights as before.
    """
    current, layout = mesh, sampling_layout(recipe)
    dtype = recipe.precision.sampling or recipe.precision.dtype
    if layout.sizes != recipe.parallel.sizes:
        current = another_layout(mesh, **layout.sizes)
    copy = None
    if layout != recipe.parallel.model_copy(update={"context": 1}) or dtype != recipe.precision.dtype:
        stages = layers_per_stage(inputs.arch, layout.stages, layout.pipeline_layout)
        with current.active():
            target = build_model(
                inputs.arch, current, layout, dtype=DTYPES[dtype], trainable=False, loaded=False
            ).eval()
        copy = WeightCopy(inputs.arch, (policy.model, mesh, inputs.layers), (target, current, stages))

    def weights() -> ModelParts:
        model = policy.settled()
        return model.eval() if copy is None else copy.refresh()

    def decoder(rule: SamplingConfig) -> Decoder:
        truncation = Truncation.of(rule.top_k, rule.top_p)
        return Decoder(weights(), inputs.arch.vocab_size, current, rule.temperature, progress.tick, truncation)

    return lambda rule: sampler_on(
        partial(decoder, rule), current, inputs.tokenizer, rule, recipe.run.seed, routes=current is not mesh
    )


def sampler_on(
    make_decoder: Callable[[], Decoder],
    mesh: Mesh,
    tokenizer: ChatTokenizer,
    rule: SamplingConfig,
    seed: int,
    *,
    routes: bool = False,
) -> Sampler:
    """A sampler by `rule` of what `make_decoder` decodes on `mesh`."""
    return InProcessSampler(
        make_decoder,
        mesh,
        seed=seed,
        max_completion_tokens=rule.max_completion_tokens,
        stop_token_ids=stop_tokens(tokenizer, rule),
        max_rows=rule.max_rows,
        decode=tokenizer.decode,
        routes=routes,
    )
