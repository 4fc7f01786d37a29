"""Adapters between this system's weights and other forms, each a table of names with its inverse."""
