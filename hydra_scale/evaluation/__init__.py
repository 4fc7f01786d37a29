"""Evaluation of trained encoders on held-out documents."""
