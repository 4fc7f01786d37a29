"""Which layouts of a configuration fit on so many GPUs, and how fast they would train: arithmetic, no GPU needed."""
