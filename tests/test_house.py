"""The house rules that a machine can hold: who imports whom, who names a backend, how long things get.

An import counts wherever it stands, inside a function or under TYPE_CHECKING too: lazy is about time, not direction.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo_mega.config import load_recipe

REPOSITORY = Path(__file__).resolve().parent.parent
FILE_LINES, FUNCTION_LINES = 400, 60
FLOORS = {  # a room imports its own floor and lower ones; __init__ is grpo_mega/__init__.py
    **dict.fromkeys(("__init__", "errors", "types", "config"), 0),
    **dict.fromkeys(("objective", "rewards"), 1),
    "data": 2,
    "parallel": 3,
    "model": 4,
    "rollout": 5,
    "trainer": 6,
    **dict.fromkeys(("cli", "selftest", "convert", "__main__"), 7),
}
ONLY = {  # a library, or a part of one -> the rooms and modules that may name it
    # of model.formats the records of checkpoints alone
    "torch.distributed": (
        "parallel",
        "trainer.checkpoint",
        "model.formats.torch_dist",
        "model.formats.torch_dist_writer",
    ),
    "megatron.core.parallel_state": ("parallel.mesh",),
    "megatron": ("parallel", "model", "trainer"),
    "transformer_engine": ("model.precision", "model.specs"),
    "apex": ("model.precision", "model.specs"),
    "vllm": ("rollout.vllm",),
    "torch.cuda": ("parallel.device", "parallel.cpu"),
}
BACKENDS = ("nccl", "gloo")  # as string literals, where torch.cuda may be named


def within(name: str, parent: str) -> bool:
    """Whether a dotted name is `parent` or lies below it."""
    return name == parent or name.startswith(parent + ".")


def violations(source: str, module: str) -> list[str]:
    """What breaks a rule in a file of grpo_mega; `module` is its dotted name below grpo_mega ("parallel.mesh")."""
    tree, room = ast.parse(source), module.split(".")[0]
    if room not in FLOORS:
        return [f"{module}:1 is in no room of the house; give {room!r} a floor in FLOORS"]
    found = []
    for line, name in names(tree, module):
        if within(name, "grpo_mega") and name != "grpo_mega":
            other = name.split(".")[1]
            if FLOORS.get(other, 0) > FLOORS[room]:
                found.append(f"{module}:{line} {name} is above floor {FLOORS[room]}")
        for owned, owners in ONLY.items():
            if within(name, owned) and not any(within(module, owner) for owner in owners):
                found.append(f"{module}:{line} {name} may be named only in {', '.join(owners)}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in BACKENDS and module not in ONLY["torch.cuda"]:
            found.append(
                f"{module}:{node.lineno} {node.value!r} may be written only in {', '.join(ONLY['torch.cuda'])}"
            )
    return list(dict.fromkeys(found))


def names(tree: ast.Module, module: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of whatever is imported, and of each attribute chain that starts at an imported name."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                aliases[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            package = ["grpo_mega", *module.split(".")][: -node.level] if node.level else []
            origin = ".".join([*package, *([node.module] if node.module else [])])
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{origin}.{alias.name}"
                yield node.lineno, f"{origin}.{alias.name}"
        elif isinstance(node, ast.Call) and dotted(node.func, {}).split(".")[-1] in ("import_module", "__import__"):
            yield from ((node.lineno, str(word.value)) for word in node.args[:1] if isinstance(word, ast.Constant))
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    inner = {id(node.value) for node in attributes}
    for node in attributes:
        if id(node) not in inner and (name := dotted(node, aliases)):
            yield node.lineno, name


def dotted(node: ast.AST, aliases: dict[str, str]) -> str:
    """`a.b.c` as written, its first name replaced by what it was imported as; "" for anything else."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute) and (left := dotted(node.value, aliases)):
        return f"{left}.{node.attr}"
    return ""


def too_long(source: str, file: str) -> list[str]:
    found = []
    if (lines := len(source.splitlines())) > FILE_LINES:
        found.append(f"{file} has {lines} lines, more than {FILE_LINES}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            if lines > FUNCTION_LINES:
                found.append(f"{file}:{node.lineno} {node.name} has {lines} lines, more than {FUNCTION_LINES}")
    return found


def modules() -> Iterator[tuple[str, str]]:
    """(dotted name below grpo_mega, source) of each file of the package; a room's __init__ has the room's name."""
    package = REPOSITORY / "grpo_mega"
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts if len(parts) == 1 or parts[-1] != "__init__" else parts[:-1])
        yield name, path.read_text(encoding="utf-8")


def test_rooms_import_downwards_and_leave_libraries_to_their_owners():
    found = [line for module, source in modules() for line in violations(source, module)]
    assert not found, "\n" + "\n".join(found)


def test_files_and_functions_stay_short():
    files = [path for folder in ("grpo_mega", "tools") for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    assert len(files) > 10
    found = [
        line for path in files for line in too_long(path.read_text(encoding="utf-8"), str(path.relative_to(REPOSITORY)))
    ]
    assert not found, "\n" + "\n".join(found)


def test_every_recipe_validates():
    paths = sorted((REPOSITORY / "launch" / "recipes").glob("*.yaml"))
    directories = [load_recipe(path).run.directory for path in paths]  # raises for one that does not
    assert len(set(directories)) == len(paths) >= 4  # and none goes on in another's run


@pytest.mark.parametrize(
    ("module", "source", "named"),
    [
        ("objective.kl", "from grpo_mega.data import packing", "grpo_mega.data.packing"),
        ("objective.kl", "def f():\n    import grpo_mega.model.build", "grpo_mega.model.build"),
        ("data.rows", "from grpo_mega import parallel", "grpo_mega.parallel"),
        ("data.rows", "from ..trainer import loop", "grpo_mega.trainer.loop"),
        ("config", "import importlib\nimportlib.import_module('grpo_mega.cli')", "grpo_mega.cli"),
        ("model.bridge", "import torch.distributed as dist", "torch.distributed"),
        ("model.bridge", "import torch\ndef f(g: torch.distributed.ProcessGroup): ...", "torch.distributed"),
        ("model.bridge", "import torch as t\nt.distributed.barrier()", "torch.distributed.barrier"),
        ("trainer.loop", "from torch import distributed", "torch.distributed"),
        ("parallel.collectives", "from megatron.core import parallel_state", "megatron.core.parallel_state"),
        ("model.build", "from megatron import core\ncore.parallel_state.is_initialized()", "parallel_state"),
        ("rollout.in_process", "if True:\n    from megatron.core import mpu", "megatron.core.mpu"),
        ("model.build", "import transformer_engine.pytorch as te", "transformer_engine.pytorch"),
        ("parallel.cpu", "import apex", "apex"),
        ("rollout.sampler", "from vllm import LLM", "vllm.LLM"),
        ("model.specs", "import torch\ntorch.cuda.current_device()", "torch.cuda.current_device"),
        ("trainer.policy", "def backend():\n    return 'nccl'", "'nccl'"),
        ("utils.text", "", "no room"),
    ],
)
def test_the_checker_sees_a_violation(module, source, named):
    assert any(named in line for line in violations(source, module)), violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("model.build", "import torch\nfrom megatron.core.transformer import mlp\nfrom grpo_mega.parallel import mesh"),
        ("parallel.mesh", "import torch.distributed as dist\nfrom megatron.core import parallel_state as mpu"),
        ("parallel.device", "import torch\ntorch.cuda.is_available() and 'nccl' or 'gloo'"),
        ("trainer.checkpoint", "import torch.distributed as dist\nfrom megatron.core import dist_checkpointing"),
        ("trainer.loop", "from grpo_mega.rollout import sampler\nfrom grpo_mega import __version__"),
        ("objective.kl", '"""On gloo and nccl alike."""\nfrom torch import Tensor'),
        ("__main__", "from grpo_mega.cli import main"),
    ],
)
def test_the_checker_lets_the_house_stand(module, source):
    assert violations(source, module) == []


def test_the_checker_counts_lines():
    body = "\n".join(["def f():", *["    x = 1"] * (FUNCTION_LINES - 1)])
    assert too_long(body, "f.py") == []
    assert too_long(body + "\n    x = 1", "f.py") == ["f.py:1 f has 61 lines, more than 60"]
    assert too_long("x = 1\n" * (FILE_LINES + 1), "f.py") == ["f.py has 401 lines, more than 400"]
