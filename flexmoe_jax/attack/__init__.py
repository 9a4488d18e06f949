"""Attacks on what a model learned of its training text: extraction and membership."""
