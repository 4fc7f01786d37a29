"""The training loop, its step, and the run folder it lives in."""
