"""NAVSIM: scene files, PDM score v1.1 and v2, PDM-Closed, open-loop metrics, and the benchmark."""
