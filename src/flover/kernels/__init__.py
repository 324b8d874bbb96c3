"""Kernels: imports nothing from flover. `reference` holds the pure-torch twins: the specification and the CPU path."""
