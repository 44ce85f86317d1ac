"""Spatially sparse execution: convolutions at the positions that a mask names (arXiv 1912.03203)."""
