"""Checkpoints: whole or absent, restored exactly, kept by policy."""

from __future__ import annotations

import pathlib
import resource
import shutil
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training import toy
from univla_jax import integrity
from univla_jax.checkpoints import (
    CheckpointConfig,
    Checkpointer,
    assets_folder,
    find_checkpoint,
    load_params,
)
from univla_jax.errors import UserError
from univla_jax.training.train_step import TrainState


def _write_assets(folder: pathlib.Path) -> None:
    (folder / "words.txt").write_text("pick")


def _save(workdir: pathlib.Path, steps: list[int], **config) -> TrainState:
    """Saves states at ``steps``; the weights of a state are its step. Returns the last."""
    state = toy.create()
    with Checkpointer(workdir, CheckpointConfig(**config), write_assets=_write_assets) as saver:
        batches = toy.Batches()
        for step in steps:
            batches.position = step
            state = TrainState(jnp.int32(step), {"w": jnp.full((4,), float(step))}, state.opt_state)
            saver.save(step, state, batches)
    return state


def _steps(workdir: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def _restore(workdir: pathlib.Path, batches: toy.Batches | None = None) -> TrainState | None:
    with Checkpointer(workdir, CheckpointConfig()) as saver:
        return saver.restore(toy.template(toy.create()), batches)


def test_roundtrip_of_state_position_and_assets(tmp_path):
    saved = _save(tmp_path, [1, 2])
    batches = toy.Batches()
    restored = _restore(tmp_path, batches)
    jax.tree.map(np.testing.assert_array_equal, restored, saved)
    assert isinstance(restored, TrainState)
    assert batches.position == 2
    newest = find_checkpoint(tmp_path)
    assert newest.name == "2"
    assert (assets_folder(newest) / "words.txt").read_text() == "pick"
    assert sorted(p.name for p in newest.iterdir() if p.is_dir()) == [
        *("assets", "checksums", "iterator", "state")
    ]


def test_empty_workdir_restores_nothing(tmp_path):
    assert _restore(tmp_path) is None
    with pytest.raises(UserError, match="no complete checkpoint"):
        find_checkpoint(tmp_path)


def test_due_and_saving_twice(tmp_path):
    with Checkpointer(tmp_path, CheckpointConfig(every=3)) as saver:
        assert [s for s in range(8) if saver.due(s)] == [3, 6]
        for _ in range(2):
            saver.save(3, toy.create(), None)
    assert find_checkpoint(tmp_path).name == "3"


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        ({"keep_last": 2}, [5, 6]),
        ({"keep_last": 1, "keep_every": 3}, [3, 6]),
    ],
)
def test_keep_policies(tmp_path, config, kept):
    _save(tmp_path, [1, 2, 3, 4, 5, 6], **config)
    assert _steps(tmp_path) == kept


def test_keep_best(tmp_path):
    config = CheckpointConfig(keep_last=1, keep_best=1, best_metric="eval/loss")
    with Checkpointer(tmp_path, config) as saver:
        for step, loss in enumerate([3.0, 1.0, 2.0, 2.5]):
            saver.save(step, toy.create(), None, metrics={"eval/loss": loss})
    assert _steps(tmp_path) == [1, 3]


def test_donated_buffers_do_not_reach_an_asynchronous_save(tmp_path):
    """The save must hold its own copy: the next step writes into the same memory."""
    big = {"w": jnp.ones((512, 512))}
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    with Checkpointer(tmp_path, CheckpointConfig(keep_last=9)) as saver:
        for step in range(4):
            state = TrainState(jnp.int32(step), jax.tree.map(partial(jnp.add, step), big), ())
            saver.save(step, state)
            overwrite(state)
    for step in range(4):
        params = load_params(tmp_path / "checkpoints" / str(step), toy.template(big))
        np.testing.assert_array_equal(params["w"], 1.0 + step)


def test_unfinished_and_incomplete_folders_are_skipped(tmp_path, caplog):
    _save(tmp_path, [1, 2])
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(checkpoints / "2", checkpoints / "3.orbax-checkpoint-tmp-17")
    shutil.copytree(checkpoints / "2", checkpoints / "4")
    (checkpoints / "4" / "_CHECKPOINT_METADATA").unlink()
    assert find_checkpoint(tmp_path).name == "2"
    assert int(_restore(tmp_path).step) == 2
    assert (checkpoints / "4.incomplete").is_dir()
    patience = time.monotonic() + 60  # Orbax removes them in the background
    while list(checkpoints.glob("*tmp*")) and time.monotonic() < patience:
        time.sleep(0.01)
    assert not list(checkpoints.glob("*tmp*"))
    assert "never finished" in caplog.text and "incomplete" in caplog.text


def _data_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Where the arrays lie, largest last."""
    return sorted((folder / "state").rglob("d/*"), key=lambda file: file.stat().st_size)


def _each(change):
    """A damage of all data files."""

    def damage(folder):
        for file in _data_files(folder):
            file.write_bytes(change(file.read_bytes()))

    return damage


def _of(name, change):
    """A damage of one file."""

    def damage(folder):
        (file,) = folder.glob(name)
        file.write_bytes(change(file.read_bytes()))

    return damage


def _flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def _half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _nothing(content: bytes) -> bytes:
    return b""


DAMAGES = {
    "data emptied": _each(_nothing),
    "data cut": _each(_half),
    "a bit of the data flipped": _each(_flip),
    "data missing": lambda folder: [file.unlink() for file in _data_files(folder)],
    "manifest emptied": _of("state/manifest.ocdbt", _nothing),
    "a bit of the manifest flipped": _of("state/manifest.ocdbt", _flip),
    "manifest missing": lambda folder: (folder / "state" / "manifest.ocdbt").unlink(),
    "description cut": _of("state/_METADATA", _half),
    "record emptied": _of("_CHECKPOINT_METADATA", _nothing),
    "position missing": lambda folder: shutil.rmtree(folder / "iterator"),
    "position emptied": _of("iterator/*.bin", _nothing),
    "a bit of the position flipped": _of("iterator/*.bin", _flip),
    "checksums cut": _of("checksums/arrays.json", _half),
    "checksums missing": lambda folder: shutil.rmtree(folder / "checksums"),
    "assets missing": lambda folder: shutil.rmtree(folder / "assets"),
    "an asset changed": _of("assets/words.txt", _flip),
}


def _check_assets(folder: pathlib.Path) -> None:
    if (folder / "words.txt").read_text() != "pick":
        raise UserError("words.txt was changed")


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """A workdir with the states of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("two")
    _save(folder, [1, 2])
    return folder


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    name, two_checkpoints, tmp_path, caplog
):
    workdir = tmp_path / "run"
    shutil.copytree(two_checkpoints, workdir)
    newest = workdir / "checkpoints" / "2"
    DAMAGES[name](newest)
    if name.partition(" ")[0] in ("data", "manifest") or "data flipped" in name:
        with pytest.raises(
            UserError, match=rf"{newest} is damaged .*; use .*checkpoints/1 instead"
        ):
            load_params(workdir, {"w": jax.ShapeDtypeStruct((4,), jnp.float32)})
    batches = toy.Batches()
    with Checkpointer(workdir, CheckpointConfig(), check_assets=_check_assets) as saver:
        restored = saver.restore(toy.template(toy.create()), batches)
        assert int(restored.step) == 1
        np.testing.assert_array_equal(restored.params["w"], 1.0)
        assert batches.position == 1
        assert f"{newest} is damaged" in caplog.text
        assert newest.with_name("2.damaged").is_dir() and not newest.exists()
        saver.save(2, restored, batches)
    assert _steps_of(workdir) == [1, 2]


def _steps_of(workdir: pathlib.Path) -> list[int]:
    names = [path.name for path in (workdir / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdecimal())


def test_all_damaged_is_an_error_and_touches_nothing(tmp_path):
    _save(tmp_path, [1])
    DAMAGES["data emptied"](tmp_path / "checkpoints" / "1")
    with pytest.raises(UserError, match="none of the checkpoints"):
        _restore(tmp_path)
    assert (tmp_path / "checkpoints" / "1").is_dir()


def test_a_save_that_cannot_be_read_back_is_an_error(tmp_path, monkeypatch):
    """As on a disk that takes everything and keeps half of it."""
    monkeypatch.setattr(integrity, "write_checksums", lambda folder, checksums: None)
    with pytest.raises(UserError, match=r"was written and cannot be read back .*arrays\.json"):
        _save(tmp_path, [1])


@pytest.mark.parametrize(
    "name", ["run[v2]", "[sweep]", "a*b?", "50% {x}", "lr=1e-4,wd=0.1", "läuft", "a:b#c&d;e'"]
)
def test_names_of_workdirs(tmp_path, name):
    saved = _save(tmp_path / name, [1])
    jax.tree.map(np.testing.assert_array_equal, _restore(tmp_path / name), saved)
    np.testing.assert_array_equal(load_params(tmp_path / name, toy.template(saved.params))["w"], 1)


@pytest.mark.parametrize("name", ["a\\b", "a\nb", "gs://bucket/run[v2]", "gs://bucket/a#b"])
def test_a_name_that_could_not_be_read_back_is_refused_at_the_start(tmp_path, name):
    with pytest.raises(UserError, match="could not be read back; choose another name"):
        Checkpointer(name if "://" in name else tmp_path / name, CheckpointConfig())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint16", "bfloat16", "float32"])
def test_a_checksum_changes_with_any_bit(dtype):
    bits = np.random.default_rng(0).integers(0, 2, (3, 5)).astype(dtype)
    checksums = integrity.array_checksums({"a": jnp.asarray(bits)})
    swapped = bits[:, ::-1].copy()
    for i in range(15):
        changed = bits.copy()
        changed.flat[i] = 1 - changed.flat[i]
        assert integrity.array_checksums({"a": jnp.asarray(changed)})["a"] != checksums["a"]
    assert integrity.array_checksums({"a": jnp.asarray(swapped)})["a"] != checksums["a"]


def test_another_model_names_the_parameter(tmp_path):
    saved = _save(tmp_path, [1])
    wider = TrainState(saved.step, {"w": jnp.zeros((5,))}, saved.opt_state)
    with (
        Checkpointer(tmp_path, CheckpointConfig()) as saver,
        pytest.raises(UserError, match=r"params/w is \(4,\) there, \(5,\) here"),
    ):
        saver.restore(toy.template(wider))
    with pytest.raises(UserError, match="params/v is absent there"):
        load_params(tmp_path, toy.template({"v": jnp.zeros(4)}))


def test_a_position_of_every_process_is_needed(tmp_path):
    _save(tmp_path, [1])
    position = tmp_path / "checkpoints" / "1" / "iterator" / "process_0_of_1.bin"
    position.rename(position.with_name("process_0_of_4.bin"))
    with pytest.raises(UserError, match="none of the checkpoints"):
        _restore(tmp_path, toy.Batches())


def test_params_alone_in_another_dtype(tmp_path):
    _save(tmp_path, [7])
    wanted = {"w": jax.ShapeDtypeStruct((4,), jnp.bfloat16)}
    params = load_params(tmp_path, wanted)
    assert params["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(params["w"].astype(np.float32), 7.0)


def test_unwritable_folder_is_a_user_error(tmp_path):
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(UserError, match="cannot write checkpoints"):
        Checkpointer(tmp_path, CheckpointConfig())


def test_a_full_disk_is_a_user_error_and_older_checkpoints_stay(tmp_path):
    """A limit on the size of files makes writes fail as a full disk does."""
    state = TrainState(jnp.int32(1), {"w": jax.random.normal(jax.random.key(0), (512, 512))}, ())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    saver = Checkpointer(tmp_path, CheckpointConfig())
    saver.save(1, state)
    saver.wait()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
        with pytest.raises(UserError, match="cannot write a checkpoint"):
            saver.save(2, state)
            saver.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert find_checkpoint(tmp_path).name == "1"


def test_bad_policy_is_refused():
    with pytest.raises(UserError, match=r"checkpoint\.every: 0"):
        CheckpointConfig(every=0)
