"""Logical checkpoints: named tensors with global shapes, whatever layout wrote them and whatever layout reads them."""
