"""From an RLDS folder to token stores: invalid episodes, interruptions, mistakes."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import threading
import time

import numpy as np
import pytest

from tests.data import test_damage
from tests.data.episodes import DATASET, MeanTokenizer, make_episode
from tests.data.test_token_store import content
from tests.data.test_video import write_video
from univla_jax.config import build_config
from univla_jax.data import datasets
from univla_jax.data import tokenize as tokenize_stage
from univla_jax.data.grounding_annotations import Grounding, dump_groundings, parse_groundings
from univla_jax.data.rlds_writer import write_rlds
from univla_jax.data.token_store import TokenStore
from univla_jax.data.tokenize import BatchedEncoder, Part, TokenizeConfig, tokenize, verify_store
from univla_jax.errors import UserError
from univla_jax.tokenizers.image import ImageSpec

SPEC = {"min_pixels": 64}
SETTINGS = {
    "corpus": "blocks",
    "image_specs": {"image": {"size": (16, 24), **SPEC}, "wrist_image": {"size": (16, 8), **SPEC}},
    "splits": {"train": "train[:75%]", "val": "train[75%:]"},
    "batch_frames": 4,
    "episodes_per_shard": 2,
    "max_invalid_fraction": 0.5,
}


def not_finite(index):
    actions = make_episode(index).actions.copy()
    actions[1] = np.nan
    return make_episode(index, actions=actions)


EPISODES = [make_episode(i) for i in range(12)]
EPISODES[0] = not_finite(0)
EPISODES[3] = make_episode(3, instruction="")
EPISODES[4] = not_finite(4)
EPISODES[5] = make_episode(5, size=(8, 8))  # any size will do: the image spec has one
EPISODES[11] = make_episode(11, steps=2)
INVALID = (0, 3, 4, 11)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(datasets.DATASETS, "blocks", DATASET)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_rlds(
        tmp_path_factory.mktemp("rlds"),
        "blocks",
        "1.0.0",
        {"train": EPISODES, "bad": [EPISODES[0], EPISODES[3]]},
        fixed_sizes=False,
        progress=False,
    )


def make_config(**changes):
    return build_config(TokenizeConfig, {**SETTINGS, **changes})


def test_valid_episodes_are_encoded_and_invalid_ones_named(source, tmp_path):
    tokenizer = MeanTokenizer()
    manifests = tokenize(make_config(), source, tmp_path, tokenizer)
    assert set(tokenizer.shapes) == {(4, 16, 24, 3), (4, 16, 8, 3)}
    valid = [i for i in range(12) if i not in INVALID]
    stores = {name: TokenStore(tmp_path / name) for name in ("train", "val")}
    read = [*stores["train"], *stores["val"]]
    assert [e.episode_id for e in read] == [f"blocks-{i}" for i in valid]
    for index, got in zip(valid, read):
        want = EPISODES[index]
        frames = ImageSpec(size=(16, 24), **SPEC).resize(want.frames["image"])
        np.testing.assert_array_equal(got.codes["image"], MeanTokenizer().encode_frames(frames))
        assert got.codes["wrist_image"].shape == (len(want), 2, 1)
        np.testing.assert_array_equal(got.actions, want.actions)
        np.testing.assert_array_equal(got.state, want.state)
        assert got.instruction == want.instruction
    assert [e.episode_id for e in manifests["train"].invalid_episodes] == [
        f"blocks-{i}" for i in (0, 3, 4)
    ]
    assert "2 frames" in manifests["val"].invalid_episodes[0].reason
    header = manifests["val"].header
    assert (header.source, header.split) == ("blocks:1.0.0", "train[75%:]")
    assert header.image_specs["image"]["size"] == [16, 24]


def test_an_interrupted_run_comes_out_the_same(source, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    tokenize(make_config(), source, whole, MeanTokenizer())
    for calls in (0, 3, 9):
        with pytest.raises(KeyboardInterrupt):
            tokenize(make_config(), source, stopped, MeanTokenizer(fail_after=calls))
    tokenize(make_config(), source, stopped, MeanTokenizer())
    assert content(stopped) == content(whole)
    idle = MeanTokenizer(fail_after=0)
    tokenize(make_config(), source, stopped, idle)
    assert content(stopped) == content(whole)


def test_too_many_invalid_episodes_fail_and_lose_nothing(source, tmp_path):
    with pytest.raises(UserError, match=r"2 of 8 episodes are broken .*blocks-0: action of step"):
        tokenize(make_config(max_invalid_fraction=0.1), source, tmp_path, MeanTokenizer())
    tokenize(make_config(), source, tmp_path, MeanTokenizer())
    assert len(TokenStore(tmp_path / "train")) == 6
    with pytest.raises(
        UserError, match=r"no valid episode among 2 of 2: 1 broken .*; 1 filtered by instruction"
    ):
        tokenize(make_config(splits={"bad": "bad"}), source, tmp_path, MeanTokenizer())


def test_other_settings_need_another_folder(source, tmp_path):
    tokenize(make_config(), source, tmp_path, MeanTokenizer())
    with pytest.raises(UserError, match="min_frames was 3, is 4"):
        tokenize(make_config(min_frames=4), source, tmp_path, MeanTokenizer())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus": "block"}, "did you mean 'blocks'"),
        ({"image_specs": {"top": SPEC}}, "no view 'top'; it has image, wrist_image"),
        ({"image_specs": {"image": {"size": (16, 24), "sise": 3}}}, "did you mean 'size'"),
        ({"image_specs": {"image": {"factor": 4, **SPEC}}}, "one code of 8 pixels"),
        ({"image_specs": {}}, "has no image_sizes of its own"),
        ({"splits": {}}, "must not be empty"),
        ({"augmented_copies": -1}, "expected 0 or more"),
        ({"splits": {"train": "training"}}, "no split 'training'"),
        ({"batch_frames": 0}, "expected at least 1"),
        ({"max_invalid_fraction": 2.0}, "expected 0...1"),
    ],
)
def test_mistakes_in_the_config_are_named(source, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        tokenize(make_config(**changes), source, tmp_path, MeanTokenizer())


def test_views_may_be_left_out(source, tmp_path):
    config = make_config(image_specs={"image": SETTINGS["image_specs"]["image"]})
    tokenize(config, source, tmp_path, MeanTokenizer())
    assert list(TokenStore(tmp_path / "train")[0].codes) == ["image"]
    assert dataclasses.asdict(config)["min_frames"] is None


ONE_BY_ONE = make_config(splits={"train": "train"}, episodes_per_shard=1)


class SlowTokenizer(MeanTokenizer):
    def encode_frames(self, frames):
        time.sleep(0.005)
        return super().encode_frames(frames)


def tokenize_slowly(source, out):
    datasets.DATASETS["blocks"] = DATASET
    tokenize(ONE_BY_ONE, source, out, SlowTokenizer())


def test_killed_at_twenty_random_moments_it_comes_out_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(datasets.DATASETS, "blocks", DATASET)
    episodes = [make_episode(i) for i in range(60)]
    source = write_rlds(tmp_path, "blocks", "1.0.0", {"train": episodes}, progress=False)
    tokenize(ONE_BY_ONE, source, tmp_path / "whole", MeanTokenizer())
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "tensorflow_datasets"])
    rng, stages, longest = np.random.default_rng(0), set(), 0.9
    for _ in range(20):
        process = context.Process(target=tokenize_slowly, args=(source, tmp_path / "killed"))
        process.start()
        time.sleep(rng.uniform(0.1, longest))
        process.kill()
        process.join()
        done = len(list((tmp_path / "killed").rglob("*.json")))
        longest *= 1 if stages and done > max(stages) else 1.2  # a slow machine needs longer
        stages.add(done)
    assert len(stages) > 1  # the kills fell into different stages of the work
    tokenize(ONE_BY_ONE, source, tmp_path / "killed", MeanTokenizer())
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_processes_share_the_shards(source, tmp_path):
    tokenize(make_config(), source, tmp_path / "one", MeanTokenizer())
    for number in (2, 0, 1):
        part = Part(number, 3)
        manifests = tokenize(make_config(), source, tmp_path / "three", MeanTokenizer(), part)
        assert (manifests["train"] is None) == (number != 1)
    assert content(tmp_path / "three") == content(tmp_path / "one")
    assert Part.parse("2/3") == Part(2, 3)
    for text, message in (
        ("3/3", r"part 3/3: the index is 0\.\.\.2"),
        ("1 of 2", "INDEX/COUNT"),
    ):
        with pytest.raises(UserError, match=message):
            Part.parse(text)


def test_augmented_copies_stand_behind_their_episode(source, tmp_path):
    config = make_config(augmented_copies=2, max_shift=0.5)
    tokenize(config, source, tmp_path / "a", MeanTokenizer())
    tokenize(config, source, tmp_path / "b", MeanTokenizer())
    assert content(tmp_path / "a") == content(tmp_path / "b")
    store = TokenStore(tmp_path / "a" / "train")
    plain = [store[i].episode_id for i in range(0, len(store), 3)]
    assert [store[i].episode_id for i in range(1, len(store), 3)] == [n + "+shift1" for n in plain]
    assert store.copies == 3 and len(store) == 18
    np.testing.assert_array_equal(store[1].actions, store[0].actions)
    shown = [np.asarray(store[i].codes["image"]) for i in range(3)]
    assert not (shown[0] == shown[1]).all() and not (shown[1] == shown[2]).all()
    with pytest.raises(UserError, match="augmented_copies was 2, is 0"):
        tokenize(make_config(), source, tmp_path / "a", MeanTokenizer())


def test_verification_notices_what_changed(source, tmp_path):
    config = make_config()
    tokenize(config, source, tmp_path, MeanTokenizer())
    folder = tmp_path / "train"
    result = verify_store(folder, config, source, MeanTokenizer())
    assert result.equal == 1 and result.shards == result.episodes == 5

    class Darker(MeanTokenizer):
        def encode_frames(self, frames):
            return super().encode_frames(frames // 2)

    with pytest.raises(UserError, match=r"of the codes of . episodes are what"):
        verify_store(folder, config, source, Darker())
    other = MeanTokenizer()
    other.fingerprint = "median"
    with pytest.raises(UserError, match=r"another vision tokenizer \(mean -> median\)"):
        verify_store(folder, config, source, other)


def test_a_full_disk_is_named(source, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    message = r"could not be written .*No space left.* MB are free"
    with monkeypatch.context() as patch, pytest.raises(UserError, match=message):
        patch.setattr("univla_jax.io.sha256", full)
        tokenize(make_config(), source, tmp_path, MeanTokenizer())
    tokenize(make_config(), source, tmp_path, MeanTokenizer())
    assert not list(tmp_path.rglob(".*partial"))


@pytest.mark.parametrize("lengths", [[1], [4], [3, 2, 9, 1, 1], [8, 8], [25]])
def test_codes_come_out_in_order_from_batches_of_one_shape(lengths):
    rng = np.random.default_rng(0)
    episodes = [rng.integers(0, 256, (n, 8, 16, 3), np.uint8) for n in lengths]
    tokenizer = MeanTokenizer()
    with BatchedEncoder(tokenizer.encode_frames, ["image"], batch_size=4) as encoder:
        for frames in episodes:
            encoder.push({"image": frames})
        assert encoder.num_ready <= sum(lengths) // 4 * 4
        encoder.flush()
        encoder.flush()
        for frames in episodes:
            codes = encoder.take(len(frames))["image"]
            assert codes.dtype == np.uint16
            np.testing.assert_array_equal(codes, MeanTokenizer().encode_frames(frames))
        assert encoder.num_ready == 0
    assert tokenizer.shapes == [(4, 8, 16, 3)] * -(-sum(lengths) // 4)


def test_boxes_move_with_a_crop(tmp_path, monkeypatch):
    text = dump_groundings(
        [
            Grounding("image", "kept", "box", ((0.1, 0.6, 0.3, 0.8),)),
            Grounding("image", "cut off", "box", ((0.6, 0.1, 0.9, 0.4),)),
        ]
    )
    episode = make_episode(1)
    episode = dataclasses.replace(episode, groundings=(text,) * len(episode))
    specs = {"image": {"size": (16, 24), **SPEC, "crop": (0.5, 0.0, 1.0, 0.5)}}
    monkeypatch.setattr(tokenize_stage, "read_episode", lambda *_, **__: episode)
    config = make_config(image_specs=specs, splits={"train": "train"})
    tokenize(
        config,
        write_rlds(tmp_path, "blocks", "1.0.0", {"train": [episode]}),
        tmp_path / "t",
        MeanTokenizer(),
    )
    (kept,) = parse_groundings(TokenStore(tmp_path / "t" / "train")[0].groundings[0])
    assert kept.phrase == "kept"
    np.testing.assert_allclose(kept.places[0], (0.2, 0.2, 0.6, 0.6), atol=1e-4)


def test_frames_that_repeat_the_one_before_are_encoded_once():
    """As between two pictures of a camera that is slower than the control."""
    drawn = np.random.default_rng(0).integers(0, 256, (7, 8, 16, 3), np.uint8)
    episodes = [np.repeat(drawn[:3], 5, 0), np.repeat(drawn[2:], [1, 4, 1, 1, 6], 0)]
    tokenizer = MeanTokenizer()
    with BatchedEncoder(tokenizer.encode_frames, ["image"], batch_size=2) as encoder:
        for frames in episodes:
            encoder.push({"image": frames})
        encoder.flush()
        for frames in episodes:
            codes = encoder.take(len(frames))["image"]
            np.testing.assert_array_equal(codes, MeanTokenizer().encode_frames(frames))
    assert len(tokenizer.shapes) == 4  # batches of two for eight frames


@pytest.mark.parametrize("name", test_damage.DATASETS)
def test_every_format_becomes_a_store(tmp_path, monkeypatch, name):
    write, config, count, _ = test_damage.DATASETS[name]
    monkeypatch.setitem(datasets.DATASETS, config.name, config)
    folder = write(tmp_path / "source")
    values = {
        "corpus": config.name,
        "image_specs": {view: {"size": (16, 16), **SPEC} for view in config.views},
        "splits": {"train": "train"},
    }
    tokenize(make_config(**values), folder, tmp_path / "stores", MeanTokenizer())
    store = TokenStore(tmp_path / "stores" / "train")
    header = store.manifest.header
    assert len(store) == count and not store.manifest.invalid_episodes
    assert header.control_hz == config.control_hz == store[0].control_hz
    for episode in store:
        assert {v: np.shape(c[:]) for v, c in episode.codes.items()} == {
            view: (len(episode), 2, 2) for view in config.views
        }


def test_clips_of_many_sizes_and_rates_become_one_store(tmp_path, monkeypatch):
    """Something-Something: several widths, 12 frames a second, an id in the test list alone."""
    config = dataclasses.replace(datasets.DATASETS["something_something"], name="clips")
    monkeypatch.setitem(datasets.DATASETS, "clips", config)
    for number in range(8):
        size = (24, (32, 42, 18)[number % 3])
        frames = range(0, 10 * (24 + 6 * number), 10) if number else range(0, 60, 10)
        levels = [level % 250 for level in frames]
        write_video(tmp_path / f"videos/{number}.webm", levels, 12, codec="libvpx", size=size)
    labels = [{"id": str(n), "label": f"push {n}"} for n in range(8)]
    (tmp_path / "something-something-v2-train.json").write_text(json.dumps(labels))
    (tmp_path / "something-something-v2-test.json").write_text('[{"id": "99"}]')
    values = {
        "corpus": "clips",
        "image_specs": {"image": {"size": (16, 16), **SPEC}},
        "splits": {"train": "train"},
        "max_invalid_fraction": 0.0,
    }
    tokenize(make_config(**values), tmp_path, tmp_path / "stores", MeanTokenizer())
    store = TokenStore(tmp_path / "stores" / "train")
    assert [len(e) for e in store] == [13, 15, 18, 20, 23, 25, 28]
    (short,) = store.manifest.invalid_episodes
    assert (short.episode_id, short.filter) == ("train/0", "min_frames")


def test_frames_are_read_while_others_are_encoded():
    released = threading.Event()

    def encode(frames):
        assert released.wait(10)
        return MeanTokenizer().encode_frames(frames)

    frames = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((8, 8, 3), np.uint8)
    with BatchedEncoder(encode, ["image"], batch_size=4) as encoder:
        encoder.push({"image": frames})
        encoder.push({"image": frames})  # does not wait for the first batch
        assert encoder.num_ready == 0
        released.set()
        assert encoder.take(8)["image"].shape == (8, 1, 1)


def test_copies_are_changed_as_the_config_says(source, tmp_path):
    changes = {"augmented_copies": 2, "max_shift": 0.0, "min_crop": 0.5, "brightness": 0.4}
    config = make_config(splits={"train": "train"}, **changes)
    tokenize(config, source, tmp_path, MeanTokenizer())
    store = TokenStore(tmp_path / "train")
    header = store.manifest.header
    assert header.augmentation == {"min_crop": 0.5, "brightness": 0.4} and store.copies == 3
    original, first, second = (np.asarray(store[i].codes["image"]) for i in range(3))
    assert (original != first).any() and (first != second).any()
    np.testing.assert_array_equal(store[0].actions, store[2].actions)
    assert not make_config().augmentation


class Rounding(MeanTokenizer):
    """In bfloat16 every eighth code is another."""

    def encode_frames(self, frames, dtype="float32"):
        codes = super().encode_frames(frames)
        if dtype == "bfloat16":
            codes.reshape(-1)[::8] += 1
        return codes


def test_the_share_of_equal_codes_is_measured(source, tmp_path):
    config = make_config(splits={"train": "train"}, encoder_dtype="bfloat16")
    tokenize(config, source, tmp_path, Rounding())
    manifest = TokenStore(tmp_path / "train").manifest
    assert manifest.header.encoder_dtype == "bfloat16"
    assert 0.8 < manifest.equal_codes < 0.95
