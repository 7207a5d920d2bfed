"""Turns a dataset into token stores, one per split, encoding every frame once.

    python -m univla_jax.tokenize_dataset --config=configs/quickstart.py:tokens \
        --source=DATASET_FOLDER --vision=VISION_TOKENIZER_FOLDER --out=STORES_FOLDER \
        [--part=0/1] [--verify]

Killed at any moment and started again it continues with the first unfinished shard; started again
when all is done it changes nothing. Several processes or hosts share the shards of a store when
each is given its part (``0/4`` ... ``3/4``); the one that finds all finished completes the store.
Invalid episodes, too short ones among them, are skipped, counted and listed. ``--verify`` changes
nothing: it recomputes the checksums of finished stores and encodes some of their episodes again.
"""

from __future__ import annotations

import sys

from absl import flags

from univla_jax import cli
from univla_jax.config import build_config
from univla_jax.data.token_store import Manifest
from univla_jax.data.tokenize import Part, TokenizeConfig, tokenize, verify_store
from univla_jax.data.validation import describe_invalid
from univla_jax.io import absolute_path
from univla_jax.tokenizers.vision import VisionTokenizer

CONFIG = cli.config_flag()
SOURCE = cli.string_flag("source", "dataset folder")
VISION = cli.string_flag("vision", "vision tokenizer folder")
OUT = cli.string_flag("out", "folder for the stores, one per split")
PART = cli.string_flag("part", "part of the work, such as 0/4", default="0/1")
VERIFY = flags.DEFINE_bool("verify", False, "Checks finished stores instead of writing any")


def main(argv: list[str]) -> None:
    """Runs the command."""
    del argv
    config = build_config(TokenizeConfig, CONFIG.value.to_dict())
    vision = VisionTokenizer.load(VISION.value)
    if VERIFY.value:
        _verify(config, vision)
        return
    part = Part.parse(PART.value)
    for name, manifest in tokenize(config, SOURCE.value, OUT.value, vision, part).items():
        if manifest is None:
            print(f"{name}: this part is done, other parts are not")
        else:
            _report(name, manifest)


def _report(name: str, manifest: Manifest) -> None:
    """What went into a store on standard output, and what did not on standard error."""
    header, invalid = manifest.header, manifest.invalid_episodes
    print(f"{name}: {manifest.episodes} episodes, {manifest.frames} frames in {OUT.value}/{name}")
    if invalid:
        print(
            f"{name}: {len(invalid)} of {header.source_episodes} episodes skipped: "
            f"{describe_invalid(invalid, 10)}",
            file=sys.stderr,
        )


def _verify(config: TokenizeConfig, vision: VisionTokenizer) -> None:
    for name in config.splits:
        folder = absolute_path(OUT.value) / name
        result = verify_store(folder, config, SOURCE.value, vision)
        print(
            f"{name}: {result.shards} shards unchanged, {result.episodes} episodes encoded again, "
            f"{result.equal:.2%} of their codes equal"
        )


if __name__ == "__main__":
    cli.run(main)
