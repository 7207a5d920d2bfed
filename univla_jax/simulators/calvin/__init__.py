"""CALVIN: its official chains, its scene without a data set, and the benchmark."""
