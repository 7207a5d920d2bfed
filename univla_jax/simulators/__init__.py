"""Benchmarks: environment, scripted expert, protocol and adapter of each in one place."""
