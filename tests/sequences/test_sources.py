import dataclasses

import numpy as np
import pytest

from tests.sequences import small
from univla_jax.data.token_store import StoreHeader, TokenStoreWriter
from univla_jax.errors import UserError
from univla_jax.pipeline.dataset import EvaluationBatches, training_batches
from univla_jax.pipeline.mixture import open_stores, source_fingerprint
from univla_jax.tokenizers.image import ImageSpec

SPECS = {view: ImageSpec(size=(80, 80), factor=8) for view in ("image", "wrist_image")}


class Vision:
    """Stands for the vision tokenizer; no pixel is encoded here."""

    fingerprint = "vision"
    codebook_size = 12
    factor = 8


def assets(**changes):
    given = dataclasses.replace(small.assets(), vision=Vision(), image_specs=SPECS)
    return dataclasses.replace(given, **changes)


def write_store(folder, count=8, min_frames=3, specs=SPECS, **changes):
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
                episode = small.episode(index, 9 + index % 4, views=len(specs))
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
        (write_store(tmp_path / "short", min_frames=2), {}, "may hold episodes of 2 frames"),
        (good, {"layout": "world_model"}, "at least 5; tokenize with min_frames=5"),
        (good, {"views": ("front",)}, "no view 'front'"),
        (str(tmp_path / "none"), {}, "no token store"),
    ]
    for folder, changes, message in cases:
        with pytest.raises(UserError, match=message):
            training_batches(small.config(stores=(folder,), **changes), assets())
    with pytest.raises(UserError, match="none named"):
        training_batches(small.config(stores=()), assets())


def test_fingerprints_tell_contents_apart():
    episodes = list(small.store(4))
    assert source_fingerprint(episodes) == source_fingerprint(list(episodes))
    assert source_fingerprint(episodes) != source_fingerprint(episodes[:3])
    assert source_fingerprint(small.store(4, "b")) == "b"
