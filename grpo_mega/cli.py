"""The command line: `grpo-mega train RECIPE.yaml [--section.key value ...]`, `sft`, `reward` and `eval` alike;
`report`, `selftest`, `convert`.

Under torchrun (or anything that sets RANK and WORLD_SIZE) it is one rank; alone it starts its own ranks here.
A user's mistake is one sentence on stderr and an exit code that is not 0; a defect of ours keeps its traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_mega.config import Recipe, load_recipe
from grpo_mega.errors import ConfigError, GrpoMegaError

if TYPE_CHECKING:
    from grpo_mega.config.reward_training import RewardRecipe

LAUNCHER_SECONDS = 2.0  # a launcher needs to see that a rank has failed and to end the others


def main() -> None:
    code = run(sys.argv[1:])
    if code and "RANK" in os.environ:
        from grpo_mega.trainer.ending import end_at_once

        end_at_once(code)
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Do what the arguments say; the exit code. A GrpoMegaError ends here, as its sentence on stderr."""
    parser, commands = _parser()
    options, overrides = parser.parse_known_args(arguments)
    if options.command not in ("train", "sft", "reward", "eval") and overrides:
        commands[options.command].error(f"unrecognized arguments: {' '.join(overrides)}")
    try:
        if options.command == "selftest":
            from grpo_mega.selftest.main import selftest

            return selftest(
                options.layouts,
                world_size=options.world_size,
                everything=options.all,
                dtype=options.dtype,
                as_json=options.json,
            )
        if options.command == "convert":
            return _convert(options, arguments)
        if options.command == "report":
            return _report(options.directory)
        if options.command == "eval":
            return _evaluate(options, overrides, arguments)
        if options.command == "reward":
            return _train_reward(options.recipe, overrides, options.ranks, arguments)
        recipe = load_recipe(options.recipe, overrides) if options.command == "train" else _sft(options, overrides)
        return _train(recipe, options.ranks, arguments)
    except GrpoMegaError as error:
        rank = f" rank {os.environ['RANK']}" if "RANK" in os.environ else ""
        # one write: print sends the line's end by itself, and ranks that share a terminal would mix their lines
        sys.stderr.write(f"grpo-mega{rank}: {error}\n")
        sys.stderr.flush()
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and its commands' by name."""
    parser = argparse.ArgumentParser(prog="grpo-mega", description="GRPO on megatron-core.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    training = _add_training(commands)
    report = commands.add_parser(
        "report",
        help="summarise a run directory",
        description="Print a run's settings, learning curve, cost and last completions, also while it goes on.",
    )
    report.add_argument("directory", help="run.directory of the run's recipe")
    check = commands.add_parser(
        "selftest",
        help="check on this machine that no parallel layout changes a result",
        description="Train a small model under many parallel layouts and compare each with one process: log-probs, "
        "loss, gradients, parameters after some steps, sampled tokens. Starts its own ranks, or uses a launcher's.",
    )
    check.add_argument("--layouts", nargs="+", metavar="NAME", help='such as "tp2-pp2-vpp2" or "moe-dp2-ep2"')
    check.add_argument("--world-size", type=int, metavar="N", help="only layouts of N ranks (default: 1, 2 and 4)")
    check.add_argument("--all", action="store_true", help="the whole table, of up to 8 ranks")
    check.add_argument("--dtype", choices=("fp32", "fp64", "bf16"), default="fp32")
    check.add_argument("--json", action="store_true", help="rows as JSON on stdout")
    convert = commands.add_parser(
        "convert",
        help="convert a model between Hugging Face's and Megatron's formats, and prove it",
        description="Convert a Hugging Face folder, a GGUF file or a Megatron checkpoint. Every tensor is read back, "
        "and logits of both sides are compared; what differs is not published (exit code 1).",
    )
    _add_convert(convert)
    return parser, training | {"report": report, "selftest": check, "convert": convert}


def _add_training(commands: argparse._SubParsersAction) -> dict[str, argparse.ArgumentParser]:
    """The commands that take a recipe and start ranks."""
    train = commands.add_parser(
        "train",
        help="train a policy by GRPO",
        description="Train a policy by GRPO. Any recipe key can be given as --section.key value.",
        allow_abbrev=False,
    )
    evaluation = commands.add_parser(
        "eval",
        help="evaluate a model on held-out problems",
        description="pass@k, maj@k, reward and length of model.path on the recipe's held-out problems, each with its "
        "95 % interval. Any recipe key can be given as --section.key value.",
        allow_abbrev=False,
    )
    reward = commands.add_parser(
        "reward",
        help="train a reward model from preferences or labels",
        description="Train a reward model from {prompt, chosen, rejected} or {prompt, completion, label}. Any recipe "
        "key can be given as --section.key value.",
        allow_abbrev=False,
    )
    sft = commands.add_parser(
        "sft",
        help="fine-tune a policy on demonstrations",
        description="As train, with the preset sft: maximum likelihood on the data's demonstrations, which are what "
        "data.completion_field holds, or the assistant's last message. Any recipe key can be given as --section.key "
        "value.",
        allow_abbrev=False,
    )
    for command in (train, sft, reward, evaluation):
        command.add_argument("recipe", help="a YAML file")
        command.add_argument("--ranks", type=int, help="processes to start here (default: fill this machine)")
    evaluation.add_argument(
        "--output", metavar="DIR", help="where results go (default: run.directory/evaluations/NAME, the model folder's)"
    )
    return {"train": train, "sft": sft, "reward": reward, "eval": evaluation}


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SRC", help="a Hugging Face folder, .gguf file or checkpoint")
    parser.add_argument("destination", type=Path, metavar="DST", help="the folder to make")
    parser.add_argument("--to", choices=("huggingface", "megatron"), help="default: what the source is not")
    for axis in ("tensor", "pipeline", "expert", "expert-tensor"):
        parser.add_argument(f"--{axis}", type=int, metavar="N", help=f"{axis} ranks of Megatron's side")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16", "fp64"), help="default: as the source has them")
    parser.add_argument("--names", choices=("te", "local"), default="te", help="whose names Megatron's side has: "
                        "Transformer Engine's spec (the default), or megatron-core's local one")  # fmt: skip
    parser.add_argument("--config", type=Path, metavar="FOLDER", help="config.json and tokenizer that SRC lacks")
    parser.add_argument("--skip-logits", action="store_true", help="prove tensors only; the report says so")
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    parser.add_argument("--allow-pickle", action="store_true", help="read Megatron-LM's mp_rank_XX files")
    parser.add_argument("--ranks", type=int, metavar="N", help="processes to share the work (default: as the layout)")


def _convert(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from grpo_mega.convert.main import convert
    from grpo_mega.convert.options import options_of

    return convert(options_of(options), options.ranks, arguments)


def _report(directory: str) -> int:
    from rich.console import Console

    from grpo_mega.trainer.summary import print_summary

    print_summary(Path(directory), Console())
    return 0


def ranks_to_fill(recipe: Recipe, *, trains: bool = True) -> int:
    """Whole model replicas, as many as this machine has GPUs, or cores and memory, for; between one and one a prompt.
    Where sampling, the reference or a reward model has a layout of its own, they divide into its replicas too.

    A replica on a CPU is taken to need 20 bytes a parameter (weights, gradients, Adam, reference; 4 where the layout is
    sampling's and nothing `trains`), 4 a parameter of a reward model (20 of one that is trained), and 3 GiB to work in.
    """
    from grpo_mega.model.families import read_architecture, read_scored
    from grpo_mega.parallel.device import free_memory_bytes, local_devices
    from grpo_mega.trainer.check import judging_layout, sampling_layout

    arch = read_architecture(recipe.model.path)
    parameters = arch.num_layers * arch.layer_parameters + 2 * arch.head_parameters
    sampling = sampling_layout(recipe)
    training = recipe.parallel if trains else sampling
    replica = training.replica
    whole = lcm(replica, sampling.replica, (recipe.reference.layout or training).replica if trains else 1)
    prompts, bytes_each = (recipe.batch.prompts_per_step, 20) if trains else (recipe.data.heldout, 4)
    need = bytes_each * parameters + (3 << 30)
    for config in recipe.reward_models.values():
        model = read_scored(config.path)
        whole = lcm(whole, judging_layout(config, training, model).replica)
        weights = model.num_layers * model.layer_parameters + model.hidden_size * model.vocab_size
        need += (20 if config.train is not None and trains else 4) * weights
    fit = free_memory_bytes() // need
    return max(1, min(local_devices(), replica * prompts, replica * fit) // whole) * whole


def reward_ranks_to_fill(recipe: RewardRecipe) -> int:
    """As `ranks_to_fill`, of a reward model: between one replica and one a row of a step, 16 bytes a parameter."""
    from grpo_mega.model.families import read_trunk
    from grpo_mega.parallel.device import free_memory_bytes, local_devices

    arch, _ = read_trunk(recipe.model.path)
    parameters = arch.num_layers * arch.layer_parameters + arch.hidden_size * arch.vocab_size
    replica = recipe.parallel.replica
    fit = free_memory_bytes() // (16 * parameters + (3 << 30))
    return max(1, min(local_devices(), replica * recipe.batch.examples_per_step, replica * fit) // replica) * replica


def _evaluate(options: argparse.Namespace, overrides: Sequence[str], arguments: Sequence[str]) -> int:
    recipe = load_recipe(options.recipe, overrides)

    def work() -> None:
        from grpo_mega.trainer.standalone import evaluate_model

        evaluate_model(recipe, options.output)

    def check(count: int) -> None:
        from grpo_mega.trainer.check import check_evaluation, check_output

        check_output(recipe, options.output)
        check_evaluation(recipe, count)

    return _on_ranks(
        work, check, lambda: ranks_to_fill(recipe, trains=False) if options.ranks is None else options.ranks, arguments
    )


def _train_reward(path: str, overrides: Sequence[str], ranks: int | None, arguments: Sequence[str]) -> int:
    from grpo_mega.config.loading import load_as
    from grpo_mega.config.reward_training import RewardRecipe

    recipe = load_as(RewardRecipe, path, overrides)

    def work() -> None:
        from grpo_mega.trainer.reward_main import train_reward

        train_reward(recipe)

    def check(count: int) -> None:
        from grpo_mega.trainer.check import check_reward

        check_reward(recipe, count)

    return _on_ranks(work, check, lambda: reward_ranks_to_fill(recipe) if ranks is None else ranks, arguments)


def _sft(options: argparse.Namespace, overrides: Sequence[str]) -> Recipe:
    recipe = load_recipe(options.recipe, overrides, implied="sft")
    if recipe.sampling.source != "data":
        raise ConfigError(
            f"{options.recipe}: grpo-mega sft trains on demonstrations, and sampling.source={recipe.sampling.source} "
            "does not; leave that key out, or use grpo-mega train"
        )
    return recipe


def _train(recipe: Recipe, ranks: int | None, arguments: Sequence[str]) -> int:
    def work() -> None:
        from grpo_mega.trainer.main import train

        train(recipe)

    def check(count: int) -> None:
        from grpo_mega.trainer.check import check_cheaply

        check_cheaply(recipe, count)

    return _on_ranks(work, check, lambda: ranks_to_fill(recipe) if ranks is None else ranks, arguments)


def _on_ranks(
    work: Callable[[], None], check: Callable[[int], None], ranks: Callable[[], int], arguments: Sequence[str]
) -> int:
    """Do a rank's work under a launcher; without one, check what can be checked and be the launcher."""
    if "RANK" in os.environ:
        from grpo_mega.parallel.device import quiet_megatron

        quiet_megatron()
        try:
            work()
        except RuntimeError:
            # when another rank ends with its sentence, this one sees a broken connection: the launcher ends it too,
            # and is to be quicker than a traceback that explains nothing
            time.sleep(LAUNCHER_SECONDS if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0)
            raise
        return 0
    from grpo_mega.parallel.launch import start_ranks

    count = ranks()
    check(count)
    print(f"grpo_mega: starting {count} ranks; torch and megatron-core take some seconds to load", flush=True)
    return start_ranks(count, ["-m", "grpo_mega", *arguments])
