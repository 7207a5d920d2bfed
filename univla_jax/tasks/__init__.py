"""Tasks: what a training sequence looks like, how it is prompted, and what is decoded from it."""
