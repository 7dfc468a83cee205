"""Files of one JSON object a line, read as far as they are whole: a run that was killed may leave half a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of a file, none if it is not there, and how many lines are no whole record."""
    if not path.exists():
        return [], 0
    records, broken = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        else:
            broken += 1
    return records, broken


def bracketed(mean: float, low: float, high: float) -> str:
    """A mean with its interval, "0.708 (0.590 to 0.803)"; the mean alone where the interval is nan."""
    return f"{mean:.3f} ({low:.3f} to {high:.3f})" if low == low else f"{mean:.3f}"


def one_line(text: str, limit: int = 100) -> str:
    """A text for a terminal: on one line of at most `limit` characters, none of which can move its cursor."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
    return text if len(text) <= limit else text[: limit - 3] + "..."
