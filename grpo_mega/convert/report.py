"""What a conversion says: conversion_report.json, and the lines that a person reads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from grpo_mega.convert.proof import Comparison
from grpo_mega.data.tokenizer import TOKENIZER_FILES, ChatTokenizer
from grpo_mega.model.architecture import Architecture

PACKAGES = ("grpo_mega", "torch", "transformers", "safetensors", "megatron-core")


def verdict(comparison: Comparison | None) -> str:
    if comparison is None:
        return "tensors proved, logits not compared"
    return "proved" if comparison.passes else "refused: logits differ"


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def describe_tokenizer(tokenizer: ChatTokenizer | None, arch: Architecture) -> dict[str, Any] | None:
    """None where the source has none."""
    if tokenizer is None:
        return None
    template = tokenizer.chat_template
    return {
        "files": [name for name in TOKENIZER_FILES if (arch.folder / name).is_file()],
        "tokens": tokenizer.vocab_size,
        "embedding_rows_without_a_token": arch.vocab_size - tokenizer.vocab_size,
        "special_tokens": dict(tokenizer.special_tokens),
        "stop_token_ids": list(tokenizer.stop_token_ids),
        "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest() if template else None,
    }


def show(found: dict[str, Any], say: Callable[[str], None]) -> None:
    """The report in a few lines."""
    source, destination = found["source"], found["destination"]
    dtypes = ", ".join(f"{count} {name}" for name, count in source["dtypes"].items())
    say(
        f"{source['architecture']}, {source['parameters'] / 1e6:,.1f} million weights in {source['tensors']} tensors "
        f"({dtypes}); each was read once, written once as {' and '.join(destination['dtypes'])}, and is the same read "
        "back"
    )
    by_reason: dict[str, list[str]] = {}
    for name, reason in found["dropped"].items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        say(f"left out: {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} ({reason})")
    if unsaid := destination["only_config_json_says"]:
        say(f"Megatron-LM's arguments do not say {', '.join(unsaid)}: config.json, which lies beside, does")
    if found["tokenizer"] is None:
        say("no tokenizer came along: the source has none")
    logits = found["logits"]
    if "skipped" in logits:
        say(f"logits were not compared: {logits['skipped']}")
        return
    say(
        f"logits at {logits['positions']} positions: largest difference {logits['max_difference']:.1e}, mean "
        f"{logits['mean_difference']:.1e} (largest logit {logits['largest_logit']:.1f}), KL {logits['kl']:.1e} nats, "
        f"same token on top {logits['top1_agreement']:.1%}; bound on the "
        f"{'largest' if logits['measure'] == 'max_difference' else 'mean'} difference: {logits['bound']:.1e}"
    )
    loss, chance = logits["source_loss"], logits["chance"]
    if loss is not None and loss >= chance:
        say(
            f"warning: the source predicts plain text no better than chance ({loss:.2f} nats a token, chance "
            f"{chance:.2f}): are its weights trained, and in order?"
        )


def refusal(comparison: Comparison, folder: Path) -> str:
    return (
        f"refused: the {comparison.measure.replace('_', ' ')} of logits is "
        f"{getattr(comparison, comparison.measure):.1e}, more than the {comparison.bound:.1e} that rounding explains: "
        f"source and destination are not the same model. Nothing was published; what was written is in {folder}"
    )
