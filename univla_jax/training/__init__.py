"""Training: loss, optimizer, sharding, step, loop, checkpoints."""
