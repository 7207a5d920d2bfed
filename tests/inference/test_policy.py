"""The policy: from a checkpoint folder to action chunks."""

from __future__ import annotations

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from tests.inference import tiny_checkpoint
from tests.inference.scripted import PatchVision, ScriptedPrefixCache
from tests.inference.uncached import greedy_tokens
from tests.parity import assert_parity
from univla_jax.checkpoints import checkpoint_identity
from univla_jax.data.action_conventions import ALOHA_DELTAS
from univla_jax.episode import Observation
from univla_jax.errors import UserError
from univla_jax.inference.loaded_model import LoadedModel
from univla_jax.inference.policy import Policy, no_motion
from univla_jax.inference.sampling import GREEDY, Sampling
from univla_jax.normalization import ActionStatistics
from univla_jax.simulators.tabletop.tabletop_env import TabletopEnv
from univla_jax.tokenizers.action import UniformBinTokenizer
from univla_jax.tokenizers.continuations import Continuations
from univla_jax.tokenizers.image import ImageSpec
from univla_jax.tokenizers.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def trained(policy_checkpoint):
    loaded = LoadedModel.from_checkpoint(policy_checkpoint)
    assets = dataclasses.replace(loaded.assets, vision=PatchVision())
    return dataclasses.replace(loaded, assets=assets)


def _observation(seed: int, instruction: str = "push the red block to the left") -> Observation:
    env = TabletopEnv()
    seen, _ = env.reset(seed=seed)
    return Observation(instruction, {v: seen[v] for v in tiny_checkpoint.GRIDS})


def _scripted(trained, answers):
    policy = Policy(trained)
    policy.action_decoder.prefix_cache = ScriptedPrefixCache(
        answers, policy.action_decoder.rules.allowed
    )
    return policy


def _ids(trained, chunk):
    """The ids, with eoa, of a chunk in physical units."""
    vocabulary = trained.assets.vocabulary
    normalized = tiny_checkpoint.STATISTICS.normalize(chunk)
    codes = trained.assets.action.encode(normalized)
    return [*vocabulary.action_ids(codes).tolist(), vocabulary.eoa]


def _chunk(seed: int) -> np.ndarray:
    s = tiny_checkpoint.STATISTICS
    return np.random.default_rng(seed).uniform(s.q01, s.q99, (tiny_checkpoint.CHUNK, 7))


def test_golden_calls_of_the_reference_policies(golden_dir):
    assert_parity(golden_dir, "step")


def test_a_free_form_is_greedy_over_the_action_ids(trained):
    policy = Policy(trained, max_new_tokens=9, free_form=True)
    vocabulary = trained.assets.vocabulary
    allowed = np.sort(policy.action_decoder.rules.allowed)
    assert allowed[-1] == vocabulary.eoa and len(allowed) == 300 + 1
    session, observation = policy.start(), _observation(3)
    policy.act([observation], [session])
    turn, opening = session.history.moments[-1], [vocabulary.bos]
    opening += trained.assets.text.encode(observation.instruction)
    expected = greedy_tokens(trained, [*opening, *turn], 9, allowed, vocabulary.eoa)
    got = session.history.actions[-1].tolist()
    assert got == expected if expected[-1] == vocabulary.eoa else got == [*expected, vocabulary.eoa]


def test_a_batch_gives_what_each_robot_gets_alone(trained):
    together = Policy(trained, batch_size=4, max_new_tokens=9)
    alone = Policy(trained, max_new_tokens=9)
    words = ["push the red block to the left", "touch green", "put the blue block"]
    sessions = [together.start() for _ in words]
    single = [alone.start() for _ in words]
    for step in range(2):
        observations = [_observation(10 * step + i, w) for i, w in enumerate(words)]
        chunks = together.act(observations, sessions)
        for i, chunk in enumerate(chunks):
            (one,) = alone.act([observations[i]], [single[i]])
            np.testing.assert_array_equal(chunk.actions, one.actions)
            assert (chunk.valid, chunk.reason) == (one.valid, one.reason)
            for kept in ("moments", "actions"):
                for a, b in zip(
                    getattr(sessions[i].history, kept), getattr(single[i].history, kept)
                ):
                    np.testing.assert_array_equal(a, b)
    assert all(len(s.history.moments) == 2 for s in sessions)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, seed=3)])
def test_drafts_change_no_action(trained, sampling):
    """Three calls of two robots, drafted from their last chunks."""
    options = {"batch_size": 2, "max_new_tokens": 9, "sampling": sampling}
    plain, drafting = Policy(trained, block=1, **options), Policy(trained, block=3, **options)
    sessions = {id(p): [p.start(), p.start()] for p in (plain, drafting)}
    for step in range(3):
        seen = [_observation(step), _observation(step + 9, "touch green")]
        for policy in (plain, drafting):
            policy.act(seen, sessions[id(policy)])
        for a, b in zip(sessions[id(plain)], sessions[id(drafting)]):
            np.testing.assert_array_equal(a.last_ids, b.last_ids)
            assert a.invalid == b.invalid


@pytest.mark.slow
def test_drafts_come_from_the_table_of_the_checkpoint(trained):
    def policy(continuations):
        assets = dataclasses.replace(trained.assets, continuations=continuations)
        return Policy(dataclasses.replace(trained, assets=assets), max_new_tokens=9, block=3)

    def steps(policy):
        sampler, counted = policy.action_decoder._sampler, []
        generate = sampler.generate

        def counting(*arguments, **options):
            generated, state = generate(*arguments, **options)
            counted.append(int(generated.steps))
            return generated, state

        sampler.generate = counting
        session = policy.start()
        policy.act([_observation(0)], [session])
        return session.last_ids, counted[0]

    ids, without = steps(policy(None))
    same, with_table = steps(policy(Continuations.fit([ids])))
    np.testing.assert_array_equal(same, ids)
    assert with_table < without


@pytest.mark.parametrize("free_form", [False, True])
def test_sampled_chunks_depend_on_the_seeds_alone(trained, free_form):
    """Not on the batch; robots of one session seed that see the same draw the same."""

    def policy(temperature, seed=0, batch_size=None):
        sampling = Sampling(temperature, top_k=40, top_p=0.95, seed=seed)
        options = {"batch_size": batch_size, "free_form": free_form, "max_new_tokens": 30}
        return Policy(trained, sampling=sampling, **options)

    def ids(policy, seeds):
        sessions, got = [policy.start(seed) for seed in seeds], []
        for call in range(2):
            policy.act([_observation(call)] * len(seeds), sessions)
            got.append([session.last_ids.tolist() for session in sessions])
        return got

    hot = policy(2.0)
    first, second = ids(hot, [0, 1, 0])
    assert first[0] == first[2] != first[1] and second[0] == second[2] != second[1]
    assert ids(hot, [1]) == [[first[1]], [second[1]]]
    assert ids(policy(2.0, batch_size=4), [1, 0]) == [first[1::-1], second[1::-1]]
    assert ids(policy(2.0, seed=1), [0]) == [[first[1]], [second[1]]]
    assert ids(policy(0.0), [0])[0][0] != first[0]


def test_more_observations_than_rows_are_split(trained):
    policy = _scripted(trained, [[_ids(trained, _chunk(i)) for i in (0, 1)]] * 2)
    policy._batch_size = 2
    observations = [_observation(i) for i in range(4)]
    chunks = policy.act(observations, [policy.start() for _ in observations])
    assert len(chunks) == 4 and [len(p) for p in policy.action_decoder.prefix_cache.prompts] == [
        2,
        2,
    ]
    np.testing.assert_array_equal(chunks[0].actions, chunks[2].actions)


def test_decoded_chunks_come_in_physical_units(trained):
    chunks = [_chunk(1), _chunk(2)]
    policy = _scripted(trained, [[_ids(trained, c) for c in chunks]])
    got = policy.act([_observation(1), _observation(2)], [policy.start(), policy.start()])
    for chunk, expected in zip(got, chunks):
        assert chunk.valid and chunk.reason == "" and chunk.actions.dtype == np.float32
        span = np.subtract(tiny_checkpoint.STATISTICS.q99, tiny_checkpoint.STATISTICS.q01)
        assert np.abs((chunk.actions - expected) / span).max() < 0.15  # FAST's rounding at scale 4


def test_undecodable_ids_stand_still_and_are_counted(trained):
    vocabulary = trained.assets.vocabulary
    closing = np.full((3, 7), 0.05) * [1, 1, 1, 1, 1, 1, 20]
    good = _ids(trained, closing)
    endless, short = good[:-1], [good[0], vocabulary.eoa]
    policy = _scripted(trained, [[good], [endless], [short]])
    session = policy.start()
    chunks = [policy.act([_observation(i)], [session])[0] for i in range(3)]
    assert [c.valid for c in chunks] == [True, False, False]
    assert f"no end of action within {len(endless)} tokens" in chunks[1].reason
    assert "coefficients instead of 21" in chunks[2].reason
    for chunk in chunks[1:]:
        assert chunk.actions.shape == (3, 7) and not chunk.actions[:, :6].any()
        np.testing.assert_array_equal(chunk.actions[:, 6], chunks[0].actions[-1, 6])
    assert (session.chunks, session.invalid) == (3, 2)
    assert session.history.actions[0].tolist() == [*endless, vocabulary.eoa]


def test_no_motion_before_any_action():
    assert not no_motion(2, 7, None).any()
    assert no_motion(2, 3, np.array([5.0, 5.0, -1.0])).tolist() == [[0, 0, -1]] * 2


def test_no_motion_of_joints_is_where_they_are_and_never_zero():
    """Poses and two grippers: zeros would drive every joint."""
    last, joints = np.arange(1.0, 5.0), range(4)
    assert no_motion(2, 4, last, joints).tolist() == [last.tolist()] * 2
    assert no_motion(2, 4, last, [1, 3]).tolist() == [[0, 2, 0, 4]] * 2
    assert no_motion(2, 4, None, joints, pose=last).tolist() == [last.tolist()] * 2
    assert no_motion(2, 4, None, joints).shape == (0, 4)


def test_a_pose_that_nobody_knows_is_no_action(trained):
    """Where actions command poses, an invalid chunk before the first action answers none at all."""
    good, endless = _ids(trained, _chunk(0)), _ids(trained, _chunk(0))[:-1]
    policy = _scripted(trained, [[endless], [good], [endless]])
    policy.absolute_dims = tuple(range(7))
    session = policy.start()
    first, second, third = (policy.act([_observation(i)], [session])[0] for i in range(3))
    assert not first.valid and first.actions.shape == (0, 7)
    assert second.valid and not third.valid
    np.testing.assert_array_equal(third.actions, np.tile(second.actions[-1], (3, 1)))


def test_history_window_and_another_instruction(trained):
    answer = _ids(trained, _chunk(0))
    policy = _scripted(trained, [[answer]] * 4)
    session = policy.start()
    for seed in range(3):
        policy.act([_observation(seed)], [session])
    policy.act([_observation(3, "touch green")], [session])
    lengths = [len(prompts[0]) for prompts in policy.action_decoder.prefix_cache.prompts]
    turn = len(session.history.moments[0])
    assert lengths[1] == lengths[0] + turn + len(answer) and lengths[2] == lengths[1]
    assert lengths[3] < lengths[0] + turn and len(session.history.moments) == 1


def test_an_image_policy_sees_one_moment(trained):
    record = dataclasses.replace(trained.record, task="policy_image", frames=1)
    image = dataclasses.replace(trained, record=record)
    policy = _scripted(image, [[_ids(trained, _chunk(0))]] * 2)
    session = policy.start()
    for seed in range(2):
        policy.act([_observation(seed)], [session])
    first, second = (p[0] for p in policy.action_decoder.prefix_cache.prompts)
    assert len(first) == len(second)


@pytest.fixture
def real_time(trained):
    """The same checkpoint, as if it had been trained with up to two committed actions."""
    record = dataclasses.replace(trained.record, max_committed=2)
    return dataclasses.replace(trained, record=record)


def test_committed_actions_stand_in_the_prompt_and_lead_the_answer(real_time):
    answers = [_ids(real_time, _chunk(i)) for i in range(3)]
    policy = _scripted(real_time, [[answer] for answer in answers])
    session, seen = policy.start(), [_observation(i) for i in range(3)]
    (first,) = policy.act([seen[0]], [session])
    committed = first.actions[1:]
    session.set_executed(1)
    (second,) = policy.act([dataclasses.replace(seen[1], committed=committed)], [session])
    np.testing.assert_array_equal(second.actions[:2], committed)
    assert second.actions.shape == (2 + 3, 7) and second.valid
    codes = [policy._encoder.encode([observation])[0] for observation in seen]
    given = real_time.task.committed_ids("tabletop", committed)
    prompts = [prompt[0] for prompt in policy.action_decoder.prefix_cache.prompts]
    # One step after the first call there is no observation a chunk before: one moment is shown.
    expected = real_time.task.build(seen[1].instruction, codes[1], [], committed=given)
    np.testing.assert_array_equal(prompts[1], expected.ids)
    # A chunk later the moment before is shown with what was executed behind it, as any other.
    session.set_executed(second.actions[:3])
    policy.act([seen[2]], [session])
    chunk = np.array(policy._encode_executed(second.actions[:3])[:-1])
    views = [np.concatenate(view) for view in zip(codes[1], codes[2])]
    expected = real_time.task.build(seen[2].instruction, views, [chunk])
    np.testing.assert_array_equal(policy.action_decoder.prefix_cache.prompts[2][0], expected.ids)


def test_an_answer_that_does_not_decode_stops_behind_what_is_committed(real_time):
    vocabulary = real_time.assets.vocabulary
    policy = _scripted(real_time, [[[vocabulary.eoa]]])
    committed = np.full((2, 7), 0.05, np.float32)
    observation = dataclasses.replace(_observation(0), committed=committed)
    (chunk,) = policy.act([observation], [policy.start()])
    assert not chunk.valid
    np.testing.assert_array_equal(chunk.actions[:2], committed)
    assert not chunk.actions[2:, :6].any() and (chunk.actions[2:, 6] == np.float32(0.05)).all()


def test_committed_actions_that_the_policy_cannot_continue_are_refused(trained, real_time):
    seen = _observation(0)
    cases = {
        "trained without any": (trained, np.zeros((1, 7))),
        r"shape \[3, 7\], expected up to 2": (real_time, np.zeros((3, 7))),
        r"shape \[1, 6\]": (real_time, np.zeros((1, 6))),
        "not finite": (real_time, np.full((1, 7), np.nan)),
    }
    for message, (loaded, committed) in cases.items():
        with pytest.raises(UserError, match=f"observation: .*{message}"):
            Policy(loaded).check(dataclasses.replace(seen, committed=committed), "observation")


def _changed(view, frame):
    observation = _observation(0)
    return dataclasses.replace(observation, frames={**observation.frames, view: frame})


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        (Observation("go", {"image": np.zeros((64, 64, 3), np.uint8)}), "'wrist_image' is missing"),
        (_changed("image", np.zeros((64, 64, 3), np.float32)), "'image' is float32"),
        (_changed("image", np.zeros((64, 64), np.uint8)), r"'image' is uint8 \[64, 64\]"),
        (_changed("wrist_image", np.zeros((64, 64, 4), np.uint8)), "'wrist_image' is uint8"),
        (Observation(b"go", _observation(0).frames), "instruction is a bytes"),
        (Observation("push the red " * 200, _observation(0).frames), "tokens, the policy was"),
    ],
)
def test_bad_observations_are_named_and_change_nothing(trained, observation, message):
    policy = Policy(trained)
    sessions = [policy.start(), policy.start()]
    with pytest.raises(UserError, match=f"observation 1: .*{message}"):
        policy.act([_observation(0), observation], sessions)
    assert all(session.chunks == 0 and not session.history.moments for session in sessions)


STATE = dataclasses.replace(
    tiny_checkpoint.STATISTICS, mean=(0.0,) * 3, std=(1.0,) * 3, q01=(-2.0,) * 3, q99=(4.0,) * 3
)


@pytest.fixture
def shown_states(trained):
    """The same checkpoint, as if it had been trained with states of three numbers."""
    statistics = {**trained.assets.statistics, "tabletop/state": STATE}
    assets = dataclasses.replace(trained.assets, statistics=statistics)
    record = dataclasses.replace(trained.record, state=True)
    return dataclasses.replace(trained, assets=assets, record=record)


def _with_state(number: int) -> Observation:
    return dataclasses.replace(_observation(number), state=np.array([0.5, -1.5, number]))


def _state_ids(trained, observation):
    codes = trained.assets.action.encode(STATE.normalize(observation.state[None]))
    return trained.assets.vocabulary.action_ids(np.array(codes))


def test_a_policy_shown_states_reads_its_training_sequence(shown_states):
    answers = [_ids(shown_states, _chunk(i)) for i in (0, 1)]
    policy = _scripted(shown_states, [[answer] for answer in answers])
    session, seen = policy.start(), [_with_state(i) for i in (0, 1)]
    for observation in seen:
        policy.act([observation], [session])
    codes = [policy._encoder.encode([observation])[0] for observation in seen]
    trained_on = shown_states.task.build(
        seen[0].instruction,
        [np.concatenate(view) for view in zip(*codes)],
        [np.array(answer[:-1]) for answer in answers],
        [_state_ids(shown_states, observation) for observation in seen],
    ).ids
    prompt = policy.action_decoder.prefix_cache.prompts[1][0]
    np.testing.assert_array_equal(prompt, trained_on[: len(prompt)])
    assert trained_on[len(prompt) :][: len(answers[1])].tolist() == answers[1]


def test_an_image_policy_shown_states_reads_its_training_sequence(shown_states):
    record = dataclasses.replace(shown_states.record, task="policy_image", frames=1)
    answer, observation = _ids(shown_states, _chunk(0)), _with_state(2)
    shown = dataclasses.replace(shown_states, record=record)
    policy = _scripted(shown, [[answer]])
    policy.act([observation], [policy.start()])
    codes, chunk = policy._encoder.encode([observation])[0], np.array(answer[:-1])
    state = _state_ids(shown_states, observation)
    trained_on = shown.task.build(observation.instruction, codes, chunk, state).ids
    prompt = policy.action_decoder.prefix_cache.prompts[0][0]
    np.testing.assert_array_equal(prompt, trained_on[: len(prompt)])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "observation 0: it has no state; the policy was trained with 3 finite numbers"),
        (np.zeros(4), r"its state is float64 \[4\]; the policy was trained with 3"),
        (np.array(["a", "b", "c"]), r"its state is <U1 \[3\]"),
        ([None, 1, 2], r"its state is object \[3\]"),
        ([True, False, True], r"its state is bool \[3\]"),
        ([[1], [2, 3]], "its state is ragged"),
        ([0.0, np.nan, 0.0], "number 1 of its state is nan"),
        ([0.0, 0.0, 1e39], r"number 2 of its state is 1e\+39"),
    ],
)
def test_a_state_that_was_not_shown_is_refused(shown_states, state, message):
    policy = Policy(shown_states)
    session = policy.start()
    with pytest.raises(UserError, match=message):
        policy.act([dataclasses.replace(_observation(0), state=state)], [session])
    assert not session.history.moments


def test_states_need_their_statistics(trained):
    record = dataclasses.replace(trained.record, state=True)
    with pytest.raises(UserError, match="no statistics of 'tabletop/state'"):
        Policy(dataclasses.replace(trained, record=record))


def test_frames_of_another_size_are_refused_where_the_spec_keeps_the_cameras(trained):
    specs = {**trained.assets.image_specs, "image": ImageSpec(size=None, min_pixels=64)}
    assets = dataclasses.replace(trained.assets, image_specs=specs)
    policy = Policy(dataclasses.replace(trained, assets=assets))
    with pytest.raises(UserError, match=r"'image' has 64 x 64 pixels.*\(8, 8\).*\(3, 3\)"):
        policy.act([_observation(0)], [policy.start()])
    with pytest.raises(UserError, match="'image' cannot be resized"):
        policy.act([_changed("image", np.zeros((4, 64, 3), np.uint8))], [policy.start()])


def test_instructions_beyond_the_limit_are_refused(trained):
    policy = Policy(trained, max_instruction_tokens=24)
    long = "push the red block " * 9
    with pytest.raises(UserError, match="at most 24 are answered; shorten it"):
        policy.check(_observation(0, long))
    assert Policy(trained).check(_observation(0, long)) is None


@pytest.mark.slow
def test_no_request_waits_for_the_compiler(trained):
    """Whatever robots ask after ``warmup``, in any order, nothing is compiled."""
    policy = Policy(trained, max_instruction_tokens=24)
    rng, compiled = np.random.default_rng(0), []
    sessions = [policy.start() for _ in range(2)]

    def listen(event, seconds, **_):
        if "backend_compile" in event:
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for size in (1, 2):
            policy.warmup(size)
        assert compiled
        compiled.clear()
        for call in range(12):
            words = ["touch green", "push the red block to the left"][int(rng.integers(2))]
            count = 1 + int(rng.integers(2))
            policy.act([_observation(call, words)] * count, sessions[:count])
            if rng.integers(2):
                policy.prefill_ahead()
            if not rng.integers(4):
                sessions[0] = policy.start()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == []


def test_sessions_belong_to_robots(trained):
    policy = Policy(trained)
    session = policy.start()
    with pytest.raises(UserError, match="2 observations for 1 sessions"):
        policy.act([_observation(0)] * 2, [session])
    with pytest.raises(UserError, match="given twice"):
        policy.act([_observation(0)] * 2, [session, session])
    assert policy.act([], []) == []


def test_corpus_and_layout_are_checked(trained, world_model_checkpoint):
    with pytest.raises(UserError, match="'libero' is not among them"):
        Policy(trained, corpus="libero")
    corpora = {**trained.record.corpora, "other": trained.record.corpora["tabletop"]}
    several = dataclasses.replace(
        trained, record=dataclasses.replace(trained.record, corpora=corpora)
    )
    with pytest.raises(UserError, match="corpora other, tabletop; name one"):
        Policy(several)
    with pytest.raises(UserError, match="no statistics of 'other'"):
        Policy(several, corpus="other")
    with pytest.raises(UserError, match="'world_model', which is not made for acting"):
        Policy.load(world_model_checkpoint)


def test_changed_checkpoints_are_refused(policy_checkpoint, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(policy_checkpoint, copy)
    assert checkpoint_identity(copy) == checkpoint_identity(policy_checkpoint)
    step = copy / "checkpoints" / "7"
    (step / "assets" / "action" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"action/tokenizer.json was changed"):
        Policy.load(copy)
    shutil.rmtree(step / "assets")
    with pytest.raises(UserError, match="no assets/ folder"):
        Policy.load(copy)
    with pytest.raises(UserError, match="no complete checkpoint"):
        Policy.load(tmp_path / "nowhere")


def test_an_untrained_policy_has_other_parameters(policy_checkpoint, trained):
    seeds = [
        LoadedModel.from_checkpoint(policy_checkpoint, untrained=True, seed=s) for s in (0, 0, 1)
    ]
    heads = [np.asarray(t.params["head"]) for t in (*seeds, trained)]
    np.testing.assert_array_equal(heads[0], heads[1])
    assert not np.array_equal(heads[0], heads[2]) and not np.array_equal(heads[0], heads[3])


ARMS = 14  # two arms: position, roll pitch yaw, gripper
DELTAS = ActionStatistics(
    mean=(0.0,) * ARMS, std=(0.1,) * ARMS, q01=(-0.5,) * ARMS, q99=(0.5,) * ARMS, count=100
)


@pytest.fixture
def aloha(trained):
    """The same checkpoint, as if it had been trained on ALOHA's chunk deltas."""
    corpus = trained.record.corpora["tabletop"]
    record = dataclasses.replace(trained.record, corpora={"aloha": corpus})
    bins = UniformBinTokenizer(255)  # fine enough that rounding is no part of the test
    text_size = trained.assets.text.vocabulary_size
    vocabulary = Vocabulary.from_scratch(text_size, 16, bins.vocabulary_size)
    assets = dataclasses.replace(
        trained.assets, vocabulary=vocabulary, action=bins, statistics={"aloha": DELTAS}
    )
    return dataclasses.replace(trained, assets=assets, record=record)


class _Arms:
    """Two arms that go where they are told: every action is the pose they take."""

    def __init__(self, pose):
        self.pose = np.array(pose, np.float64)

    def step(self, action):
        self.pose = np.array(action, np.float64)


def _delta_ids(aloha, deltas):
    vocabulary = aloha.assets.vocabulary
    codes = aloha.assets.action.encode(DELTAS.normalize(np.asarray(deltas, np.float32)))
    return [*vocabulary.action_ids(codes).tolist(), vocabulary.eoa]


def test_chunk_deltas_become_poses_that_lead_the_arms_to_their_goal(aloha):
    """Chunks as training sees them (relative to their first pose), executed as poses."""
    rng = np.random.default_rng(0)
    start, calls = rng.uniform(-3, 3, ARMS), 4
    # Angles wind past pi on the way, and grippers are absolute.
    path = start + np.cumsum(rng.uniform(-0.1, 0.1, (calls * tiny_checkpoint.CHUNK, ARMS)), axis=0)
    path[:, [6, 13]] = rng.uniform(-0.4, 0.4, (len(path), 2))
    chunks = path.reshape(calls, tiny_checkpoint.CHUNK, ARMS)
    poses = [start, *chunks[:-1, -1]]
    relative = [
        ALOHA_DELTAS.to_relative(np.concatenate([pose[None], chunk]))[1:]
        for pose, chunk in zip(poses, chunks)
    ]
    policy = _scripted(aloha, [[_delta_ids(aloha, deltas)] for deltas in relative])
    arms, session = _Arms(start), policy.start()
    for chunk in chunks:
        observation = dataclasses.replace(_observation(0), state=arms.pose)
        (predicted,) = policy.act([observation], [session])
        assert predicted.valid and predicted.actions.dtype == np.float32
        for action, goal in zip(predicted.actions, chunk):
            arms.step(action)
            off = arms.pose - goal
            turns = [3, 4, 5, 10, 11, 12]
            off[turns] -= 2 * np.pi * np.round(off[turns] / (2 * np.pi))
            assert np.abs(off).max() < 0.02
    # what training wrote as numbers near zero is no pose of these arms
    assert np.abs(predicted.actions - relative[-1]).max() > 0.5


def test_arms_that_got_no_whole_chunk_stay_where_they_are(aloha):
    policy = _scripted(aloha, [[_delta_ids(aloha, np.full((3, ARMS), 0.1))], [[5]]])
    policy.action_decoder.prefix_cache._allowed.add(5)
    session, pose = policy.start(), np.linspace(-1, 1, ARMS)
    observation = dataclasses.replace(_observation(0), state=pose)
    (valid,) = policy.act([observation], [session])
    (stopped,) = policy.act([observation], [session])
    assert valid.valid and not stopped.valid
    expected = np.tile(pose, (3, 1)).astype(np.float32)
    expected[:, [6, 13]] = valid.actions[-1, [6, 13]]  # grippers as last commanded
    np.testing.assert_array_equal(stopped.actions, expected)


def test_poses_need_the_current_one(aloha):
    policy = Policy(aloha)
    with pytest.raises(UserError, match="relative to the current one and needs 14 finite numbers"):
        policy.act([_observation(0)], [policy.start()])
    assert policy.example().state.shape == (ARMS,)
    policy.check(policy.example())


@pytest.mark.parametrize("block", [1, 3])
def test_random_weights_predict_whole_chunks(trained, block):
    """What they mean is another matter: the grammar's part in it is counted."""
    policy = Policy(trained, batch_size=2, block=block)
    sessions, rng = [policy.start(), policy.start()], np.random.default_rng(0)
    for _ in range(2):
        frames = {
            v: rng.integers(0, 256, (8 * h, 8 * w, 3), np.uint8)
            for v, (h, w) in tiny_checkpoint.GRIDS.items()
        }
        chunks = policy.act([Observation("touch green", frames)] * 2, sessions)
        assert all(chunk.valid and chunk.num_overridden > 0 for chunk in chunks)
    free = Policy(trained, batch_size=2, free_form=True)
    chunk, _ = free.act([Observation("touch green", frames)] * 2, [free.start(), free.start()])
    assert not chunk.valid and chunk.num_overridden == 0
