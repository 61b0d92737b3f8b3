"""Attention over packed documents: one function under our own name, and the kernels behind it."""
