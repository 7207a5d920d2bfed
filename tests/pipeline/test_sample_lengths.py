"""The longest sample of a store is known before the first step."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.pipeline import small
from tests.pipeline.test_mixture import assets, write_store
from tests.tasks import driving_runs
from univla_jax.assets import Assets
from univla_jax.data.token_store import StoreHeader, TokenStore, TokenStoreWriter
from univla_jax.errors import UserError
from univla_jax.pipeline import sample_lengths
from univla_jax.pipeline.data_config import DataConfig
from univla_jax.pipeline.dataset import training_batches
from univla_jax.pipeline.mixture import SampleBuilder
from univla_jax.pipeline.sample_lengths import longest_sample
from univla_jax.tokenizers.fast import FastTokenizer
from univla_jax.tokenizers.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def fast() -> Assets:
    """The small world with FAST, whose chunks differ in length, and states."""
    chunks = np.random.default_rng(0).uniform(-1, 1, (50, 3, 2))
    tokenizer = FastTokenizer.fit(chunks, 5, 300)
    given = small.assets()
    vocabulary = Vocabulary.from_scratch(128, 12, tokenizer.vocabulary_size)
    statistics = {"tabletop": given.statistics["tabletop"]}
    statistics["tabletop/state"] = given.statistics["tabletop"]
    return dataclasses.replace(
        given, vocabulary=vocabulary, action=tokenizer, statistics=statistics
    )


def moving(steps=13, **changes):
    """An episode whose chunks differ in length: it moves at its end alone."""
    rng = np.random.default_rng(1)
    actions = np.zeros((steps, 2), np.float32)
    actions[-4:] = rng.uniform(-1, 1, (4, 2))
    return dataclasses.replace(small.episode(0, steps), actions=actions, **changes)


@pytest.mark.parametrize(
    "settings",
    [
        {"task": "policy_video"},
        {"task": "policy_video", "state": True},
        {"task": "policy_image", "frames": 1},
        {"task": "policy_image", "frames": 1, "aligned_windows": 1.0},
        {"task": "policy_video", "state": True, "state_steps": 2},
        {"task": "policy_video", "max_committed": 2},
        {"task": "policy_image", "frames": 1, "max_committed": 2, "state": True},
        {"task": "policy_flow", "frames": 1, "packing": False},
        {"task": "world_model", "frame_spacing": 2},
        {"task": "chain_of_thought", "frames": 1},
        {"task": "question", "frames": 1},
    ],
)
def test_the_longest_sample_is_that_of_all_windows(fast, settings):
    state = np.random.default_rng(2).uniform(-1, 1, (13, 2)).astype(np.float32)
    episode = moving(instruction="a", state=state, texts={"reasoning": ("so",), "answer": ("yes",)})
    task = SampleBuilder(small.config(**settings), fast).task
    lengths = [len(task.sample(episode, "a", np.random.default_rng(seed))) for seed in range(300)]
    # With committed actions it is a bound: the longest chunks need not lie behind the longest ones.
    found = longest_sample(task, episode, limit=0).tokens
    slack = 8 if task.settings.max_committed else 0
    assert max(lengths) <= found <= max(lengths) + slack
    assert longest_sample(task, episode, limit=10_000).tokens >= max(lengths)
    longer = dataclasses.replace(episode, paraphrases=("no", "aaaaa"))
    longest = longest_sample(task, longer, limit=0)
    assert (longest.tokens, longest.without_text) == (found + 4, found - 1)


def test_episodes_are_read_only_where_the_texts_of_their_shard_may_be_too_long(
    tmp_path, monkeypatch
):
    folder = write_store(tmp_path / "store")
    config = small.config(stores=(folder,))
    read = []
    monkeypatch.setattr(
        sample_lengths,
        "longest_sample",
        lambda task, episode, limit: read.append(episode) or longest_sample(task, episode, limit),
    )
    training_batches(config, assets()).close()
    assert {len(episode.instruction) for episode in read} == {0}  # one bound per shard
    assert len(read) == len(TokenStore(folder).manifest.shards)
    read.clear()
    with pytest.raises(UserError, match="8 of 8 episodes have samples of more than 60 tokens"):
        training_batches(dataclasses.replace(config, sequence_length=60), assets())
    assert len(read) == len(TokenStore(folder).manifest.shards) + 8


def test_a_store_that_does_not_tell_the_length_of_its_texts_is_read(tmp_path):
    store = TokenStore(write_store(tmp_path / "store"))
    shards = tuple(dataclasses.replace(s, text_bytes=0) for s in store.manifest.shards)
    store.manifest = dataclasses.replace(store.manifest, shards=shards)
    builder = SampleBuilder(small.config(sequence_length=60), assets())
    with pytest.raises(UserError, match="8 of 8 episodes"):
        sample_lengths.check_lengths(small.config(sequence_length=60), builder, [store])
    sample_lengths.check_lengths(small.config(), builder, [store])


@pytest.mark.parametrize(
    ("name", "views"),
    [
        ("driving", ("image",)),
        ("driving_vava", driving_runs.VIEWS),
        ("driving_world_model", ("image",)),
    ],
)
def test_texts_that_say_where_a_sample_may_begin_are_kept(tmp_path, name, views):
    run, specs = driving_runs.run(), {view: {"size": [16, 24]} for view in driving_runs.VIEWS}
    header = StoreHeader(
        corpus="road",
        split="train",
        control_hz=2.0,
        source="road",
        source_fingerprint="source",
        source_episodes=1,
        episodes_per_shard=1,
        min_frames=1,
        image_specs=specs,
        grids=dict.fromkeys(specs, driving_runs.GRID),
        vision_fingerprint="vision",
        codebook_size=16,
        block_steps=4,
    )
    writer = TokenStoreWriter(tmp_path / "store", header)
    with writer.shard(0) as shard:
        shard.add(run)
    writer.finish()
    store = TokenStore(tmp_path / "store")
    settings = {"state": name != "driving_world_model", "views": views, "frames": 1}
    config = DataConfig(
        sequence_length=40,
        batch_size=1,
        stores=("store",),
        task=name,
        chunk_size=8,
        packing=False,
        **settings,
    )
    builder = SampleBuilder(config, driving_runs.assets())
    drawn = [
        len(builder.task.sample(store[0], "go left", np.random.default_rng(seed)).tokens.ids)
        for seed in range(20)
    ]
    found = longest_sample(builder.task, store[0], max(drawn) - 1)
    assert found.tokens >= max(drawn)
    sample_lengths.check_lengths(
        dataclasses.replace(config, sequence_length=found.tokens), builder, [store]
    )
    with pytest.raises(UserError, match="1 of 1 episodes have samples of more than"):
        sample_lengths.check_lengths(
            dataclasses.replace(config, sequence_length=max(drawn) - 1), builder, [store]
        )
