"""What was trained or fitted here, as model folders of the reference."""

from __future__ import annotations

import json

import flax.traverse_util
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.inference import tiny_checkpoint
from tests.interop.state_dicts import import_state
from tests.training import tiny_run
from univla_jax.assets import Assets
from univla_jax.checkpoints import find_checkpoint, load_params
from univla_jax.interop.from_hf import from_hf
from univla_jax.interop.hf_assets import ConvertConfig
from univla_jax.interop.hf_weights import HfModel
from univla_jax.interop.to_hf import to_hf
from univla_jax.tokenizers.vision import VisionTokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return tiny_checkpoint.save(folder / "run", tiny_checkpoint.make_assets(bins=True))


def test_a_model_trained_here_gets_the_references_names(trained, tmp_path):
    to_hf(trained, tmp_path / "hub", progress=False)
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    state = load_file(tmp_path / "hub" / "model.safetensors")
    model = HfModel.from_config(config, state)
    params = import_state(model.state_rules, state)
    step = find_checkpoint(trained)
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    tables = {name: np.zeros((384, 32)) for name in ("embedding", "head")}  # padded to 128
    template |= {k: jax.ShapeDtypeStruct(v.shape, np.float32) for k, v in tables.items()}
    for path, ours in flax.traverse_util.flatten_dict(load_params(step, template)).items():
        rows = config["vocab_size"] if path[-1] in tables else None
        theirs = flax.traverse_util.flatten_dict(params)[path]
        np.testing.assert_array_equal(ours[:rows], theirs[:rows])
    vocabulary = Assets.load(step / "assets").vocabulary
    assert config["bov_token_id"] == vocabulary.bov and config["vocab_size"] == vocabulary.size
    assert {p.name for p in (tmp_path / "hub").iterdir()} > {"sentencepiece.model"}


def test_another_dtype_on_the_way_out(trained, tmp_path):
    to_hf(trained, tmp_path / "hub", dtype="bfloat16", progress=False)
    to_hf(trained, tmp_path / "full", progress=False)
    for key, value in load_file(tmp_path / "hub" / "model.safetensors").items():
        whole = load_file(tmp_path / "full" / "model.safetensors")[key]
        np.testing.assert_array_equal(value, whole.astype(value.dtype))
        assert value.dtype.name == "bfloat16"


def test_a_vision_tokenizer_fitted_here_goes_out_and_comes_back(tmp_path):
    tiny_run.make_tokenizers(tmp_path / "fitted")
    to_hf(tmp_path / "fitted" / "vision", tmp_path / "hub", progress=False)
    from_hf(tmp_path / "hub", tmp_path / "ours", ConvertConfig(), progress=False)
    prints = {VisionTokenizer.load(tmp_path / p).fingerprint for p in ("ours", "fitted/vision")}
    assert len(prints) == 1
