"""Convolutions with a weight for every sample."""
