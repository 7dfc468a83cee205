"""Parquet files, and the rows of any Arrow table (what `datasets` keeps too)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from grpo_mega.data.rows import Fields, Row, read_row
from grpo_mega.errors import DataError

if TYPE_CHECKING:
    import pyarrow


def read_parquet(name: str, fields: Fields, said: str) -> list[Row]:
    """The file's rows; messages say `said`=name of the file as a whole. Raises DataError naming file and row."""
    from pyarrow import ArrowException, parquet

    path = Path(name)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "cannot be read (No such file or directory)"
        raise DataError(f"{said}={name} {found}; give a Parquet file (data.dataset takes folders)")
    try:
        # the file alone: the table readers of pyarrow take partitions from the folders' names
        table = parquet.ParquetFile(path).read()
    except (ArrowException, OSError) as error:
        raise DataError(f"{said}={name} cannot be read as Parquet ({_reason(error)}); write the file anew") from None
    return table_rows(table, fields, name, said)


def table_rows(table: pyarrow.Table, fields: Fields, name: str, said: str) -> list[Row]:
    """The rows of a table that was read from `name`. Rows count from 0, as in pandas and datasets: "train.parquet[3]".

    A prompt column that can hold no prompt is refused by its type, before any row.
    """
    if not table.num_rows:
        raise DataError(f"{said}={name} holds no rows; give at least one")
    if fields.prompt in table.column_names:
        _check_type(table, fields, name)
    try:
        entries = table.to_pylist()
    except UnicodeDecodeError:
        raise DataError(_not_text(table, name)) from None
    short = Path(name).name
    return [read_row(entry, fields, f"{name}[{i}]", f"{short}[{i}]") for i, entry in enumerate(entries)]


def _check_type(table: pyarrow.Table, fields: Fields, name: str) -> None:
    kind = table.schema.field(fields.prompt).type
    if not _is_text(kind) and not _is_list(kind):
        texts = [field.name for field in table.schema if _is_text(field.type) or _is_list(field.type)]
        known = f"one of the columns of text or messages ({', '.join(texts)})" if texts else "a column of text"
        raise DataError(
            f"{name}: column {fields.prompt!r} is of type {kind}, not text; set {fields.key}.prompt_field to {known}, "
            "or write the column as text"
        )


def _is_text(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_list(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    return types.is_list(kind) or types.is_large_list(kind)


def _not_text(table: pyarrow.Table, name: str) -> str:
    """Where the first value stands whose bytes are not UTF-8: writers of Parquet need not check."""
    for i in range(table.num_rows):
        for column in table.column_names:
            try:
                table[column][i].as_py()
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                return f"{name}[{i}]: {column!r} has byte {byte:#04x}, which is not UTF-8; write the column as UTF-8"
    return f"{name}: a column's name is not UTF-8; write it as UTF-8"


def _reason(error: Exception) -> str:
    reason = " ".join(str(error).split())
    return reason if len(reason) <= 200 else reason[:197] + "..."
