"""Kernels compiled ahead of time, and the gate that every kernel compiles: neither needs a GPU."""
