"""One file per family: the maths and nothing else."""
