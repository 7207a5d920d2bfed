"""Four directions of one checkpoint: act, imagine, obey, judge; and planning with all of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.inference import tiny_unified
from tests.inference.tiny_checkpoint import CHUNK, GRIDS
from tests.inference.uncached import next_logits
from univla_jax.episode import Observation
from univla_jax.errors import UserError
from univla_jax.inference.imagination import WorldModel
from univla_jax.inference.judge import Judge
from univla_jax.inference.loaded_model import LoadedModel
from univla_jax.inference.planning import PlanningConfig, plan
from univla_jax.inference.policy import Policy
from univla_jax.sequences.tokens import Role
from univla_jax.tasks import records_from_json
from univla_jax.tasks.policy_video import PolicyVideo
from univla_jax.tasks.value import Judgement

WORDS = ("touch green", "push the red block to the left")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return LoadedModel.from_checkpoint(tiny_unified.save(tmp_path_factory.mktemp("unified")))


def only(loaded, *names, **changes):
    """The same weights, trained on fewer tasks."""
    assets = tiny_unified.unified_assets(*names, **changes)
    records = records_from_json(assets.task)
    return dataclasses.replace(loaded, record=records[0], records=records)


def observation(seed):
    rng = np.random.default_rng(seed)
    frames = {
        view: rng.integers(0, 256, (8 * h, 8 * w, 3), np.uint8) for view, (h, w) in GRIDS.items()
    }
    return Observation(WORDS[seed % 2], frames)


def chunks(seed, count):
    return np.random.default_rng(seed).uniform(-0.08, 0.08, (count, CHUNK, 7)).astype(np.float32)


def test_the_checkpoint_lists_its_tasks(loaded):
    names = ["policy_video", "policy_video", "world_model", "world_model", "value"]
    assert [record.task for record in loaded.tasks] == names
    assert Policy(loaded).loaded.record.frames == 2
    assert WorldModel(loaded).loaded.record.task == "world_model"


@pytest.mark.slow
def test_given_actions_are_imagined_as_without_a_cache(loaded):
    model, seen, given = WorldModel(loaded), observation(0), chunks(0, 2)
    got = model.roll_out(seen, given)
    assert {v: f.shape for v, f in got.frames.items()} == {
        "image": (2, 24, 24, 3),
        "wrist_image": (2, 16, 16, 3),
    }
    acted = loaded.select(PolicyVideo, Role.VISION, "a test", moments=3)
    task = acted.task
    encoded = [model._vision.encode_frames(seen.frames[view][None]) for view in GRIDS]
    ids = task.build(seen.instruction, encoded, []).ids.tolist()
    normalized = loaded.assets.statistics["tabletop"].normalize(given)
    for number, chunk in enumerate(task.chunk_ids(normalized)):
        ids += task.outcome(chunk, (3, 3)).tolist()
        ids, codes = greedy_moment(loaded, task, ids)
        for view in GRIDS:
            np.testing.assert_array_equal(got.codes[view][number], codes[view])
        ids += task.next_action.tolist()


def greedy_moment(loaded, task, ids):
    """The ids with the likeliest codes of one moment behind them, and those by view."""
    v, found = loaded.assets.vocabulary, {}
    for view, (h, w) in GRIDS.items():
        ids = ids + ([] if view == "image" else task.separator((h, w)).tolist())
        for _ in range(h * w):
            ids.append(v.bov + int(next_logits(loaded, ids)[v.bov : v.eov + 1].argmax()))
        found[view] = np.array(ids[-h * w :]).reshape(h, w) - v.bov
    return ids, found


@pytest.mark.slow
def test_a_batch_is_rolled_out_as_each_alone_also_beyond_the_trained_window(loaded):
    model, given = WorldModel(loaded), np.stack([chunks(1, 4), chunks(2, 4)])
    both = model.roll_out([observation(0), observation(1)], given)
    for i in range(2):
        alone = model.roll_out(observation(i), given[i])
        for view in GRIDS:
            np.testing.assert_array_equal(both.codes[view][i], alone.codes[view])


def test_wordless_frames_follow_from_actions_whatever_is_told(loaded):
    given, seen = chunks(1, 2), observation(0)
    other = dataclasses.replace(seen, instruction=WORDS[1])
    silent = dataclasses.replace(seen, instruction="")
    model = WorldModel(only(loaded, "dynamics", wordless=True))
    bare = WorldModel(only(loaded, "dynamics")).roll_out(silent, given).codes
    for view in GRIDS:
        for told in (seen, other):
            np.testing.assert_array_equal(model.roll_out(told, given).codes[view], bare[view])


@pytest.mark.slow
def test_other_actions_lead_elsewhere(loaded):
    model = WorldModel(loaded)
    first, second = (model.roll_out(observation(0), chunks(seed, 2)).codes for seed in (3, 4))
    assert any((first[view] != second[view]).any() for view in GRIDS)


@pytest.mark.slow
def test_any_view_and_both_together_are_imagined(loaded):
    context = {v: np.zeros((2, 1, *grid), np.uint16) for v, grid in GRIDS.items()}
    for view, grid in GRIDS.items():
        model = WorldModel(loaded, view=view)
        assert model.imagine(WORDS, context[view], 2).shape == (2, 2, *grid)
    together = WorldModel(loaded).imagine(WORDS, context, 2, guidance=1.5)
    assert {v: codes.shape for v, codes in together.items()} == {
        v: (2, 2, *grid) for v, grid in GRIDS.items()
    }


@pytest.mark.slow
def test_a_judgement_is_the_distribution_behind_bot(loaded):
    judge, seen = Judge(loaded), [observation(0), observation(1)]
    found = judge.judge(seen)
    task = judge.loaded.task
    for judgement, each in zip(found, seen):
        views = [model_codes(loaded, each, view) for view in GRIDS]
        logits = next_logits(loaded, task.build(each.instruction, views).ids.tolist())[task.ids]
        p = np.exp(logits - logits.max())
        expected = task.parse((p / p.sum())[None])[0]
        assert judgement.success == pytest.approx(expected.success, abs=1e-4)
        assert judgement.score == pytest.approx(expected.score, abs=1e-4)
    assert judge.seconds_per_chunk == CHUNK / 5


def model_codes(loaded, seen, view):
    return loaded.assets.vision.encode_frames(seen.frames[view][None])


@pytest.mark.slow
@pytest.mark.parametrize("choose", ["value", "random", "divergence"])
def test_a_plan_is_a_valid_chunk_and_the_same_in_any_batch(loaded, choose):
    planner = plan(Policy(loaded), PlanningConfig(3, choose, temperature=2.0))
    seen = [observation(0), observation(1)]
    together = planner.act(seen, [planner.start(5), planner.start(6)])
    assert all(chunk.valid and chunk.actions.shape == (CHUNK, 7) for chunk in together)
    alone = planner.act(seen[1:], [planner.start(6)])
    np.testing.assert_allclose(alone[0].actions, together[1].actions, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("wordless", [True, False])
def test_plans_imagine_without_words_where_frames_were_learned_so_and_judge_with_them(
    loaded, wordless
):
    records = [dataclasses.replace(r, wordless=wordless and r.frames == 3) for r in loaded.tasks]
    chosen = dataclasses.replace(loaded, record=records[0], records=tuple(records))
    planner, seen = plan(Policy(chosen), PlanningConfig(2, temperature=3.0)), observation(0)
    decoder, imagined, drawn = planner.action_decoder, [], []
    for name, calls in (("_imagine", imagined), ("_candidates", drawn)):
        own = getattr(decoder, name)
        setattr(decoder, name, lambda *a, own=own, calls=calls: calls.append(own(*a)) or calls[-1])
    planner.act([seen], [planner.start(3)])
    (codes,), task = imagined, Judge(chosen).loaded.task
    video = chosen.select(PolicyVideo, Role.VISION, "a test", moments=3).task
    first = [model_codes(chosen, seen, view) for view in GRIDS]
    told = video.build("" if wordless else seen.instruction, first, []).ids.tolist()
    for number, ((ids,), judged) in enumerate(zip(drawn[0][0], decoder.judgements[0])):
        ids = ids[ids != task.vocabulary.eoa]
        _, moment = greedy_moment(chosen, video, told + video.outcome(ids, (3, 3)).tolist())
        for view, own in zip(GRIDS, codes):
            np.testing.assert_array_equal(own[number, 0], moment[view])
        views = [np.append(a, moment[view][None], 0) for a, view in zip(first, GRIDS)]
        prompt = task.build(seen.instruction, views, [ids]).ids.tolist()
        logits = next_logits(chosen, prompt)[task.ids]
        p = np.exp(logits - logits.max())
        assert judged.score == pytest.approx(task.parse((p / p.sum())[None])[0].score, abs=1e-4)


@pytest.mark.slow
def test_the_best_judged_candidate_is_executed(loaded, monkeypatch):
    planner = plan(Policy(loaded), PlanningConfig(4, temperature=3.0))
    drawn = []
    candidates = planner.action_decoder._candidates
    monkeypatch.setattr(
        planner.action_decoder,
        "_candidates",
        lambda state, keys: drawn.append(candidates(state, keys)) or drawn[-1],
    )
    best = Judgement(1.0, 0.0, 1.0)
    monkeypatch.setattr(
        planner.action_decoder,
        "_judge",
        lambda state, prompts, chosen: [[Judgement(0, 0, 0)] * 2 + [best, Judgement(0, 0, 0.5)]],
    )
    (chunk,) = planner.act([observation(0)], [planner.start()])
    ids = drawn[0][0][2][0]
    decoded = planner.loaded.task.parse(ids, (CHUNK, 7)).actions
    np.testing.assert_allclose(chunk.actions, planner.statistics.unnormalize(decoded), atol=1e-6)


def test_a_direction_that_was_not_trained_is_refused(loaded):
    policy = only(loaded, "policy")
    with pytest.raises(UserError, match="'policy_video', which is not made for imagining"):
        WorldModel(policy)
    with pytest.raises(UserError, match="not made for judging"):
        Judge(policy)
    with pytest.raises(UserError, match="imagining what its actions do in sequences of 3 moments"):
        plan(Policy(policy), PlanningConfig(2))
    with pytest.raises(UserError, match="judging moments in sequences of 3"):
        plan(Policy(only(loaded, "policy", "dynamics")), PlanningConfig(2))
    imagines = WorldModel(only(loaded, "world_model"))
    with pytest.raises(UserError, match="not made for imagining what given actions do"):
        imagines.roll_out(observation(0), chunks(0, 1))
    with pytest.raises(UserError, match="views image, wrist_image together"):
        imagines.imagine(WORDS, {v: np.zeros((2, 1, *g), int) for v, g in GRIDS.items()}, 1)
    obeys = WorldModel(only(loaded, "policy", "dynamics"))
    assert obeys.chunk_size == CHUNK and obeys.action_views == tuple(GRIDS)
    with pytest.raises(UserError, match="not made for imagining frames without actions"):
        obeys.imagine(["a"], np.zeros((1, 1, 3, 3), np.uint16), 1)
    with pytest.raises(UserError, match="was shown proprioceptive states"):
        WorldModel(only(loaded, "dynamics", state=True)).roll_out(observation(0), chunks(0, 1))
    with pytest.raises(UserError, match="not made for acting"):
        Policy(only(loaded, "dynamics", "value"))


def test_actions_that_do_not_fit_are_refused(loaded):
    model, seen = WorldModel(loaded), observation(0)
    for given, message in [
        (np.zeros((1, CHUNK + 1, 7)), "chunks of 4 steps and 7 dimensions; the model was trained"),
        (np.zeros((1, CHUNK, 6)), "and 6 dimensions"),
        (np.zeros((0, CHUNK, 7)), "shape"),
        (np.full((1, CHUNK, 7), np.nan), "not finite"),
    ]:
        with pytest.raises(UserError, match=message):
            model.roll_out(seen, given)


def test_settings_of_a_plan_are_checked():
    for values, message in [
        ((1,), "1 candidates, expected at least 2"),
        ((4, "luck"), "'luck' is not one of value"),
        ((4, "value", 0.0), "temperature"),
    ]:
        with pytest.raises(UserError, match=message):
            PlanningConfig(*values)
