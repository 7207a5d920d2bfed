"""A folder refuses another config, and says why; files with former field names still load."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import pathlib
import time

import pytest
from etils import epath

from univla_jax import io, run_dir
from univla_jax.data.tokenizer_fitting import TextFitConfig
from univla_jax.errors import UserError
from univla_jax.evaluation.closed_loop import EvaluateConfig
from univla_jax.io import json_values
from univla_jax.pipeline.data_config import DataConfig
from univla_jax.training.train_config import LossConfig, ModelConfig, TrainConfig


@dataclasses.dataclass(frozen=True)
class _Inner:
    sizes: tuple[int, ...] = (1, 2)
    threads: int = 1


@dataclasses.dataclass(frozen=True)
class _Config:
    steps: int = 10
    rate: float = 0.1
    data: _Inner = _Inner()


FREE = ("steps", "data.threads")


def test_the_same_config_may_come_back(tmp_path):
    run_dir.check_config(tmp_path / "run", _Config())
    run_dir.write_config(tmp_path / "run", _Config())
    changed = _Config(steps=20, data=_Inner(threads=4))
    run_dir.check_config(tmp_path / "run", changed, free=FREE)
    run_dir.write_config(tmp_path / "run", changed, free=FREE)
    assert run_dir.read_config(tmp_path / "run", _Config) == changed


def test_a_bound_folder_keeps_the_config_that_it_was_begun_with(tmp_path):
    run_dir.bind_config(tmp_path / "run", _Config(), extra={"checkpoint": "a"}, free=FREE)
    written = (tmp_path / "run" / "config.json").read_bytes()
    changed = _Config(steps=20, data=_Inner(threads=4))
    run_dir.bind_config(tmp_path / "run", changed, extra={"checkpoint": "a"}, free=FREE)
    assert (tmp_path / "run" / "config.json").read_bytes() == written
    with pytest.raises(UserError, match="checkpoint"):
        run_dir.bind_config(tmp_path / "run", _Config(), extra={"checkpoint": "b"}, free=FREE)


def test_another_config_is_refused_key_by_key(tmp_path):
    run_dir.write_config(tmp_path, _Config())
    other = _Config(rate=0.2, data=_Inner(sizes=(1, 3)))
    with pytest.raises(UserError) as error:
        run_dir.check_config(tmp_path, other, free=FREE)
    assert "rate was 0.1, is 0.2" in str(error.value)
    assert "data.sizes was [1, 2], is [1, 3]" in str(error.value)
    assert run_dir.read_config(tmp_path, _Config) == _Config()


def test_a_changed_config_is_taken_where_it_is_forced(tmp_path):
    run_dir.write_config(tmp_path, _Config())
    other = _Config(steps=20, rate=0.2)
    assert run_dir.config_changes(tmp_path, other, free=FREE) == ["rate was 0.1, is 0.2"]
    assert run_dir.check_config(tmp_path, other, free=FREE, force=True)
    run_dir.write_config(tmp_path, other, free=FREE, force=True)
    assert run_dir.read_config(tmp_path, _Config) == other
    assert run_dir.config_changes(tmp_path / "new", other) == []


def test_many_processes_begin_one_folder_at_once(tmp_path, monkeypatch):
    """With writes as slow as those of a network disk; and none of them reads half a file."""
    write = pathlib.Path.write_bytes

    def slow(self, content):
        write(self, content[: len(content) // 2])
        time.sleep(0.01)
        return write(self, content)

    monkeypatch.setattr(type(epath.Path()), "write_bytes", slow)
    configs = [*[_Config()] * 6, _Config(rate=0.2), _Config(rate=0.3)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        accepted = list(pool.map(lambda config: _begin(tmp_path / "run", config), configs))
    first = run_dir.read_config(tmp_path / "run", _Config)
    assert accepted == [config == first for config in configs]
    assert [path.name for path in (tmp_path / "run").iterdir()] == [run_dir.CONFIG_FILE]


def _begin(folder, config):
    """Whether the folder is this config's."""
    try:
        run_dir.check_config(folder, config)
        run_dir.write_config(folder, config)
    except UserError:
        return False
    return True


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        run_dir.write_config(tmp_path / "file" / "run", _Config())


def test_a_damaged_config_file(tmp_path):
    (tmp_path / run_dir.CONFIG_FILE).write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        run_dir.check_config(tmp_path, _Config())


def test_values_beside_the_config_belong_to_it(tmp_path):
    place = {"name": "evaluation.json"}
    assert not run_dir.check_config(tmp_path, _Config(), **place, extra={"checkpoint": "a"})
    run_dir.write_config(tmp_path, _Config(), **place, extra={"checkpoint": "a"})
    assert run_dir.check_config(tmp_path, _Config(), **place, extra={"checkpoint": "a"})
    with pytest.raises(UserError, match="checkpoint was 'a', is 'b'"):
        run_dir.check_config(tmp_path, _Config(), **place, extra={"checkpoint": "b"})


def test_a_config_may_be_a_mapping(tmp_path):
    mapping = {"protocol": {"seeds": (1, 2)}, "corpus": None}
    run_dir.write_config(tmp_path, mapping)
    assert run_dir.check_config(tmp_path, mapping)
    with pytest.raises(UserError, match=r"protocol\.seeds was \[1, 2\], is \[2\]"):
        run_dir.check_config(tmp_path, {"protocol": {"seeds": (2,)}})


def test_a_fit_is_complete_when_its_report_is_there(tmp_path):
    config = TextFitConfig("blocks", symbols=("1*2*2",))
    assert run_dir.read_fit_report(tmp_path, config) is None
    run_dir.write_fit_report(tmp_path, config, source="blocks:1.0.0", report={"ids": 3})
    assert run_dir.read_fit_report(tmp_path, config) == {"ids": 3}
    other = dataclasses.replace(config, split="val")
    with pytest.raises(UserError, match=r"another config: split was 'train', is 'val'"):
        run_dir.read_fit_report(tmp_path, other)
    assert run_dir.read_fit_report(tmp_path, other, free=["split"]) == {"ids": 3}
    (tmp_path / run_dir.FIT_FILE).write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        run_dir.read_fit_report(tmp_path, config)


def _with_former_names(values: dict) -> dict:
    """JSON values as they were saved before fields were renamed."""
    names = {
        "chunk_size": "action_frames",
        "visual_init": "visual_rows",
        "normalization": "normalisation",
        "max_labeled": "max_labelled",
        "max_invalid_fraction": "max_bad_share",
        "video_episodes": "film_episodes",
    }
    return {
        names.get(key, key): _with_former_names(value) if isinstance(value, dict) else value
        for key, value in values.items()
    }


def test_runs_from_before_a_renaming_continue(tmp_path):
    data = DataConfig(64, 2, ("store",), "policy_video", chunk_size=5)
    loss = LossConfig(normalization="per_micro_batch", max_labeled=8)
    run = TrainConfig(4, ModelConfig("tiny", visual_init="codebook"), data, loss=loss)
    saved = _with_former_names(json_values(run))
    assert saved["data"]["action_frames"] == 5 and saved["loss"]["max_labelled"] == 8
    io.write_json(tmp_path / run_dir.CONFIG_FILE, saved)
    assert run_dir.read_config(tmp_path, TrainConfig) == run
    assert run_dir.check_config(tmp_path, run)
    other = dataclasses.replace(run, data=dataclasses.replace(data, chunk_size=6))
    with pytest.raises(UserError, match=r"data\.chunk_size was 5, is 6"):
        run_dir.check_config(tmp_path, other)


def test_fits_and_evaluations_from_before_a_renaming_are_known(tmp_path):
    fit = TextFitConfig("blocks", max_invalid_fraction=0.1)
    record = {"config": _with_former_names(json_values(fit)), "source": "x", "report": {"ids": 3}}
    io.write_json(tmp_path / run_dir.FIT_FILE, record)
    assert run_dir.read_fit_report(tmp_path, fit) == {"ids": 3}
    evaluation, beside = EvaluateConfig(video_episodes=3), {"checkpoint": "a"}
    io.write_json(
        tmp_path / "evaluation.json", _with_former_names(json_values(evaluation)) | beside
    )
    assert run_dir.check_config(tmp_path, evaluation, name="evaluation.json", extra=beside)


def test_a_field_that_the_saved_config_lacks_has_its_default(tmp_path):
    io.write_json(tmp_path / run_dir.CONFIG_FILE, {"steps": 10})
    assert run_dir.check_config(tmp_path, _Config())
    with pytest.raises(UserError, match=r"rate was 0\.1, is 0\.2"):
        run_dir.check_config(tmp_path, _Config(rate=0.2))
    io.write_json(tmp_path / run_dir.CONFIG_FILE, {"stepps": 10})
    with pytest.raises(UserError, match="did you mean 'steps'"):
        run_dir.check_config(tmp_path, _Config())
