"""Packaging. requirements.txt pins what the tests run with; the ranges here are what the code is written for."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "grpo_mega" / "__init__.py").read_text(encoding="utf-8"))

setup(
    name="grpo_mega",
    version=VERSION.group(1),
    description="GRPO on megatron-core: how you shard it never changes what you compute",
    license="Apache-2.0",
    packages=find_packages(include=["grpo_mega", "grpo_mega.*"]),
    package_data={"grpo_mega.config.presets": ["*.yaml"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11,<3",
        "megatron-core>=0.16.1,<0.20",  # 0.16.1 is the newest for Python 3.10 and 3.11; later ones ask for 3.12
        "einops",  # megatron-core imports it without declaring it
        "psutil",  # the same, in its checkpoint writer
        "numpy>=1.26,<3",
        "transformers>=5,<6",
        "accelerate>=1,<2",  # transformers runs no GGUF file, and no 8-bit blocks, without it
        "tokenizers>=0.22,<1",
        "jinja2>=3.1",  # chat templates
        "sentencepiece>=0.2",
        "safetensors>=0.5,<1",
        "gguf>=0.17,<1",
        "pydantic>=2.7,<3",
        "pyyaml>=6",
        "rich>=13",
        "tensorboard>=2.15",
        "pyarrow>=16",  # rollouts and Parquet data
        "datasets>=3",
        "reasoning-gym>=0.1.25,<0.2",
        "math-verify>=0.8,<1",
    ],
    extras_require={
        # NVIDIA apex has no package there (PyPI's "apex" is unrelated); Transformer Engine serves without it
        "gpu": [
            'transformer-engine[pytorch]>=2.9,<2.12; python_version < "3.12"',  # what megatron-core 0.16.1 declares
            'transformer-engine[pytorch]>=2.20,<3; python_version >= "3.12"',  # of the time of 0.19.2, which names none
            "triton>=3",
        ],
        "mpi": ["mpi4py>=4"],
        "test": ["pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.5", 'triton>=3; sys_platform == "linux"'],
        "dev": ["ruff", "mypy"],
    },
    entry_points={"console_scripts": ["grpo-mega = grpo_mega.cli:main"]},
)
