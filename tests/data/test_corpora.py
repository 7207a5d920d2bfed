"""The table of corpora."""

from __future__ import annotations

import pytest

from univla_jax.data.datasets import DATASETS, find_dataset_config
from univla_jax.errors import UserError


def test_rows_are_found_by_name():
    assert all(find_dataset_config(name).name == name for name in DATASETS)
    assert (
        find_dataset_config("tabletop").control_hz
        == find_dataset_config("tabletop").frame_spacing
        == 5
    )


def test_a_mistyped_name_is_corrected():
    with pytest.raises(UserError, match="did you mean 'libero_goal'"):
        find_dataset_config("libero_gaol")
    with pytest.raises(UserError, match="known: tabletop"):
        find_dataset_config("qqq")
