"""Token stores of every corpus, at the sizes of the published recipes.

    python -m univla_jax.tokenize_dataset --config=configs/tokens.py:libero \\
        --source=LIBERO_SPATIAL_RLDS --vision=EMU3_VISION_TOKENIZER --out=STORES/spatial

The name after the colon is a row of ``univla_jax/data/datasets.py``: it says how the files are read
and at which size each camera is tokenized. ``libero`` and ``calvin`` are stored with a randomly
shifted copy of each episode, as the reference trains on; the world model's corpora keep episodes of
at least six frames at their spacing.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from univla_jax.config import complete
from univla_jax.data.datasets import find_dataset_config
from univla_jax.data.tokenize import TokenizeConfig
from univla_jax.errors import UserError

POLICIES = {"libero": 10, "calvin": 10, "bridge": 5, "aloha": 20}  # steps of an action chunk
SHIFTED = ("libero", "calvin")
WORLD_MODEL_FRAMES = 6


def get_config(corpus: str = "") -> ConfigDict:
    """How one corpus is tokenized.

    Raises:
      UserError: no corpus of that name.
    """
    if not corpus:
        raise UserError("config: name a corpus after a colon, such as configs/tokens.py:libero")
    row = find_dataset_config(corpus)
    values = {
        "corpus": corpus,
        "splits": {"train": "train"},
        "image_specs": {view: {"size": size} for view, size in row.image_sizes.items()},
        "min_frames": POLICIES.get(corpus, WORLD_MODEL_FRAMES * row.frame_spacing),
        "augmented_copies": int(corpus in SHIFTED),
    }
    return complete(TokenizeConfig, values)
