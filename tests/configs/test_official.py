"""What the published checkpoints do not say."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.configs.test_quickstart import recipe
from univla_jax.config import build_config
from univla_jax.errors import UserError
from univla_jax.interop.hf_assets import ConvertConfig
from univla_jax.normalization import ActionStatistics
from univla_jax.tokenizers.image import ImageSpec

GRIDS = {
    "libero_video": [(25, 25), (25, 25)],
    "libero_image": [(25, 25), (25, 25)],
    "calvin_video": [(25, 25), (10, 10)],
    "bridge_video": [(32, 32)],
    "world_model": [(32, 32)],
}


@pytest.mark.parametrize("name", GRIDS)
def test_recipes_lack_nothing_but_folders(name):
    config = build_config(ConvertConfig, recipe("official")(name).to_dict())
    with pytest.raises(UserError, match=r"config\.vision is empty"):
        config.require()
    dataclasses.replace(config, vision="there", action="there").require()
    specs = [ImageSpec.from_dict(spec) for spec in config.views.values()]
    assert [spec.grid_size(*spec.size) for spec in specs] == GRIDS[name]


def test_a_base_model_needs_nothing():
    build_config(ConvertConfig, recipe("official")("base").to_dict()).require()


@pytest.mark.parametrize("name", ["libero", "calvin", "bridge"])
def test_statistics_are_the_references(name, golden_dir):
    kind = "libero_image" if name == "libero" else f"{name}_video"
    ours = ActionStatistics.from_dict(recipe("official")(kind).to_dict()["statistics"])
    with np.load(golden_dir / "normalize.npz") as arrays:
        for field in ("mean", "std", "q01", "q99"):
            np.testing.assert_array_equal(getattr(ours, field), arrays[f"config_{name}|{field}"])


def test_an_unknown_recipe_is_named_beside_the_known_ones():
    with pytest.raises(UserError, match=r"'libero'.*libero_video, libero_image"):
        recipe("official")("libero")
