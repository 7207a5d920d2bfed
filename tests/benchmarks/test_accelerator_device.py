"""Weights that look random, and errors of a full device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from univla_jax.benchmarks.accelerator_device import (
    Sizes,
    describe_error,
    draw_params,
    is_out_of_memory,
)


def test_drawn_weights_look_random():
    shape = jax.ShapeDtypeStruct((2, 64, 128), jnp.bfloat16)
    drawn = draw_params({"kernel": shape, "scale": jax.ShapeDtypeStruct((3,), jnp.float32)})
    kernel = np.asarray(drawn["kernel"], np.float32)
    assert kernel.std() == pytest.approx(0.02, rel=0.05) and abs(kernel.mean()) < 5e-4
    assert abs(np.corrcoef(kernel[0].ravel(), kernel[1].ravel())[0, 1]) < 0.05
    assert abs(np.corrcoef(kernel[0, 0], kernel[0, 1])[0, 1]) < 0.4
    np.testing.assert_array_equal(drawn["scale"], 1)


def test_a_full_device_is_told_from_other_errors():
    assert is_out_of_memory(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 17 GiB"))
    assert not is_out_of_memory(ValueError("no such kernel"))
    assert describe_error(ValueError("")) == "ValueError: "


def test_repeats_end_with_half_of_the_time():
    assert list(Sizes(repeats=3).turns()) == [0, 1, 2]
    assert list(Sizes(repeats=3, budget=0).turns()) == [0]
