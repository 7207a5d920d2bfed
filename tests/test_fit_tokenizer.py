"""The command that fits tokenizers: three kinds, finished once, resumed to the last bit."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import REPOSITORY
from univla_jax.data.datasets import find_dataset_config
from univla_jax.data.rlds import RldsReader
from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.data.token_store import StoreHeader, TokenStore, TokenStoreWriter
from univla_jax.errors import UserError
from univla_jax.fit_tokenizer import fit_tokenizer
from univla_jax.normalization import ActionStatistics
from univla_jax.simulators.tabletop import tabletop_expert
from univla_jax.tokenizers.action import load_action_tokenizer
from univla_jax.tokenizers.text import load_text_tokenizer
from univla_jax.tokenizers.vision import VisionTokenizer
from univla_jax.training import vision_training
from univla_jax.training.vision_training import FrameBatches

TEXT = {"kind": "text", "corpus": "tabletop", "vocabulary_size": 300}
ACTION = {"kind": "action", "corpus": "tabletop", "chunk_size": 5, "vocabulary_size": 300}
VISION = {
    "kind": "vision",
    "corpus": "tabletop",
    "image_specs": {"wrist_image": {"size": [8, 8], "factor": 2, "min_pixels": 64}},
    "overrides": {
        "codebook_size": 16,
        "ch": 8,
        "ch_mult": [1, 1],
        "num_groups": 4,
    },
    "total_steps": 12,
    "batch_size": 4,
    "loss": {"continuous_steps": 3},
    "checkpoint": {"every": 4},
    "log_every": 1,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rlds")
    config = tabletop_expert.DemonstrationsConfig(train_episodes=6, val_episodes=1)
    return str(tabletop_expert.write_demonstrations(config, folder))


@pytest.fixture(scope="module")
def fitted_vision(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted") / "vision"
    return folder, fit_tokenizer(VISION, source, folder)


def test_text(source, tmp_path, capsys):
    report = fit_tokenizer(TEXT, source, tmp_path)
    tokenizer = load_text_tokenizer(tmp_path)
    assert tokenizer.vocabulary_size == report["vocabulary_size"] <= 300
    for episode in RldsReader(source, find_dataset_config("tabletop"), "train"):
        ids = tokenizer.encode(episode.instruction)
        assert tokenizer.decode(ids) == episode.instruction
    assert fit_tokenizer(TEXT, source, tmp_path) == report
    assert "the text tokenizer is fitted already" in capsys.readouterr().err


def test_action(source, tmp_path):
    report = fit_tokenizer(ACTION, source, tmp_path)
    tokenizer = load_action_tokenizer(tmp_path)
    values = json.loads((tmp_path / "statistics.json").read_text())["tabletop"]
    statistics = ActionStatistics.from_dict(values)
    episodes = list(RldsReader(source, find_dataset_config("tabletop"), "train"))
    assert statistics.count == sum(map(len, episodes))
    assert report["chunks"] == sum(len(e) - 4 for e in episodes)
    chunk = statistics.normalize(episodes[0].actions[:5])
    decoded = tokenizer.decode(tokenizer.encode(chunk), *chunk.shape)
    assert decoded.valid and np.abs(decoded.actions - chunk).max() <= report["max_error"]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Token stores of two corpora, the second with actions of 14 dimensions and two copies."""
    folder = tmp_path_factory.mktemp("stores")
    for corpus, dimensions, copies in (("tabletop", 7, 0), ("aloha", 14, 1)):
        header = StoreHeader(
            corpus=corpus,
            split="train",
            control_hz=5.0,
            source=f"{corpus}:1",
            source_fingerprint="source",
            source_episodes=4,
            episodes_per_shard=4,
            min_frames=8,
            image_specs={"image": {"size": [16, 16]}},
            grids={"image": (2, 2)},
            vision_fingerprint="vision",
            codebook_size=8,
            block_steps=4,
            augmented_copies=copies,
        )
        writer = TokenStoreWriter(folder / corpus, header)
        with writer.shard(0) as shard:
            for number in range(4):
                rng = np.random.default_rng(number)
                actions = rng.uniform(-1, 1, (8 + number, dimensions)).astype(np.float32)
                codes = {"image": np.zeros((8 + number, 2, 2), np.uint16)}
                for copy in range(1 + copies):
                    name, paraphrases = f"{number}+{copy}", ("raise it",) if number else ()
                    words = f"lift block {number}"
                    episode = TokenizedEpisode(words, codes, actions, 5.0, corpus, name)
                    shard.add(dataclasses.replace(episode, paraphrases=paraphrases))
        writer.finish()
    return folder


def test_text_and_actions_of_token_stores_of_several_corpora(stores, tmp_path):
    source = f"{stores / 'tabletop'},{stores / 'aloha'}"
    both = {"corpus": "tabletop,aloha"}
    report = fit_tokenizer(TEXT | both, source, tmp_path / "text")
    assert (report["instructions"], report["distinct_instructions"]) == (2 * (4 + 3), 5)
    report = fit_tokenizer(ACTION | both, source, tmp_path / "action")
    assert report["chunks"] == sum(8 + n - 4 for n in range(4)) * 2
    assert report["max_error"] < 0.2
    tokenizer = load_action_tokenizer(tmp_path / "action")
    assert tokenizer.horizon == 5
    values = json.loads((tmp_path / "action/statistics.json").read_text())
    own = TokenStore(stores / "tabletop").manifest.statistics
    assert ActionStatistics.from_dict(values["tabletop"]) == own
    for corpus, dimensions in (("tabletop", 7), ("aloha", 14)):
        statistics = ActionStatistics.from_dict(values[corpus])
        chunk = statistics.normalize(np.zeros((5, dimensions)))
        decoded = tokenizer.decode(tokenizer.encode(chunk), *chunk.shape)
        assert decoded.valid and np.abs(decoded.actions - chunk).max() < 0.2
    few = fit_tokenizer(ACTION | both | {"max_chunks": 10}, source, tmp_path / "few")
    assert few["chunks"] <= 10
    with pytest.raises(UserError, match="'tabletop', but the stores hold 'aloha,tabletop'"):
        fit_tokenizer(ACTION, source, tmp_path / "other")
    with pytest.raises(UserError, match="no token store"):
        fit_tokenizer(ACTION | both, f"{stores / 'tabletop'},nowhere", tmp_path / "none")


def test_several_datasets_of_one_corpus(source, tmp_path):
    one = fit_tokenizer(ACTION, source, tmp_path / "one")
    two = fit_tokenizer(ACTION, f"{source},{source}", tmp_path / "two")
    assert two["chunks"] == 2 * one["chunks"]
    assert two["max_error"] == pytest.approx(one["max_error"], rel=0.2)
    with pytest.raises(UserError, match="nowhere"):
        fit_tokenizer(ACTION, f"{source},nowhere", tmp_path / "none")


def test_vision(source, fitted_vision, capsys):
    folder, report = fitted_vision
    tokenizer = VisionTokenizer.load(folder)
    assert tokenizer.codebook_size == 16
    assert set(report) == {"psnr", "codes_used", "perplexity"}
    assert report["psnr"].keys() == {"wrist_image"} and 0 < report["codes_used"] <= 1
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(12))
    assert fit_tokenizer(VISION, source, folder) == report
    assert "fitted already" in capsys.readouterr().err


@pytest.mark.slow
def test_interrupted_vision_resumes_to_the_last_bit(source, fitted_vision, tmp_path, monkeypatch):
    whole, _ = fitted_vision
    with monkeypatch.context() as patch:
        patch.setattr(FrameBatches, "__next__", stop_at(10))
        with pytest.raises(KeyboardInterrupt):
            fit_tokenizer(VISION, source, tmp_path)
    with pytest.raises(UserError, match=r"batch_size was 4, is 8"):
        fit_tokenizer(VISION | {"batch_size": 8}, source, tmp_path)
    fit_tokenizer(VISION, source, tmp_path)
    for name in ("params.safetensors", "config.json", "run/metrics.jsonl"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), name


def stop_at(step):
    original = FrameBatches.__next__

    def advance(self):
        if self._next == step:
            raise KeyboardInterrupt
        return original(self)

    return advance


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "texts"}, r"config\.kind: 'texts'; expected one of text, action, vision"),
        (TEXT | {"vocabulary": 3}, "did you mean 'vocabulary_size'"),
        (TEXT | {"split": "test"}, "no split 'test'; it has train, val"),
        (ACTION | {"chunk_size": 0}, "at least one step"),
        (ACTION | {"chunk_size": 10_000}, "the longest episode has"),
        (VISION | {"preset": "quick"}, "'quick' is not one of emu3, quickstart"),
        (VISION | {"image_specs": {"front": {"size": [8, 8], "factor": 2}}}, "min_pixels 6400"),
        (VISION | {"image_specs": {"image": {"factor": 4}}}, "code of 2 pixels a side"),
        (VISION | {"image_specs": {"side": {"factor": 2}}}, "no view 'side'; it has image"),
    ],
)
def test_mistakes_are_named(source, tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        fit_tokenizer(values, source, tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_finished_fit_belongs_to_its_config(source, tmp_path):
    fit_tokenizer(TEXT, source, tmp_path)
    with pytest.raises(UserError, match=r"vocabulary_size was 300, is 310"):
        fit_tokenizer(TEXT | {"vocabulary_size": 310}, source, tmp_path)


def test_the_command(tmp_path):
    code = f"import ml_collections\nget_config = lambda: ml_collections.ConfigDict({TEXT})\n"
    (tmp_path / "config.py").write_text(code)
    command = [sys.executable, "-m", "univla_jax.fit_tokenizer", "--config=config.py"]
    result = subprocess.run(
        [*command, "--source=nowhere", "--workdir=out"],
        cwd=tmp_path,
        env=dict(os.environ, PYTHONPATH=str(REPOSITORY)),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert (
        result.stderr.strip()
        .splitlines()[-1]
        .startswith(f"error: no dataset folder {tmp_path}/nowhere")
    )


def test_report_by_hand():
    class Half:
        codebook_size = 8

        def encode_frames(self, frames):
            return frames[:, ::2, ::2, 0]

        def decode_codes(self, codes):
            return np.repeat(np.repeat(codes, 2, 1), 2, 2)[..., None].repeat(3, -1)

    frames = np.zeros((1, 4, 4, 3), np.uint8)
    frames[0, 0, 0] = 1  # that cell decodes to ones: three of sixteen pixels are wrong by one
    report = vision_training.measure(Half(), {"image": frames})
    assert report["psnr"]["image"] == pytest.approx(10 * np.log10(255**2 * 16 / 3), abs=0.01)
    assert report["codes_used"] == 0.25
    assert report["perplexity"] == pytest.approx(1.8, abs=0.05)  # 1/4 and 3/4: 0.81 bits
