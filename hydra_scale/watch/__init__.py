"""Watching a run from within: heartbeats of all ranks, who holds the others up, who is slow."""
