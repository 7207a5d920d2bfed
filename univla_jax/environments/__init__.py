"""Embedded simulators."""
