"""The only room that knows ranks, process groups, backends and devices."""
