"""Parity with the reference, one module per family of golden groups."""
