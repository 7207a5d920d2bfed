"""LIBERO: protocol, adapter of `hf-libero`, and scripted experts."""
