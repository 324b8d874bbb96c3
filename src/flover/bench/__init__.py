"""Benchmarks: workloads, the systems that serve them, and what is made of the records (`flover bench`)."""
