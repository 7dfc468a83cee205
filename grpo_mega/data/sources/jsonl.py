"""JSONL: a file of one JSON object a line, in UTF-8."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grpo_mega.data.rows import Fields, Row, read_row
from grpo_mega.errors import DataError


def read_jsonl(name: str, fields: Fields, said: str) -> list[Row]:
    """The file's rows; messages say `said`=name of the file as a whole. Raises DataError naming file and line."""
    path = Path(name)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(
            f"{said}={name} cannot be read ({error.strerror}); give a file of one JSON object a line"
        ) from None
    if lines[-1] == b"":
        lines.pop()
    if not lines:
        raise DataError(f"{said}={name} is empty; give a file of one JSON object a line")
    rows = []
    for number, line in enumerate(lines, start=1):
        where = f"{name}:{number}"
        rows.append(read_row(_parse_line(line, where), fields, where, f"{path.name}:{number}"))
    return rows


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    if not line.strip():
        raise DataError(f"{where}: the line is empty; delete it")
    try:
        entry = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: byte {line[error.start]:#04x} at column {error.start + 1} is not UTF-8; save the file as UTF-8"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {_shown(line)} is not JSON ({error}); write one JSON object a line") from None
    if not isinstance(entry, dict):
        raise DataError(f"{where}: {_shown(line)} is not a JSON object; write {{...}} on each line")
    return entry


def _shown(line: bytes) -> str:
    text = line.decode("utf-8", "replace").strip()
    return repr(text if len(text) <= 60 else text[:57] + "...")
