"""Published checkpoints in and out: config, weights and assets of Hugging Face model folders."""
