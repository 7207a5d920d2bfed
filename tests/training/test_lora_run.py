"""Adapters trained beside a frozen base: small checkpoints, acting, exporting, what is refused."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.training import tiny_run
from univla_jax import checkpoints
from univla_jax.errors import UserError
from univla_jax.inference.loaded_model import LoadedModel
from univla_jax.interop.hf_conversion import to_hf
from univla_jax.interop.hf_weights import decoder_rules, export_state
from univla_jax.models.lora import is_adapter
from univla_jax.training.model_setup import TrainSetup
from univla_jax.training.train_config import ModelConfig
from univla_jax.training.train_loop import train

RANK = {"rank": 2, "targets": "attention/query|mlp/up|head", "rows": "action"}


def setup(world, **lora):
    from univla_jax.tokenizers.vocabulary import Vocabulary

    config = tiny_run.config(world, model__lora=lora)
    return TrainSetup.on_devices(config, Vocabulary.from_scratch(40, 30, 20), jax.devices()[:1])


def test_a_run_without_a_base_is_refused(world, tmp_path):
    with pytest.raises(UserError, match=r"adapts a trained model; name it in config\.init_from"):
        train(tiny_run.config(world, model__lora=RANK), tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_an_expression_that_matches_nothing(world):
    with pytest.raises(UserError, match="'atention' matches no matrix; they are stack/layers/"):
        setup(world, rank=2, targets="atention")


def test_a_quantized_base_without_qwix(world, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "qwix", None)
    with pytest.raises(UserError, match="need the package qwix: pip install"):
        setup(world, rank=2, base="int8")


def test_only_adapters_have_a_state_and_are_saved(world):
    made = setup(world, **RANK, dropout=0.1)
    saved = made.saved_part(made.abstract)
    names = {
        jax.tree_util.keystr(p, simple=True, separator="/")
        for p, _ in jax.tree_util.tree_leaves_with_path(saved.params)
    }
    assert names and all(is_adapter(name) for name in names)
    moments = jax.tree.leaves(made.abstract.opt_state[1].mu)
    assert sum(x.size for x in moments) == sum(x.size for x in jax.tree.leaves(saved.params))
    assert made.model.config.param_dtype == made.model.config.dtype


@pytest.mark.slow
@pytest.mark.parametrize("base", ["", "int4"])
def test_an_adapter_acts_as_its_export_does(world, tmp_path, compilation_cache, base):
    """Trained, resumed, merged for acting and merged into a model folder: the same weights."""
    lora = {**RANK, "base": base}
    train(tiny_run.config(world, total_steps=2), tmp_path / "base", progress=False)
    options = {"init_from": str(tmp_path / "base"), "model__lora": lora}
    folder = tmp_path / "adapter"
    for steps in (2, 3):
        train(tiny_run.config(world, total_steps=steps, **options), folder, progress=False)
    shapes = checkpoints.saved_shapes(checkpoints.find_checkpoint(folder))
    assert all(is_adapter(name) for name in shapes if name.startswith("params/"))
    model = LoadedModel.from_checkpoint(folder)
    plain = LoadedModel.from_checkpoint(tmp_path / "base")
    differs = jax.tree.map(lambda a, b: bool((a != b).any()), model.params, plain.params)
    layers = differs["stack"]["layers"]
    assert layers["mlp"]["up"]["kernel"] and differs["head"] and differs["embedding"]
    assert layers["mlp"]["gate"]["kernel"] == bool(base)  # rounded as in training
    to_hf(folder, tmp_path / "hf", progress=False)
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    for name, x in export_state(decoder_rules(model.model.config), model.params).items():
        np.testing.assert_allclose(exported[name], x, atol=1e-6)
    with pytest.raises(UserError, match="is an adapter; merge it"):
        nested = options | {"init_from": str(folder)}
        train(tiny_run.config(world, **nested), tmp_path / "nested", progress=False)


@pytest.mark.slow
def test_averages_act_are_exported_and_survive_a_resume(world, tmp_path, compilation_cache):
    options = {"optimizer__ema_decay": 0.5, "optimizer__freeze": ("embedding",)}
    for steps in (2, 3):
        train(
            tiny_run.config(world, total_steps=steps, **options), tmp_path / "run", progress=False
        )
    model = LoadedModel.from_checkpoint(tmp_path / "run")
    folder = checkpoints.find_checkpoint(tmp_path / "run")
    saved = checkpoints.saved_arrays(folder)
    read = checkpoints.load_arrays(
        folder,
        checkpoints.nested(
            {n: x for n, x in saved.items() if n.startswith(("params/", "opt_state/ema/"))}
        ),
    )
    np.testing.assert_array_equal(model.params["head"], read["opt_state"]["ema"]["head"])
    assert (np.asarray(model.params["head"]) != np.asarray(read["params"]["head"])).any()
    np.testing.assert_array_equal(model.params["embedding"], read["params"]["embedding"])
    last = LoadedModel.from_checkpoint(tmp_path / "run", averaged=False)
    jax.tree.map(np.testing.assert_array_equal, last.params, read["params"])
    to_hf(tmp_path / "run", tmp_path / "hf", progress=False)
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    for name, x in export_state(decoder_rules(model.model.config), model.params).items():
        np.testing.assert_array_equal(exported[name], x)


def test_old_configs_have_no_adapters():
    assert not ModelConfig("tiny").lora.enabled
