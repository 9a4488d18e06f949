"""Everything on disk: packages, model directories, run checkpoints, digests, signatures, the journal."""
