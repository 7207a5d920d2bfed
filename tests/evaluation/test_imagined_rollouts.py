"""Roll-outs inside a world model: what policies do there is judged, and orders them."""

from __future__ import annotations

import types

import numpy as np
import pytest

from tests.inference import tiny_checkpoint, tiny_unified
from tests.inference.tiny_checkpoint import GRIDS
from univla_jax.errors import UserError
from univla_jax.evaluation import imagined_rollouts
from univla_jax.evaluation.imagined_rollouts import rank_policies, table
from univla_jax.inference.imagination import WorldModel
from univla_jax.inference.judge import Judge
from univla_jax.inference.policy import Policy


class Counting:
    """World, judge and policy in one, whose only code counts the steps that were taken."""

    def __init__(self, stride, goal):
        self.stride, self.goal, self.seen = stride, goal, []
        self.action_views, self.corpus = ("image",), "tabletop"
        record = types.SimpleNamespace(frames=3, views_of=lambda corpus: ("image",))
        self.loaded = types.SimpleNamespace(record=record)

    def start(self):
        return object()

    def act(self, seen, sessions):
        self.seen.append([int(one.frames["image"].max()) for one in seen])
        return [types.SimpleNamespace(actions=np.full((2, 1), self.stride)) for _ in seen]

    def encode(self, frames):
        return frames[..., :1, :1, 0].astype(np.uint16)

    def roll_out(self, starts, given):
        first = np.array([start.frames["image"].max() for start in starts])
        codes = first[:, None] + given.sum((2, 3)).cumsum(1)
        codes = codes.astype(np.uint16)[..., None, None]
        return types.SimpleNamespace(codes={"image": codes}, frames={"image": codes[..., None]})

    def judge_codes(self, words, views, chunks):
        for (codes,), own in zip(views, [None] * len(views) if chunks is None else chunks):
            assert len(codes) == (1 if own is None else len(own) + 1) <= 3
            if own is not None:
                np.testing.assert_array_equal(np.diff(codes[:, 0, 0]), own.sum((1, 2)))
        near = [abs(int(codes[-1, 0, 0]) - self.goal) for (codes,) in views]
        return [types.SimpleNamespace(score=1 / (1 + distance)) for distance in near]


def test_policies_act_on_what_is_imagined_and_the_best_moment_counts():
    frames = [np.full((1, 1, 3), first, np.uint8) for first in (0, 4)]
    starts = [imagined_rollouts.Observation("go", {"image": frame}) for frame in frames]
    world = Counting(stride=1, goal=4)
    first, best = imagined_rollouts._roll_out(world, world, world, starts)
    assert world.seen == [[2 * n, 4 + 2 * n] for n in range(imagined_rollouts.CHUNKS)]
    # The first begins four away and comes there; the second only goes on from the goal.
    np.testing.assert_allclose(first, [1 / 5, 1])
    np.testing.assert_allclose(best, [1, 1 / 3])


@pytest.mark.slow
def test_policies_are_ordered_by_what_the_world_model_says(tmp_path, monkeypatch):
    monkeypatch.setattr(imagined_rollouts, "CHUNKS", 1)
    world_folder = tiny_unified.save(tmp_path / "world")
    other = tiny_checkpoint.save(tmp_path / "other", tiny_checkpoint.make_assets(), scale=5)
    world = WorldModel.load(world_folder)
    rng = np.random.default_rng(0)
    episodes = [
        types.SimpleNamespace(
            instruction=words,
            codes={
                v: rng.integers(0, 16, (2, *grid)).astype(np.uint16) for v, grid in GRIDS.items()
            },
        )
        for words in ("touch green", "lift red")
    ]
    fingerprint = world.loaded.assets.vision.fingerprint

    class Store(list):
        manifest = types.SimpleNamespace(
            header=types.SimpleNamespace(vision_fingerprint=fingerprint)
        )

    monkeypatch.setattr(imagined_rollouts, "TokenStore", lambda store: Store(episodes))
    found = rank_policies([other, world_folder], world_folder, "store", tmp_path / "out")
    means = [row["score"]["mean"] for row in found["policies"]]
    assert means == sorted(means, reverse=True) and len(set(means)) == 2
    assert found["episodes"] == 2 and str(other) in table(found)
    # One chunk by hand: acted on the decoded first frames, imagined, judged with what came before.
    policy, judge = Policy.load(other, batch_size=2), Judge(world.loaded)
    starts = [imagined_rollouts._first_moment(world, episode) for episode in episodes]
    acted = policy.act(starts, [policy.start() for _ in starts])
    given = np.stack([chunk.actions for chunk in acted])[:, None]
    codes = world.roll_out(starts, given).codes
    seen = {v: world.encode(np.stack([s.frames[v][None] for s in starts])) for v in GRIDS}
    views = [[np.append(seen[v][i], codes[v][i], 0) for v in GRIDS] for i in range(2)]
    said = judge.judge_codes([e.instruction for e in episodes], views, given)
    (row,) = [r for r in found["policies"] if str(other) in r["checkpoint"]]
    assert row["score"]["mean"] == pytest.approx(np.mean([j.score for j in said]), abs=1e-3)


@pytest.mark.slow
def test_what_does_not_fit_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no policy to roll out"):
        rank_policies([], tmp_path, tmp_path, tmp_path)
    folder = tiny_unified.save(tmp_path / "world")
    header = types.SimpleNamespace(vision_fingerprint="another")
    store = types.SimpleNamespace(manifest=types.SimpleNamespace(header=header))
    monkeypatch.setattr(imagined_rollouts, "TokenStore", lambda name: store)
    with pytest.raises(UserError, match="store S was made with another vision tokenizer"):
        rank_policies([folder], folder, "S", tmp_path)
