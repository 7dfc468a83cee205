"""The command: open, write aside, read back, compare logits, report, publish."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from grpo_mega.convert import proof, report
from grpo_mega.convert.options import REPORT, Options
from grpo_mega.convert.source import Source, check_downloads, known_digests, open_source, summary
from grpo_mega.convert.write import (
    HuggingFaceTarget,
    MegatronTarget,
    Target,
    check_space,
    on_writer,
    read_back,
    target_dtypes,
)
from grpo_mega.data.tokenizer import ChatTokenizer, check_vocabulary, load_tokenizer
from grpo_mega.errors import ConfigError, DataError
from grpo_mega.model.families import read_architecture
from grpo_mega.model.formats import Weights, open_weights
from grpo_mega.model.formats.hugging_face import TOKENIZER_MARKS
from grpo_mega.model.names import shapes
from grpo_mega.parallel import collectives, mesh
from grpo_mega.trainer.check import check_parallel
from grpo_mega.trainer.progress import Progress, progress_on


def convert(options: Options, ranks: int | None, arguments: Sequence[str]) -> int:
    """Convert in this process, in ranks of its own, or as one rank of a launcher's; the exit code."""
    options.check()
    alone = "RANK" not in os.environ
    fewest = 1 if options.skip_logits else options.ranks
    count = (ranks or fewest) if alone else mesh.world_size_from_environment()
    with tempfile.TemporaryDirectory(prefix="grpo-mega-convert-") as scratch:
        source = open_source(options.source, Path(scratch), config=options.config, allow_pickle=options.allow_pickle)
        tokenizer = check(source, options, count)  # what can be refused is refused before any rank waits for another
        if alone and count > 1:
            from grpo_mega.parallel.launch import start_ranks

            return start_ranks(count, ["-m", "grpo_mega", *arguments])
        from grpo_mega.parallel.device import quiet_megatron

        quiet_megatron()
        grid = mesh.initialize(**({} if options.skip_logits else options.parallel.sizes))
        with closing(progress_on(speaks=grid.is_writer)) as progress:
            code = Conversion(options, grid, progress, source, tokenizer).run()
    mesh.shutdown()
    return code


def check(source: Source, options: Options, ranks: int) -> ChatTokenizer | None:
    """What needs no other rank: tensors, layout, tokenizer, disk, memory. Raises GrpoMegaError."""
    arch = source.arch
    source.check()
    try:
        check_parallel(arch, options.parallel, ranks if not options.skip_logits else options.ranks)
    except ConfigError as error:
        raise ConfigError(
            re.sub(r"parallel\.(\w+)", lambda axis: "--" + axis[1].replace("_", "-"), str(error))
        ) from None
    tokenizer = None
    if any((arch.folder / name).exists() for name in TOKENIZER_MARKS):
        tokenizer = load_tokenizer(arch.folder)
        check_vocabulary(tokenizer, str(arch.folder), arch.vocab_size)
    dtypes = target_dtypes(source, options.dtype)
    sizes = {name: math.prod(shape) for name, shape in shapes(arch).items()}
    check_space(options.destination, sum(count * dtypes[name].itemsize for name, count in sizes.items()))
    if not options.skip_logits:
        proof.check_memory(sum(sizes.values()), ranks // options.parallel.replica)
    return tokenizer


def _as_options(words: str) -> str:
    """A recipe's names for the axes of a layout, as this command's."""
    return re.sub(r"parallel\.(\w+)", lambda axis: "--" + axis[1].replace("_", "-"), words)


class Conversion:
    """One conversion on one rank; every rank makes the same calls."""

    def __init__(
        self, options: Options, grid: mesh.Mesh, progress: Progress, source: Source, tokenizer: ChatTokenizer | None
    ):
        self.options, self.grid, self.progress, self.source, self.tokenizer = options, grid, progress, source, tokenizer
        self.dtypes = target_dtypes(source, options.dtype)

    def run(self) -> int:
        """0 when the destination is published; 1 when the logits differ: then it stands under another name."""
        options, grid, progress = self.options, self.grid, self.progress
        verified = on_writer(grid, lambda: check_downloads(options.source))
        known = known_digests(options.source)
        make = HuggingFaceTarget if options.to == "huggingface" else MegatronTarget
        target: Target = make(self.source, options, self.dtypes, grid)
        try:
            with progress.task("writing", f" {options.destination}"):
                target.write(grid, progress.tick)
            self._used_once()
            written = open_weights(read_architecture(target.partial))
            with progress.task("reading back"):
                digests = read_back(self.source, written, self.dtypes, known, grid, progress.tick)
            comparison = self._logits(target.partial, written)
            checked = {"tensors_checked_against_a_report": len(known), "files_checked_against_their_download": verified}
            found = self._report(target, comparison, digests, checked)
            on_writer(grid, lambda: (target.partial / REPORT).write_text(json.dumps(found, indent=1)))
            report.show(found, progress.say)
            if comparison is not None and not comparison.passes:
                refused = options.destination.with_name(options.destination.name + ".refused")
                on_writer(grid, lambda: move(target.partial, refused))
                progress.say(report.refusal(comparison, refused))
                return 1
            on_writer(grid, target.publish)
        finally:
            if grid.is_writer:
                shutil.rmtree(target.partial, ignore_errors=True)
        progress.say(f"{options.destination}: {found['verdict']}")
        return 0

    def _used_once(self) -> None:
        """Raise AssertionError unless the ranks together have read every number of every tensor once."""
        total: dict[str, int] = {}
        for part in collectives.gather_objects(self.source.read_numbers, self.grid.world.group):
            for name, count in part.items():
                total[name] = total.get(name, 0) + count
        if wrong := self.source.misread(total):
            raise AssertionError(f"{len(wrong)} tensors were not used exactly once; {wrong[0]}")

    def _logits(self, partial: Path, written: Weights) -> proof.Comparison | None:
        """The comparison, the same on every rank; None where it is not asked for."""
        options, grid, source = self.options, self.grid, self.source
        if options.skip_logits:
            return None
        ids = proof.prompts(self.tokenizer, source.arch.vocab_size)
        with self.progress.task("logits of the source"):
            before = self._run(source.kind, source.path, source.weights, ids)
        with self.progress.task("logits of the destination"):
            after = self._run(options.to, partial, written, ids)
        found = None
        if grid.is_writer:
            bound = proof.bound_of(source.arch, set(self.dtypes.values()), rounded=source.rounds_to(self.dtypes))
            found = proof.compare(before, after, ids, bound=bound, texts=self.tokenizer is not None)
        return collectives.broadcast_object(found, grid.world.group)

    def _run(self, kind: str, path: Path, weights: Weights, ids: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Logits on the writing rank."""
        if kind == "megatron":
            return proof.by_megatron(weights, self.options.parallel, self.grid, ids)
        return on_writer(self.grid, lambda: _by_transformers(path, ids)) or []

    def _report(
        self,
        target: Target,
        comparison: proof.Comparison | None,
        digests: Mapping[str, str],
        checked: Mapping[str, int | None],
    ) -> dict[str, Any]:
        options, arch = self.options, self.source.arch
        return {
            "verdict": report.verdict(comparison),
            "source": {**summary(self.source), **checked},
            "destination": {
                "path": str(options.destination),
                "format": options.to,
                "dtypes": sorted({str(dtype).removeprefix("torch.") for dtype in self.dtypes.values()}),
                "layout": {key: value for key, value in options.parallel.sizes.items() if value and value > 1},
                "vocabulary_rows": target.rows,
                "only_config_json_says": target.unsaid,
            },
            "vocabulary_rows": arch.vocab_size,
            "dropped": self.source.dropped(),
            "tokenizer": report.describe_tokenizer(self.tokenizer, arch),
            "logits": {"skipped": "--skip-logits was given"} if comparison is None else comparison.as_dict(),
            "versions": report.versions(),
            "digests": dict(digests),
        }


def move(folder: Path, name: Path) -> None:
    """Rename a folder to a name of which something may be left."""
    shutil.rmtree(name, ignore_errors=True)
    folder.rename(name)


def _by_transformers(path: Path, ids: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    try:
        return proof.by_transformers(path, ids)
    except (ValueError, KeyError, OSError, RuntimeError, ImportError) as error:  # whatever its loaders do
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"transformers cannot run {path} ({type(error).__name__}: {reason}); without it logits cannot be compared: "
            "mend the folder, or give --skip-logits"
        ) from error
