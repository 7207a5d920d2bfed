"""The table of corpora."""

from __future__ import annotations

import pytest

from univla_jax.data.datasets import CORPORA, find_corpus
from univla_jax.errors import UserError


def test_rows_are_found_by_name():
    assert all(find_corpus(name).name == name for name in CORPORA)
    assert find_corpus("tabletop").control_hz == find_corpus("tabletop").frame_spacing == 5


def test_a_mistyped_name_is_corrected():
    with pytest.raises(UserError, match="did you mean 'libero_goal'"):
        find_corpus("libero_gaol")
    with pytest.raises(UserError, match="known: tabletop"):
        find_corpus("qqq")
