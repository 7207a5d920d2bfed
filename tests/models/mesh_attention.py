"""Attention on eight virtual devices beside the plain formula; prints the largest errors as JSON.

Run by ``test_attention.py`` in a process of its own, because the number of devices is fixed
when JAX starts.
"""

from __future__ import annotations

import json
import math
import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["PJRT_NPROC"] = "64"
os.environ["JAX_PLATFORMS"] = "cpu"

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from univla_jax.models import decoder_config
from univla_jax.models.attention import attention, plain_attention
from univla_jax.training.sharding import MeshConfig, activation_rules, make_mesh

ROWS, LENGTH, HEADS, KEY_HEADS, SIZE = 4, 300, 4, 2, 128
MESHES = {
    "context 2": {"fsdp": 2, "tensor": 2, "context": 2},
    "copied key heads": {"fsdp": 1, "tensor": 4, "context": 2},
}


def main() -> None:
    """Values and gradients of every mesh and implementation."""
    rng = np.random.default_rng(0)
    draw = lambda heads: jnp.asarray(rng.normal(size=(ROWS, LENGTH, heads, SIZE)), jnp.float32)  # noqa: E731
    qkv, weight = (draw(HEADS), draw(KEY_HEADS), draw(KEY_HEADS)), draw(HEADS)
    segments = jnp.asarray(np.sort(rng.integers(0, 4, (ROWS, LENGTH)), axis=1), jnp.int32)

    def run(implementation):
        def loss(*qkv):
            out = implementation(*qkv)
            return jnp.sum(out * weight), out

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*qkv)

    errors = {}
    wanted = run(lambda *qkv: plain_attention(*qkv, segments))
    for name, sizes in MESHES.items():
        mesh = make_mesh(MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())])
        heads = {
            decoder_config.ACTIVATION_HEADS: HEADS,
            decoder_config.ACTIVATION_KV_HEADS: KEY_HEADS,
        }
        for kind in ("blocked", "splash"):
            with jax.set_mesh(mesh), nn.logical_axis_rules(activation_rules(mesh, heads)):
                got = run(lambda *qkv: attention(*qkv, segment_ids=segments, implementation=kind))  # noqa: B023
            both = zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
            errors[f"{name}, {kind}"] = max(float(np.abs(a - b).max()) for a, b in both)
    json.dump(errors, sys.stdout)


if __name__ == "__main__":
    main()
