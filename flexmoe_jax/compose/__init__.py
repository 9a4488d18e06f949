"""Composition of models: merging, opting out, replacing, router tuning, certificates and verification."""
