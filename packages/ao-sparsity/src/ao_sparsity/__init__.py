"""Sparsity for ao: pruning on the block walk (magnitude, Wanda, SparseGPT), and 2:4 weights that are stored so."""

__version__ = "0.1.0"
