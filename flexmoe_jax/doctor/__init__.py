"""The coordinates of a machine, the usual mistakes with their remedies, and whether processes can meet."""
