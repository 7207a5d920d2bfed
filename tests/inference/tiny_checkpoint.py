"""Whole checkpoints with random parameters, small enough to make in a second."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np

from univla_jax.adapters import adapter_record
from univla_jax.assets import Assets
from univla_jax.checkpoints import (
    CheckpointConfig,
    Checkpointer,
    assets_folder,
    find_checkpoint,
)
from univla_jax.config import build_config
from univla_jax.models.action_expert import params_init
from univla_jax.models.decoder import Decoder
from univla_jax.models.decoder_config import DecoderConfig, preset
from univla_jax.models.lora import LoraConfig, is_adapter
from univla_jax.normalization import ActionStatistics
from univla_jax.tokenizers.action import UniformBinTokenizer
from univla_jax.tokenizers.fast import FastTokenizer
from univla_jax.tokenizers.image import ImageSpec
from univla_jax.tokenizers.text import SentencePieceTextTokenizer
from univla_jax.tokenizers.vision import VisionTokenizer
from univla_jax.tokenizers.vision_vq import VisionConfig, init_variables
from univla_jax.tokenizers.vocabulary import Vocabulary

GRIDS = {"image": (3, 3), "wrist_image": (2, 2)}
CHUNK = 3
STATISTICS = ActionStatistics(
    mean=(0.0,) * 7,
    std=(0.1,) * 7,
    q01=(-0.1, -0.1, -0.1, -0.2, -0.2, -0.2, -1.0),
    q99=(0.1, 0.08, 0.1, 0.2, 0.2, 0.2, 1.0),
    count=100,
)
VISION = VisionConfig(
    codebook_size=16,
    embed_dim=4,
    z_channels=4,
    ch=8,
    ch_mult=(1, 2, 2, 2),
    num_res_blocks=1,
    attn_resolutions=(),
    num_groups=4,
)
WORDS = ("push the red block to the left", "put the blue block in the white zone", "touch green")


def make_assets(*, bins: bool = False, **task: Any) -> Assets:
    """Assets of a policy on the tabletop; ``bins`` takes an action tokenizer without BPE."""
    text = SentencePieceTextTokenizer.fit(WORDS * 4, 320)
    vision = VisionTokenizer(VISION, init_variables(VISION, 0))
    chunks = np.random.default_rng(0).uniform(-1, 1, (40, CHUNK, 7))
    action = UniformBinTokenizer(16) if bins else FastTokenizer.fit(chunks, 4, 300)
    corpus = {
        "control_hz": 5.0,
        "frame_spacing": 5,
        "grids": {v: list(g) for v, g in GRIDS.items()},
    }
    return Assets(
        vocabulary=Vocabulary.from_scratch(
            text.vocabulary_size, vision.codebook_size, action.vocabulary_size
        ),
        text=text,
        vision=vision,
        action=action,
        image_specs={
            view: ImageSpec(size=(h * 8, w * 8), min_pixels=64) for view, (h, w) in GRIDS.items()
        },
        statistics={"tabletop": STATISTICS},
        task={
            "layout": "policy_video",
            "frames": 2,
            "action_frames": CHUNK,
            "frame_spacing": 0,
            "sequence_length": 512,
            "views": list(GRIDS),
            "corpora": {"tabletop": corpus},
            **task,
        },
    )


@dataclasses.dataclass(frozen=True)
class _State:
    params: Any


jax.tree_util.register_dataclass(_State, ["params"], [])


def _random_params(model: Decoder, seed: int, scale: float) -> Any:
    """Normal matrices and norms of 1, drawn by NumPy: nothing is compiled."""
    rng = np.random.default_rng(seed)
    shapes = nn.unbox(jax.eval_shape(params_init(model), jax.random.key(0)))

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[-1].key == "scale":
            return np.ones(leaf.shape, np.float32)
        return (scale * 0.02 * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def save(
    workdir: pathlib.Path, assets: Assets, *, seed: int = 0, scale: float = 1.0, step=7, **changes
):
    """Writes ``workdir``/checkpoints/7 with random parameters; returns the workdir."""
    vocabulary = assets.vocabulary
    config = preset("tiny", vocab_size=vocabulary.size, pad_id=vocabulary.pad, **changes)
    assets = dataclasses.replace(assets, model=dataclasses.asdict(config))
    params = _random_params(Decoder(config), seed, scale)
    with Checkpointer(workdir, CheckpointConfig(), write_assets=assets.save) as checkpointer:
        checkpointer.save(step, _State(params))
        checkpointer.wait()
    return workdir


def save_adapter(
    workdir: pathlib.Path, base: pathlib.Path, lora: LoraConfig, *, seed: int, step: int
):
    """Writes a checkpoint of random adapters beside the base; returns the workdir."""
    folder = find_checkpoint(base)
    assets = Assets.load(assets_folder(folder))
    config = build_config(DecoderConfig, assets.model)
    adapted = Decoder(dataclasses.replace(config, lora=lora))
    flat = flax.traverse_util.flatten_dict(_random_params(adapted, seed, 20.0), sep="/")
    params = {name: x for name, x in flat.items() if is_adapter(name)}
    params = flax.traverse_util.unflatten_dict(params, sep="/")
    assets = dataclasses.replace(assets, adapter=adapter_record(folder, lora))
    with Checkpointer(workdir, CheckpointConfig(), write_assets=assets.save) as checkpointer:
        checkpointer.save(step, _State(params))
        checkpointer.wait()
    return workdir
