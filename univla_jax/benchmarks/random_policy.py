"""A whole policy with random weights and real sizes: tokenizers, vocabulary, decoder, statistics.

It sees two small cameras and writes FAST chunks of ten steps and seven dimensions. Weights are
random, so what it does means nothing; how long it takes does.
"""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np

from univla_jax.benchmarks.decode_cases import random_decoder
from univla_jax.benchmarks.synthetic import CODEBOOK, make_assets
from univla_jax.data.actions import ActionStatistics
from univla_jax.inference.policy import Policy
from univla_jax.inference.trained import Layout, TrainedModel
from univla_jax.tokenizers.image import ImageSpec
from univla_jax.tokenizers.vision import PRESETS, VisionTokenizer
from univla_jax.tokenizers.vision_vq import fresh_variables

CHUNK, DIMENSIONS = 10, 7
_SIDES = {"image": 32, "wrist_image": 16}  # pixels; 4 x 4 and 2 x 2 codes
_CORPUS = "synthetic"


def random_policy(preset: str, *, seed: int = 0) -> Policy:
    """A video policy around the decoder ``preset`` with as many ids as it needs."""
    one = (1.0,) * DIMENSIONS
    minus = (-1.0,) * DIMENSIONS
    statistics = ActionStatistics(mean=(0.0,) * DIMENSIONS, std=one, q01=minus, q99=one, count=1)
    assets = make_assets({_CORPUS: statistics}, CHUNK)
    ids = assets.vocabulary
    rng = np.random.default_rng(seed)
    model, params = random_decoder(preset, rng, vocab_size=ids.size, pad_id=ids.pad)
    config = dataclasses.replace(PRESETS["quickstart"], codebook_size=CODEBOOK)
    assets = dataclasses.replace(
        assets,
        vision=VisionTokenizer(config, fresh_variables(config, seed)),
        image_specs={
            view: ImageSpec(size=(side, side), factor=config.factor, min_pixels=side * side)
            for view, side in _SIDES.items()
        },
        layout=_layout(config.factor),
        model=dataclasses.asdict(model.config),
    )
    folder = pathlib.Path("random")
    return Policy(TrainedModel(folder, assets, Layout.of(assets), model, params))


def _layout(factor: int) -> dict:
    grids = {view: [side // factor] * 2 for view, side in _SIDES.items()}
    return {
        "layout": "policy_video",
        "frames": 2,
        "action_frames": CHUNK,
        "frame_spacing": 0,
        "sequence_length": 512,
        "views": list(_SIDES),
        "corpora": {_CORPUS: {"control_hz": 10.0, "frame_spacing": 10, "grids": grids}},
    }
