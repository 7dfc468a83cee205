"""The recipe as a whole: its sections, what each key means and its default, and what must hold across sections."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from grpo_mega.config.base import Counts, Name, NonNegative, Positive, Section
from grpo_mega.config.data import DataConfig
from grpo_mega.config.evaluation import EvaluationConfig
from grpo_mega.config.grpo import PER_STEP, GrpoConfig
from grpo_mega.config.parallel import OwnLayoutConfig, ParallelConfig
from grpo_mega.config.reward import RewardConfig
from grpo_mega.config.reward_model import RewardModelConfig
from grpo_mega.config.source import check_source


class ModelConfig(Section):
    path: Name  # Hugging Face folder of the policy's first weights
    tokenizer: Name | None = None  # another folder's tokenizer, or a sentencepiece .model file; default: of model.path
    # what the backward computes again instead of keeping it: nothing, attention, or each layer as a whole
    recompute: Literal["none", "selective", "full"] = "none"


class ReferenceConfig(OwnLayoutConfig):
    section: ClassVar[str] = "reference."
    path: str | None = None  # frozen reference; default: the policy's first weights
    enabled: bool = True  # false: none is ever loaded, and a KL term is refused
    # iterative GRPO (DeepSeekMath, algorithm 1): before every so many steps the reference becomes the policy; 0: never.
    # What it became is kept under run.directory/references, for runs that resume
    refresh_every: NonNegative = 0


class MoeConfig(Section):
    """Training of models whose feed-forward layers are mixtures of experts; a dense model has none of these keys.

    No token is ever dropped: an expert takes all rows that chose it. A capacity (megatron's moe_expert_capacity_factor)
    would make a row's log-prob depend on the rows beside it, so that there is no option for one.
    """

    aux_loss_coef: Annotated[float, Field(ge=0)] = 0.0  # load balancing over each microbatch's rows: model/experts
    z_loss_coef: Annotated[float, Field(ge=0)] = 0.0  # mean squared log-sum-exp of the router's logits
    # updates of a step choose the experts that the pass for the old log-probs chose: ratios do not jump with a choice
    routing_replay: bool = False


class PrecisionConfig(Section):
    """Of each phase. Log-probs, gradients of a step and Adam's states are float32 whatever is chosen here."""

    dtype: str = "fp32"  # the policy's weights and its update; bf16 keeps float32 main weights in the optimizer
    sampling: str | None = None  # default: as dtype; another one samples from a copy of the weights
    reference: str | None = None  # default: as dtype

    @field_validator("dtype", "sampling", "reference")
    @classmethod
    def _dtype(cls, value: str | None) -> str | None:
        if value == "fp16":
            raise ValueError(
                "is refused: its range ends at 65504, so that gradients need a loss scale, and each overflow skips a "
                "step, which changes the result; use bf16 or fp32"
            )
        if value not in ("fp32", "bf16", None):
            raise ValueError("is not supported; use bf16 or fp32")
        return value


class SamplingConfig(Section):
    # where the completions come from that are trained on: the policy's samples, or the rows' demonstrations (SFT)
    source: Literal["policy", "data"] = "policy"
    temperature: Annotated[float, Field(gt=0)] = 1.0
    # draw among the k likeliest tokens (0: all), and of those among the fewest that hold this share of their mass. The
    # policy is then the truncated distribution: every log-prob, ratio, KL and entropy is over the tokens that were kept
    top_k: NonNegative = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_completion_tokens: Positive = 256
    stop_token_ids: Counts = ()  # besides the tokenizer's end of sequence (and end of turn)
    max_rows: Positive = 64  # completions decoded together on one data-parallel rank
    # a layout of its own for sampling; default: training's. Another one samples from a copy of the weights, renewed
    # after each update, and the world's other ranks become data ranks
    tensor: Positive | None = None
    pipeline: Positive | None = None
    expert: Positive | None = None
    expert_tensor: Positive | None = None


class BatchConfig(Section):
    prompts_per_step: Positive = 8
    minibatches: Positive = 1  # optimizer updates a step and iteration
    tokens_per_microbatch: Positive = 1024  # rows of one forward; only a sequence longer than that exceeds it
    fixed_rows: bool = False  # true: always that many, so that shapes never change; false: as few as a minibatch needs

    @model_validator(mode="after")
    def _divides(self) -> BatchConfig:
        if self.prompts_per_step % self.minibatches:
            raise ValueError(
                f"batch.prompts_per_step={self.prompts_per_step} is not divisible by batch.minibatches="
                f"{self.minibatches}; every minibatch holds whole groups"
            )
        return self


class OptimizerConfig(Section):
    lr: Annotated[float, Field(gt=0)] = 1e-6
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: NonNegative = 0
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0  # never on norms and biases
    clip_grad: Annotated[float, Field(gt=0)] = 1.0  # of the global gradient norm
    distributed: bool = False  # megatron's distributed optimizer: main weights and Adam's states sharded over data


class RunConfig(Section):
    directory: Name
    num_steps: Positive = 100
    seed: NonNegative = 0
    save_every: NonNegative = 0  # 0: only at the end
    evaluate_every: NonNegative = 0  # 0: only before and after


def check_schedule(optimizer: OptimizerConfig, run: RunConfig) -> None:
    """Raise ValueError for a learning rate that the run's steps cannot follow."""
    if optimizer.warmup_steps > run.num_steps:
        raise ValueError(
            f"optimizer.warmup_steps={optimizer.warmup_steps} exceeds run.num_steps={run.num_steps}; warm up for fewer "
            "steps"
        )
    if optimizer.min_lr > optimizer.lr:
        raise ValueError(f"optimizer.min_lr={optimizer.min_lr} exceeds optimizer.lr={optimizer.lr}; lower min_lr")


class Recipe(Section):
    model: ModelConfig
    reference: ReferenceConfig = ReferenceConfig()
    moe: MoeConfig = MoeConfig()
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    data: DataConfig
    reward: RewardConfig = RewardConfig()
    reward_models: dict[str, RewardModelConfig] = Field(default_factory=dict)  # by the names that reward has for them
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    grpo: GrpoConfig = GrpoConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    run: RunConfig

    @model_validator(mode="after")
    def _across_sections(self) -> Recipe:
        check_schedule(self.optimizer, self.run)
        if self.grpo.group_size > self.sampling.max_rows:
            raise ValueError(
                f"grpo.group_size={self.grpo.group_size} exceeds sampling.max_rows={self.sampling.max_rows}, the rows "
                "decoded together; raise max_rows, so that a group's prompt is read once"
            )
        if self.grpo.kl_coef > 0 and not self.reference.enabled:
            raise ValueError(
                f"grpo.kl_coef={self.grpo.kl_coef} needs the reference that reference.enabled=false turns off; set "
                "grpo.kl_coef=0, or leave reference.enabled out"
            )
        for key, value in self.reference:
            if (
                key != "enabled"
                and self.grpo.kl_coef == 0
                and value not in (None, ReferenceConfig.model_fields[key].default)
            ):
                shown = str(value).lower() if isinstance(value, bool) else value
                raise ValueError(
                    f"reference.{key}={shown} would never be used with grpo.kl_coef=0; leave it out, or give the KL "
                    "term a weight"
                )
        if self.moe.routing_replay and self.grpo.num_iterations == self.batch.minibatches == 1:
            raise ValueError(
                "moe.routing_replay=true would never be used with grpo.num_iterations=1 and batch.minibatches=1, where "
                "the one update is by the policy that sampled; leave it out, or update more than once a step"
            )
        if self.moe.routing_replay and self.grpo.old_logprobs != "policy":
            raise ValueError(
                f"moe.routing_replay=true replays the pass for the old log-probs, and grpo.old_logprobs="
                f"{self.grpo.old_logprobs} makes none; use grpo.old_logprobs=policy"
            )
        self._check_old_logprobs()
        self._check_steps()
        check_source(self)
        self.reward.check_lengths(self.sampling.max_completion_tokens)
        if self.data.heldout:
            self.evaluation.correct_part(self.reward)  # raises where the recipe does not decide it
        else:
            if self.run.evaluate_every:
                raise ValueError(
                    f"run.evaluate_every={self.run.evaluate_every} would never be used with data.heldout=0; hold "
                    "problems out, or leave it out"
                )
            for key, value in self.evaluation.model_dump(exclude_defaults=True).items():
                raise ValueError(
                    f"evaluation.{key}={value} would never be used with data.heldout=0; hold problems out, or leave it "
                    "out"
                )
        self.reward.check_models(self.reward_models)
        return self

    def _check_old_logprobs(self) -> None:
        grpo, updates = self.grpo, self.grpo.num_iterations * self.batch.minibatches
        if grpo.old_logprobs == "none" and updates > 1 and grpo.needs_old:
            raise ValueError(
                f"grpo.num_iterations={grpo.num_iterations} x batch.minibatches={self.batch.minibatches} updates a "
                "step need the log-probs of the policy that the step began with, and grpo.old_logprobs=none computes "
                "none; use policy (or sampler), or one update a step"
            )
        if grpo.surrogate == "logprob" and grpo.advantage != "best_of_n" and updates > 1:
            raise ValueError(
                f"grpo.surrogate=logprob compares with no old log-probs, and of grpo.num_iterations="
                f"{grpo.num_iterations} x batch.minibatches={self.batch.minibatches} updates a step only the first is "
                "by the policy that sampled; use grpo.surrogate=clip, or one update a step"
            )
        if grpo.kl_in == "reward" and grpo.advantage != "reinforce_plus_plus" and self.reward.truncated == "mask":
            raise ValueError(
                "reward.truncated=mask with grpo.kl_in=reward: completions that do not count have no penalty, and "
                f"would raise what grpo.advantage={grpo.advantage} compares the others with; use penalize or reward, "
                "or kl_in=loss"
            )
        if grpo.old_logprobs == "sampler" and grpo.correction != "none":
            raise ValueError(
                f"grpo.correction={grpo.correction} weighs what lies between the sampler and grpo.old_logprobs=sampler,"
                " which are the same; use grpo.old_logprobs=policy, or no correction"
            )

    def _check_steps(self) -> None:
        """Process supervision beside what needs one advantage a completion."""
        if self.reward.steps is None:
            return
        for key, value, allowed in (
            ("advantage", self.grpo.advantage, PER_STEP),
            ("kl_in", self.grpo.kl_in, ("loss",)),
            ("ratio", self.grpo.ratio, ("token", "sequence_token")),
        ):
            if value not in allowed:
                raise ValueError(
                    f"grpo.{key}={value} is for one reward a completion, and reward.steps gives one a step; use "
                    f"{' or '.join(allowed)}, or leave reward.steps out"
                )

    @property
    def reference_path(self) -> str:
        return self.reference.path or self.model.path

    @property
    def evaluation_sampling(self) -> SamplingConfig:
        """How completions of held-out problems are drawn: as in training, but for what `evaluation` says of its own.

        Temperature 0 is top-k with k = 1: the likeliest token, whatever the temperature. Of several with the very same
        logit the noise takes one.
        """
        temperature, limit = self.evaluation.temperature, self.evaluation.max_completion_tokens
        changes: dict[str, Any] = {} if limit is None else {"max_completion_tokens": limit}
        if temperature == 0:
            changes |= {"temperature": 1.0, "top_k": 1, "top_p": 1.0}
        elif temperature is not None:
            changes["temperature"] = temperature
        return self.sampling.model_copy(update=changes)
