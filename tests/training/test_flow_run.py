"""Training an action expert: from its config to a policy that acts, on top of earlier stages."""

from __future__ import annotations

import json
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.configs.test_quickstart import recipe
from tests.interop.state_dicts import import_state
from tests.training import tiny_run
from univla_jax import io
from univla_jax.assets import Assets
from univla_jax.checkpoints import assets_folder, find_checkpoint, load_params
from univla_jax.config import build_config
from univla_jax.episode import Observation
from univla_jax.errors import UserError
from univla_jax.inference.policy import Policy
from univla_jax.interop.hf_conversion import to_hf
from univla_jax.interop.hf_weights import HfModel, check_params, joint_rules
from univla_jax.tokenizers.vocabulary import Vocabulary
from univla_jax.training import metrics, train_loop
from univla_jax.training.model_setup import TrainSetup
from univla_jax.training.sharding import MeshConfig, make_mesh
from univla_jax.training.train_config import TrainConfig

pytestmark = pytest.mark.usefixtures("compilation_cache")
FLOW = {"data__task": "policy_flow", "data__frames": 1, "data__packing": False}
EXPERT = {"num_layers": 1, "mlp_size": 16}


def _config(world: pathlib.Path, **changes):
    settings = {**FLOW, "model__action_expert": EXPERT, "evaluation__every": 3, **changes}
    return tiny_run.config(world, **settings)


@pytest.fixture(scope="module")
def flow(world, tmp_path_factory):
    """The folder of a run that trained decoder and expert."""
    folder = tmp_path_factory.mktemp("runs") / "flow"
    train_loop.train(_config(world, total_steps=12), folder, progress=False)
    return folder


def _model(config: TrainConfig, checkpoint: pathlib.Path) -> TrainSetup:
    vocabulary = Assets.load(assets_folder(checkpoint)).vocabulary
    return TrainSetup.build(config, vocabulary, make_mesh(MeshConfig()))


@pytest.mark.slow
def test_the_flow_is_learnt_and_measured(flow):
    lines = io.read_jsonl(flow / metrics.METRICS_FILE)
    held_out = [line["eval/flow_mse"] for line in lines if "eval/flow_mse" in line]
    assert len(held_out) == 4 and held_out[-1] < held_out[0]
    assert all(line["loss"] > line["flow_mse"] > 0 for line in lines if "loss" in line)


@pytest.mark.slow
def test_what_was_trained_acts(flow):
    policy = Policy.load(flow)
    rng = np.random.default_rng(0)
    seen = [
        Observation(
            words,
            {v: rng.integers(0, 256, (64, 64, 3), np.uint8) for v in ("image", "wrist_image")},
        )
        for words in tiny_run.WORDS
    ]
    sessions = [policy.start(seed) for seed in range(3)]
    for _ in range(2):
        chunks = policy.act(seen, sessions)
        assert all(chunk.valid and chunk.actions.shape == (3, 7) for chunk in chunks)
    assert Policy.load(flow, untrained=True).act(seen[:1], [policy.start()])[0].valid


@pytest.mark.slow
def test_it_goes_to_the_hub_in_the_references_names(flow, tmp_path):
    checkpoint = find_checkpoint(flow)
    to_hf(checkpoint, tmp_path / "hub", progress=False)
    run_model = _model(_config(flow), checkpoint)
    params = load_params(checkpoint, run_model.abstract.params)
    config = json.loads((tmp_path / "hub" / "config.json").read_text(encoding="utf-8"))
    written = HfModel.from_config(config, ())
    assert written.expert == run_model.expert.config
    state = load_file(tmp_path / "hub" / "model.safetensors")
    rules = joint_rules(written.expert, run_model.model.config)
    jax.tree.map(np.testing.assert_array_equal, import_state(rules, state), params)


@pytest.mark.slow
def test_stages_take_over_what_they_share(world, flow, tmp_path):
    """From a token policy to the flow's, whose expert starts anew; from flow to flow; and back."""
    tokens = tmp_path / "tokens"
    train_loop.train(tiny_run.config(world, total_steps=1), tokens, progress=False)
    earlier, joint = find_checkpoint(tokens), find_checkpoint(flow)
    model, plain = _model(_config(world), joint), _model(tiny_run.config(world), joint)
    whole = load_params(joint, model.abstract.params)
    jax.tree.map(np.testing.assert_array_equal, model.earlier_params(joint), whole)
    decoder = plain.earlier_params(joint)
    jax.tree.map(np.testing.assert_array_equal, decoder, whole["decoder"])
    begun = model.earlier_params(earlier)
    before = load_params(earlier, plain.abstract.params)
    jax.tree.map(np.testing.assert_array_equal, begun["decoder"], before)
    fresh = model.new_state().params["action_expert"]
    jax.tree.map(np.testing.assert_array_equal, begun["action_expert"], fresh)


def test_what_does_not_do_is_named(world, tmp_path):
    with pytest.raises(UserError, match="'policy_video' has no action expert"):
        tiny_run.config(world, model__action_expert=EXPERT)
    with pytest.raises(UserError, match=r"expert makes 5 dimensions.*'tabletop' have 7"):
        train_loop.train(_config(world, model__action_expert={"action_dim": 5}), tmp_path / "run")
    with pytest.raises(UserError, match=r"model\.action_expert\.layers: unknown key"):
        train_loop.train(_config(world, model__action_expert={"layers": 5}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_full_size_recipe_has_the_references_expert(golden_dir):
    config = build_config(TrainConfig, recipe("libero")("flow").to_dict())
    model = TrainSetup.build(config, Vocabulary.emu3(), make_mesh(MeshConfig()))
    rules = joint_rules(model.expert.config, model.model.config)
    check_params(rules, model.abstract.params)
    names = json.loads((golden_dir / "full_size_keys.json").read_text(encoding="utf-8"))
    theirs = {**names["moe"], **names["moe_action_experts_extra"]}
    assert {rule.key: list(rule.shape) for rule in rules} == {k: v[1] for k, v in theirs.items()}
