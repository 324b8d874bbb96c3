"""Pure-torch twins: the specification of every kernel, and the CPU path."""
