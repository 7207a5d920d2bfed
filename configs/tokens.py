"""Token stores of every dataset, at the sizes of the published recipes.

    python -m univla_jax.tokenize_dataset --config=configs/tokens.py:libero \\
        --source=LIBERO_SPATIAL_RLDS --vision=EMU3_VISION_TOKENIZER --out=STORES/spatial

The name after the colon is one of ``univla_jax/data/datasets.py``, where it says how the files are
read and at which size each camera is tokenized; or one that you registered: a config file of your
own may call ``register_dataset(DatasetConfig(...))`` and import ``get_config`` from here.

Episodes of at least ``DatasetConfig.min_frames`` are kept, the steps of an action chunk. Datasets
that were published for the world model alone need six frames at their spacing. ``libero`` and
``calvin`` are stored with a randomly shifted copy of each episode, as the reference trains on.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from univla_jax.config import complete
from univla_jax.data.datasets import find_dataset_config
from univla_jax.data.tokenize import TokenizeConfig
from univla_jax.errors import UserError

# The published recipes; a dataset that is not named here is stored once, from a chunk's length on.
SHIFTED = ("libero", "calvin")
SPLITS = {"navsim": {"train": "navtrain", "val": "navtest"}}
WORLD_MODEL_FRAMES = 6
WORLD_MODEL_ONLY = (
    "fractal",
    "droid",
    "toto",
    "taco_play",
    "fmb",
    "maniskill",
    "kuka",
    "berkeley_autolab_ur5",
    "cmu_play_fusion",
    "viola",
    "utaustin_mutex",
    "something_something",
    "1x",
)


def get_config(corpus: str = "") -> ConfigDict:
    """How one dataset is tokenized.

    Raises:
      UserError: no dataset of that name.
    """
    if not corpus:
        raise UserError("config: name a dataset after a colon, such as configs/tokens.py:libero")
    dataset, min_frames = find_dataset_config(corpus), None
    if corpus in WORLD_MODEL_ONLY:
        min_frames = WORLD_MODEL_FRAMES * dataset.frame_spacing
    values = {
        "corpus": corpus,
        "splits": SPLITS.get(corpus, {"train": "train"}),
        "image_specs": {view: {"size": size} for view, size in dataset.image_sizes.items()},
        "min_frames": min_frames or dataset.min_frames,
        "augmented_copies": int(corpus in SHIFTED),
    }
    return complete(TokenizeConfig, values)
