"""ALOHA's simulated tasks: adapter of `gym-aloha`, and scripted experts."""
