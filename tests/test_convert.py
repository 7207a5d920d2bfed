"""The convert command as a process, and what comes after a conversion: training, going back."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.conftest import REPOSITORY
from tests.interop import hf_folders
from tests.training import tiny_run
from univla_jax.checkpoints import find_checkpoint
from univla_jax.episode import Observation
from univla_jax.errors import UserError
from univla_jax.inference.policy import Policy
from univla_jax.interop.hf_assets import ConvertConfig
from univla_jax.interop.hf_conversion import from_hf, to_hf
from univla_jax.tokenizers.action import UniformBinTokenizer
from univla_jax.training.train_loop import train

SIZES = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "mlp_size": 48,
    "vocab_pad_multiple": 256,
}


def run(program, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", program, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_goes_there_and_back(tmp_path):
    source = hf_folders.decoder_folder(tmp_path / "source")
    (source / "figures").mkdir()
    there = run("univla_jax.convert", f"--from_hf={source}", f"--to={tmp_path / 'ours'}")
    assert there.returncode == 0, there.stderr
    assert re.search(r"ours: 21 tensors, .* GB, .* peak memory \d+\.\d\d GB", there.stdout)
    assert "not converted: figures" in there.stderr
    back = run("univla_jax.convert", f"--from={tmp_path / 'ours'}", f"--to_hf={tmp_path / 'back'}")
    assert back.returncode == 0, back.stderr
    (source / "figures").rmdir()
    assert hf_folders.contents(tmp_path / "back") == hf_folders.contents(source)


def test_the_command_refuses_in_one_line(tmp_path):
    source = hf_folders.decoder_folder(tmp_path / "source")
    (source / "model-00001-of-00003.safetensors").unlink()
    done = run("univla_jax.convert", f"--from_hf={source}", f"--to={tmp_path / 'ours'}")
    assert done.returncode == 2 and not (tmp_path / "ours").exists()
    assert re.fullmatch(r"error: .*names model-00001-of-00003.safetensors.*\n", done.stderr)
    done = run("univla_jax.convert", f"--from_hf={source}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "give --from_hf=FOLDER and --to=DIR" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.1, 0.3])
def test_killed_while_writing(delay, tmp_path):
    """Kill -9 once the first bytes are there; what is left looks like nothing, and is replaced."""
    source = hf_folders.decoder_folder(
        tmp_path / "source", hidden_size=512, intermediate_size=4096, num_hidden_layers=16
    )
    command = ["-m", "univla_jax.convert", f"--from_hf={source}", f"--to={tmp_path / 'ours'}"]
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=REPOSITORY,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not list(tmp_path.glob("ours.*/state.*/*")):
        time.sleep(0.01)
    time.sleep(delay)
    process.kill()
    assert process.wait() == -9 and list(tmp_path.glob("ours.*"))
    assert not (tmp_path / "ours").exists()
    with pytest.raises(UserError, match="no complete checkpoint"):
        find_checkpoint(tmp_path)
    from_hf(source, tmp_path / "ours", ConvertConfig(), progress=False)
    to_hf(tmp_path / "ours", tmp_path / "back", progress=False)
    assert hf_folders.contents(tmp_path / "back") == hf_folders.contents(source)
    assert {p.name for p in tmp_path.iterdir()} == {"source", "ours", "back"}


@pytest.mark.slow
def test_training_starts_from_a_converted_base_and_its_result_goes_out(tmp_path):
    source = hf_folders.decoder_folder(tmp_path / "source", dtype=np.float32)
    from_hf(source, tmp_path / "base", ConvertConfig(), progress=False)
    world = tiny_run.make_world(tmp_path / "world")
    UniformBinTokenizer(16).save(tmp_path / "bins")
    config = tiny_run.config(
        world,
        total_steps=2,
        init_from=str(tmp_path / "base"),
        model={"preset": "tiny", "overrides": SIZES},
        tokenizers={"vision": str(world / "vision"), "action": str(tmp_path / "bins")},
        optimizer__learning_rate=1e-8,
        optimizer__min_learning_rate=1e-8,
    )
    train(config, tmp_path / "run", progress=False)
    to_hf(tmp_path / "run", tmp_path / "hub", progress=False)
    before = {k: v for f in source.glob("*.safetensors") for k, v in load_file(f).items()}
    after = load_file(tmp_path / "hub" / "model.safetensors")
    assert before.keys() == after.keys()
    for key, value in after.items():  # at this learning rate the weights stay those of the base
        np.testing.assert_allclose(value, before[key], atol=1e-6, err_msg=key)
    files = hf_folders.contents(tmp_path / "hub")
    assert hf_folders.text_files().items() <= files.items()


@pytest.mark.slow
def test_an_adapter_of_a_converted_base_acts_the_same_after_a_trip_to_the_hub(
    tmp_path, compilation_cache
):
    """Converted base, adapters, a merged model folder, converted again: the same actions."""
    source = hf_folders.decoder_folder(tmp_path / "source", dtype=np.float32)
    from_hf(source, tmp_path / "base", ConvertConfig(), progress=False)
    world = tiny_run.make_world(tmp_path / "world")
    UniformBinTokenizer(16).save(tmp_path / "bins")
    config = tiny_run.config(
        world,
        total_steps=4,
        init_from=str(tmp_path / "base"),
        model={
            "preset": "tiny",
            "overrides": SIZES,
            "lora": {"rank": 4, "alpha": 32.0, "rows": "action"},
        },
        tokenizers={"vision": str(world / "vision"), "action": str(tmp_path / "bins")},
        optimizer__learning_rate=5e-2,
    )
    train(config, tmp_path / "adapter", progress=False)
    to_hf(tmp_path / "adapter", tmp_path / "hub", progress=False)
    adapted = Policy.load(tmp_path / "adapter")
    task, statistics = config.data, adapted.statistics.to_dict()
    views = {view: {"size": size, "min_pixels": 64} for view, size in adapted.frame_sizes.items()}
    imported = ConvertConfig(
        vision=str(world / "vision"),
        action=str(tmp_path / "bins"),
        task=task.task,
        frames=task.frames,
        chunk_size=task.chunk_size,
        sequence_length=task.sequence_length,
        control_hz=5.0,
        corpus=adapted.corpus,
        views=views,
        statistics={name: statistics[name] for name in ("mean", "std", "q01", "q99")},
    )
    from_hf(tmp_path / "hub", tmp_path / "imported", imported, progress=False)
    from_hf(source, tmp_path / "before", imported, progress=False)
    chunks = [_act(Policy.load(tmp_path / name)) for name in ("imported", "before")]
    expected = _act(adapted)
    np.testing.assert_array_equal(chunks[0], expected)
    assert (chunks[1] != expected).any()  # what was trained counts


def _act(policy):
    """Two chunks of each of two robots' episodes."""
    rng = np.random.default_rng(0)
    sessions, chunks = [policy.start() for _ in range(2)], []
    for _ in range(2):
        seen = [
            Observation(
                words,
                {v: rng.integers(0, 256, (*s, 3), np.uint8) for v, s in policy.frame_sizes.items()},
            )
            for words in ("the red block", "the bed")
        ]
        chunks += [chunk.actions for chunk in policy.act(seen, sessions)]
        assert all(np.isfinite(chunk).all() for chunk in chunks)
    return np.stack(chunks)


_RESTORE = """
import sys
import jax, numpy as np
from univla_jax.models.decoder import Decoder
from univla_jax.models.decoder_config import preset
from univla_jax.checkpoints import load_params
from univla_jax.training.optimizer import OptimizerConfig, make_optimizer
from univla_jax.training.model_setup import params_init
from univla_jax.training.sharding import MeshConfig, make_mesh
from univla_jax.training.train_step import abstract_state
sizes = dict(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_size=48,
             vocab_pad_multiple=256)
model = Decoder(preset("tiny", vocab_size=493, param_dtype="float32", **sizes))
template = abstract_state(
    params_init(model),
    make_optimizer(OptimizerConfig(learning_rate=1.0), 1),
    make_mesh(MeshConfig(fsdp=4, tensor=2)),
).params
params = load_params(sys.argv[1], template)
assert len(params["embedding"].sharding.device_set) == 8
up = params["stack"]["layers"]["mlp"]["up"]["kernel"]
assert max(shard.data.size for shard in up.addressable_shards) * 8 == up.size
np.savez(sys.argv[2], embedding=params["embedding"], up=up)
"""


@pytest.mark.slow
def test_a_converted_checkpoint_is_restored_onto_a_mesh(tmp_path):
    source = hf_folders.decoder_folder(tmp_path / "source")
    from_hf(source, tmp_path / "ours", ConvertConfig(), progress=False)
    done = subprocess.run(
        [sys.executable, "-c", _RESTORE, str(tmp_path / "ours"), str(tmp_path / "out.npz")],
        cwd=REPOSITORY,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    state = {k: v for f in source.glob("*.safetensors") for k, v in load_file(f).items()}
    found = np.load(tmp_path / "out.npz")
    np.testing.assert_array_equal(found["embedding"][:493], state["model.embed_tokens.weight"])
    up = np.stack([state[f"model.layers.{i}.mlp.up_proj.weight"].T for i in range(2)])
    np.testing.assert_array_equal(found["up"], up)
