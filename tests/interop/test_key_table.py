from __future__ import annotations

import numpy as np
import pytest

from univla_jax.errors import UserError
from univla_jax.interop.key_table import (
    KeyRule,
    check_keys,
    export_state,
    import_state,
    stacked_shapes,
)

RULES = [
    KeyRule("table", (3, 2), "in/table", (4, 2), pad_rows=1),
    *(KeyRule(f"l.{i}.w", (6, 2), "layers/w", (2, 3, 2), (1, 0), i) for i in range(2)),
    KeyRule("conv", (5, 4, 3, 3), "conv", (3, 3, 4, 5), (2, 3, 1, 0)),
]


def _state():
    rng = np.random.default_rng(0)
    return {rule.key: rng.normal(size=rule.shape).astype(np.float32) for rule in RULES}


def test_places_and_axes():
    state = _state()
    params = import_state(RULES, state)
    np.testing.assert_array_equal(params["in"]["table"], np.pad(state["table"], ((0, 1), (0, 0))))
    assert params["layers"]["w"].shape == (2, 2, 3, 2)
    assert params["layers"]["w"][1, 0, 2, 1] == state["l.1.w"][2 * 2 + 1, 0]
    assert params["conv"][1, 2, 3, 4] == state["conv"][4, 3, 1, 2]
    assert stacked_shapes(RULES) == {
        "in/table": (4, 2),
        "layers/w": (2, 2, 3, 2),
        "conv": (3, 3, 4, 5),
    }


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_there_and_back_is_identical(dtype):
    state = {key: value.astype(dtype) for key, value in _state().items()}
    back = export_state(RULES, import_state(RULES, state))
    assert back.keys() == state.keys()
    for key, value in state.items():
        assert back[key].dtype == dtype
        np.testing.assert_array_equal(back[key], value)


def test_every_difference_is_listed():
    found = {key: value.shape for key, value in _state().items()}
    del found["l.1.w"]
    found |= {"extra": (7,), "table": (9, 2)}
    with pytest.raises(UserError) as error:
        check_keys(RULES, found, where="model.safetensors")
    message = str(error.value)
    assert message.startswith("model.safetensors: 3 difference(s)")
    assert "missing l.1.w [6, 2]" in message
    assert "unexpected extra [7]" in message
    assert "table is [9, 2], expected [3, 2]" in message


def test_parameters_of_another_model_are_listed():
    params = import_state(RULES, _state())
    params["conv"] = params["conv"][:2]
    params["more"] = np.zeros(1)
    del params["in"]
    with pytest.raises(UserError) as error:
        export_state(RULES, params)
    for part in ("missing in/table", "unexpected more", "conv is [2, 3, 4, 5]"):
        assert part in str(error.value)
