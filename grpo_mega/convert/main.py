"""The command: open, write aside, read back, compare logits, report, publish."""

from __future__ import annotations

import json
import os
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
    read_back,
    target_dtypes,
    together,
)
from grpo_mega.data.tokenizer import ChatTokenizer, check_vocabulary, load_tokenizer
from grpo_mega.errors import DataError
from grpo_mega.model.architecture import check_experts, check_layout, padded_vocab_size
from grpo_mega.model.families import read_architecture
from grpo_mega.model.formats import Weights, open_weights
from grpo_mega.model.formats.hugging_face import TOKENIZER_MARKS
from grpo_mega.model.names import shapes
from grpo_mega.parallel import collectives, mesh
from grpo_mega.trainer.progress import Progress, progress_on


def convert(options: Options, ranks: int | None, arguments: Sequence[str]) -> int:
    """Convert in this process, in ranks of its own, or as one rank of a launcher's; the exit code."""
    options.check()
    if "RANK" not in os.environ:
        with tempfile.TemporaryDirectory(prefix="grpo-mega-convert-") as scratch:
            check(opened(options, Path(scratch)), options)  # what can be refused is refused once
        count = ranks or (1 if options.skip_logits else options.ranks)
        if count > 1:
            from grpo_mega.parallel.launch import start_ranks

            return start_ranks(count, ["-m", "grpo_mega", *arguments])
    from grpo_mega.parallel.device import quiet_megatron

    quiet_megatron()
    sizes = {} if options.skip_logits else options.parallel.sizes
    grid = mesh.initialize(**sizes)
    progress = progress_on(speaks=grid.is_writer)
    with tempfile.TemporaryDirectory(prefix="grpo-mega-convert-") as scratch, closing(progress):
        code = Conversion(options, grid, progress, Path(scratch)).run()
    mesh.shutdown()
    return code


def opened(options: Options, scratch: Path) -> Source:
    return open_source(options.source, scratch, config=options.config, allow_pickle=options.allow_pickle)


def check(source: Source, options: Options) -> ChatTokenizer | None:
    """What needs no other rank: tensors, layout, tokenizer, disk, memory. Raises GrpoMegaError."""
    arch, parallel = source.arch, options.parallel
    source.check()
    check_layout(arch, parallel.tensor, parallel.pipeline, "--", virtual=parallel.virtual_pipeline)
    check_experts(arch, parallel.tensor, parallel.expert, parallel.expert_tensor, "--")
    tokenizer = None
    if any((arch.folder / name).exists() for name in TOKENIZER_MARKS):
        tokenizer = load_tokenizer(arch.folder)
        check_vocabulary(tokenizer, str(arch.folder), arch.vocab_size)
    dtypes = target_dtypes(source, options.dtype)
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes(arch).items()}
    check_space(options.destination, sum(count * dtypes[name].itemsize for name, count in sizes.items()))
    if not options.skip_logits:
        replicas = options.ranks // parallel.replica
        proof.check_memory(arch, sum(sizes.values()), replicas)
    return tokenizer


class Conversion:
    """One conversion on one rank; every rank makes the same calls."""

    def __init__(self, options: Options, grid: mesh.Mesh, progress: Progress, scratch: Path):
        self.options, self.grid, self.progress = options, grid, progress
        self.source = opened(options, scratch)
        self.tokenizer = check(self.source, options)
        self.dtypes = target_dtypes(self.source, options.dtype)

    def run(self) -> int:
        """0 when the destination is published; 1 when the logits differ: then it stands under another name."""
        options, grid, progress = self.options, self.grid, self.progress
        verified = together(grid, lambda: check_downloads(options.source) if grid.is_writer else 0)
        make = HuggingFaceTarget if options.to == "huggingface" else MegatronTarget
        target: Target = make(self.source, options, self.dtypes, grid)
        try:
            with progress.task("writing", f" {options.destination}"):
                target.write(grid, progress.tick)
            self._used_once()
            arch = read_architecture(target.partial)
            with progress.task("reading back"):
                known = known_digests(options.source)
                digests = read_back(self.source, open_weights(arch), self.dtypes, known, grid, progress.tick)
            comparison = self._logits(target)
            found = self._report(comparison, digests, len(known), verified)
            if grid.is_writer:
                (target.partial / REPORT).write_text(json.dumps(found, indent=1))
                report.show(found, progress.say)
            if comparison is not None and not comparison.passes:
                if grid.is_writer:
                    refused = options.destination.with_name(options.destination.name + ".refused")
                    shutil.rmtree(refused, ignore_errors=True)
                    target.partial.rename(refused)
                    progress.say(report.refusal(comparison, refused))
                return 1
            together(grid, target.publish if grid.is_writer else lambda: None)
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

    def _logits(self, target: Target) -> proof.Comparison | None:
        """The comparison, the same on every rank; None where it is not asked for."""
        options, grid, source = self.options, self.grid, self.source
        if options.skip_logits:
            return None
        ids = proof.prompts(self.tokenizer, source.arch.vocab_size)
        with self.progress.task("logits of the source"):
            before = self._run(source.kind, source.path, source.weights, ids)
        with self.progress.task("logits of the destination"):
            written = open_weights(read_architecture(target.partial))
            after = self._run(options.to, target.partial, written, ids)
        found = None
        if grid.is_writer:
            names = shapes(source.arch)
            bound = proof.bound_of(source.arch, {source.dtype(n) for n in names}, set(self.dtypes.values()))
            found = proof.compare(before, after, ids, bound=bound, texts=self.tokenizer is not None)
        return collectives.broadcast_object(found, grid.world.group)

    def _run(self, kind: str, path: Path, weights: Weights, ids: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        if kind == "megatron":
            return proof.by_megatron(weights, self.options.parallel, self.grid, ids)
        found = together(self.grid, lambda: _by_transformers(path, ids) if self.grid.is_writer else [])
        return found

    def _report(
        self, comparison: proof.Comparison | None, digests: Mapping[str, str], known: int, verified: int
    ) -> dict[str, Any]:
        options, arch = self.options, self.source.arch
        parallel = options.parallel
        padded = padded_vocab_size(arch.vocab_size, parallel.tensor)
        return {
            "verdict": report.verdict(comparison),
            "source": summary(self.source)
            | {"tensors_checked_against_a_report": known, "files_checked_against_their_download": verified},
            "destination": {
                "path": str(options.destination),
                "format": options.to,
                "dtypes": sorted({str(dtype).removeprefix("torch.") for dtype in self.dtypes.values()}),
            },
            "layout": {key: value for key, value in parallel.sizes.items() if value and value > 1},
            "dropped": self.source.dropped(),
            "vocabulary": {"rows": arch.vocab_size, "padded_for_this_layout": padded},
            "tokenizer": report.describe_tokenizer(self.tokenizer, arch),
            "logits": {"skipped": "--skip-logits was given"} if comparison is None else comparison.as_dict(),
            "versions": report.versions(),
            "digests": dict(digests),
        }


def _by_transformers(path: Path, ids: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    try:
        return proof.by_transformers(path, ids)
    except (ValueError, KeyError, OSError, RuntimeError, ImportError) as error:  # whatever its loaders do
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"transformers cannot run {path} ({type(error).__name__}: {reason}); without it logits cannot be compared: "
            "mend the folder, or give --skip-logits"
        ) from error
