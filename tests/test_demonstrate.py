"""The command that writes demonstrations."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
from tests.data.episodes import assert_same
from univla_jax.data.datasets import find_dataset_config
from univla_jax.data.rlds import RldsReader
from univla_jax.errors import UserError
from univla_jax.simulators.libero.libero_demonstrations import LiberoDemonstrationsConfig
from univla_jax.simulators.tabletop import tabletop_expert

CONFIG = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict({"train_episodes": 2, "val_episodes": 1, "first_seed": 40})
"""


def test_demonstrations_read_back_with_disjoint_seeds(tmp_path):
    config = tabletop_expert.DemonstrationsConfig(train_episodes=2, val_episodes=1, first_seed=40)
    tabletop_expert.write_demonstrations(config, tmp_path)
    read = []
    for split in ("train", "val"):
        read += RldsReader(tmp_path, find_dataset_config("tabletop"), split)
    assert len(read) == 3
    for got, seed in zip(read, tabletop_expert.DEMONSTRATION_SEEDS[40:]):
        assert_same(got, tabletop_expert.demonstrate(seed))
    tabletop_expert.write_demonstrations(config, tmp_path)
    other = tabletop_expert.DemonstrationsConfig(train_episodes=1, val_episodes=1)
    with pytest.raises(UserError, match="holds other demonstrations"):
        tabletop_expert.write_demonstrations(other, tmp_path)


def test_several_processes_write_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(tabletop_expert, "EPISODES_PER_WORKER", 2)
    monkeypatch.setattr(tabletop_expert.os, "sched_getaffinity", lambda process: {0, 1})
    config = tabletop_expert.DemonstrationsConfig(4, 1, families=("touch", "push", "place"))
    tabletop_expert.write_demonstrations(config, tmp_path)
    read = list(RldsReader(tmp_path, find_dataset_config("tabletop"), "train"))
    assert len(read) == 4
    for seed, (got, family) in enumerate(zip(read, ("touch", "push", "place", "touch"))):
        assert_same(got, tabletop_expert.demonstrate(seed, family=family))


@pytest.mark.parametrize(
    "changes", [{"train_episodes": 0}, {"val_episodes": 0}, {"first_seed": -1}]
)
def test_numbers_are_checked(changes):
    values = {"train_episodes": 1, "val_episodes": 1, **changes}
    with pytest.raises(UserError, match="must be at least"):
        tabletop_expert.DemonstrationsConfig(**values)
    with pytest.raises(UserError, match="kept for demonstrations"):
        tabletop_expert.DemonstrationsConfig(train_episodes=10**9, val_episodes=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": (2,)}, "config.tasks: .2,., libero_goal has scripts for 0, 1"),
        ({"suite": "libero_90"}, "libero_90 has scripts for none"),
        ({"val_episodes": 0}, "val_episodes 0 must be at least 1"),
        ({"displacement": -0.1}, "displacement -0.1 at least 0"),
    ],
)
def test_mistakes_in_libero_demonstrations_are_named(changes, message):
    values = {"suite": "libero_goal", "tasks": (7,), "train_episodes": 1, "val_episodes": 1}
    with pytest.raises(UserError, match=message):
        LiberoDemonstrationsConfig(**values | changes)


def test_the_command_runs_and_names_mistakes(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)

    def run(*arguments):
        command = [sys.executable, "-m", "univla_jax.demonstrate", "--config=config.py"]
        environment = dict(os.environ, PYTHONPATH=str(REPOSITORY))
        return subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    done = run("--out=data")
    assert done.returncode == 0, done.stderr
    assert "2 + 1 demonstrations in data/tabletop/1.0.0" in done.stdout
    assert run().stderr.splitlines()[-1].endswith("give --out=..., the folder for the dataset")
    wrong = run("--out=data", "--config.trian_episodes=2")
    assert (wrong.returncode, "did you mean 'train_episodes'?" in wrong.stderr) == (2, True)
