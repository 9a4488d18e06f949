"""What happens to whole models: merge, opt-out and its certificate, replace, router tuning, verification."""
