"""Folders of data sets: what `datasets` saved, or Parquet and JSONL files as a data set's repository holds them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_mega.config.base import nearest
from grpo_mega.data.rows import Fields, Row
from grpo_mega.data.sources.jsonl import read_jsonl
from grpo_mega.data.sources.parquet import read_parquet, table_rows
from grpo_mega.errors import DataError

if TYPE_CHECKING:
    import datasets

SUFFIXES = {".parquet": read_parquet, ".jsonl": read_jsonl, ".json": read_jsonl}


def read_folder(name: str, split: str | None, fields: Fields) -> list[Row]:
    """The rows of one split of the data set in folder `name`; `split` None takes the only one.

    A folder that `save_to_disk` wrote is read by `datasets`. In any other the files of a split are those that
    `datasets` would take: what README.md declares, or data/train-00000-of-00002.parquet, train.jsonl, train/*.parquet;
    files without a split's name are "train". They are read here, so that errors name file and line.
    Never the network, never code from the folder. Raises DataError.
    """
    path, said = Path(name), f"{fields.key}.dataset"
    if not path.is_dir():
        raise DataError(
            f"{said}={name} is no folder; give one that datasets' save_to_disk wrote, or of Parquet or JSONL files"
        )
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _read_saved(path, split, fields, said)
    files = _files_by_split(path, said)
    rows: list[Row] = []
    for file in files[_chosen(split, list(files), said, name, fields)]:
        reader = SUFFIXES.get(Path(file).suffix)
        if reader is None:
            raise DataError(
                f"{said}={name} has {Path(file).name}, which is neither Parquet nor JSONL; convert or move it"
            )
        rows += reader(file, fields, said)
    return rows


def _read_saved(path: Path, split: str | None, fields: Fields, said: str) -> list[Row]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # pyarrow's errors, json's, KeyError, FileNotFoundError: whatever a damaged folder gives
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{said}={path} cannot be loaded by datasets ({type(error).__name__}: {reason}); save it anew"
        ) from None
    if isinstance(saved, datasets.DatasetDict):
        data: Any = saved[_chosen(split, list(saved), said, str(path), fields)]
    elif split is not None and split != str(saved.split):
        raise DataError(f"{said}={path} is one data set without splits; leave {fields.key}.split={split} out")
    else:
        data = saved
    return table_rows(_table(data), fields, str(path) if split is None else f"{path}/{split}", said)


def _table(data: datasets.Dataset) -> Any:
    # arrow: rows as they are stored, in the data set's order, with nothing decoded (images, audio)
    return data.with_format("arrow")[:]


def _files_by_split(path: Path, said: str) -> dict[str, list[str]]:
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns, sanitize_patterns

    declared = _declared_in_readme(path, said)
    try:
        patterns = get_data_patterns(str(path)) if declared is None else sanitize_patterns(declared)
        found = DataFilesDict.from_patterns(patterns, base_path=str(path))
    except EmptyDatasetError:
        raise DataError(f"{said}={path} holds no data files; give a folder of Parquet or JSONL files") from None
    for split, files in found.items():
        if not files:
            raise DataError(f"{said}={path}: README.md declares files of {split} that are not there; mend it")
    return {str(split): sorted(files) for split, files in found.items()}


def _declared_in_readme(path: Path, said: str) -> Any:
    """data_files of README.md's only or default subset, as repositories declare them; None where nothing is said."""
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    readme = path / "README.md"
    if not readme.exists():
        return None
    try:
        subsets = MetadataConfigs.from_dataset_card_data(DatasetCard.load(readme, ignore_metadata_errors=True).data)
        default = subsets.get_default_config_name()
    except Exception as error:  # YAML's errors, huggingface_hub's and datasets' own checks
        raise DataError(f"{readme}: its metadata cannot be read ({' '.join(str(error).split())}); mend it") from None
    if subsets and default is None:
        raise DataError(
            f"{said}={path} holds the subsets {', '.join(subsets)} (README.md); give the folder of one of them"
        )
    return subsets[default].get("data_files") if default is not None else None


def _chosen(split: str | None, known: list[str], said: str, name: str, fields: Fields) -> str:
    if split is None:
        if len(known) == 1:
            return known[0]
        raise DataError(f"{said}={name} holds the splits {', '.join(known)}; name one in {fields.key}.split")
    if split not in known:
        raise DataError(f"{fields.key}.split={split} is no split of {name}{nearest(split, known)}")
    return split
