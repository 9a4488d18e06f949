"""Training: a pure step and a thin loop. Floor 3."""
