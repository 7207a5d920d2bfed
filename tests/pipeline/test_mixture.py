"""Stores, samples of their episodes, and the mixture of them."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest

from tests.pipeline import small
from univla_jax.assets import spec_key
from univla_jax.data.datasets import DATASETS
from univla_jax.data.token_store import StoreHeader, TokenStore, TokenStoreWriter
from univla_jax.errors import UserError
from univla_jax.pipeline.dataset import EvaluationBatches, training_batches, training_stream
from univla_jax.pipeline.mixture import (
    SampleBuilder,
    SampleStream,
    Split,
    make_split,
    mixture_weight,
    open_stores,
    slots_per_store,
    source_fingerprint,
)
from univla_jax.sequences.tokens import Role
from univla_jax.tokenizers.image import ImageSpec
from univla_jax.training.run_assets import image_specs


def stream(counts, proportions=None, seed=7, **changes):
    config = small.config(**changes)
    stores = [Split(small.store(n, letter), 0, held_out=False) for n, letter in zip(counts, "abc")]
    builder = SampleBuilder(config, small.assets())
    return SampleStream(stores, proportions or counts, [builder] * len(stores), seed)


def located(count, *args, **changes):
    made = stream(*args, **changes)
    return [made.locate(n) for n in range(count)]


@pytest.mark.parametrize(
    ("proportions", "episodes", "slots"),
    [
        ((12, 12), 24, (12, 12)),
        ((3, 1), 8, (6, 2)),
        ((1, 1, 1), 4, (334, 333, 333)),
        ((0.7, 0.3), 10, (7, 3)),
        ((1e-9, 1), 10, (1, 1000)),
    ],
)
def test_blocks_hold_every_store_in_proportion(proportions, episodes, slots):
    assert slots_per_store(proportions, episodes) == slots


def test_with_equal_weights_an_epoch_shows_every_episode_once():
    for epoch in range(3):
        drawn = located(20 * (epoch + 1), (12, 8))[20 * epoch :]
        assert sorted(drawn) == sorted(
            [(0, epoch, i) for i in range(12)] + [(1, epoch, i) for i in range(8)]
        )


def test_epochs_and_stores_are_shuffled_each_in_its_own_way():
    drawn = located(60, (10, 10))
    orders = {
        (store, epoch): [i for s, e, i in drawn if (s, e) == (store, epoch)]
        for store in (0, 1)
        for epoch in (0, 1, 2)
    }
    assert len({tuple(order) for order in orders.values()}) == 6
    assert drawn != located(60, (10, 10), seed=8)
    assert drawn == located(60, (10, 10))


def test_weights_set_the_proportions_of_every_part_of_the_stream():
    drawn = np.array([store for store, _, _ in located(4000, (12, 8), proportions=(3.0, 1.0))])
    assert (drawn == 0).mean() == pytest.approx(0.75, abs=1e-3)
    for part in (drawn[:1000], drawn[::2], drawn[1::4]):
        assert (part == 0).mean() == pytest.approx(0.75, abs=0.04)


def test_a_store_seen_more_often_is_seen_evenly():
    drawn = [
        index for store, _, index in located(1000, (10, 10), proportions=(3.0, 1.0)) if store == 0
    ]
    counts = np.bincount(drawn)
    assert len(drawn) == 750 and set(counts) == {75}


def test_a_sample_is_a_function_of_its_number():
    made = stream((12, 8))
    copy = pickle.loads(pickle.dumps(made))
    later = [copy.draw(n).tokens.ids for n in (31, 4)]
    np.testing.assert_array_equal(later[1], made.draw(4).tokens.ids)
    np.testing.assert_array_equal(later[0], made.draw(31).tokens.ids)


def test_windows_differ_between_epochs():
    made = stream((4,))
    starts = [{made.draw(n).shown[0][1] for n in range(4 * e, 4 * e + 4)} for e in range(6)]
    assert len(set(map(frozenset, starts))) > 1


def test_an_empty_store_is_refused():
    with pytest.raises(UserError, match=r"data.stores\[1\]: holds no episode"):
        stream((3, 0), proportions=(1.0, 1.0))


def build(episode, **changes):
    return SampleBuilder(small.config(**changes), small.assets())(episode, np.random.default_rng(0))


def test_an_example_has_the_promised_arrays():
    example = build(small.episode(0, 6))
    assert small.shown_codes(example.tokens) == [0, 1, 3, 4]
    assert example.tokens.dtype == np.int32 and example.roles.dtype == np.uint8
    assert example.actions is None and len(example) == len(example.roles)
    assert (example.roles == Role.VISION).sum() == 16
    flow = build(small.episode(0, 3), task="policy_flow", frames=1, packing=False)
    assert flow.actions.shape == (3, 2) and flow.actions.dtype == np.float32


def test_a_drawn_sample_reads_no_codes():
    class Unread:
        shape = (6, 2, 2)

        def __getitem__(self, step):
            raise AssertionError("read while it was drawn")

    codes = {"view0": Unread(), "view1": Unread()}
    builder = SampleBuilder(small.config(), small.assets())
    episode = dataclasses.replace(small.episode(0, 6), codes=codes)
    spec = builder.draw(episode, np.random.default_rng(0))
    assert len(spec) == len(build(small.episode(0, 6)))
    with pytest.raises(AssertionError, match="read while"):
        builder.load(spec)


def test_texts_of_a_step_are_written_and_missing_ones_named():
    episode = dataclasses.replace(
        small.episode(0, 3),
        texts={"reasoning": ("up",), "question": ("what",), "answer": ("x", "y", "z")},
    )

    def words(**changes):
        ids = build(episode, frames=1, **changes).tokens
        return "".join(chr(i) for i in ids if i < 128)

    assert words(task="chain_of_thought").endswith("up")
    assert words(task="question").split("ASSISTANT:")[1] in "xyz"
    assert "what. ASSISTANT:" in words(task="question")
    assert words(task="caption").startswith("a") and words(task="text_to_image")[:4] == "a2*2"
    with pytest.raises(UserError, match="a0: it has no 'answer' text"):
        build(small.episode(0, 3), task="question", frames=1)


def test_null_prompts_have_their_share():
    builder = SampleBuilder(small.config(null_prompt_prob=0.3), small.assets())
    rng = np.random.default_rng(0)
    lengths = [len(builder(small.episode(0, 6), rng)) for _ in range(300)]
    assert np.mean(np.array(lengths) == min(lengths)) == pytest.approx(0.3, abs=0.07)


def test_wordless_samples_have_no_words_and_move_nothing_else():
    told, silent = stream((12,)), stream((12,), wordless=True)
    for number in range(20):
        (episode, own), (_, bare) = told.sample(number), silent.sample(number)
        words = len(small.task("policy_video").text_encoder.encode(episode.instruction))
        np.testing.assert_array_equal(bare.tokens.ids[1:], own.tokens.ids[1 + words :])
        assert words and bare.tokens.ids[0] == own.tokens.ids[0]


def test_errors_name_the_episode():
    short, other = small.episode(4, 2), dataclasses.replace(small.episode(0, 9), corpus="mars")
    cases = [
        (short, {}, "episode tabletop/a4: 2 steps are fewer than one chunk of 3"),
        (small.episode(0, 9), {"sequence_length": 20}, r"a0: its sample has \d+ tokens"),
        (small.episode(0, 9), {"views": ("front",)}, "a0: no view 'front'"),
        (small.episode(0, 9), {"state": True}, "a0: it has no state"),
        (other, {}, "mars/a0: no statistics of 'mars'"),
        (other, {"task": "world_model"}, "unknown dataset 'mars'"),
    ]
    for episode, changes, message in cases:
        with pytest.raises(UserError, match=message):
            build(episode, **changes)


def test_a_code_outside_the_vocabulary_is_named_with_its_episode():
    codes = {view: np.full((9, 2, 2), 12, np.uint16) for view in ("view0", "view1")}
    with pytest.raises(UserError, match="episode tabletop/a0: visual code 12"):
        build(dataclasses.replace(small.episode(0, 9), codes=codes))


def test_each_sample_draws_one_of_the_instructions():
    episode = dataclasses.replace(small.episode(0, 9), instruction="a", paraphrases=("b", "c"))
    builder = SampleBuilder(small.config(), small.assets())
    rng = np.random.default_rng(0)
    drawn = [chr(builder.draw(episode, rng).tokens.ids[1]) for _ in range(300)]
    assert all(70 < drawn.count(letter) < 130 for letter in "abc")


def test_a_builder_pickles_for_workers():
    builder = SampleBuilder(small.config(), small.assets())
    copy = pickle.loads(pickle.dumps(builder))
    episode = small.episode(0, 9)
    ours, theirs = (b(episode, np.random.default_rng(3)) for b in (builder, copy))
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_array_equal(ours.roles, theirs.roles)


def test_held_out_episodes_are_never_trained_on():
    source = small.store(10)
    train, held = (Split(source, 4, held_out=h) for h in (False, True))
    names = [[split[i].episode_id for i in range(len(split))] for split in (train, held)]
    assert names[1] == ["a3", "a7"]
    assert sorted(names[0] + names[1]) == sorted(e.episode_id for e in source)
    whole = Split(source, 0, held_out=True)
    assert len(whole) == 10 and whole[3].episode_id == "a3"


def test_augmented_copies_stay_on_their_side_of_the_split():
    source = small.store(12)
    source.copies = 3
    train, held = (Split(source, 2, held_out=h) for h in (False, True))
    names = [[split[i].episode_id for i in range(len(split))] for split in (train, held)]
    assert names == [["a0", "a1", "a2", "a6", "a7", "a8"], ["a3", "a4", "a5", "a9", "a10", "a11"]]


def test_some_of_the_copies_are_drawn_for_every_epoch():
    source = small.store(12)  # four episodes, each with two copies behind it
    source.copies = 3
    config = small.config(copies_per_epoch=2)
    made = SampleStream(
        [make_split(config, source, held_out=False)],
        [1],
        [SampleBuilder(config, small.assets())],
        7,
    )
    assert made.epoch == 8
    epochs = []
    for epoch in range(6):
        numbers = range(8 * epoch, 8 * epoch + 8)
        epochs.append(sorted(int(made.sample(n)[0].episode_id[1:]) for n in numbers))
        assert [n // 3 for n in epochs[-1]] == [0, 0, 1, 1, 2, 2, 3, 3]
        assert len(set(epochs[-1])) == 8
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert {n for epoch in epochs for n in epoch} == set(range(12))
    assert len(make_split(small.config(), source, held_out=False)) == 12
    assert len(make_split(small.config(copies_per_epoch=9), source, held_out=False)) == 12


SPECS = {view: ImageSpec(size=(80, 80), factor=8) for view in ("image", "wrist_image")}


class Vision:
    """In place of the vision tokenizer; no pixel is encoded here."""

    fingerprint = "vision"
    codebook_size = 12
    factor = 8


def assets(**changes):
    given = dataclasses.replace(small.assets(), vision=Vision(), image_specs=SPECS)
    return dataclasses.replace(given, **changes)


def write_store(folder, count=8, min_frames=3, specs=SPECS, steps=9, **changes):
    header = StoreHeader(
        corpus="tabletop",
        split="train",
        control_hz=5.0,
        source="tabletop",
        source_fingerprint="source",
        source_episodes=count,
        episodes_per_shard=3,
        min_frames=min_frames,
        image_specs={view: spec.to_dict() for view, spec in specs.items()},
        grids={view: (2, 2) for view in specs},
        vision_fingerprint="vision",
        codebook_size=12,
        block_steps=2,
    )
    writer = TokenStoreWriter(folder, dataclasses.replace(header, **changes))
    for number in range(writer.header.num_shards):
        with writer.shard(number) as shard:
            for index in writer.source_range(number):
                episode = small.episode(index, steps + index % 4, views=len(specs))
                codes = dict(zip(specs, map(np.ascontiguousarray, episode.codes.values())))
                shard.add(dataclasses.replace(episode, codes=codes))
    writer.finish()
    return str(folder)


def test_batches_come_from_stores_on_disk(tmp_path):
    config = small.config(stores=(write_store(tmp_path / "a"),), held_out_every=4)
    iterator = training_batches(config, assets())
    first = iterator.next()
    state = iterator.get_state()
    wanted = iterator.next()
    iterator.close()
    again = training_batches(config, assets())
    np.testing.assert_array_equal(again.next().tokens, first.tokens)
    again.set_state(state)
    np.testing.assert_array_equal(again.next().tokens, wanted.tokens)
    again.close()
    (batch,) = EvaluationBatches(config, assets())
    assert batch.valid.all() and batch.tokens.shape == (2, 160)


def test_a_store_is_the_same_data_as_a_list_of_its_episodes(tmp_path):
    config = small.config(stores=(write_store(tmp_path / "a"),))
    (store,) = open_stores(config, assets())
    from_disk = training_batches(config, assets())
    from_list = training_batches(config, assets(), [list(store)])
    for _ in range(3):
        np.testing.assert_array_equal(from_disk.next().tokens, from_list.next().tokens)


def test_stores_that_do_not_fit_are_refused(tmp_path):
    good = write_store(tmp_path / "good")
    sized = {view: dataclasses.replace(spec, size=(96, 96)) for view, spec in SPECS.items()}
    cases = [
        (write_store(tmp_path / "other", vision_fingerprint="x"), {}, "another vision tokenizer"),
        (write_store(tmp_path / "sized", specs=sized), {}, "view 'image' was made with"),
        (write_store(tmp_path / "short", steps=2), {}, "2 of 8 episodes .* 3 frames .* shortest 2"),
        (good, {"task": "world_model", "frame_spacing": 10}, "tokenize with min_frames=10"),
        (good, {"views": ("front",)}, "no view 'front'"),
        (str(tmp_path / "none"), {}, "no token store"),
    ]
    for folder, changes, message in cases:
        with pytest.raises(UserError, match=message):
            training_batches(small.config(stores=(folder,), **changes), assets())
    with pytest.raises(UserError, match="none named"):
        training_batches(small.config(stores=()), assets())


def test_corpora_may_differ_in_the_size_of_a_view(tmp_path):
    large = dict.fromkeys(SPECS, ImageSpec(size=(96, 96)))
    tall = {"image": ImageSpec(size=(80, 80)), "wrist_image": ImageSpec(size=(96, 80))}
    folders = [
        write_store(tmp_path / name, specs=specs, corpus=name, min_frames=5)
        for name, specs in (("tabletop", SPECS), ("bridge", large), ("calvin", tall))
    ]
    headers = [TokenStore(folder).manifest.header for folder in folders]
    specs = image_specs(headers)
    assert specs[spec_key("bridge", "image")] == ImageSpec(size=(96, 96))
    given = assets(image_specs=specs)
    config = small.config(
        stores=tuple(folders), task="world_model", frame_spacing=2, views=("image",)
    )
    iterator = training_batches(config, given)
    assert iterator.next().tokens.shape == (2, 160)
    iterator.close()
    with pytest.raises(UserError, match=r"corpus 'bridge'.*make them with the same"):
        image_specs([headers[1], dataclasses.replace(headers[0], corpus="bridge")])
    assert set(image_specs(headers[:1])) == set(SPECS)


def droid_episode(number):
    """Code v of camera v."""
    episode = small.episode(number, 10, views=3)
    views = ("image", "side_image", "wrist_image")
    codes = {view: np.full((10, 2, 2), v, np.uint16) for v, view in enumerate(views)}
    return dataclasses.replace(episode, codes=codes, corpus="droid")


def test_the_world_model_gets_a_sample_of_every_camera_that_the_corpus_names():
    source = [droid_episode(n) for n in range(4)]
    config = small.config(task="world_model", frame_spacing=3, held_out_every=4)
    split = make_split(config, source, held_out=False)
    made = SampleStream([split], [1], [SampleBuilder(config, small.assets())], 7)
    shown = [(made.sample(n)[0].episode_id, *made.draw(n).shown[0][0][0, 0, :1]) for n in range(9)]
    assert sorted(shown) == [(f"a{n}", camera) for n in range(3) for camera in range(3)]
    assert len(make_split(config, source, held_out=True)) == 3
    named = dataclasses.replace(config, views=("image", "side_image"))
    assert len(make_split(named, source, held_out=False)) == 3
    assert len(make_split(small.config(), source, held_out=False)) == 4


def test_a_policy_sees_the_cameras_that_the_corpus_names():
    given = small.assets()
    statistics = {"bridge": given.statistics["tabletop"]}
    builder = SampleBuilder(small.config(), dataclasses.replace(given, statistics=statistics))
    episode = small.episode(0, 9)
    codes = dict(zip(("side_image", "image"), episode.codes.values()))
    bridge = dataclasses.replace(episode, codes=codes, corpus="bridge")
    spec = builder.draw(bridge, np.random.default_rng(0))
    assert {id(codes) for codes, _ in spec.shown} == {id(codes["image"])}


def test_a_store_weighs_what_its_corpus_does():
    droid = [droid_episode(0)]
    assert mixture_weight(droid) == DATASETS["droid"].mixture_weight == 0.2
    assert mixture_weight([dataclasses.replace(droid[0], corpus="own")]) == 1
    config = small.config(
        stores=("a", "b"), task="world_model", frame_spacing=3, weight_unit="store"
    )
    made = training_stream(config, small.assets(), [droid * 5, small.store(5)])
    drawn = np.array([made.locate(n)[0] for n in range(made.epoch)])
    assert (drawn == 0).mean() == pytest.approx(0.2 / 1.2, abs=1e-3)


def test_fingerprints_tell_contents_apart():
    episodes = list(small.store(4))
    assert source_fingerprint(episodes) == source_fingerprint(list(episodes))
    assert source_fingerprint(episodes) != source_fingerprint(episodes[:3])
    assert source_fingerprint(small.store(4, "b")) == "b"
