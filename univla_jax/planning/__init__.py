"""Memory and time of training and decoding on TPU slices, from ahead-of-time compilation."""
