import pytest

from configs import tokens
from univla_jax.config import build_config
from univla_jax.data.datasets import DATASETS
from univla_jax.data.tokenize import TokenizeConfig
from univla_jax.errors import UserError

EMBEDDED = {"tabletop", "road"}  # their recipes give the sizes


@pytest.mark.parametrize("corpus", sorted(set(DATASETS) - EMBEDDED))
def test_every_dataset_has_a_recipe(corpus):
    config = build_config(TokenizeConfig, tokens.get_config(corpus).to_dict())
    dataset, specs = config.resolve()
    assert {view: spec.size for view, spec in specs.items()} == DATASETS[corpus].image_sizes
    pictures = dataset.reader == "grounding"  # each an episode by itself
    assert dataset.min_frames >= (1 if pictures else 5)


def test_published_settings():
    libero = tokens.get_config("libero")
    assert (libero.min_frames, libero.augmented_copies) == (10, 1)
    assert tokens.get_config("droid").min_frames == 90
    assert {name: tokens.get_config(name).min_frames for name in ("calvin", "bridge", "aloha")} == {
        "calvin": 10,
        "bridge": 5,
        "aloha": 20,
    }
    with pytest.raises(UserError, match="name a dataset after a colon"):
        tokens.get_config()
