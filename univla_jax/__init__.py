"""UniVLA in JAX: one decoder over text, image and action tokens, as world model and robot policy."""

__version__ = "0.1.0"
