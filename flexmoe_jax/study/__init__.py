"""The paper's comparison at a size anyone can run: baselines, ablations, metrics with intervals."""
