"""Text from a model. Floor 3."""
