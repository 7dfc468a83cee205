"""Completions: who samples them, and how they become scored groups."""
