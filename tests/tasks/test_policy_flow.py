"""The flow-matching policy: the image policy's prompt, and the chunk as numbers."""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.pipeline import small
from tests.sequences.spelling import ASSETS, FRAME, code, spell
from univla_jax.data.action_conventions import ChunkDeltas
from univla_jax.data.datasets import DATASETS
from univla_jax.sequences.tokens import Role
from univla_jax.tasks import make_task
from univla_jax.tasks.base import TaskSettings

TASK = small.task("policy_flow")


def sample(episode):
    return TASK.sample(episode, "a", np.random.default_rng(0))


def test_a_sequence_ends_with_boa():
    tokens = TASK.build("a", [code(1, 2)])
    assert spell(tokens) == f"<bos> a {FRAME.format(1, 2)} <boa>"
    assert tokens.roles[-1] == Role.ACTION


def test_the_prompt_is_the_whole_training_sequence():
    spec = sample(small.episode(0, 3))
    prompt = TASK.build("a", [np.full((1, 2, 2), c, np.uint16) for c in (0, 1)])
    np.testing.assert_array_equal(prompt.ids, spec.fill(TASK.vocabulary).ids)


def test_the_chunk_comes_as_numbers():
    episode = small.episode(0, 3)
    actions = sample(episode).actions
    assert actions.dtype == np.float32 and actions.shape == (3, 2)
    normal = ASSETS.statistics["tabletop"].normalize(episode.actions)
    np.testing.assert_array_equal(actions, normal)


def test_no_action_tokenizer_is_needed():
    task = make_task("policy_flow", TaskSettings(chunk_size=3), small.without_action_tokenizer())
    assert task.sample(small.episode(0, 3), "a", np.random.default_rng(0)).actions is not None


def test_chunks_of_deltas_start_at_nothing(monkeypatch):
    deltas = ChunkDeltas(absolute=(1,), angles=())
    dataset = dataclasses.replace(DATASETS["tabletop"], chunk_deltas=deltas)
    monkeypatch.setitem(DATASETS, "tabletop", dataset)
    episode = small.episode(0, 3)
    actions, raw = sample(episode).actions, episode.actions
    moved = np.clip(raw[:, 0] - raw[0, 0], -1, 1)
    np.testing.assert_allclose(actions[:, 0], moved, atol=1e-6)
    np.testing.assert_allclose(actions[:, 1], raw[:, 1], atol=1e-6)
