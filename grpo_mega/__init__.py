"""grpo_mega: GRPO (arXiv:2402.03300) on megatron-core. How you shard it never changes what you compute."""

__version__ = "0.1.0"
