"""Memory and time of a conversion there and back, on a random checkpoint of the released widths.

    python -m univla_jax.benchmarks.conversion --folder=DIR [--layers=8] [--json=FILE]

Writes a sharded bfloat16 model folder (hidden size 4,096, 184,622 ids; 8 layers are 6.5 GB, 1 layer
3.5 GB) into ``--folder``, which needs three times its size, converts it there and back with the
``convert`` command, restores the checkpoint onto a mesh of eight virtual CPU devices, and compares
every file that came back. Peak memory is the resident memory of each process. Everything written is
removed at the end. Exit status 1: files differ, or a conversion took more than 1 GB above the
largest tensor.
"""

from __future__ import annotations

import base64
import itertools
import math
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import flags

from univla_jax import cli
from univla_jax.benchmarks.harness import print_cases, save
from univla_jax.errors import UserError
from univla_jax.interop.hf_folder import INDEX, decoder_config_to_hf
from univla_jax.interop.hf_weights import HfModel
from univla_jax.interop.tensor_io import make_header, write_safetensors
from univla_jax.io import dump_json, hash_files
from univla_jax.models.decoder_config import preset

FOLDER = cli.string_flag("folder", "folder to write into; needs three times the model's size")
LAYERS = flags.DEFINE_integer("layers", 8, "Decoder layers; 436 MB each beside 3 GB of tables")

_TENSORS_PER_SHARD = 24
_BLOCK_BYTES = 32 << 20
_TEXT_IDS, _CODES = 151_643, 32_768
_DEVICES = 8
_MEMORY_LIMIT = 1e9  # bytes above the largest tensor


def make_model(folder: pathlib.Path, layers: int) -> int:
    """Writes a model folder of random bits; returns the bytes of its largest tensor."""
    decoder = decoder_config_to_hf(preset("emu3_8b", num_layers=layers))
    config = {"architectures": ["Emu3MoE"], "model_type": "Emu3", **decoder}
    folder.mkdir(parents=True)
    rules = HfModel.from_config(config, ()).state_rules
    shards = [rules[i : i + _TENSORS_PER_SHARD] for i in range(0, len(rules), _TENSORS_PER_SHARD)]
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    rng = np.random.default_rng(0)
    for name, shard in zip(names, shards):
        size = sum(2 * math.prod(rule.shape) for rule in shard)
        header = make_header({rule.key: ("BF16", rule.shape) for rule in shard})
        write_safetensors(folder / name, header, _random_blocks(rng, size))
    weight_map = {rule.key: name for name, shard in zip(names, shards) for rule in shard}
    (folder / INDEX).write_bytes(dump_json({"metadata": {}, "weight_map": weight_map}))
    for name, content in _text_files().items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_bytes(dump_json(config))
    return max(2 * math.prod(rule.shape) for rule in rules)


def _random_blocks(rng: np.random.Generator, size: int) -> Iterator[np.ndarray]:
    for start in range(0, size, _BLOCK_BYTES):
        yield np.frombuffer(rng.bytes(min(_BLOCK_BYTES, size - start)), np.uint8)


def _text_files() -> dict[str, bytes]:
    """An Emu3 text tokenizer of the right size: bytes, pairs and some triples of them."""
    tokens = itertools.chain.from_iterable(
        map(bytes, itertools.product(range(256), repeat=length)) for length in (1, 2, 3)
    )
    lines = (
        base64.b64encode(token) + f" {rank}\n".encode()
        for rank, token in enumerate(itertools.islice(tokens, _TEXT_IDS))
    )
    names = ["<|image token|>", "<|image start|>", "<|image end|>"]
    names += [f"<|visual token {i:06d}|>" for i in range(_CODES)]
    return {
        "emu3.tiktoken": b"".join(lines),
        "emu3_vision_tokens.txt": ("\n".join(names) + "\n").encode(),
    }


def run_process(*arguments: str, **environment: str) -> dict[str, float]:
    """Runs Python; returns the wall time in seconds and the peak resident memory in bytes.

    Raises:
      UserError: it failed.
    """
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    # wait4 gives this child's peak memory; getrusage would give the largest of all children.
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise UserError(f"{' '.join(arguments)} failed: {process.stderr.read().decode()[-2000:]}")
    return {"seconds": time.monotonic() - start, "peak_bytes": usage.ru_maxrss * 1024}


def differing_files(one: pathlib.Path, other: pathlib.Path) -> list[str]:
    """Names of files that two folders do not share bit for bit."""
    return sorted({name for name, _ in hash_files(one).items() ^ hash_files(other).items()})


# Restores the decoder sharded over all devices, in a process of its own that has that many.
_RESTORE = f"""
import sys, jax, numpy as np
from univla_jax.models.decoder import Decoder
from univla_jax.models.decoder_config import preset
from univla_jax.checkpoints import load_params
from univla_jax.training.optimizer import OptimizerConfig, make_optimizer
from univla_jax.training.model_setup import params_init
from univla_jax.training.sharding import MeshConfig, make_mesh
from univla_jax.training.train_step import abstract_state
model = Decoder(preset("emu3_8b", num_layers=int(sys.argv[2]), param_dtype="bfloat16"))
mesh = make_mesh(MeshConfig(fsdp={_DEVICES}))
optimizer = make_optimizer(OptimizerConfig(), 1)
params = load_params(sys.argv[1], abstract_state(params_init(model), optimizer, mesh).params)
assert all(len(x.sharding.device_set) == {_DEVICES} for x in jax.tree.leaves(params))
"""


def measure(folder: pathlib.Path, layers: int) -> dict[str, Any]:
    """All steps: sizes in bytes, seconds and peak bytes of each step, and the files that differ."""
    source, ours, back = (folder / name for name in ("source", "ours", "back"))
    largest = make_model(source, layers)
    size = sum(path.stat().st_size for path in source.iterdir())
    command = ("-m", "univla_jax.convert")
    steps = {
        "from_hf": run_process(*command, f"--from_hf={source}", f"--to={ours}"),
        "to_hf": run_process(*command, f"--from={ours}", f"--to_hf={back}"),
        "restore": run_process(
            *("-c", _RESTORE, str(ours), str(layers)),
            XLA_FLAGS=f"--xla_force_host_platform_device_count={_DEVICES}",
        ),
    }
    return {
        "bytes": size,
        "largest_tensor_bytes": largest,
        "steps": steps,
        "differing_files": differing_files(source, back),
        "files": len(list(source.iterdir())),
    }


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""
    del argv
    folder = pathlib.Path(FOLDER.value).absolute() / "convert-benchmark"
    if folder.exists():
        raise UserError(f"{folder}: exists already; remove it")
    try:
        report = measure(folder, LAYERS.value)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(
        f"model folder {report['bytes'] / 1e9:.2f} GB in bfloat16, largest tensor "
        f"{report['largest_tensor_bytes'] / 1e9:.2f} GB"
    )
    steps = report["steps"]
    print_cases(
        [
            {
                "step": name,
                "seconds": round(s["seconds"]),
                "peak GB": round(s["peak_bytes"] / 1e9, 2),
            }
            for name, s in steps.items()
        ]
    )
    wrong = report["differing_files"]
    same = f"all {report['files']} files identical" if not wrong else f"DIFFERING: {wrong}"
    print(f"there and back: {same}")
    print(f"restore: onto {_DEVICES} devices of one process, which hold the whole model together")
    save(report)
    limit = report["largest_tensor_bytes"] + _MEMORY_LIMIT
    exceeded = any(steps[name]["peak_bytes"] > limit for name in ("from_hf", "to_hf"))
    return int(bool(wrong) or exceeded)


if __name__ == "__main__":
    cli.run(main)
