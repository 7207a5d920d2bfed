"""UniVLA in JAX: one decoder over text, image and action tokens; world model and robot policy."""

__version__ = "0.1.0"
