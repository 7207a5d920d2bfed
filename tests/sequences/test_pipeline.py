import itertools
import json

import grain
import numpy as np
import pytest

from tests.sequences import small
from univla_jax.errors import UserError
from univla_jax.sequences.evaluation import EvaluationBatches
from univla_jax.sequences.pipeline import sample_dataset, training_batches
from univla_jax.sequences.samples import SampleBuilder
from univla_jax.sequences.sources import Split

TWO = {"stores": ("a", "b")}


def stores(a=12, b=12):
    return [small.store(a, "a"), small.store(b, "b")]


def batches(count, sources=None, **changes):
    iterator = training_batches(small.config(**changes), small.assets(), sources or stores()[:1])
    made = [iterator.next() for _ in range(count)]
    iterator.close()
    return made


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        for name in ("tokens", "loss_weight", "positions", "segment_ids"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def samples(count, host=0, hosts=1, sources=None, **changes):
    """The first samples of a host as (letter of the store, bytes of the tokens)."""
    config = small.config(**{**TWO, **changes})
    sources = sources or stores()
    splits = [Split(s, config.held_out_every, held_out=False) for s in sources]
    dataset = sample_dataset(config, SampleBuilder(config, small.assets()), splits, host, hosts)
    drawn = [dataset[i]["tokens"] for i in range(count)]
    return [(chr(t[1]), t.tobytes()) for t in drawn]


def test_batches_have_the_promised_arrays():
    for packing in (True, False):
        (batch,) = batches(1, packing=packing)
        assert batch.tokens.shape == (2, 160) and batch.tokens.dtype == np.int32
        assert batch.loss_weight.dtype == np.float32 and batch.valid.all()
        starts = batch.positions == 0
        assert not batch.loss_weight[starts].any()
    assert batches(4, packing=True)[0].useful_share > batches(4, packing=False)[0].useful_share


def test_same_seed_same_batches_other_seed_other_batches():
    assert_equal(batches(3), batches(3))
    assert not np.array_equal(batches(1)[0].tokens, batches(1, seed=8)[0].tokens)


def test_threads_and_prefetching_change_nothing():
    assert_equal(batches(4), batches(4, read_threads=2, prefetch_batches=2))


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "packing"), [(2, True), (3, True), (2, False)])
def test_worker_count_changes_nothing(workers, packing):
    assert_equal(batches(5, packing=packing), batches(5, packing=packing, workers=workers))


def _resumed(config, sources, before, after):
    """Batches after a restart, and the ones an uninterrupted run would have given."""
    first = training_batches(config, small.assets(), sources)
    for _ in range(before):
        first.next()
    state = first.get_state()
    wanted = [first.next() for _ in range(after)]
    first.close()
    second = training_batches(config, small.assets(), sources)
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
def test_resume_with_workers_is_exact():
    config = small.config(**TWO, workers=2, read_threads=1, prefetch_batches=1)
    assert_equal(*_resumed(config, stores(), 3, 4))


def test_grain_finds_the_sample_stream_checkpointable():
    config = small.config(**TWO)
    splits = [Split(s, 0, held_out=False) for s in stores(4, 4)]
    dataset = sample_dataset(config, SampleBuilder(config, small.assets()), splits, 0, 1)
    stream = grain.experimental.LimitIterDataset(dataset.to_iter_dataset(), count=6)
    grain.experimental.assert_equal_output_after_checkpoint(stream)


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
        ({"workers": 2}, None, "data.workers was 0, is 2"),
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


def test_a_state_of_another_host_or_a_cut_one_is_refused():
    config = small.config(**TWO)
    saved = training_batches(config, small.assets(), stores(), host=0, hosts=2).get_state()
    other = training_batches(config, small.assets(), stores(), host=1, hosts=2)
    with pytest.raises(UserError, match="host was 0, is 1"):
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
def test_hosts_share_every_epoch_without_overlap(hosts):
    for epoch in range(2):
        drawn = []
        for host in range(hosts):
            mine = 24 // hosts
            drawn += samples(mine * (epoch + 1), host, hosts)[mine * epoch :]
        # 12 episodes of each store; the windows are the same for any number of hosts
        whole = samples(24 * (epoch + 1))[24 * epoch :]
        assert sorted(drawn) == sorted(whole)


def test_epochs_differ_in_order_and_windows():
    first, second = np.split(np.array(samples(48), dtype=object), 2)
    assert first.tolist() != second.tolist()
    assert {t for _, t in first} != {t for _, t in second}


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_every_host_sees_the_stores_in_proportion(hosts):
    for host in range(hosts):
        letters = [letter for letter, _ in samples(100, host, hosts, weights=(3.0, 1.0))]
        assert letters.count("a") == 75
    uneven = [small.store(12, "a"), small.store(4, "b")]
    letters = [letter for letter, _ in samples(80, sources=uneven)]
    assert letters.count("a") == 60
    letters = [letter for letter, _ in samples(80, sources=uneven, weight_unit="store")]
    assert letters.count("a") == 40


def test_stores_are_shuffled_by_seeds_of_their_own():
    same = [small.store(40, "a"), small.store(40, "a")]
    config = small.config(**TWO)
    splits = [Split(s, 0, held_out=False) for s in same]
    names = []
    for number in range(2):
        part = sample_dataset(config, _Name(), [splits[number]] * (number + 1), 0, 1)
        names.append([part[i]["name"] for i in range(number, 40, number + 1)])
    assert names[0][:20] != names[1][:20]


class _Name:
    """A builder that gives the episode's name alone."""

    def __call__(self, episode, rng):
        return {"name": episode.episode_id}


def test_held_out_episodes_are_never_trained_on():
    source = small.store(10)
    train, held = (Split(source, 4, held_out=h) for h in (False, True))
    names = [[split[i].episode_id for i in range(len(split))] for split in (train, held)]
    assert names[1] == ["a3", "a7"]
    assert sorted(names[0] + names[1]) == sorted(e.episode_id for e in source)
    whole = Split(source, 0, held_out=True)
    assert len(whole) == 10 and whole[3].episode_id == "a3"


@pytest.mark.parametrize("hosts", [1, 2])
def test_evaluation_reads_each_held_out_episode_once(hosts):
    config = small.config(**TWO, held_out_every=3, batch_size=4)
    rows = []
    for host in range(hosts):
        evaluation = EvaluationBatches(
            config, small.assets(), stores(17, 12), host=host, hosts=hosts
        )
        made = list(evaluation)
        assert len(made) == len(evaluation) == 3
        assert {batch.tokens.shape for batch in made} == {(4 // hosts, 160)}
        assert_equal(made, list(evaluation))
        for batch in made:
            assert not batch.loss_weight[~batch.valid].any()
            rows += list(batch.tokens[batch.valid])
    assert len(rows) == 5 + 4
    assert {chr(row[1]) for row in rows} == {"a", "b"}


def test_unfit_sources_are_refused():
    config, given = small.config(**TWO), small.assets()
    with pytest.raises(UserError, match="2 named, 1 opened"):
        training_batches(config, given, stores()[:1])
    with pytest.raises(UserError, match=r"b: 1 episode\(s\) to train on for 2 host"):
        training_batches(config, given, stores(12, 1), hosts=2)
    with pytest.raises(UserError, match="3 hosts"):
        training_batches(config, given, stores(), hosts=3)
    with pytest.raises(UserError, match="no episode is held out of 24"):
        EvaluationBatches(small.config(**TWO, held_out_every=20), given, stores())


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_broken_episode_is_named(workers):
    source = small.Store("a", [small.episode(i, 2 if i == 1 else 9) for i in range(4)])
    iterator = training_batches(
        small.config(workers=workers, prefetch_batches=1), small.assets(), [source]
    )
    with pytest.raises(UserError, match="episode tabletop/a1: 2 steps are fewer"):
        for _ in itertools.repeat(None, 20):
            iterator.next()
    iterator.close()


def test_state_is_json_of_moderate_size():
    state = training_batches(small.config(**TWO), small.assets(), stores()).get_state()
    assert set(json.loads(state)) == {"identity", "grain"} and len(state) < 4000
