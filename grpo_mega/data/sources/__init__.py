"""Where rows come from, a module a kind: JSONL files, Parquet tables, folders of data sets, reasoning-gym tasks."""

from grpo_mega.data.sources.source import Source, sources_of

__all__ = ["Source", "sources_of"]
