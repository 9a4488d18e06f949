"""The mini-FlexMix: eight domains of real text rebuilt out of pinned packages."""
