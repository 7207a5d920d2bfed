from __future__ import annotations

import pytest

from tests.decoders import parameter_count
from univla_jax.errors import UserError
from univla_jax.models import decoder_config
from univla_jax.models.decoder_config import PRESETS, preset


def test_sizes_of_the_presets():
    millions = {name: parameter_count(config) / 1e6 for name, config in PRESETS.items()}
    assert 1.0 < millions["quickstart"] < 1.3
    assert millions["tiny"] < 0.1
    assert 8492 < millions["emu3_8b"] < 8493


@pytest.mark.parametrize(
    ("size", "multiple", "rows"), [(600, 256, 768), (512, 256, 512), (5, 1, 5)]
)
def test_vocabulary_padding(size, multiple, rows):
    config = preset("tiny", vocab_size=size, vocab_pad_multiple=multiple)
    assert config.padded_vocab_size == rows


def test_full_vocabulary_divides_over_a_mesh():
    assert preset("emu3_8b").padded_vocab_size % 256 == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads: 3 is not a divisor of num_heads=4"),
        ({"head_dim": 7}, "head_dim: 7 is not an even number"),
        ({"dropout": 1.0}, "dropout: 1.0 is not a rate"),
        ({"dtype": "float8"}, "dtype: 'float8' is not one of"),
        ({"attention": "flash9"}, "attention: 'flash9' is not one of"),
        ({"pad_id": 512}, "pad_id: 512 is not an id below vocab_size=512"),
        ({"remat": "most"}, "remat: unknown preset 'most'"),
        ({"num_layers": 0}, "num_layers: 0 is not a positive number"),
        ({"hidden": 5}, "hidden: unknown key"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        preset("tiny", **changes)


def test_unknown_preset():
    with pytest.raises(UserError, match="'huge' is unknown; known: tiny"):
        preset("huge")


def test_remat_presets_name_known_tensors():
    assert all(
        set(names) <= set(decoder_config.REMAT_NAMES)
        for names in decoder_config.REMAT_PRESETS.values()
    )
