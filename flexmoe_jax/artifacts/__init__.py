"""Files on disk: packages, model directories, checkpoints of runs, signatures, and the journal."""
