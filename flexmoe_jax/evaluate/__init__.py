"""How good a model is, and where its tokens go."""
