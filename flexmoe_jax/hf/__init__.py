"""Hugging Face both ways: checkpoints in, checkpoints out (method: section 5)."""
