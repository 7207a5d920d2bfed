"""Grounding and questions on the frames of a store, with the command that asks for it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from tests.evaluation.test_offline import _episode
from tests.inference import tiny_checkpoint, tiny_grounded
from tests.inference.tiny_checkpoint import GRIDS
from univla_jax.data.grounding_annotations import Grounding, Mask, dump_groundings
from univla_jax.data.token_store import StoreHeader, TokenStoreWriter
from univla_jax.errors import UserError
from univla_jax.evaluation import grounded_frames
from univla_jax.inference.answers import Answerer

pytestmark = pytest.mark.slow

BOX = (0.1, 0.1, 0.5, 0.5)
MASK = Mask.from_array(np.ones((4, 4), bool))
GROUNDINGS = dump_groundings(
    [
        *(Grounding(v, "the red block", "box", (BOX,), (MASK,)) for v in GRIDS),
        Grounding("image", "the block left of the red block", "box", ((0.6, 0.1, 0.9, 0.5),)),
        Grounding("image", "the block left of the blue block", "box", ()),
        Grounding("image", "all blocks", "box", (BOX, (0.6, 0.1, 0.9, 0.5))),
        Grounding("image", "the cat", "box", ()),
    ]
)


def _store(folder, count=3, **changes):
    assets = tiny_checkpoint.make_assets()
    header = StoreHeader(
        corpus="tabletop",
        split="val",
        control_hz=5.0,
        source="test 1.0.0",
        source_fingerprint="none",
        source_episodes=count,
        episodes_per_shard=count,
        min_frames=5,
        image_specs={view: spec.to_dict() for view, spec in assets.image_specs.items()},
        grids={view: list(grid) for view, grid in GRIDS.items()},
        vision_fingerprint=assets.vision.fingerprint,
        codebook_size=16,
        block_steps=4,
    )
    writer = TokenStoreWriter(folder, header)
    with writer.shard(0) as shard:
        for number in range(count):
            episode = _episode(number)
            texts = {"question": ("is it red?",), "answer": ("yes",)}
            fields = {"groundings": (GROUNDINGS,) * len(episode), "texts": texts} | changes
            shard.add(dataclasses.replace(episode, **fields))
    writer.finish()
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_grounded.save(tmp_path_factory.mktemp("grounded"))


def test_every_figure_and_floor_is_reported(checkpoint, tmp_path):
    store = _store(tmp_path / "store")
    found = grounded_frames.evaluate(checkpoint, store, tmp_path / "out", progress=False)
    assert json.loads((tmp_path / "out" / grounded_frames.REPORT).read_text()) == found
    groups = found["grounding"]
    pairs = {"seen pairs", "held-out pairs"}
    assert set(groups) == {"all", "image", "wrist_image", "free decoding", *pairs}
    assert groups["all"]["parse_failures"] == 0
    for name in ("acc@0.5", "point_in_mask", "f1", "absent_accuracy"):
        assert 0 <= groups["all"][name] <= 1
    assert groups["all"]["answers"] == sum(groups[view]["answers"] for view in GRIDS)
    assert set(found["floors"]) == {
        "center",
        "mean box",
        "another phrase",
        "black frame",
        "shuffled phrases",
    }
    assert found["questions"]["all"]["questions"] == 3
    assert found["questions"]["black frame"]["questions"] == 3
    assert found["touches"]["tables"] == 3
    text = grounded_frames.table(found)
    assert "black frame" in text and "questions, is:" in text
    assert "touches, predicted point: " in text and "% of 3" in text
    again = grounded_frames.evaluate(checkpoint, store, tmp_path / "out", progress=False)
    assert again == found


def test_true_answers_score_full_marks(checkpoint, tmp_path, monkeypatch):
    def truth(self, questions, codes, *, constrained=True):
        from univla_jax.data.grounding_annotations import asked_for, parse_groundings
        from univla_jax.inference.answers import Answer
        from univla_jax.tasks.grounding import middle

        answers = []
        for question in questions:
            asked = asked_for(question)
            if asked is None:
                answers.append(Answer("yes", None))
                continue
            known = parse_groundings(GROUNDINGS)
            places = next((g.places for g in known if g.phrase == asked[0]), ())
            places = [middle(p) for p in places] if asked[1] == "point" else places
            answers.append(Answer("", tuple(places)))
        return answers

    monkeypatch.setattr(Answerer, "answer_codes", truth)
    store = _store(tmp_path / "store")
    found = grounded_frames.evaluate(checkpoint, store, tmp_path / "out", progress=False)
    figures = found["grounding"]["all"]
    for name in ("acc@0.75", "point_in_mask", "f1", "absent_accuracy", "mean_iou"):
        assert figures[name] == 1, name
    assert figures["false_none"] == 0
    assert found["questions"]["all"]["exact"] == 1
    assert found["floors"]["another phrase"]["acc@0.5"] < 1


def test_stores_without_groundings_are_refused(checkpoint, tmp_path):
    store = _store(tmp_path / "store", groundings=())
    with pytest.raises(UserError, match="it has no groundings"):
        grounded_frames.evaluate(checkpoint, store, tmp_path / "out")
