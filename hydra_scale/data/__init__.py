"""Prepared data: its format, its order, its masks, and the batches made of them."""
