"""How far bf16 log-probs are from float32's, on the completions of one step of any recipe; one process.

    python tools/compare_precision.py launch/recipes/quickstart.yaml [--section.key value ...]

The float32 policy answers a step's first prompts; then both score what it wrote. A ratio of two policies whose
log-probs differ by d is off by exp(d): printed is also how many tokens would leave the clip range by rounding alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from types import SimpleNamespace

import torch

from grpo_mega.config import load_recipe
from grpo_mega.errors import GrpoMegaError
from grpo_mega.parallel import mesh
from grpo_mega.parallel.device import quiet_megatron

PROMPTS = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a YAML file; --section.key value overrides it")
    options, overrides = parser.parse_known_args()
    try:
        compare(options.recipe, [*overrides, "--precision", "{dtype: fp32}"])
    except GrpoMegaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def compare(path: str, overrides: list[str]) -> None:
    quiet_megatron()
    from grpo_mega.model.build import DTYPES, build_model
    from grpo_mega.trainer.batches import equalize
    from grpo_mega.trainer.heads import TokenHead
    from grpo_mega.trainer.policy import Scorer
    from grpo_mega.trainer.progress import progress_on
    from grpo_mega.trainer.setup import build_samplers, read_inputs
    from grpo_mega.types import Sample

    recipe = load_recipe(path, overrides)
    inputs, grid = read_inputs(recipe, 1), mesh.initialize()
    models = {
        name: build_model(inputs.arch, grid, recipe.parallel, dtype=DTYPES[name], trainable=False)
        for name in ("fp32", "bf16")
    }
    prompts = inputs.prompts.next(min(PROMPTS, recipe.batch.prompts_per_step))
    frozen = SimpleNamespace(model=models["fp32"], settled=lambda: models["fp32"])  # a policy, as far as samplers know
    sampler = build_samplers(recipe, inputs, grid, frozen, progress_on(speaks=False))(recipe.sampling)
    groups = sampler.sample(prompts, range(len(prompts)), recipe.grpo.group_size, 0)
    samples = [
        Sample(
            order=n * len(group) + i, group=n, prompt_tokens=len(prompt.token_ids), advantage=1.0, weight=1.0,
            token_ids=prompt.token_ids + completion.token_ids, kept=completion.kept,
            loss_mask=(False,) * len(prompt.token_ids) + (True,) * len(completion.token_ids),
            sampler_logprobs=(0.0,) * len(prompt.token_ids) + completion.sampler_logprobs,
        )
        for n, (prompt, group) in enumerate(zip(prompts, groups, strict=True))
        for i, completion in enumerate(group)
    ]  # fmt: skip
    batches = equalize(samples, 1, recipe.batch.tokens_per_microbatch, grid, torch.float32)
    found, seconds = {}, {}
    for name, model in models.items():
        scorer = Scorer(TokenHead(model, inputs.arch.vocab_size, grid, recipe.sampling.temperature))
        scorer.logprobs(batches)
        started = time.perf_counter()
        several = scorer.logprobs(batches)
        seconds[name] = time.perf_counter() - started
        found[name] = torch.cat([x[b.loss_weights != 0] for x, b in zip(several, batches, strict=True)])
    off = (found["bf16"] - found["fp32"]).abs().double()
    sizes = {name: sum(p.nbytes for p in model.parameters()) / 2**20 for name, model in models.items()}
    low, high = recipe.grpo.clip_low, recipe.grpo.clip_high
    ratio = torch.exp(found["bf16"] - found["fp32"])
    print(f"{len(off)} sampled tokens of {inputs.arch.folder}, bf16 against float32:")
    print(
        f"|log-prob difference|: mean {off.mean():.1e}, 99th percentile {off.quantile(0.99):.1e}, max {off.max():.1e}"
    )
    print(f"mean difference: {(found['bf16'] - found['fp32']).mean():+.1e} nats")
    print(f"ratios outside [{1 - low:g}, {1 + high:g}]: {((ratio < 1 - low) | (ratio > 1 + high)).double().mean():.2%}")
    print(f"weights: {sizes['fp32']:.0f} and {sizes['bf16']:.0f} MiB; log-prob pass: bf16 takes "
          f"{seconds['bf16'] / seconds['fp32']:.2f} times float32's time")  # fmt: skip
    mesh.shutdown()


if __name__ == "__main__":
    sys.exit(main())
