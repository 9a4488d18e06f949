"""Training: a pure step and a thin loop around it."""
