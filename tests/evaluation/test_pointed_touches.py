"""Where a point sends the gripper, and which floors a point has."""

from __future__ import annotations

import types

import numpy as np

from univla_jax.data.grounding_annotations import asked_for
from univla_jax.evaluation import pointed_touches
from univla_jax.evaluation.pointed_touches import is_touched, tables
from univla_jax.inference.answers import Answer


def test_the_point_of_a_block_touches_it_and_no_other_point_does():
    for table in tables(6):
        assert is_touched(table, table.truth)
        assert not is_touched(table, None)
        corner = (0.01, 0.99)
        assert not is_touched(table, corner)


def test_scores_of_a_model_that_knows_where_everything_is():
    shown = {t.picture.tobytes(): t for t in tables(6)}

    def answer(observations, *, view):
        assert view == "image"
        found = []
        for o in observations:
            table = shown.get(o.frames["image"].tobytes())
            phrase, kind = asked_for(o.instruction)
            assert kind == "point"
            right = table is not None and phrase == f"the {table.color} block"
            found.append(Answer("", (table.truth,) if right else ()))
        return found

    found = pointed_touches.scores(types.SimpleNamespace(answer=answer), 6)
    assert found == {
        "tables": 6,
        "predicted point": 1.0,
        "true point": 1.0,
        "center": found["center"],
        "another phrase": 0.0,
        "black frame": 0.0,
    }
    assert found["center"] < 1


def test_tables_show_the_block_that_is_asked_for():
    for table in tables(3):
        assert table.picture.dtype == np.uint8 and table.picture.shape == (64, 64, 3)
        assert table.color != table.other
