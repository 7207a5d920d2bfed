"""Studies: shares of demonstrations, paired statistics, and a whole one in miniature."""

from __future__ import annotations

import dataclasses
import json
import runpy

import numpy as np
import pytest

from tests.conftest import REPOSITORY
from tests.training import tiny_run
from univla_jax import io
from univla_jax.config import build_config
from univla_jax.data.token_store import TokenStore
from univla_jax.errors import UserError
from univla_jax.evaluation import study_runs
from univla_jax.evaluation.closed_loop import EvaluateConfig
from univla_jax.evaluation.study_runs import Arm, StudyConfig, run_study, summarize, write_share
from univla_jax.pipeline.data_config import DataConfig
from univla_jax.tokenizers.vision import VisionTokenizer
from univla_jax.training.train_config import EvaluationConfig, ModelConfig, TrainConfig

RECIPES = runpy.run_path(str(REPOSITORY / "configs" / "study.py"))
DATA = DataConfig(sequence_length=192, batch_size=2, chunk_size=3, task="policy_video")
POLICY = TrainConfig(
    total_steps=2,
    model=ModelConfig(preset="tiny"),
    data=DATA,
    evaluation=EvaluationConfig(every=2, batches=1, stores=("val",)),
)
POST = dataclasses.replace(
    POLICY,
    data=dataclasses.replace(DATA, task="world_model", views=("image",), frames=2, frame_spacing=2),
)
EVALUATE = EvaluateConfig(
    episodes=5, max_steps=4, batch=5, conditions=("policy",), video_episodes=0
)
ARMS = (Arm("none", post_trained=False), Arm("world_model"))
CONFIG = StudyConfig(POST, POLICY, EVALUATE, ARMS, seeds=(0,), demonstrations=(0.5,))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Tokenizers and stores, as the quickstart leaves them."""
    folder = tmp_path_factory.mktemp("quickstart")
    tiny_run.make_tokenizers(folder / "tokenizers")
    vision = VisionTokenizer.load(folder / "tokenizers" / "vision").fingerprint
    for seed, split in enumerate(("train", "val")):
        tiny_run.make_store(folder / "tokens" / split, vision, seed=seed)
    return folder


@pytest.mark.slow
def test_a_study_trains_pairs_and_goes_on_where_it_was_killed(workdir, tmp_path, monkeypatch):
    trained, train = [], study_runs.train

    def counted(config, folder, **options):
        if len(trained) == 2 and "killed" not in trained:
            trained.append("killed")
            raise KeyboardInterrupt
        trained.append(str(folder))
        train(config, folder, **options)

    monkeypatch.setattr(study_runs, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        run_study(CONFIG, workdir, tmp_path, progress=False)
    assert io.read_json(tmp_path / "study.json")["rows"][0]["arm"] == "none"
    report = run_study(CONFIG, workdir, tmp_path, progress=False)
    assert [row["arm"] for row in report["rows"]] == ["none", "world_model"]
    assert report["rows"][1]["seeds"] == 1 and report["rows"][1]["episodes"] == 5
    assert "difference" in report["rows"][1] and (tmp_path / "study.png").exists()
    assert "world model" in study_runs.table(report)
    saved = json.loads((tmp_path / "policies" / "world_model_50_100_0" / "config.json").read_text())
    assert "post" in saved["init_from"] and saved["data"]["stores"][0].endswith("stores/50_0")
    assert len(TokenStore(tmp_path / "stores" / "50_0")) == 6
    assert io.read_json(tmp_path / "study.json") == report
    with pytest.raises(UserError, match="seeds"):
        run_study(dataclasses.replace(CONFIG, seeds=(1,)), workdir, tmp_path, progress=False)


@pytest.mark.slow
def test_a_share_holds_the_smaller_one(workdir, tmp_path):
    source = TokenStore(workdir / "tokens" / "train")
    names = {}
    for share, seed in ((0.25, 0), (0.5, 0), (0.5, 1)):
        out = tmp_path / f"{share}_{seed}"
        write_share(source, share, seed, io.absolute_path(out))
        write_share(source, share, seed, io.absolute_path(out))  # finished: nothing to do
        names[share, seed] = [episode.episode_id for episode in TokenStore(out)]
    assert names[0.25, 0] == names[0.5, 0][:3] and len(set(names[0.5, 0])) == 6
    assert names[0.5, 0] != names[0.5, 1]
    with pytest.raises(UserError, match=r"0.01 of 12 episodes is none"):
        write_share(source, 0.01, 0, io.absolute_path(tmp_path / "none"))


def test_arms_are_compared_on_the_same_episodes_and_seeds(tmp_path):
    config = dataclasses.replace(CONFIG, seeds=(0, 1))
    # 40 episodes: none solves the first ten; the world model also ten more, and of seed 1 twenty.
    solved = {("none", 0): 10, ("none", 1): 10, ("world_model", 0): 20, ("world_model", 1): 30}
    for run in config.runs():
        folder = tmp_path / "evaluations" / run.title
        folder.mkdir(parents=True)
        records = [
            {
                "condition": "policy",
                "number": n % 5,
                "trial": n // 5,
                "success": 8 * (n % 5) + n // 5 < solved[run.arm.name, run.seed],
            }
            for n in np.random.default_rng(run.seed).permutation(40).tolist()
        ]
        (folder / "episodes.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    report = summarize(config, io.absolute_path(tmp_path), config.runs())
    none, other = report["rows"]
    assert none["success"]["mean"] == 0.25 and "difference" not in none
    assert other["success_by_seed"] == [0.5, 0.75] and other["difference"]["mean"] == 0.375
    assert other["difference"]["low"] > 0.1 and other["p_value"] < 1e-6
    # Where one seed alone differs, another seed might not: the interval says so.
    assert other["difference"]["high"] - other["difference"]["low"] > 0.25
    partial = summarize(config, io.absolute_path(tmp_path), config.runs()[:1])
    assert [row["arm"] for row in partial["rows"]] == ["none"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [study.__name__ for study in RECIPES["STUDIES"]])
def test_every_recipe_is_a_study(name):
    config = build_config(StudyConfig, RECIPES["get_config"](name).to_dict())
    assert len({run.title for run in config.runs()}) == len(config.runs())
    assert config.evaluate.episodes == 300 and len(config.seeds) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ARMS[:1]}, "at least two arms"),
        ({"arms": (*ARMS, Arm("a b"))}, "letters, digits"),
        ({"arms": (*ARMS, Arm("x", False, {"seed": 1}))}, "is not post_trained"),
        ({"arms": (*ARMS, Arm("x", policy={"data": {"chunks": 1}}))}, r"x.policy.data.chunks"),
        ({"seeds": (1, 1)}, "config.seeds"),
        ({"demonstrations": (0.0,)}, "config.demonstrations"),
        ({"steps": (1.5,)}, "config.steps"),
    ],
)
def test_what_cannot_be_compared_is_said(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **changes)
