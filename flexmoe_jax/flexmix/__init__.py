"""The mini-FlexMix: eight domains of real text, built from pinned packages."""
