"""How much memory the data pipeline takes with every corpus open, and over an epoch.

    python -m univla_jax.benchmarks.data_memory [--share=1] [--epochs=0.2] [--folder=DIR]
        [--json=FILE]

The world-model mixture lies on disk as token stores with as many episodes, steps, shards and
records as published (times ``--share``). A frame is a single code here and the shards of a corpus
are links to one file: what stays in memory is the stores' indices, the order of an epoch and the
batches under way, which all have their real sizes, and no frame. One process reads the epochs;
memory grows until every shard has been opened once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from typing import Any

from absl import flags

from univla_jax import cli, io
from univla_jax.benchmarks.data_speed import MIXTURE, kept_folder, mixture_config, mixture_lengths
from univla_jax.benchmarks.measure import save
from univla_jax.benchmarks.synthetic import make_assets, write_store
from univla_jax.cli import format_table
from univla_jax.data.token_store import MANIFEST, TokenStore, read_manifest
from univla_jax.io import json_values
from univla_jax.pipeline.dataset import training_batches

SHARE = flags.DEFINE_float("share", 1.0, "Share of the published episodes")
EPOCHS = flags.DEFINE_float("epochs", 0.2, "Epochs that are read")

_PLACES = 10


def main(argv: list[str]) -> None:
    """Runs the command."""
    del argv
    with kept_folder() as folder:
        rows = measure(folder, SHARE.value, EPOCHS.value)
    print(format_table([list(rows[0]), *(list(row.values()) for row in rows)]))
    save(rows)


def measure(folder: pathlib.Path, share: float, epochs: float) -> list[dict[str, Any]]:
    """Resident memory before the stores are opened, behind it, and at ten places of the epochs."""
    for name in MIXTURE:
        if not (folder / name / MANIFEST).exists():
            _write(folder / name, name, share)
    assets, config = make_assets({}), mixture_config(6400, packing=False)
    rows = [_row("before", 0)]
    stores = [TokenStore(folder / name) for name in MIXTURE]
    episodes = sum(map(len, stores))
    shards = sum(len(store.manifest.shards) for store in stores)
    rows.append(_row(f"{episodes:,} episodes in {shards:,} shards open", 0))
    steps = max(_PLACES, round(epochs * episodes / config.batch_size))
    with contextlib.closing(training_batches(config, assets, stores)) as batches:
        for step in range(1, steps + 1):
            batches.next()
            if step * _PLACES // steps > (step - 1) * _PLACES // steps:
                rows.append(_row(f"{100 * step // steps} % read", step * config.batch_size))
    return rows


def _write(folder: pathlib.Path, name: str, share: float) -> None:
    """One shard of a corpus, and links to it for all others."""
    wanted = mixture_lengths(name, share)
    write_store(folder, name, dataclasses.replace(wanted, episodes=64), one_code=True)
    manifest = read_manifest(folder)
    (shard,) = manifest.shards
    copies = max(1, wanted.episodes // 64)
    shards = [
        dataclasses.replace(shard, file=f"shards/{n:05d}.array_record") for n in range(copies)
    ]
    for copy in shards[1:]:
        os.link(folder / shard.file, folder / copy.file)
    counts = {"episodes": 64 * copies, "frames": copies * manifest.frames, "shards": tuple(shards)}
    io.write_json(folder / MANIFEST, json_values(dataclasses.replace(manifest, **counts)))


def _row(place: str, samples: int) -> dict[str, Any]:
    return {"place": place, "samples": samples, "memory MB": _resident() >> 20}


def _resident() -> int:
    """Bytes of memory that this process holds now."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    cli.run(main)
