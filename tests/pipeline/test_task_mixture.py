"""A mixture of tasks: shared rows, exact proportions and positions, and what it refuses."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest

from tests.conftest import REPOSITORY
from tests.pipeline import small
from univla_jax.errors import UserError
from univla_jax.pipeline.data_config import MixtureTask
from univla_jax.pipeline.dataset import EvaluationBatches, training_batches
from univla_jax.pipeline.example_page import render_examples
from univla_jax.pipeline.mixture import with_held_out_stores
from univla_jax.pipeline.packing import PackedSource
from univla_jax.sequences.tokens import Role

TOKENS = REPOSITORY / "tests" / "fixtures" / "before" / "tokens" / "val"
MIXTURE = (
    MixtureTask("policy_video", weight=2.0, stores=("a",), views=("view0", "view1")),
    MixtureTask("policy_video", name="dynamics", stores=("data/b",), frames=3, loss_on="vision"),
    MixtureTask("world_model", frames=2, frame_spacing=3, vision_weight=(1.0, 0.5, 10)),
)
SOURCES = [small.store(6, "a"), small.store(6, "b"), small.store(6, "a"), small.store(6, "b")]


def config(mixture=MIXTURE, **changes):
    values = {"task": "", "mixture": mixture, "stores": ("data/a", "data/b"), **changes}
    return small.config(**values)


def batches(made=None, **options):
    return training_batches(made or config(), small.assets(), SOURCES, **options)


def test_each_task_has_settings_of_its_own():
    policy, dynamics, world_model = config().parts
    assert (policy.stores, policy.frames, policy.labels) == (("data/a",), 2, "action")
    assert (dynamics.stores, dynamics.frames, dynamics.labels) == (("data/b",), 3, "vision")
    assert world_model.stores == ("data/a", "data/b") and world_model.chunk_size == 3
    assert world_model.vision_schedule == (1.0, 0.5, 10)
    assert config().titles == ("policy_video", "dynamics", "world_model")
    assert config().needs.actions and config().needs.frame_spacing
    question = MixtureTask("question", null_prompt_prob=0.5)
    assert config((question,), frames=2).parts[0].frames == 1


def test_samples_come_in_proportion_and_tasks_share_rows():
    iterator = batches(config(sequence_length=240, batch_size=4))
    try:
        made = [next(iterator) for _ in range(40)]
    finally:
        iterator.close()
    counts, shared = np.zeros(3), 0
    for batch in made:
        for tasks, segments in zip(batch.task_ids, batch.segment_ids):
            firsts = [tasks[segments == n][0] for n in range(1, segments.max() + 1)]
            counts += np.bincount(firsts, minlength=3)
            shared += len(set(firsts)) > 1
            assert all(len(set(tasks[segments == n])) == 1 for n in range(1, segments.max() + 1))
    assert shared > 80
    np.testing.assert_allclose(counts / counts.sum(), [0.5, 0.25, 0.25], atol=0.03)


def test_a_batch_depends_on_seed_and_number_alone_and_resumes_exactly():
    iterators = [batches(), batches(), batches(host=1, hosts=2)]
    try:
        first, second, half = iterators
        for _ in range(5):
            next(first)
        state = first.get_state()
        expected = [next(first) for _ in range(3)]
        second.set_state(state)
        for batch in expected:
            got = next(second)
            for field in ("tokens", "task_ids", "segment_ids", "roles"):
                np.testing.assert_array_equal(getattr(batch, field), getattr(got, field))
        for _ in range(5):
            next(half)
        np.testing.assert_array_equal(next(half).tokens, expected[0].tokens[1:])
    finally:
        for iterator in iterators:
            iterator.close()


def test_a_position_belongs_to_its_mixture_but_not_to_what_is_learned():
    saved = batches()
    state = saved.get_state()
    saved.close()
    other_loss = dataclasses.replace(MIXTURE[0], loss_on="both", vision_weight=0.1)
    other = batches(config((other_loss, *MIXTURE[1:])))
    other.set_state(state)
    other.close()
    heavier = batches(config((dataclasses.replace(MIXTURE[0], weight=3.0), *MIXTURE[1:])))
    with pytest.raises(UserError, match=r"data\.mixture\.0\.weight was 2"):
        heavier.set_state(state)
    heavier.close()


def test_evaluation_shows_every_task_in_turn():
    first = next(iter(EvaluationBatches(config(batch_size=4), small.assets(), SOURCES)))
    assert first.task_ids[:, 0].tolist() == [0, 1, 2, 2]


def test_a_task_is_evaluated_on_the_stores_it_names(tmp_path):
    folders = [str(tmp_path / "val"), str(tmp_path / "rollouts")]
    for folder in folders:
        shutil.copytree(TOKENS, folder)
    policy = MixtureTask("policy_video", evaluation_stores=("val",))
    mixture = (policy, MixtureTask("world_model", frames=2))
    found = with_held_out_stores(config(mixture), folders)
    assert [entry.stores for entry in found.mixture] == [(folders[0],), tuple(folders)]
    strange = dataclasses.replace(policy, evaluation_stores=("test",))
    with pytest.raises(UserError, match=r"'policy_video' names 'test', there are .*rollouts"):
        with_held_out_stores(config((strange,)), folders)


def test_packing_loads_every_sample_with_its_task():
    from univla_jax.pipeline.dataset import training_stream

    made = config(packing=False)
    stream = training_stream(made, small.assets(), SOURCES)
    source = PackedSource(made, stream, range(2), small.assets().vocabulary.pad)
    for n in range(8):
        item = source[n]
        for i in range(2):
            task = item["task_ids"][i, 0]
            has_action = (item["roles"][i] == Role.ACTION).any()
            assert task == stream.draw(2 * n + i).task_id and has_action == (task < 2)


def test_examples_of_a_mixture_are_drawn_with_their_task():
    from tests.inference.scripted import PatchVision

    assets = dataclasses.replace(small.assets(), vision=None)
    object.__setattr__(assets, "vision", PatchVision())
    page = render_examples(config(), assets, 6, SOURCES)
    assert "policy_video, dynamics, world_model" in page
    assert "loss on action" in page and "loss on vision" in page


@pytest.mark.parametrize(
    ("entries", "changes", "message"),
    [
        ((), {}, "neither; give one of the two"),
        (MIXTURE, {"task": "world_model", "frames": 2}, "and a mixture; give one of the two"),
        ((MixtureTask("dance"),), {}, r"mixture\[0\].task: 'dance' is not one of policy_video"),
        ((MixtureTask("caption", weight=0.0),), {}, r"mixture\[0\].weight: 0.0, expected above 0"),
        ((MixtureTask("caption"),) * 2, {}, r"mixture\[1\]: two tasks are called 'caption'"),
        ((MixtureTask("policy_flow"),), {}, "'policy_flow' takes one sample per batch element"),
        ((MixtureTask("caption", frames=2),), {}, r"mixture\[0\] \(caption\): frames: 2, but"),
        ((MixtureTask("caption", state=True),), {}, r"\(caption\): state: the task 'caption' has"),
        ((MixtureTask("caption", views_together=True),), {}, "a choice of world models"),
        ((MixtureTask("caption"),), {"stores": ()}, "none named"),
        (MIXTURE[:1], {"stores": ("x/a", "y/a")}, "'a' may be x/a or y/a"),
        ((MixtureTask("caption", weights=(1.0,)),), {}, "1 weights for 2 stores"),
    ],
)
def test_what_cannot_be_mixed_is_named(entries, changes, message):
    with pytest.raises(UserError, match=message):
        config(entries, **changes)
