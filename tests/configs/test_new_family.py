"""The recipe that adapts a policy to a family it has never seen."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import pytest

from tests.configs.test_quickstart import recipe
from tests.training import tiny_run
from univla_jax.assets import Assets
from univla_jax.checkpoints import assets_folder, find_checkpoint
from univla_jax.config import build_config
from univla_jax.evaluation.closed_loop import EvaluateConfig, evaluate
from univla_jax.models.action_expert import params_init
from univla_jax.models.decoder import Decoder
from univla_jax.models.decoder_config import preset
from univla_jax.models.lora import is_adapter
from univla_jax.simulators.tabletop.tabletop_env import FAMILIES
from univla_jax.simulators.tabletop.tabletop_expert import DemonstrationsConfig
from univla_jax.tokenizers.vision import VisionTokenizer
from univla_jax.training.train_config import TrainConfig
from univla_jax.training.train_loop import train

RECIPE = recipe("new_family")
KINDS = ("known", "new")


def test_the_new_family_is_in_no_demonstration_of_the_known_ones():
    shown, seeds, scored = {}, {}, {}
    for kind in KINDS:
        made = build_config(DemonstrationsConfig, RECIPE(f"demonstrations_{kind}").to_dict())
        shown[kind] = set(made.families)
        seeds[kind] = {seed for split in made.seeds().values() for seed in split}
        scored[kind] = {FAMILIES[number] for number in RECIPE(f"evaluate_{kind}").tasks}
    assert (
        shown == scored and not shown["known"] & shown["new"] and not seeds["known"] & seeds["new"]
    )
    assert shown["known"] | shown["new"] == set(FAMILIES)


def test_adapters_are_less_than_a_twentieth_and_learn_what_the_others_learn():
    full, lora = (
        build_config(TrainConfig, {**RECIPE(name).to_dict(), "init_from": "policy"})
        for name in ("full", "lora")
    )
    same = ("total_steps", "data", "tokenizers", "seed")
    assert all(getattr(full, name) == getattr(lora, name) for name in same)
    config = dataclasses.replace(preset("quickstart"), lora=lora.model.lora)
    shapes = nn.unbox(jax.eval_shape(params_init(Decoder(config)), jax.random.key(0)))
    flat = jax.tree_util.tree_leaves_with_path(shapes)
    sizes = {jax.tree_util.keystr(path, simple=True, separator="/"): x.size for path, x in flat}
    adapters = sum(size for name, size in sizes.items() if is_adapter(name))
    assert 0.02 < adapters / (sum(sizes.values()) - adapters) < 0.05


@pytest.mark.slow
def test_the_recipe_in_small(tmp_path, compilation_cache):
    """A policy, adapters beside it on another store, and both acting in the simulator."""
    world, new = tiny_run.make_world(tmp_path), tmp_path / "new"
    tiny_run.make_store(new, VisionTokenizer.load(world / "vision").fingerprint, seed=5)
    tokenizers = {name: str(world / name) for name in ("text", "vision", "action")}
    small = {"total_steps": 2, "model.preset": "tiny", "evaluation.every": 0, "log_every": 1}
    small |= {"data.sequence_length": 256, "data.chunk_size": 3, "data.batch_size": 4}

    def run(stage, stores, **more):
        config = RECIPE(stage)
        config.update_from_flattened_dict({**small, "data.stores": stores})
        config.update(more)
        train(build_config(TrainConfig, config.to_dict()), tmp_path / stage, progress=False)
        return Assets.load(assets_folder(find_checkpoint(tmp_path / stage)))

    known = (str(world / "store"),)
    policy = run("policy", known, tokenizers=tokenizers)
    adapted = run("lora", (str(new), *known), init_from=str(tmp_path / "policy"))
    assert adapted.statistics == policy.statistics and adapted.adapter["lora"]["rank"]
    config = RECIPE("evaluate_new")
    config.update({"episodes": 2, "batch": 2, "max_steps": 4, "video_episodes": 0})
    config = build_config(EvaluateConfig, config.to_dict())
    report = evaluate(config, tmp_path / "lora", tmp_path / "score", progress=False)
    assert [task["task"] for task in report["conditions"]["policy"]["tasks"]] == ["push"]
