"""Benchmarks of bitwright: what its claims about quality and speed rest on."""
