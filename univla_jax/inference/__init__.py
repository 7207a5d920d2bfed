"""Acting and imagining with a trained checkpoint."""
