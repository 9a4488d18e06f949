"""Evaluation: bits per byte, routing, log-likelihoods, and the paper's tasks."""
