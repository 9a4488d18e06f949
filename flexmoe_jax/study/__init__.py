"""The paper's comparison at a size anyone can run: the method, baselines and ablations, scored with intervals."""
