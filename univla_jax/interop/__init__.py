"""Weights of other implementations, in and out."""
