"""Pretraining of bidirectional Hydra encoders, from one CPU to many GPUs. The way in is `hydra_scale.cli`."""
