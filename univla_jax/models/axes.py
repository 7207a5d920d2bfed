"""Logical axis names of the decoder: the only words models and sharding rules share.

Parameters are created with these names and activations are constrained by them; the table that
maps each name to mesh axes lives in ``training/sharding.py``. Without rules in scope every name is
a no-op.
"""

from __future__ import annotations

BATCH = "batch"
LENGTH = "length"
LAYERS = "layers"
EMBED = "embed"
NORM = "norm"
HEADS = "heads"
KV_HEADS = "kv_heads"
HEAD_DIM = "head_dim"
MLP = "mlp"
VOCAB = "vocab"
ACTIVATION_EMBED = "activation_embed"
ACTIVATION_HEADS = "activation_heads"
ACTIVATION_KV_HEADS = "activation_kv_heads"
ACTIVATION_MLP = "activation_mlp"
ACTIVATION_VOCAB = "activation_vocab"
CACHE_LENGTH = "cache_length"
LOOKUP_BATCH = "lookup_batch"
LOOKUP_LENGTH = "lookup_length"
LOOKUP_EMBED = "lookup_embed"
LOSS_BATCH = "loss_batch"
LOSS_LENGTH = "loss_length"
LOSS_VOCAB = "loss_vocab"

PARAMETER_AXES = (LAYERS, EMBED, NORM, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB)
ACTIVATION_AXES = (
    BATCH,
    LENGTH,
    CACHE_LENGTH,
    ACTIVATION_EMBED,
    ACTIVATION_HEADS,
    ACTIVATION_KV_HEADS,
    ACTIVATION_MLP,
    ACTIVATION_VOCAB,
    LOOKUP_BATCH,
    LOOKUP_LENGTH,
    LOOKUP_EMBED,
    LOSS_BATCH,
    LOSS_LENGTH,
    LOSS_VOCAB,
)
