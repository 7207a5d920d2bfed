"""The READMEs: their examples run as written, their links and paths lead somewhere."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.conftest import REPOSITORY
from univla_jax.config import build_config
from univla_jax.data import datasets
from univla_jax.data.rlds_writer import write_rlds
from univla_jax.data.token_store import TokenStore
from univla_jax.data.tokenize import TokenizeConfig, tokenize
from univla_jax.episode import Episode
from univla_jax.tokenizers.vision import VisionTokenizer

BEFORE = REPOSITORY / "tests" / "fixtures" / "before"
READMES = sorted(
    path
    for path in REPOSITORY.rglob("README.md")
    if not {".venv", "fixtures", "build"} & set(path.relative_to(REPOSITORY).parts)
)


def block(heading, language="python"):
    """The code block under a heading of the README."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)[1]


@pytest.fixture
def quickstart(tmp_path, monkeypatch):
    """Makes a tiny ``quickstart/unified`` of what the test needs; the working directory."""

    def make(stage):
        shutil.copytree(BEFORE / stage, tmp_path / "quickstart" / "unified")

    monkeypatch.chdir(tmp_path)
    return make


def test_it_is_short():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 150
    for heading in ("Load a checkpoint and act", "Imagine"):
        assert len([line for line in block(heading).splitlines() if line]) <= 8


def test_its_policy_acts(quickstart):
    quickstart("policy")
    names = {}
    exec(block("Load a checkpoint and act"), names)
    chunk = names["chunk"]
    assert chunk.valid and chunk.actions.shape == (5, 7) and chunk.actions.dtype == np.float32


def test_its_world_model_imagines(quickstart):
    quickstart("world_model")
    Image.fromarray(np.full((48, 48, 3), 128, np.uint8)).save("table.png")
    exec(block("Imagine"), {})
    assert Image.open("imagined.png").size == (3 * 32, 32)


def test_its_dataset_is_tokenized_without_losing_an_episode(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "DATASETS", dict(datasets.DATASETS))
    names = {}
    exec(block("Bring your own data"), names)
    lengths = (12, 25, 40)
    episodes = [_episode(steps, seed) for seed, steps in enumerate(lengths)]
    source = write_rlds(tmp_path, "my_robot", "1.0.0", {"train": episodes})
    config = build_config(TokenizeConfig, names["get_config"]("my_robot").to_dict())
    vision = VisionTokenizer.load(BEFORE / "tokenizers" / "vision")
    tokenize(config, source, tmp_path / "tokens", vision)
    store = TokenStore(tmp_path / "tokens" / "train")
    assert sorted(len(episode.actions) for episode in store) == sorted(lengths)
    assert store[0].codes["image"].shape[1:] == (32, 32)
    assert store[0].codes["wrist_image"].shape[1:] == (16, 16)


def _episode(steps, seed):
    rng = np.random.default_rng(seed)
    frames = {
        view: rng.integers(0, 256, (steps, side, side, 3), np.uint8)
        for view, side in (("image", 64), ("wrist_image", 32))
    }
    actions = rng.uniform(-1, 1, (steps, 7)).astype(np.float32)
    state = np.zeros((steps, 8), np.float32)
    return Episode("push the cup", frames, actions, 10.0, "my_robot", f"{seed}", state=state)


every_readme = pytest.mark.parametrize(
    "path", READMES, ids=lambda path: str(path.relative_to(REPOSITORY))
)
PATHS = [f"/{path}" for path in REPOSITORY.rglob("*.*") if ".venv" not in path.parts]
SHARED_FLAGS = (
    "cli.py",
    "inference/sampling.py",
    "training/distributed.py",
    "benchmarks/harness.py",
)


@every_readme
def test_links_and_files_exist(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (path.parent / target).exists(), target
    for file in re.findall(r"[`= ]([\w/]+\.(?:py|sh|yaml))(?=[`:\s])", text):
        to_write = "my_" in file or "NAME" in file  # by the reader
        assert to_write or any(known.endswith(f"/{file}") for known in PATHS), file


@every_readme
def test_commands_and_their_flags_exist(path):
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    for module, arguments in re.findall(
        r"python -m ((?:univla_jax|tests)[\w.]*)([^\n`|#&]*)", text
    ):
        file = REPOSITORY / (module.replace(".", "/") + ".py")
        assert file.exists(), module
        sources = [file, *(REPOSITORY / "univla_jax" / name for name in SHARED_FLAGS)]
        defined = "".join(source.read_text(encoding="utf-8") for source in sources)
        for flag in re.findall(r"--(\w+)(?![\w.])", arguments):
            assert f'"{flag}"' in defined or f'"--{flag}"' in defined, f"{module} --{flag}"


def test_the_map_lists_every_module():
    package = REPOSITORY / "univla_jax"
    rooms = (package / "README.md").read_text(encoding="utf-8").split("## Every module")[1]
    listed = re.findall(r"^\| `([\w/]+\.py)` \| \S", rooms, re.MULTILINE)
    names = sorted(path.name for path in package.rglob("*.py") if path.name != "__init__.py")
    assert sorted(name.rsplit("/")[-1] for name in listed if "__init__" not in name) == names


@pytest.mark.parametrize("room", ["data", "serving"])
def test_a_room_lists_its_modules(room):
    folder = REPOSITORY / "univla_jax" / room
    text = (folder / "README.md").read_text(encoding="utf-8")
    for path in folder.glob("*.py"):
        assert path.name == "__init__.py" or f"`{path.name}`" in text, path.name
