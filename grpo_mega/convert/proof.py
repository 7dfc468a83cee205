"""Whether two models are one: their logits on fixed texts, computed by different programs, side by side.

A Hugging Face folder or a GGUF file is run by transformers, a Megatron checkpoint by megatron-core under the layout
asked for, both in float32 from whatever the tensors are stored in. The table that converts has no part in
transformers' side, and on megatron's side puts back what it took: a name, order or scale that it has wrong shows.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_mega.config import ParallelConfig
from grpo_mega.data.tokenizer import ChatTokenizer
from grpo_mega.errors import ConfigError
from grpo_mega.model.architecture import Architecture
from grpo_mega.model.formats import Weights
from grpo_mega.parallel.mesh import Mesh

LENGTH = 48  # tokens of a prompt, at most
TEXTS = (
    "The committee met on Tuesday morning to discuss how the river should be crossed before the winter floods came.",
    "Question: A farmer has 17 sheep and buys 5 more, then sells 8 of them. How many are left? Answer: 17 + 5 = 22 and",
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n    return total",
    "Le chat dort sur la chaise. Die Katze schläft auf dem Stuhl. The cat is asleep on the chair, and nobody minds.",
)
# How far float32 arithmetic in another order moves any logit, in units of eps * sqrt(2 layers) * the largest logit, and
# how far weights that were rounded to another dtype move logits on the average: some times what was measured (README)
ARITHMETIC, ROUNDING = 16.0, 0.5
EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@dataclass(frozen=True)
class Comparison:
    """Of `positions` rows of logits: differences in logits, KL(source || target) in nats, how often both have the same
    token on top; source_loss: mean negative log-prob of the next token of a text by the source, chance: of a uniform
    guess (None: the prompts were no texts)."""

    positions: int
    max_difference: float
    mean_difference: float
    kl: float
    top1_agreement: float
    largest_logit: float
    bound: float
    measure: str  # which of the differences the bound is about
    source_loss: float | None
    chance: float

    @property
    def passes(self) -> bool:
        found = self.max_difference if self.measure == "max_difference" else self.mean_difference
        return found <= self.bound  # a nan is not

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passes": self.passes}


def prompts(tokenizer: ChatTokenizer | None, vocab_size: int) -> list[list[int]]:
    """The fixed texts in tokens; without a tokenizer, tokens of a fixed generator."""
    if tokenizer is None:
        generator = torch.Generator().manual_seed(20240203)
        return [torch.randint(vocab_size, (LENGTH,), generator=generator).tolist() for _ in TEXTS]
    plain = [list(tokenizer.text_ids(text))[:LENGTH] for text in TEXTS]
    return [ids for ids in plain if len(ids) > 1]


def compare(
    source: Sequence[Tensor], target: Sequence[Tensor], ids: Sequence[Sequence[int]], *, bound: Bound, texts: bool
) -> Comparison:
    """source, target: [T, V] of each prompt."""
    a, b = (torch.cat(tuple(several)).double() for several in (source, target))
    log_a, log_b = a.log_softmax(dim=1), b.log_softmax(dim=1)
    difference = (a - b).abs()
    starts = [torch.tensor(tokens[1:]) for tokens in ids]
    losses = [
        -logits.double().log_softmax(dim=1)[:-1].gather(1, following[:, None])
        for logits, following in zip(source, starts, strict=True)
    ]
    largest = a.abs().max().item()
    return Comparison(
        positions=len(a),
        max_difference=difference.max().item(),
        mean_difference=difference.mean().item(),
        kl=(log_a.exp() * (log_a - log_b)).sum(dim=1).mean().item(),
        top1_agreement=(a.argmax(dim=1) == b.argmax(dim=1)).double().mean().item(),
        largest_logit=largest,
        bound=bound.units * largest,
        measure=bound.measure,
        source_loss=torch.cat(losses).mean().item() if texts else None,
        chance=math.log(a.shape[1]),
    )


@dataclass(frozen=True)
class Bound:
    """The largest difference that rounding explains, as a multiple of the largest logit."""

    units: float
    measure: str


def bound_of(arch: Architecture, target: set[torch.dtype], *, rounded: bool) -> Bound:
    """target: what its tensors are stored as; rounded: whether weights were, on their way. Then single logits may move
    far (by 1.4 units after the quick start's training, by 0.2 before), and all of a row whose router then chooses
    otherwise: the mean is bounded."""
    depth = math.sqrt(2 * arch.num_layers)
    if not rounded:
        return Bound(ARITHMETIC * EPS[torch.float32] * depth, "max_difference")
    eps = max(EPS[dtype] for dtype in target)
    return Bound(max(ROUNDING * eps, ARITHMETIC * EPS[torch.float32]) * depth, "mean_difference")


def by_transformers(path: Path, ids: Sequence[Sequence[int]]) -> list[Tensor]:
    """[T, V] float32 of each prompt from a Hugging Face folder or a GGUF file, dequantised by transformers itself."""
    from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config
    from transformers.utils import logging

    logging.disable_progress_bar()
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(path)}
    if path.is_file():
        where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    elif hasattr(AutoConfig.from_pretrained(str(path), local_files_only=True), "quantization_config"):
        where["quantization_config"] = FineGrainedFP8Config(dequantize=True)
    with redirect_stderr(io.StringIO()):  # a progress bar that has no switch
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, local_files_only=True)
    if path.is_dir():
        model = model.float()  # of 8-bit blocks, what is beside them comes out as it lies there
    with torch.no_grad():
        return [model.eval()(torch.tensor([tokens])).logits[0].float() for tokens in ids]


def by_megatron(weights: Weights, parallel: ParallelConfig, mesh: Mesh, ids: Sequence[Sequence[int]]) -> list[Tensor]:
    """The same by megatron-core, on rank 0. Every rank must call."""
    from grpo_mega.model.build import build_model
    from grpo_mega.model.logits import logits_of

    arch = weights.arch
    model = build_model(arch, mesh, parallel, trainable=False, weights=weights)
    return logits_of(model, arch.vocab_size, mesh, ids)


def check_memory(parameters: int, replicas: int) -> None:
    """Raise ConfigError where the models do not fit into this machine's memory in float32."""
    from grpo_mega.parallel.device import free_memory_bytes

    need, free = 4 * parameters * max(1, replicas), free_memory_bytes()
    if need > 0.9 * free:
        raise ConfigError(
            f"comparing logits takes {need / 2**30:.0f} GiB of memory ({parameters / 1e9:.1f} billion weights in "
            f"float32), and {free / 2**30:.0f} GiB are free; give --skip-logits (tensors are proved all the same), or "
            "convert on a larger machine"
        )
