"""The token store: continued byte for byte, opened whole, and damage named."""

from __future__ import annotations

import dataclasses
import json
import pickle

import numpy as np
import pytest

from tests.data.episodes import assert_same
from tests.data.test_token_record import make_tokens
from univla_jax.data.token_store import StoreHeader, TokenStore, TokenStoreWriter
from univla_jax.data.validation import InvalidEpisode
from univla_jax.errors import UserError

HEADER = StoreHeader(
    corpus="blocks",
    split="train",
    control_hz=5.0,
    source="blocks:1.0.0",
    source_fingerprint="abc",
    source_episodes=8,
    episodes_per_shard=3,
    min_frames=3,
    image_specs={"image": {"size": [16, 24]}, "wrist_image": {"size": [8, 8]}},
    grids={"image": (2, 3), "wrist_image": (1, 1)},
    vision_fingerprint="mean",
    codebook_size=256,
    block_steps=4,
)
INVALID = 4
EPISODES = {i: make_tokens(i, steps=3 + i) for i in range(8) if i != INVALID}


def fill(writer, number):
    with writer.shard(number) as shard:
        for index in writer.source_range(number):
            if index == INVALID:
                shard.skip(InvalidEpisode(f"blocks-{index}", "the instruction is empty"))
            else:
                shard.add(EPISODES[index])


def write(folder):
    writer = TokenStoreWriter(folder, HEADER)
    for number in range(HEADER.num_shards):
        if not writer.has_shard(number):
            fill(writer, number)
    return writer.finish()


def content(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "train")
    return tmp_path / "train"


def test_episodes_come_back_in_order(folder):
    store = TokenStore(folder)
    assert len(store) == 7
    for got, want in zip(store, EPISODES.values(), strict=True):
        assert_same(got, want)
    assert_same(pickle.loads(pickle.dumps(store))[-1], EPISODES[7])


def test_the_manifest_says_what_is_inside(folder):
    store = TokenStore(folder)
    manifest = store.manifest
    actions = np.concatenate([e.actions for e in EPISODES.values()])
    assert (manifest.episodes, manifest.frames) == (7, len(actions))
    assert [s.steps for s in manifest.shards] == [(3, 4, 5), (6, 8), (9, 10)]
    assert [(e.episode_id, e.reason) for e in manifest.invalid_episodes] == [
        ("blocks-4", "the instruction is empty")
    ]
    assert manifest.header.vision_fingerprint == "mean"
    np.testing.assert_allclose(store.statistics["blocks"].mean, actions.mean(0), atol=1e-6)
    assert store.statistics["blocks"].count == len(actions)
    store.verify()


def test_an_interrupted_store_comes_out_the_same(folder, tmp_path):
    other = tmp_path / "other"
    writer = TokenStoreWriter(other, HEADER)
    fill(writer, 1)
    with pytest.raises(KeyboardInterrupt), writer.shard(0) as shard:
        shard.add(EPISODES[0])
        raise KeyboardInterrupt
    assert not writer.has_shard(0)
    (other / "shards" / ".00000.array_record.partial").write_bytes(b"killed here")
    (other / "shards" / "00002.array_record").write_bytes(b"renamed, but killed before its entry")
    with pytest.raises(UserError, match="an unfinished store"):
        TokenStore(other)
    write(other)
    assert content(other) == content(folder)


def test_a_rerun_changes_nothing(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    write(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_finishing_needs_every_shard(tmp_path):
    writer = TokenStoreWriter(tmp_path / "train", HEADER)
    fill(writer, 0)
    with pytest.raises(UserError, match=r"00001\.json"):
        writer.finish()


def test_other_settings_are_refused(folder):
    other = dataclasses.replace(HEADER, vision_fingerprint="median", min_frames=4)
    with pytest.raises(UserError, match="min_frames was 3, is 4; vision_fingerprint was 'mean'"):
        TokenStoreWriter(folder, other)


def test_a_changed_shard_is_noticed(folder):
    path = folder / "shards" / "00001.array_record"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"00001.array_record has .* bytes, the manifest says"):
        TokenStore(folder)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="has changed since it was written"):
        TokenStore(folder).verify()
    path.unlink()
    with pytest.raises(UserError, match=r"00001.array_record is missing"):
        TokenStore(folder)


def test_a_damaged_manifest_is_named(folder, tmp_path):
    with pytest.raises(UserError, match="holds no token store"):
        TokenStore(tmp_path)
    path = folder / "manifest.json"
    value = json.loads(path.read_text())
    for damaged, message in (
        ("{", "not valid JSON"),
        ("[]", "a JSON list"),
        ("{}", "is damaged .*missing key"),
    ):
        path.write_text(damaged)
        with pytest.raises(UserError, match=message):
            TokenStore(folder)
    old = {**value, "header": {**value["header"], "format": 1}}
    path.write_text(json.dumps(old))
    with pytest.raises(UserError, match="record format 1, not 2; tokenize again"):
        TokenStore(folder)
    path.write_text(json.dumps({**value, "color": 1}))
    with pytest.raises(UserError, match="color"):
        TokenStore(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": (2, 2)}, "code grids"),
        ({"codes": {"image": np.zeros((5, 2, 3), np.uint16)}}, "code grids"),
        (
            {
                "codes": {
                    "image": np.full((5, 2, 3), 256, np.uint16),
                    "wrist_image": np.zeros((5, 1, 1), np.uint16),
                }
            },
            "code 256 is not below 256",
        ),
    ],
)
def test_codes_must_fit_the_header(tmp_path, changes, message):
    writer = TokenStoreWriter(tmp_path, HEADER)
    with pytest.raises(UserError, match=message), writer.shard(0) as shard:
        shard.add(make_tokens(**changes))


def test_a_dataset_without_actions_has_no_statistics(tmp_path):
    header = dataclasses.replace(HEADER, source_episodes=1)
    writer = TokenStoreWriter(tmp_path, header)
    with writer.shard(0) as shard:
        shard.add(make_tokens(actions=np.zeros((5, 0), np.float32)))
    writer.finish()
    assert set(TokenStore(tmp_path).statistics) == {"blocks/state"}


def test_a_store_begun_under_former_names_is_finished(folder):
    """Shards and manifest once called the invalid episodes "problems", and their ids "episode"."""
    (folder / "manifest.json").unlink()
    entry = folder / "shards" / "00001.json"
    value = json.loads(entry.read_text())
    former = [
        {"episode": e["episode_id"], "reason": e["reason"]} for e in value["invalid_episodes"]
    ]
    assert former
    entry.write_text(json.dumps({"shard": value["shard"], "problems": former}))
    manifest = write(folder)
    assert [e.episode_id for e in manifest.invalid_episodes] == ["blocks-4"]
    assert TokenStore(folder).manifest.shards == manifest.shards
