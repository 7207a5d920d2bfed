"""Simulators: environment, scripted expert, protocol and adapter of each benchmark in one place."""
