"""The embedded tabletop: a small deterministic simulator with scripted demonstrations."""
