"""The shapes of the self-test's models, and whether a layout can cut them: within a second, without megatron."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grpo_mega.config import ParallelConfig, validate_recipe
from grpo_mega.model.architecture import check_layout
from grpo_mega.model.families import read_architecture
from grpo_mega.model.layout import layers_per_stage
from grpo_mega.selftest.cases import Case

VOCABULARY = 91  # 7 x 13: every tensor size of the table pads it
PROMPTS, GROUP, LIMIT = 8, 4, 12
CONFIGS: dict[str, dict[str, Any]] = {
    "dense": {"architectures": ["LlamaForCausalLM"]},
    "moe": {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2},
}


def write_config(folder: Path, kind: str) -> Path:
    """`folder/config.json`: 4 layers, H = 32, 8 heads."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "head_dim": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
        "tie_word_embeddings": kind == "dense", "rope_theta": 10000.0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | CONFIGS[kind]))
    return folder


def settings_of(case: Case, folder: Path) -> dict[str, Any]:
    """The case as a recipe's sections."""
    return {
        "model": {"path": str(folder), "recompute": case.recompute},
        "parallel": case.parallel,
        "reference": case.reference,
        "data": {"jsonl": "unused"},
        "sampling": {"max_completion_tokens": LIMIT, "temperature": 0.9},
        "grpo": {
            "group_size": GROUP, "kl_coef": 0.1, "normalization": case.normalization, "num_iterations": case.iterations,
        },
        "batch": {
            "prompts_per_step": PROMPTS, "minibatches": case.minibatches, "tokens_per_microbatch": case.rows,
        },
        # so large an eps that an update is no mere sign of a gradient which rounding may turn
        "optimizer": {"lr": 1e-2, "eps": 1e-2, "distributed": case.distributed},
        "run": {"directory": "unused", "num_steps": 3},
    }  # fmt: skip


def check(case: Case, scratch: Path) -> None:
    """Raise ConfigError for a layout that no model of ours can be cut into."""
    folder = write_config(scratch / case.model, case.model)
    recipe = validate_recipe(settings_of(case, folder), f"--layouts {case.name}")
    arch = read_architecture(folder)
    for parallel in (recipe.parallel, ParallelConfig.model_validate(case.reference)):
        check_layout(arch, parallel.tensor, parallel.pipeline, virtual=parallel.virtual_pipeline)
        layers_per_stage(arch, parallel.stages)
