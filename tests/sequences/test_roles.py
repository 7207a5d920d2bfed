"""Which roles the named sets of labels learn to predict."""

from __future__ import annotations

import numpy as np
import pytest

from tests.pipeline import small
from tests.sequences.spelling import chunk, code
from univla_jax.sequences.roles import LABELS, Role, labeled_roles


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        # bos g o | boi 1 * 1 * 2 img | v v | eof eoi | state | boa a eoa
        ("action", "000 0000000 00 00 0 111"),
        ("vision", "000 0000000 11 00 0 000"),
        ("both", "000 1111111 11 11 0 111"),
        ("all", "111 1111111 11 11 0 111"),
        ("thought_and_action", "000 0000000 00 00 0 111"),
        ("answer", "000 0000000 00 00 0 000"),
    ],
)
def test_labeled_tokens_by_role(labels, expected):
    tokens = small.task("policy_image").build("go", [code(1, 2)], chunk(1), state=chunk(1))
    labeled = labeled_roles(labels)[tokens.roles]
    assert labeled.dtype == bool
    assert "".join(map(str, labeled.astype(int))) == expected.replace(" ", "")


def test_the_table_has_an_entry_per_role():
    for labels, roles in LABELS.items():
        assert set(np.flatnonzero(labeled_roles(labels))) == set(roles)
        assert len(labeled_roles(labels)) == len(Role)
        assert Role.STATE not in roles
