"""Held-out episodes of a token store: what is asked, what counts, what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.inference import tiny_checkpoint
from tests.inference.tiny_checkpoint import CHUNK, GRIDS, STATISTICS
from tests.inference.uncached import next_logits
from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.data.token_store import StoreHeader, TokenStoreWriter
from univla_jax.errors import UserError
from univla_jax.evaluation import offline
from univla_jax.evaluation.offline import ScoredSequence, next_token_accuracy
from univla_jax.inference.action_decoders import ActionPrediction
from univla_jax.inference.imagination import WorldModel
from univla_jax.inference.loaded_model import LoadedModel
from univla_jax.inference.policy import Policy
from univla_jax.tokenizers.constrained import DecodedActions

STEPS = 11


def _episode(number, steps=STEPS):
    rng = np.random.default_rng(number)
    return TokenizedEpisode(
        instruction="touch green",
        codes={v: rng.integers(0, 16, (steps, *g)).astype(np.uint16) for v, g in GRIDS.items()},
        actions=rng.uniform(-0.1, 0.08, (steps, 7)).astype(np.float32),
        control_hz=5.0,
        corpus="tabletop",
        episode_id=f"held-out-{number}",
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder, assets = tmp_path_factory.mktemp("store"), tiny_checkpoint.make_assets()
    header = StoreHeader(
        corpus="tabletop",
        split="val",
        control_hz=5.0,
        source="test 1.0.0",
        source_fingerprint="none",
        source_episodes=3,
        episodes_per_shard=3,
        min_frames=5,
        image_specs={view: spec.to_dict() for view, spec in assets.image_specs.items()},
        grids={view: list(grid) for view, grid in GRIDS.items()},
        vision_fingerprint=assets.vision.fingerprint,
        codebook_size=16,
        block_steps=4,
    )
    writer = TokenStoreWriter(folder, header)
    with writer.shard(0) as shard:
        for number in range(3):
            shard.add(_episode(number))
    writer.finish()
    return folder


@pytest.fixture(scope="module")
def policy(policy_checkpoint):
    return Policy(LoadedModel.from_checkpoint(policy_checkpoint), batch_size=4)


@pytest.fixture(scope="module")
def dreamer(world_model_checkpoint):
    return WorldModel(LoadedModel.from_checkpoint(world_model_checkpoint))


def test_a_policy_is_asked_as_in_training(policy):
    """Prompt and recorded answer are the training sequence of the same window."""
    episode = _episode(0)
    queries = list(offline.episode_queries(policy, episode))
    assert len(queries) == STEPS // CHUNK
    loaded = policy.loaded
    vocabulary = loaded.assets.vocabulary
    chunks = STATISTICS.normalize(episode.actions[:9].reshape(3, CHUNK, 7))
    ids = [vocabulary.action_ids(np.array(c)) for c in loaded.assets.action.encode_batch(chunks)]
    for now, query in enumerate(queries):
        window = range(max(0, now - 1), now + 1)
        steps = np.array(window) * CHUNK
        views = [episode.codes[view][steps] for view in GRIDS]
        words, answers = episode.instruction, [ids[t] for t in window]
        whole = loaded.task.build(words, views, answers).ids
        assert query.sequence.ids.tolist() == whole.tolist()
        asked = whole[query.sequence.scored]
        visual = (asked >= vocabulary.bov) & (asked <= vocabulary.eov)
        assert asked[-len(ids[now]) - 1 :].tolist() == [*ids[now], vocabulary.eoa]
        assert visual.sum() == (13 if now else 0) and vocabulary.boa not in asked
        np.testing.assert_array_equal(query.raw, episode.actions[3 * now : 3 * now + 3])


def test_a_policy_shown_states_is_asked_with_the_recorded_ones(policy):
    loaded = policy.loaded
    statistics = {**loaded.assets.statistics, "tabletop/state": STATISTICS}
    loaded = dataclasses.replace(
        loaded,
        assets=dataclasses.replace(loaded.assets, statistics=statistics),
        record=dataclasses.replace(loaded.record, state=True),
    )
    shown, states = (
        Policy(loaded, batch_size=4),
        np.linspace(-0.1, 0.1, STEPS * 7).reshape(STEPS, 7),
    )
    episode = dataclasses.replace(_episode(0), state=states.astype(np.float32))
    boa = loaded.assets.vocabulary.boa
    for now, query in enumerate(offline.episode_queries(shown, episode)):
        codes = loaded.assets.action.encode(STATISTICS.normalize(states[3 * now][None]))
        ids = loaded.assets.vocabulary.action_ids(np.array(codes)).tolist()
        assert query.prompt[-len(ids) - 1 :].tolist() == [*ids, boa]
    with pytest.raises(UserError, match="tabletop/held-out-0: it has no state"):
        list(offline.episode_queries(shown, _episode(0)))


def test_errors_are_of_chunks_that_decoded(policy, monkeypatch):
    """Answers known beforehand: always 0.5, but the second of each episode does not decode."""
    answers = iter(range(100))

    def predict(prompts, sessions, timer):
        half = DecodedActions(np.full((CHUNK, 7), 0.5))
        bad = DecodedActions.invalid("nonsense", CHUNK, 7)
        chosen = [bad if next(answers) % 3 == 1 else half for _ in prompts]
        return [
            ActionPrediction(decoded, np.zeros(0), num_overridden=decoded.valid)
            for decoded in chosen
        ]

    monkeypatch.setattr(offline, "Policy", lambda loaded, **_: policy)
    monkeypatch.setattr(policy.action_decoder, "predict", predict)
    episodes = [_episode(n) for n in range(2)]
    found = offline.action_scores(policy.loaded, "tabletop", episodes, batch_size=4, progress=False)
    counts = [found[f"{kind}chunks"] for kind in ("", "invalid_", "overridden_")]
    assert counts == [6, 2, 4]
    kept = np.concatenate([np.delete(e.actions[:9].reshape(3, 3, 7), 1, axis=0) for e in episodes])
    answered = STATISTICS.unnormalize(np.full(7, 0.5))
    *dimensions, whole = found["action_error"]
    for i, entry in enumerate(dimensions):
        assert entry["mean_absolute"] == pytest.approx(
            abs(answered[i] - kept[..., i]).mean(), abs=1e-6
        )
        mean = abs(STATISTICS.mean[i] - kept[..., i]).mean()
        assert entry["mean_action"] == pytest.approx(mean, abs=1e-6)
    normalized = abs(0.5 - STATISTICS.normalize(kept)).mean()
    assert whole["dimension"] == "all" and whole["normalized"] == pytest.approx(
        normalized, abs=1e-6
    )


def test_token_accuracy_is_that_of_the_likeliest_token(policy):
    """Every other token asked for is made the one the model holds likeliest."""
    vocabulary = policy.loaded.assets.vocabulary
    actions = {*vocabulary.action_ids(np.arange(300)).tolist(), vocabulary.eoa}
    right = {"text": [], "visual": [], "action": []}
    sequences = []
    for query in list(offline.episode_queries(policy, _episode(1)))[:2]:
        ids, asked = query.sequence.ids.tolist(), query.sequence.scored
        for n, place in enumerate(np.flatnonzero(asked)):
            guess = int(next_logits(policy.loaded, ids[:place])[: vocabulary.size].argmax())
            ids[place] = guess if n % 2 else ids[place]
            visual = "visual" if vocabulary.bov <= ids[place] <= vocabulary.eov else "text"
            right["action" if ids[place] in actions else visual].append(guess == ids[place])
        sequences.append(ScoredSequence(np.array(ids, np.int32), asked))
    expected = {name: round(float(np.mean(found)), 4) for name, found in right.items() if found}
    assert next_token_accuracy(policy.loaded, sequences, batch_size=3) == expected
    assert 0.4 < np.mean([hit for found in right.values() for hit in found]) < 0.6


def test_frames_are_imagined_after_the_real_ones(dreamer):
    """Spacing 5 leaves 3 frames of an episode: one window."""
    (window,) = offline._windows(dreamer, _episode(0))
    np.testing.assert_array_equal(window.codes, _episode(0).codes["image"][np.array([0, 5, 10])])
    asked = offline._scored_frames(dreamer.loaded, window)
    codes = dreamer.loaded.assets.vocabulary.visual_codes(asked.ids[asked.scored])
    np.testing.assert_array_equal(codes, window.codes[1:].ravel())
    episodes = [_episode(n) for n in range(3)]
    found = offline.frame_scores(dreamer.loaded, "tabletop", episodes, batch_size=4, progress=False)
    assert found["windows"] == 3 and set(found["token_accuracy"]) == {"visual"}
    last = np.stack([e.codes["image"][np.array([5, 10])] for e in episodes])
    same = (last[:, 0] == last[:, 1]).mean()
    assert found["frames"]["repeat_context"]["token_accuracy"] == pytest.approx(same, abs=1e-4)
    context = np.stack([e.codes["image"][np.array([0, 5])] for e in episodes])
    dreamt = dreamer.imagine(["touch green"] * 3, context, 1)[:, 0]
    hits = (dreamt == last[:, 1]).mean()
    assert found["frames"]["imagined"]["token_accuracy"] == pytest.approx(hits, abs=1e-4)


def test_nothing_changes_is_right_where_nothing_moves(dreamer):
    still = _episode(0)
    codes = {view: np.repeat(c[:1], STEPS, axis=0) for view, c in still.codes.items()}
    still = dataclasses.replace(still, codes=codes)
    found = offline.frame_scores(dreamer.loaded, "tabletop", [still], batch_size=4, progress=False)
    expected = {"psnr": 99.0, "ssim": 1.0, "token_accuracy": 1.0}
    assert found["frames"]["repeat_context"] == expected


def test_a_store_is_scored_once(store, policy_checkpoint, world_model_checkpoint, tmp_path):
    report = offline.evaluate(
        policy_checkpoint, store, tmp_path / "a", episodes=1, batch_size=4, progress=False
    )
    assert report["episodes"] == 1 and report["chunks"] == 3 and report["corpus"] == "tabletop"
    assert "of 3 chunks did not decode" in offline.table(report)
    again = offline.evaluate(policy_checkpoint, store, tmp_path / "a", episodes=1)
    assert again == report
    with pytest.raises(UserError, match="episodes was 1, is 0"):
        offline.evaluate(policy_checkpoint, store, tmp_path / "a")
    frames = offline.evaluate(
        world_model_checkpoint, store, tmp_path / "b", batch_size=4, progress=False
    )
    assert frames["windows"] == 3 and "repeat_context" in offline.table(frames)


def test_mistakes_are_named(store, policy_checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"--episodes: 4, .* holds 3"):
        offline.evaluate(policy_checkpoint, store, tmp_path / "a", episodes=4)
    with pytest.raises(UserError, match="no token store"):
        offline.evaluate(policy_checkpoint, tmp_path, tmp_path / "b")
    assets = tiny_checkpoint.make_assets()
    vision = dataclasses.replace(assets.image_specs["image"], size=(16, 16))
    other = dataclasses.replace(assets, image_specs={**assets.image_specs, "image": vision})
    changed = tiny_checkpoint.save(tmp_path / "other", other)
    with pytest.raises(UserError, match="image"):
        offline.evaluate(changed, store, tmp_path / "c")
