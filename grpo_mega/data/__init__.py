"""Prompts -> tokens -> samples -> packed microbatches. Knows no ranks: a rank's share is handed in."""
