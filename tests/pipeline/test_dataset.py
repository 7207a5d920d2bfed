"""Training and evaluation batches: what is in them, who makes them, and where they go on."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from tests.pipeline import small
from univla_jax.errors import UserError
from univla_jax.pipeline.batch import Batch
from univla_jax.pipeline.dataset import EvaluationBatches, training_batches
from univla_jax.sequences.tokens import Role, labeled_roles
from univla_jax.training.losses import LabelWeights

TWO = {"stores": ("a", "b")}
FIELDS = ("tokens", "roles", "task_ids", "positions", "segment_ids")


def stores(a=12, b=12):
    return [small.store(a, "a"), small.store(b, "b")]


def batches(count, sources=None, host=0, hosts=1, **changes):
    """The first batches of a host."""
    iterator = training_batches(
        small.config(**changes), small.assets(), sources or stores()[:1], host=host, hosts=hosts
    )
    made = [iterator.next() for _ in range(count)]
    iterator.close()
    return made


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def together(parts):
    """The global batches of several hosts' ones."""
    return [
        Batch(*(np.concatenate([getattr(b, name) for b in batch]) for name in FIELDS))
        for batch in zip(*parts, strict=True)
    ]


def segments(made):
    """The bytes of every sample in batches."""
    found = []
    for batch in made:
        for tokens, ids in zip(batch.tokens, batch.segment_ids):
            found += [tokens[ids == n].tobytes() for n in range(1, ids.max() + 1)]
    return found


def letters(made):
    """The store of every sample, by its instruction."""
    return [chr(np.frombuffer(s, np.int32)[1]) for s in segments(made)]


def test_batches_have_the_promised_arrays():
    for packing in (True, False):
        (batch,) = batches(1, packing=packing)
        assert batch.tokens.shape == (2, 160) and batch.tokens.dtype == np.int32
        assert batch.roles.dtype == batch.task_ids.dtype == np.uint8 and batch.valid.all()
        assert not batch.task_ids.any() and batch.roles.max() == Role.ACTION
        v = small.assets().vocabulary
        visual = (batch.tokens >= v.bov) & (batch.tokens <= v.eov)
        np.testing.assert_array_equal(batch.roles == Role.VISION, visual)
        assert (batch.tokens[batch.segment_ids == 0] == v.pad).all()
    assert (
        batches(4, packing=True)[0].useful_fraction > batches(4, packing=False)[0].useful_fraction
    )


def test_same_seed_same_batches_other_seed_other_batches():
    assert_equal(batches(3), batches(3))
    assert not np.array_equal(batches(1)[0].tokens, batches(1, seed=8)[0].tokens)


def test_threads_and_prefetching_change_nothing():
    assert_equal(batches(4), batches(4, read_threads=2, prefetch_batches=2))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("hosts", [2, 4])
def test_host_count_changes_nothing(hosts, packing):
    settings = {**TWO, "batch_size": 4, "packing": packing, "sources": stores()}
    whole = batches(9, **settings)
    parts = [batches(9, host=host, hosts=hosts, **settings) for host in range(hosts)]
    assert_equal(together(parts), whole)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_worker_count_changes_nothing(hosts, workers, packing):
    settings = {**TWO, "batch_size": 4, "packing": packing, "sources": stores()}
    whole = batches(5, **settings)
    parts = [batches(5, host=h, hosts=hosts, workers=workers, **settings) for h in range(hosts)]
    assert_equal(together(parts), whole)


def test_padded_batches_show_every_episode_once_an_epoch():
    made = batches(12, stores(), **TWO, packing=False, batch_size=2)
    assert sorted(letters(made)) == ["a"] * 12 + ["b"] * 12
    assert len(set(segments(made))) == 24


def _resumed(config, sources, before, after, **host):
    """Batches after a restart, and the ones an uninterrupted run would have given."""
    first = training_batches(config, small.assets(), sources, **host)
    for _ in range(before):
        first.next()
    state = first.get_state()
    wanted = [first.next() for _ in range(after)]
    first.close()
    second = training_batches(config, small.assets(), sources, **host)
    second.set_state(state)
    assert second.get_state() == state
    made = [second.next() for _ in range(after)]
    second.close()
    return made, wanted


@pytest.mark.parametrize("before", [0, 1, 5])
@pytest.mark.parametrize("changes", [{}, {"packing": False}, {"prefetch_batches": 2}])
def test_resume_is_exact(before, changes):
    config = small.config(**TWO, **changes)
    assert_equal(*_resumed(config, stores(), before, 4))


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "host", "hosts"), [(2, 0, 1), (3, 1, 2), (3, 3, 4)])
def test_resume_with_workers_is_exact(workers, host, hosts):
    config = small.config(**TWO, batch_size=4, workers=workers, read_threads=1, prefetch_batches=1)
    assert_equal(*_resumed(config, stores(), 3, 4, host=host, hosts=hosts))


def test_workers_may_change_on_resume():
    first = training_batches(small.config(), small.assets(), stores()[:1])
    first.next()
    other = training_batches(small.config(read_threads=2), small.assets(), stores()[:1])
    other.set_state(first.get_state())
    assert_equal([other.next() for _ in range(5)], [first.next() for _ in range(5)])


def test_set_state_goes_back_in_the_same_iterator():
    iterator = training_batches(small.config(prefetch_batches=1), small.assets(), stores()[:1])
    iterator.next()
    state = iterator.get_state()
    wanted = [iterator.next() for _ in range(3)]
    iterator.set_state(state)
    assert_equal([iterator.next() for _ in range(3)], wanted)
    iterator.close()


@pytest.mark.parametrize(
    ("changes", "sources", "message"),
    [
        ({"packing_bins": 2}, None, "data.packing_bins was 4, is 2"),
        ({"weights": (1.0, 2.0)}, None, "data.weights"),
        ({"sequence_length": 200}, None, "data.sequence_length was 160, is 200"),
        ({"batch_size": 4}, None, "data.batch_size was 2, is 4"),
        ({}, [small.store(12, "a"), small.store(12, "c")], "content of the stores"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(changes, sources, message):
    saved = training_batches(small.config(**TWO), small.assets(), stores()).get_state()
    other = training_batches(
        small.config(**{**TWO, **changes}), small.assets(), sources or stores()
    )
    with pytest.raises(UserError, match=message):
        other.set_state(saved)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 4), (4, 2)])
def test_another_number_of_hosts_goes_on_from_the_same_place(before, after, packing):
    config = small.config(**TWO, batch_size=4, packing=packing)

    def hosts(count):
        return [
            training_batches(config, small.assets(), stores(), host=host, hosts=count)
            for host in range(count)
        ]

    readers = hosts(before)
    for reader in readers:
        for _ in range(3):
            reader.next()
    saved = [reader.get_state() for reader in readers]
    wanted = together([[reader.next() for _ in range(4)] for reader in readers])
    others = hosts(after)
    for reader in others:
        reader.set_state(*saved)
    assert_equal(together([[reader.next() for _ in range(4)] for reader in others]), wanted)
    for reader in (*readers, *others):
        reader.close()


def test_a_state_without_this_hosts_elements_or_a_cut_one_is_refused():
    config = small.config(**TWO)
    first = training_batches(config, small.assets(), stores(), host=0, hosts=2)
    first.next()
    saved = first.get_state()
    other = training_batches(config, small.assets(), stores(), host=1, hosts=2)
    with pytest.raises(UserError, match="another number of hosts"):
        other.set_state(saved)
    with pytest.raises(UserError, match="not one of this pipeline"):
        other.set_state(saved[: len(saved) // 2])


def test_threads_and_prefetching_may_change_on_resume():
    plain = training_batches(small.config(), small.assets(), stores()[:1])
    plain.next()
    busy = small.config(read_threads=2, prefetch_batches=3)
    other = training_batches(busy, small.assets(), stores()[:1])
    other.set_state(plain.get_state())
    assert_equal([other.next()], [plain.next()])
    other.close()
    with pytest.raises(UserError, match="was closed"):
        other.next()


def test_store_folders_may_move():
    here = training_batches(small.config(stores=("here",)), small.assets(), stores()[:1])
    there = training_batches(small.config(stores=("there",)), small.assets(), stores()[:1])
    there.set_state(here.get_state())


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_every_host_sees_the_stores_in_proportion(hosts):
    for host in range(hosts):
        settings = {**TWO, "packing": False, "batch_size": 4, "host": host, "hosts": hosts}
        seen = letters(batches(100, stores(), weights=(3.0, 1.0), **settings))
        assert seen.count("a") / len(seen) == pytest.approx(0.75, abs=0.08)


def test_weights_count_per_episode_or_per_store():
    uneven = [small.store(12, "a"), small.store(4, "b")]
    settings = {**TWO, "packing": False, "batch_size": 8}
    assert letters(batches(10, uneven, **settings)).count("a") == 60
    per_store = letters(batches(10, uneven, weight_unit="store", **settings))
    assert per_store.count("a") == pytest.approx(40, abs=12)


@pytest.mark.parametrize("hosts", [1, 2])
def test_evaluation_reads_each_held_out_episode_once(hosts):
    config = small.config(**TWO, held_out_every=3, batch_size=4)
    elements = []
    for host in range(hosts):
        evaluation = EvaluationBatches(
            config, small.assets(), stores(17, 12), host=host, hosts=hosts
        )
        made = list(evaluation)
        assert len(made) == len(evaluation) == 3
        assert {batch.tokens.shape for batch in made} == {(4 // hosts, 160)}
        assert_equal(made, list(evaluation))
        for batch in made:
            assert not batch.segment_ids[~batch.valid].any()
            elements += list(batch.tokens[batch.valid])
    assert len(elements) == 5 + 4
    assert {chr(element[1]) for element in elements} == {"a", "b"}


def test_unfit_sources_are_refused():
    config, given = small.config(**TWO), small.assets()
    with pytest.raises(UserError, match="2 named, 1 opened"):
        training_batches(config, given, stores()[:1])
    with pytest.raises(UserError, match=r"data.stores\[1\]: holds no episode to train on"):
        training_batches(config, given, stores(12, 0))
    with pytest.raises(UserError, match="3 hosts"):
        training_batches(config, given, stores(), hosts=3)
    with pytest.raises(UserError, match="no episode is held out of 24"):
        EvaluationBatches(small.config(**TWO, held_out_every=20), given, stores())


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_broken_episode_is_named(workers):
    episodes = [small.episode(i, 9) for i in range(4)]
    beyond = {view: np.full((9, 2, 2), 12, np.uint16) for view in episodes[1].codes}
    episodes[1] = dataclasses.replace(episodes[1], codes=beyond)
    source = small.Store("a", episodes)
    iterator = training_batches(
        small.config(workers=workers, prefetch_batches=1), small.assets(), [source]
    )
    with pytest.raises(UserError, match="episode tabletop/a1: visual code"):
        for _ in itertools.repeat(None, 20):
            iterator.next()
    iterator.close()


def test_an_episode_without_a_sample_is_named_before_the_first_step():
    source = small.Store("a", [small.episode(i, 2 if i == 1 else 9) for i in range(4)])
    with pytest.raises(UserError, match="episode tabletop/a1: 2 steps are fewer"):
        training_batches(small.config(), small.assets(), [source])


# Samples that are too long. One of the episodes of ``wordy`` has an instruction of 90 words.


WORDY = "push the block " * 30


def wordy():
    """Four episodes; the samples of ``a2`` have 519 tokens."""
    episodes = list(small.store(4))
    episodes[2] = dataclasses.replace(episodes[2], instruction=WORDY)
    return [small.Store("a", episodes)]


def test_a_sample_that_is_too_long_is_refused_before_the_first_step():
    message = r"1 of 4 episodes .* more than 160 tokens, the longest 519 \(episode tabletop/a2\)"
    with pytest.raises(UserError, match=message):
        training_batches(small.config(), small.assets(), wordy())
    with pytest.raises(UserError, match=message):
        EvaluationBatches(small.config(), small.assets(), wordy())
    training_batches(small.config(sequence_length=519), small.assets(), wordy()).close()


@pytest.mark.parametrize("packing", [True, False])
def test_a_sample_that_is_too_long_is_dropped(packing, capsys):
    settings = {"too_long": "drop", "packing": packing}
    made = batches(8, wordy(), **settings)
    assert "1 of 4 episodes have samples of more than 160 tokens; these are dropped" in (
        capsys.readouterr().err
    )
    assert_equal(batches(8, wordy(), hosts=1, read_threads=2, **settings), made)
    assert set(letters(made)) == {"a"}
    held_out = EvaluationBatches(small.config(**settings), small.assets(), wordy())
    assert sum(int(batch.valid.sum()) for batch in held_out) == 3


def test_a_text_that_is_too_long_loses_its_last_words():
    made = batches(8, wordy(), too_long="cut_text")
    cut = [s for s, letter in zip(segments(made), letters(made)) if letter == "p"]
    assert cut and all(150 <= len(s) // 4 <= 160 for s in cut)
    with pytest.raises(UserError, match=r"episode tabletop/a\d has \d+ tokens without its instr"):
        batches(1, wordy(), too_long="cut_text", sequence_length=40)
    assert_equal(batches(4, too_long="cut_text"), batches(4))


def test_what_becomes_of_long_samples_may_change_on_resume():
    first = training_batches(small.config(), small.assets(), stores()[:1])
    state = first.get_state()
    other = training_batches(small.config(too_long="drop"), small.assets(), stores()[:1])
    other.set_state(state)
    assert_equal([other.next()], [first.next()])


def test_state_is_json_of_moderate_size():
    state = training_batches(small.config(**TWO), small.assets(), stores()).get_state()
    assert set(json.loads(state)) == {"identity", "step", "places"} and len(state) < 4000


def test_the_flow_expert_gets_its_chunks():
    settings = {"task": "policy_flow", "frames": 1, "packing": False}
    batch, _ = batches(2, **settings)
    assert batch.actions.shape == (2, 3, 2) and batch.actions.dtype == np.float32
    config = small.config(**settings, held_out_every=2, batch_size=4)
    held_out = list(EvaluationBatches(config, small.assets(), stores()[:1]))
    assert [b.actions.shape for b in held_out] == [(4, 3, 2)] * 2
    assert dataclasses.replace(batch, actions=None).useful_fraction == batch.useful_fraction


# What changes the loss alone, and what older code saved.


@pytest.mark.parametrize(
    "changes", [{"loss_on": "all"}, {"vision_weight": (1.0, 0.1, 50)}, {"value_weight": 9.0}]
)
def test_what_changes_the_loss_alone_changes_neither_batches_nor_position(changes):
    config, other = small.config(**TWO), small.config(**TWO, **changes)
    first = training_batches(config, small.assets(), stores())
    second = training_batches(other, small.assets(), stores())
    assert_equal([second.next() for _ in range(3)], [first.next() for _ in range(3)])
    second.set_state(first.get_state())
    assert_equal([second.next()], [first.next()])


def saved_by_older_code(state, **changes):
    """A state under the field names, and with the loss settings, that were saved once."""
    saved = json.loads(state)
    identity = saved["identity"]
    identity["data.layout"] = identity.pop("data.task")
    identity["data.action_frames"] = identity.pop("data.chunk_size")
    identity |= {"data.loss_on": "", "data.vision_weight": 0.5, **changes}
    return json.dumps(saved, sort_keys=True).encode()


def test_a_state_that_older_code_saved_goes_on():
    iterator = training_batches(small.config(**TWO), small.assets(), stores())
    iterator.next()
    state = iterator.get_state()
    assert not {"data.loss_on", "data.vision_weight"} & json.loads(state)["identity"].keys()
    other = training_batches(small.config(**TWO), small.assets(), stores())
    other.set_state(saved_by_older_code(state))
    assert other.get_state() == state
    assert_equal([other.next()], [iterator.next()])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.layout": "policy_image"}, "data.task was 'policy_image', is 'policy_video'"),
        ({"data.action_frames": 4}, "data.chunk_size was 4, is 3"),
        ({"data.seed": 8}, "data.seed was 8, is 7"),
        ({"data.unheard_of": 1}, "data.unheard_of was 1, is None"),
    ],
)
def test_a_state_of_older_code_and_other_data_is_refused(changes, message):
    iterator = training_batches(small.config(**TWO), small.assets(), stores())
    with pytest.raises(UserError, match=message):
        iterator.set_state(saved_by_older_code(iterator.get_state(), **changes))


def annotated(letter, count):
    """A store of episodes with states and texts."""
    episodes = []
    for number in range(count):
        episode = small.episode(number, 9 + number % 4, letter)
        steps = len(episode)
        state = np.linspace(-1, 1, 2 * steps, dtype=np.float32).reshape(steps, 2)
        texts = {
            "reasoning": tuple(f"t{step}" for step in range(steps)),
            "question": ("what",),
            "answer": ("x",),
        }
        episodes.append(dataclasses.replace(episode, state=state, texts=texts))
    return small.Store(letter, episodes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"loss_on": "both", "vision_weight": 0.25}, "6d64e92916f98f8f"),
        ({"packing": False, "aligned_windows": 0.5}, "ab1c93e89cab7f8f"),
        ({"state": True, "loss_on": "all"}, "71062fe847a84d29"),
        (
            {"task": "policy_image", "frames": 1, "views": ("view1", "view0")},
            "b803630450bfe17e",
        ),
        ({"task": "policy_flow", "frames": 1, "packing": False}, "842fd2befe57785c"),
        ({"task": "chain_of_thought", "frames": 1}, "f865c86e1e4f88a7"),
        (
            {
                "task": "world_model",
                "frames": 3,
                "frame_spacing": 2,
                "views": ("view0", "view1"),
            },
            "48127bad4b64e2f5",
        ),
        (
            {
                "task": "world_model",
                "packing": False,
                "null_prompt_prob": 0.3,
                "vision_weight": 1.0,
            },
            "eec36ca7ca673f9d",
        ),
        ({"task": "question", "frames": 1}, "d091ca8b77d8e304"),
        ({"task": "caption", "frames": 1, "null_prompt_prob": 0.5}, "1a8efb515cba2e51"),
        ({"task": "text_to_image", "frames": 1}, "cae3f96d204e91a2"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else value,
)
def test_six_batches_are_what_they_always_were(changes, expected):
    """Tokens, positions, segments, loss weights and actions; a resumed run depends on it.

    The hashes are of batches that carried their loss weights themselves.
    """
    assets = small.assets()
    statistics = assets.statistics["tabletop"]
    assets = dataclasses.replace(
        assets, statistics={"tabletop": statistics, "tabletop/state": statistics}
    )
    config = small.config(**TWO, weights=(2.0, 1.0), **changes)
    weigh = LabelWeights((labeled_roles(config.labels),), (config.vision_schedule,), (1.0,))
    iterator = training_batches(config, assets, [annotated("a", 12), annotated("b", 6)])
    digest = hashlib.sha256()
    for _ in range(6):
        batch = iterator.next()
        weights = np.asarray(weigh(batch, jnp.int32(0)))
        arrays = [batch.tokens, batch.positions, batch.segment_ids, weights]
        for array in [*arrays, *([] if batch.actions is None else [batch.actions])]:
            digest.update(np.ascontiguousarray(array).tobytes())
    iterator.close()
    assert digest.hexdigest()[:16] == expected
