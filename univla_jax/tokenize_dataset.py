"""Turns an RLDS dataset into token stores, one per split, encoding every frame once.

    python -m univla_jax.tokenize_dataset --config=configs/quickstart.py:tokens \
        --source=RLDS_FOLDER --vision=VISION_TOKENIZER_FOLDER --out=STORES_FOLDER

Killed at any moment and started again it continues with the first unfinished shard; started again
when all is done it changes nothing. Broken episodes are left out, listed and counted.
"""

from __future__ import annotations

import sys

from univla_jax import commands
from univla_jax import config as strict
from univla_jax.data.problems import describe
from univla_jax.data.tokenization import TokenizeConfig, tokenize
from univla_jax.tokenizers.vision import VisionTokenizer

CONFIG = commands.config_flag()
SOURCE = commands.string_flag("source", "RLDS dataset folder")
VISION = commands.string_flag("vision", "vision tokenizer folder")
OUT = commands.string_flag("out", "folder for the stores, one per split")


def main(argv: list[str]) -> None:
    """Runs the command."""
    del argv
    config = strict.build(TokenizeConfig, CONFIG.value.to_dict())
    manifests = tokenize(config, SOURCE.value, OUT.value, VisionTokenizer.load(VISION.value))
    for name, manifest in manifests.items():
        print(
            f"{name}: {manifest.episodes} episodes, {manifest.frames} frames in {OUT.value}/{name}"
        )
        if manifest.problems:
            print(
                f"{name}: {len(manifest.problems)} broken: {describe(manifest.problems, 20)}",
                file=sys.stderr,
            )


if __name__ == "__main__":
    commands.run(main)
