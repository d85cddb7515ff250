"""What Triton compiles: the kernels, and the functions that they share."""
