"""The recipe: one YAML file a run, typed, validated before anything is loaded, overridden by `--section.key value`.

A recipe states what to compute. How many ranks there are is not its business: data parallelism follows from the
world size. Unknown keys are errors that name the nearest known one. `recipe` has the sections; `loading` the files;
`presets` published methods by name.
"""

from grpo_mega.config.data import DataConfig, PlaceConfig, SourceConfig
from grpo_mega.config.evaluation import EvaluationConfig
from grpo_mega.config.grpo import GrpoConfig
from grpo_mega.config.loading import load_recipe, to_yaml, validate_recipe
from grpo_mega.config.recipe import MoeConfig, OptimizerConfig, ParallelConfig, Recipe, SamplingConfig
from grpo_mega.config.reward import RewardConfig

__all__ = [
    "DataConfig",
    "EvaluationConfig",
    "GrpoConfig",
    "MoeConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PlaceConfig",
    "Recipe",
    "RewardConfig",
    "SamplingConfig",
    "SourceConfig",
    "load_recipe",
    "to_yaml",
    "validate_recipe",
]
