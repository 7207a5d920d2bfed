"""Token sequences: layouts, labels, packing and the Grain pipeline."""
