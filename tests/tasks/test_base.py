"""What all tasks share: windows, prompts that are cut sequences, and the registry."""

from __future__ import annotations

import pickle
import sys
import types

import numpy as np
import pytest

from tests.parity import assert_parity
from tests.pipeline import small
from tests.sequences.spelling import ASSETS, TEXT_ENCODER, chunk, code, spell
from univla_jax import tasks
from univla_jax.errors import UserError
from univla_jax.pipeline.dataset import training_batches
from univla_jax.sequences.tokens import LABELS, Role, opening
from univla_jax.tasks.base import (
    Needs,
    SampleSpec,
    Task,
    TaskSettings,
    draw_window,
    frames_in_order,
    ordered_views,
    window_frames,
)


@pytest.mark.parametrize(
    ("steps", "frames", "spacing", "expected"),
    [(27, 2, 10, 2), (20, 2, 10, 2), (15, 2, 10, 1), (10, 1, 10, 1), (31, 6, 3, 6)],
)
def test_a_window_takes_whole_chunks(steps, frames, spacing, expected):
    assert window_frames(steps, frames, spacing) == expected
    window = draw_window(steps, frames, spacing, np.random.default_rng(0))
    assert len(window) == expected and window.step == spacing
    assert window.stop - window.start == expected * spacing and window.stop <= steps


def test_an_episode_shorter_than_a_chunk_is_refused():
    with pytest.raises(UserError, match="8 steps are fewer than one chunk of 10"):
        draw_window(8, 2, 10, np.random.default_rng(0))


def test_every_start_that_fits_is_drawn():
    rng = np.random.default_rng(0)
    assert {draw_window(12, 2, 5, rng).start for _ in range(100)} == {0, 1, 2}
    assert draw_window(10, 2, 5, rng) == range(0, 10, 5)


def test_the_given_share_of_windows_begins_on_whole_chunks():
    rng = np.random.default_rng(0)
    starts = [draw_window(34, 2, 5, rng, aligned=0.5).start for _ in range(2000)]
    on_chunks = sum(start % 5 == 0 for start in starts) / 2000
    assert 0.55 < on_chunks < 0.65 and set(starts) == set(range(25))  # 0.5 + 0.5 * 5 / 25
    always = {draw_window(34, 2, 5, rng, aligned=1.0).start for _ in range(200)}
    assert always == {0, 5, 10, 15, 20}


@pytest.mark.parametrize("behind", [1, 3, 5, 7])
def test_chunks_behind_committed_actions_begin_on_whole_chunks(behind):
    rng = np.random.default_rng(0)
    drawn = [draw_window(34, 2, 5, rng, aligned=1.0, behind=behind) for _ in range(200)]
    begins = {window[-1] + behind for window in drawn}
    assert begins == {begin for begin in range(5 + behind, 30) if begin % 5 == 0}


def test_a_short_episode_shows_any_window_where_no_aligned_one_fits():
    rng = np.random.default_rng(0)
    starts = {draw_window(9, 2, 5, rng, aligned=1.0, behind=3).start for _ in range(50)}
    assert starts == {0, 1}


def test_cameras_of_a_corpus_come_in_its_order():
    assert ordered_views("tabletop", ["side", "wrist_image", "image"]) == [
        "image",
        "wrist_image",
        "side",
    ]
    assert ordered_views("mars", {"b": 1, "a": 2}) == ["b", "a"]


@pytest.mark.parametrize("group", ["dataset", "prompts"])
def test_golden_samples_and_prompts(golden_dir, group):
    assert_parity(golden_dir, group)


VIEWS = [code(1, 2), code(3, 4)]
TWO = np.concatenate(VIEWS)


def build_with_and_without_target(name):
    """A training sequence, its prompt, and the target behind it, as text."""
    task = small.task(name, frames=2 if tasks.task_class(name).needs.frame_sequence else 1)
    chunks = [chunk(1, 2), chunk(3)]
    cases = {
        "policy_video": lambda: (
            task.build("go", [TWO], chunks),
            task.build("go", [TWO], chunks[:1]).ids,
            "a3 <eoa>",
        ),
        "policy_image": lambda: (
            task.build("go", VIEWS, chunks[0]),
            task.build("go", VIEWS).ids,
            "a1 a2 <eoa>",
        ),
        "policy_flow": lambda: (task.build("go", VIEWS), task.build("go", VIEWS).ids, ""),
        "chain_of_thought": lambda: (
            task.build("go", VIEWS, "hm", chunks[1]),
            task.build("go", VIEWS).ids,
            "h m <eot> <boa> a3 <eoa>",
        ),
        "world_model": lambda: (
            task.build("go", [TWO]),
            task.prompt("go", TWO[:1]),
            "v3 v4 <eof> <eoi>",
        ),
        "question": lambda: (
            task.build("go", VIEWS, "yes"),
            task.build("go", VIEWS).ids,
            "y e s <eos>",
        ),
        "grounding": lambda: (
            task.build("go", VIEWS[:1], "[1,2]"),
            task.build("go", VIEWS[:1]).ids,
            "[ 1 , 2 ] <eos>",
        ),
        "tracking": lambda: (
            task.build_video("go", TWO, ["none", "[1,2]"]),
            task.build_video("go", TWO, ["none"]).ids,
            "[ 1 , 2 ] <eoa>",
        ),
        "caption": lambda: (
            task.build("go", [TWO]),
            task.prompt("go", 1, 2, 2),
            "v1 v2 <eof> v3 v4 <eof> <eoi> <eos>",
        ),
        "value": lambda: (
            task.build("go", [TWO], chunks[:1], 3),
            task.build("go", [TWO], chunks[:1]).ids,
            "a3",
        ),
        "text_to_image": lambda: (
            task.build("go", TWO[0]),
            task.prompt("go", 1, 2),
            "v1 v2 <eol> <eof> <eoi> <eos>",
        ),
    }
    return cases[name]()


@pytest.mark.parametrize("name", [n for n in tasks.TASK_NAMES if not n.startswith("driving")])
def test_a_prompt_is_the_training_sequence_up_to_its_target(name):
    whole, prompt, target = build_with_and_without_target(name)
    np.testing.assert_array_equal(prompt, whole.ids[: len(prompt)])
    assert spell(whole.ids[len(prompt) :]) == target
    assert prompt.dtype == np.int32 and len(whole.ids) == len(whole.roles)


@pytest.mark.parametrize("name", tasks.TASK_NAMES)
def test_every_task_is_named_after_its_module_and_has_labels(name):
    task = small.task(name)
    assert task.name == name and task.labels in LABELS
    assert spell(task.opening("go")) in ("<bos> g o", "<bos>")  # or a text at every moment
    assert pickle.loads(pickle.dumps(task)).settings == task.settings


def test_an_unknown_task_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="task 'policy_vdeo': expected one of policy_video, "):
        tasks.task_class("policy_vdeo")
    with pytest.raises(UserError, match="action"):
        tasks.make_task("policy_video", TaskSettings(), small.without_action_tokenizer())


def test_tasks_may_share_a_text_encoder():
    task = tasks.make_task("caption", TaskSettings(), ASSETS, TEXT_ENCODER)
    assert task.text_encoder is TEXT_ENCODER


class LastFrame(Task):
    """The last frame of the first camera and a word for the number of steps."""

    name = "last_frame"
    labels = "answer"
    needs = Needs(single_view=True)

    def sample(self, episode, instruction, rng):
        view, step = self.view_codes(episode)[0], len(episode) - 1
        tokens = self.build(view[step:], "x" * len(episode))
        return SampleSpec(tokens, frames_in_order([view], [step]))

    def build(self, frame, answer=None):
        pieces = [opening(self.text_encoder, ""), *self.frame_pieces([frame])]
        if answer is not None:
            pieces.append((Role.ANSWER, self.text_encoder.encode(answer)))
        return self.compose(pieces)


@pytest.fixture
def registered(monkeypatch):
    """``LastFrame`` as a ninth task: one module and one name, as the package documents it."""
    module = types.ModuleType("univla_jax.tasks.last_frame")
    module.TASK = LastFrame
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(tasks, "TASK_NAMES", (*tasks.TASK_NAMES, "last_frame"))


def test_a_new_task_is_one_module_and_one_name(registered):
    config = small.config(task="last_frame", frames=1)
    assert config.labels == "answer" and config.needs.single_view
    iterator = training_batches(config, small.assets(), [small.store(12)])
    batch = iterator.next()
    iterator.close()
    answers = batch.tokens[batch.roles == Role.ANSWER]
    assert set(map(chr, answers)) == {"x"} and (batch.roles == Role.VISION).sum() % 4 == 0
    assert batch.segment_ids.max() > 1


def test_a_task_that_is_not_registered_is_refused():
    with pytest.raises(UserError, match=r"data\.task: 'last_frame' is not one of"):
        small.config(task="last_frame", frames=1)
