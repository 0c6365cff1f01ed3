"""Sparsity for ao: magnitude pruning, Wanda and SparseGPT on the block walk; 2:4 weights."""

__version__ = "0.1.0"
