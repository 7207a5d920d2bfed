"""Streamed arrays are ordinary Orbax arrays; any checkpoint's arrays are read in parts."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from univla_jax.interop.tensor_io import StateReader, StreamedArray, streamed_state_handler

VALUE = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def streamed(value: np.ndarray, *, stacked: bool = False) -> StreamedArray:
    blocks = [((i,), row) for i, row in enumerate(value)]
    return StreamedArray(value.shape, value.dtype.name, stacked, lambda: iter(blocks))


@pytest.fixture
def state(tmp_path):
    tree = {"params": {"a": {"b": streamed(VALUE, stacked=True)}, "c": streamed(VALUE[0])}}
    with ocp.Checkpointer(streamed_state_handler()) as writer:
        writer.save(tmp_path / "state", ocp.args.PyTreeSave(tree))
    return tmp_path / "state"


def test_orbax_restores_them(state):
    with ocp.StandardCheckpointer() as reader:
        template = {
            "params": {
                "a": {"b": jax.ShapeDtypeStruct((2, 3, 4), jnp.float32)},
                "c": jax.ShapeDtypeStruct((3, 4), jnp.float32),
            }
        }
        restored = reader.restore(state, template)["params"]
    np.testing.assert_array_equal(restored["a"]["b"], VALUE)
    np.testing.assert_array_equal(restored["c"], VALUE[0])


def test_parts_are_read(state):
    reader = StateReader(state)
    np.testing.assert_array_equal(reader.read("params/a/b", (1,)), VALUE[1])
    np.testing.assert_array_equal(reader.read("params/c", (slice(1, 3),)), VALUE[0, 1:3])
    assert reader.array("params/a/b").chunk_layout.read_chunk.shape == (1, 3, 4)


@pytest.mark.parametrize("options", [{}, {"use_ocdbt": False}, {"use_zarr3": True}])
def test_parts_of_what_orbax_wrote(options, tmp_path):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as writer:
        tree = {"params": {"a": jnp.asarray(VALUE, jnp.bfloat16)}}
        writer.save(tmp_path / "state", ocp.args.PyTreeSave(tree))
    found = StateReader(tmp_path / "state").read("params/a", (1, slice(0, 2)))
    np.testing.assert_array_equal(found, tree["params"]["a"][1, :2])
    assert found.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("shape", "stacked"),
    [
        ((184_832, 4096), False),
        ((32, 4096, 14_336), True),
        ((32, 4096, 32, 128), True),
        ((7,), False),
    ],
)
def test_chunks_are_small_and_of_one_layer(shape, stacked):
    chunks = StreamedArray(shape, "bfloat16", stacked, lambda: iter(())).chunks
    assert 2 * math.prod(chunks) <= 8 << 20
    assert not stacked or chunks[0] == 1
    assert all(chunk <= size for chunk, size in zip(chunks, shape))
