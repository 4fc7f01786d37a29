"""Adapters between this system's weights and other forms, each verified by running both models."""
