"""Kinds of parallelism, one file each: tensor (megatron-core layers) and zero (DeepSpeed)."""
