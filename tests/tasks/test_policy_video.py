"""The video policy: interleaved frames and chunks, its prompt, decoding and parsing."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest

from tests.pipeline import small
from tests.sequences.spelling import ASSETS, FRAME, chunk, code, spell
from univla_jax.errors import UserError
from univla_jax.sequences.tokens import Role
from univla_jax.tasks import make_task
from univla_jax.tasks.base import TaskSettings

T, M, V, S, A = Role.TEXT, Role.MARKUP, Role.VISION, Role.STATE, Role.ACTION
TASK = small.task("policy_video", frames=2)
TWO = np.concatenate([code(1, 2), code(3, 4)])


def sample(episode, **settings):
    task = small.task("policy_video", **{"frames": 2, **settings})
    spec = task.sample(episode, episode.instruction, np.random.default_rng(0))
    return spec.fill(task.vocabulary)


def test_frames_and_chunks_are_interleaved():
    second = np.concatenate([code(5, 6), code(7, 8)])
    tokens = TASK.build("go", [TWO, second], [chunk(1, 2), chunk(3)])
    expected = [
        "<bos> g o",
        FRAME.format(1, 2),
        FRAME.format(5, 6),
        "<boa> a1 a2 <eoa>",
        FRAME.format(3, 4),
        FRAME.format(7, 8),
        "<boa> a3 <eoa>",
    ]
    assert spell(tokens) == " ".join(expected)
    frame = [M] * 7 + [V] * 2 + [M] * 2
    assert tokens.roles.tolist() == [T] * 3 + frame * 2 + [A] * 4 + frame * 2 + [A] * 3
    assert tokens.ids.dtype == np.int32


def test_wordless_sequences_have_no_instruction():
    task = small.task("policy_video", frames=2, wordless=True)
    tokens = task.build("go", [code(1, 2)], [chunk(1, 2)])
    assert spell(tokens) == f"<bos> {FRAME.format(1, 2)} <boa> a1 a2 <eoa>"
    assert task.opening("go").tolist() == [task.vocabulary.bos]
    # The first moment of both cameras is given; what follows from the chunks is learned.
    two = task.build("go", [TWO, TWO], [chunk(1), chunk(2)])
    own = TASK.build("", [TWO, TWO], [chunk(1), chunk(2)])
    np.testing.assert_array_equal(two.ids, own.ids)
    codes = two.roles[own.roles == V]
    assert codes.tolist() == [Role.SEEN] * 4 + [V] * 4
    np.testing.assert_array_equal(two.roles[own.roles != V], own.roles[own.roles != V])
    episode = small.episode(0, 6)
    spec = task.sample(episode, "go", np.random.default_rng(0))
    filled = small.task("policy_video", frames=2).sample(episode, "", np.random.default_rng(0))
    np.testing.assert_array_equal(spec.fill(task.vocabulary).ids, filled.fill(task.vocabulary).ids)


def test_states_are_written_before_their_chunk():
    chunks = [chunk(1), chunk(2)]
    tokens = TASK.build("", [TWO], chunks, states=chunks)
    text = spell(tokens)
    assert f"{FRAME.format(1, 2)} a1 <boa> a1 <eoa>" in text
    assert f"{FRAME.format(3, 4)} a2 <boa> a2 <eoa>" in text
    assert tokens.roles.tolist()[-4:] == [S, A, A, A]


def test_without_the_last_chunk_it_is_the_prompt():
    chunks = [chunk(1, 2), chunk(3)]
    for states in (None, [chunk(3), chunk(4)]):
        whole = TASK.build("go", [TWO, TWO], chunks, states)
        prompt = TASK.build("go", [TWO, TWO], chunks[:1], states)
        np.testing.assert_array_equal(prompt.ids, whole.ids[: -len(chunks[1]) - 1])
        np.testing.assert_array_equal(prompt.roles, whole.roles[: len(prompt)])
        assert prompt.ids[-1] == TASK.vocabulary.boa


def test_unfit_parts_are_refused():
    cases = {
        "same number": lambda: TASK.build("", [TWO, code(1)], []),
        "0 action chunks for 2": lambda: TASK.build("", [TWO], []),
        "2 action chunks for 2 moments": lambda: TASK.build("", [TWO], [chunk(1)] * 2, [chunk(1)]),
        "visual code 12": lambda: TASK.build("", [code(12)], [chunk(1)]),
    }
    for message, call in cases.items():
        with pytest.raises(UserError, match=message):
            call()


def test_a_sample_shows_every_view_at_each_chunk():
    # 6 steps are exactly two chunks: frames 0 and 3, view 1 one code further.
    tokens = sample(small.episode(0, 6))
    assert small.shown_codes(tokens.ids) == [0, 1, 3, 4]
    assert tokens.ids.dtype == np.int32 and tokens.roles.dtype == np.uint8


def test_views_are_taken_in_the_configured_order():
    episode = small.episode(0, 6)
    assert small.shown_codes(sample(episode, views=("view1", "view0")).ids) == [1, 0, 4, 3]
    assert small.shown_codes(sample(episode, views=("view1",)).ids) == [1, 4]


def test_all_views_come_in_the_order_of_the_corpus():
    episode = small.episode(0, 6)
    renamed = {"wrist_image": episode.codes["view1"], "image": episode.codes["view0"]}
    tokens = sample(dataclasses.replace(episode, codes=renamed))
    assert small.shown_codes(tokens.ids) == [0, 1, 3, 4]


def test_actions_are_normalized_and_encoded_chunk_by_chunk():
    episode = small.episode(0, 6)
    ids = sample(episode).ids
    starts = np.flatnonzero(ids == ASSETS.vocabulary.boa)
    ends = np.flatnonzero(ids == ASSETS.vocabulary.eoa)
    assert len(starts) == 2
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        codes = ASSETS.vocabulary.action_codes(ids[start + 1 : end])
        raw = episode.actions[3 * number : 3 * number + 3]
        normal = ASSETS.statistics["tabletop"].normalize(raw)
        assert codes.tolist() == ASSETS.action.encode(normal)


def test_short_episodes_give_fewer_chunks():
    assert len(small.shown_codes(sample(small.episode(0, 5)).ids)) == 2


def test_states_of_an_episode_stand_before_their_chunk():
    statistics = ASSETS.statistics["tabletop"]
    assets = dataclasses.replace(
        ASSETS, statistics={"tabletop": statistics, "tabletop/state": statistics}
    )
    settings = TaskSettings(frames=2, chunk_size=3, state=True)
    task = make_task("policy_video", settings, assets)
    state = np.linspace(-1, 1, 12, dtype=np.float32).reshape(6, 2)
    episode = dataclasses.replace(small.episode(0, 6), state=state)
    ids = task.sample(episode, "a", np.random.default_rng(0)).tokens.ids
    starts = np.flatnonzero(ids == ASSETS.vocabulary.boa)
    assert len(starts) == 2
    for moment, start in enumerate(starts):
        codes = ASSETS.vocabulary.action_codes(ids[start - 2 : start])
        assert codes.tolist() == ASSETS.action.encode(state[3 * moment : 3 * moment + 1])
    with pytest.raises(UserError, match="it has no state"):
        sample(small.episode(0, 6), state=True)
    with pytest.raises(UserError, match="no statistics of 'tabletop/state'"):
        small.task("policy_video", state=True).sample(episode, "a", np.random.default_rng(0))


def test_the_window_of_the_history_is_that_of_training():
    assert small.task("policy_video", frames=3).history_window == 3


def test_a_whole_chunk_and_nothing_else_is_decoded():
    v = ASSETS.vocabulary
    decoding = TASK.decoding((3, 2))
    assert decoding.stop_id == v.eoa and decoding.forced_ids is None
    assert set(decoding.allowed) == {v.eoa, *v.action_ids(np.arange(5))}
    assert decoding.max_new_tokens == ASSETS.action.max_tokens(3, 2) + 1
    assert decoding.grammar is not None
    free = TASK.decoding((3, 2), free_form=True, max_new_tokens=9)
    assert free.grammar is None and free.max_new_tokens == 9


def test_generated_ids_are_parsed_into_the_chunk():
    actions = np.array([[-1, 1], [0.3, -0.3], [0, 1]], np.float32)
    ids = np.append(TASK.chunk_ids(actions[None])[0], ASSETS.vocabulary.eoa)
    parsed = TASK.parse(ids, (3, 2))
    assert parsed.valid
    wanted = ASSETS.action.decode(ASSETS.action.encode(actions), 3, 2)
    np.testing.assert_array_equal(parsed.actions, wanted.actions)
    for broken in (ids[:-1], ids[:0], ids[1:]):
        assert not TASK.parse(broken, (3, 2)).valid


def test_it_pickles_for_workers():
    copy = pickle.loads(pickle.dumps(TASK))
    for task in (TASK, copy):
        assert spell(task.build("a", [code(1, 2)], [])) == f"<bos> a {FRAME.format(1, 2)} <boa>"


def test_committed_actions_stand_before_the_newest_chunk_and_are_not_learned():
    chunks, given = [chunk(1, 2), chunk(3)], [chunk(1), chunk(2)]
    whole = TASK.build("go", [TWO], chunks, committed=given)
    text = spell(whole)
    newest = f"{FRAME.format(3, 4)} <boa> a1 <eoa> <boa> a2 <eoa> <boa> a3 <eoa>"
    assert text.endswith(newest) and f"{FRAME.format(1, 2)} <boa> a1 a2 <eoa>" in text
    assert whole.roles.tolist()[-9:] == [S] * 6 + [A] * 3
    prompt = TASK.build("go", [TWO], chunks[:1], committed=given)
    np.testing.assert_array_equal(prompt.ids, whole.ids[: len(prompt)])
    moment = TASK.moment_prompt([code(3, 4)], committed=given)
    np.testing.assert_array_equal(moment, prompt.ids[-len(moment) :])


@pytest.mark.parametrize("name", ["policy_video", "policy_image"])
def test_a_sample_commits_to_a_drawn_number_of_actions_and_its_chunk_follows(name):
    frames = 2 if name == "policy_video" else 1
    task = small.task(name, frames=frames, max_committed=2)
    episode, vocabulary = small.episode(0, 9), ASSETS.vocabulary
    encode = lambda actions: ASSETS.action.encode(  # noqa: E731
        ASSETS.statistics["tabletop"].normalize(actions)
    )
    found, ends = set(), set()
    for seed in range(80):
        tokens = task.sample(episode, "a", np.random.default_rng(seed)).fill(vocabulary)
        moments = small.shown_codes(tokens.ids)[::2]  # the code of view 0 is the step
        last, rest = moments[-1], tokens.ids[tokens.roles == S]
        given = int((rest == vocabulary.eoa).sum())
        expected = [id for t in range(given) for id in encode(episode.actions[[last + t]])]
        codes = rest[(rest != vocabulary.boa) & (rest != vocabulary.eoa)]
        assert vocabulary.action_codes(codes).tolist() == expected
        learned = tokens.ids[tokens.roles == A]
        begin = np.flatnonzero(learned == vocabulary.boa)[-1]
        still = np.array([[0, episode.actions[-1, -1]]] * 2, np.float32)
        newest = np.concatenate([episode.actions, still])[last + given : last + given + 3]
        ends.add(last + given)
        assert vocabulary.action_codes(learned[begin + 1 : -1]).tolist() == encode(newest)
        found.add((len(moments), given))
    assert found == {(m, n) for m in range(1, frames + 1) for n in range(3)}
    assert max(ends) == 8  # the robot stands still behind the last of 9 steps
    # An episode of one step more than a chunk may have all of its actions but one committed.
    short = [task.sample(small.episode(0, 3), "a", np.random.default_rng(i)) for i in range(20)]
    given = {int(((s.tokens.ids == vocabulary.eoa) & (s.tokens.roles == S)).sum()) for s in short}
    assert given == {0, 1, 2}


def test_actions_that_depend_on_their_chunk_cannot_be_committed_to():
    with pytest.raises(UserError, match=r"relative to the beginning .* set data\.max_committed=0"):
        TASK.committed_ids("aloha", np.zeros((1, 14), np.float32))


def test_an_advantage_is_a_token_behind_the_instruction():
    task = small.task("policy_video", advantage=True)
    good = task.build("go", [TWO], [chunk(1), chunk(2)])
    bad = task.build("go", [TWO], [chunk(1), chunk(2)], good=False)
    assert spell(good).startswith("<bos> g o <bot> a1 <boi>")
    assert spell(bad).startswith("<bos> g o <bot> a0 <boi>")
    assert good.roles.tolist()[3:5] == [M, M]
    # What the policy is prompted with begins as what it was shown of good chunks.
    opening = task.opening("go")
    np.testing.assert_array_equal(opening, good.ids[: len(opening)])
    assert TASK.opening("go").tolist() == opening.tolist()[:-2]


def test_a_window_is_good_where_all_its_chunks_are():
    episode = small.episode(0, 12)
    words = ["good"] * 9 + ["bad"] * 3
    annotated = dataclasses.replace(episode, texts={"advantage": words})
    seen = set()
    for seed in range(40):
        task, rng = (
            small.task("policy_video", frames=2, advantage=True),
            np.random.default_rng(seed),
        )
        moments = task.draw_window(annotated, 2, 3, np.random.default_rng(seed))
        ids = task.sample(annotated, "go", rng).fill(task.vocabulary)
        said = spell(ids).split()[4]
        assert said == ("a0" if moments[-1] >= 9 else "a1")
        seen.add(said)
    assert seen == {"a0", "a1"}
    assert " <bot> a1 " in spell(sample(episode, advantage=True))
