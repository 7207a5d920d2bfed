"""Samples per second, padding and memory of the training pipeline, on synthetic data of real sizes.

    python -m univla_jax.benchmarks.data_speed [--parts=libero,world_model] [--seconds=5]
        [--workers=0] [--folder=DIR] [--json=FILE]
    python -m univla_jax.benchmarks.data_speed --seconds=1                      # quick
    python -m univla_jax.benchmarks.data_speed --parts=memory [--share=1] [--epochs=0.2]

* ``libero``: the video policy's recipe (two views of 25 x 25 codes, two chunks of ten actions,
  FAST, sequences of 3,200 tokens) from a store on disk, padded and packed; the reference feeds 10.5
  samples a second on a like machine.
* ``world_model``: the mixture of all corpora with their published lengths, sizes and weights:
  useful tokens of sequences padded to 6,400 and packed into a few lengths.
* ``memory``: resident memory with every corpus of the mixture open, and over an epoch.

Everything runs in one process and one thread unless ``--workers`` says otherwise. Samples per
second are given by the clock and by the processor's time, which other programs disturb less.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags

from univla_jax import cli
from univla_jax.assets import Assets
from univla_jax.benchmarks.harness import (
    EpisodeLengths,
    SyntheticEpisodes,
    make_assets,
    print_cases,
    resident_megabytes,
    save,
    write_store,
)
from univla_jax.data.datasets import DATASETS
from univla_jax.data.token_store import MANIFEST, TokenStore, read_manifest
from univla_jax.errors import UserError
from univla_jax.io import json_values, write_json
from univla_jax.pipeline.data_config import DataConfig
from univla_jax.pipeline.dataset import training_batches
from univla_jax.pipeline.mixture import EpisodeSource, check_store, open_stores

PARTS = flags.DEFINE_list(
    "parts", ["libero", "world_model"], "What is measured", allow_override=True
)
SECONDS = flags.DEFINE_float("seconds", 5.0, "How long each case is measured")
WORKERS = flags.DEFINE_integer("workers", 0, "Worker processes of the pipeline")
FOLDER = flags.DEFINE_string("folder", None, "Keeps the synthetic stores here; a temporary folder")
SHARE = flags.DEFINE_float("share", 1.0, "Of memory: share of the published episodes")
EPOCHS = flags.DEFINE_float("epochs", 0.2, "Of memory: epochs that are read")

# Corpus -> episodes in thousands and median steps, as published.
MIXTURE = {
    "fractal": (87, 44),
    "droid": (76, 280),
    "bridge": (60, 38),
    "toto": (1, 325),
    "taco_play": (4, 64),
    "fmb": (9, 110),
    "maniskill": (30, 150),
    "kuka": (210, 40),
    "berkeley_autolab_ur5": (1, 97),
    "cmu_play_fusion": (1, 410),
    "viola": (1, 500),
    "utaustin_mutex": (2, 240),
    "calvin": (23, 64),
    "libero": (2, 165),
    "something_something": (169, 45),
    "1x": (1, 30),
}
_WORLD_MODEL_FRAMES = 6
_SPEED_SHARE = 0.01  # of the episodes, which packing and speed do not depend on
_PACKED_LENGTHS = (6400, 12_800, 25_600)
_SHARD_EPISODES = 64
_MEMORY_READINGS = 10


def main(argv: list[str]) -> None:
    """Runs the command."""
    del argv
    parts = {
        "libero": lambda folder: measure_libero(folder, SECONDS.value, WORKERS.value),
        "world_model": lambda folder: measure_world_model(SECONDS.value),
        "memory": lambda folder: measure_memory(folder, SHARE.value, EPOCHS.value),
    }
    unknown = sorted(set(PARTS.value) - set(parts))
    if unknown:
        raise UserError(f"--parts: {unknown[0]!r}, expected some of {', '.join(parts)}")
    figures = {}
    with _store_folder() as folder:
        for part in PARTS.value:
            figures[part] = parts[part](folder)
            print_cases(figures[part])
    save(figures)


@contextlib.contextmanager
def _store_folder() -> Iterator[pathlib.Path]:
    """The folder that ``--folder`` names, or a temporary one."""
    if FOLDER.value:
        pathlib.Path(FOLDER.value).mkdir(parents=True, exist_ok=True)
        yield pathlib.Path(FOLDER.value)
        return
    folder = pathlib.Path(tempfile.mkdtemp(prefix="univla_benchmark_"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ----------------------------------------------------------------------------
# Speed.


def measure_libero(
    folder: pathlib.Path, seconds: float, workers: int, episodes: int = 400
) -> list[dict[str, Any]]:
    """Figures of the LIBERO recipe from disk, one dictionary per case."""
    store_folder = folder / "libero"
    if not (store_folder / MANIFEST).exists():
        write_store(store_folder, "libero", EpisodeLengths(episodes, median=140))
    store = TokenStore(store_folder)
    assets = make_assets(store.statistics, [store.manifest.header])
    cases = []
    for how, length, packing in (
        ("padded", 3200, False),
        ("packed", 3200, True),
        ("packed", 8000, True),
    ):
        config = DataConfig(
            stores=(str(store_folder),),
            task="policy_video",
            sequence_length=length,
            batch_size=24,
            frames=2,
            chunk_size=10,
            packing=packing,
            workers=workers,
            read_threads=0,
            prefetch_batches=0,
        )
        figures = measure_pipeline(config, assets, None, seconds)
        cases.append({"sequences": f"{how} {length}", **figures})
    return cases


def measure_world_model(seconds: float) -> list[dict[str, Any]]:
    """Figures of the mixture of all corpora in memory, one dictionary per case."""
    sources = [SyntheticEpisodes(name, mixture_lengths(name, _SPEED_SHARE)) for name in MIXTURE]
    assets = make_assets({}, [source.header for source in sources])
    cases = []
    for how, length in (("padded", 6400), *(("packed", length) for length in _PACKED_LENGTHS)):
        config = _mixture_config(tuple(MIXTURE), length, packing=how == "packed")
        for name, source in zip(MIXTURE, sources):
            check_store(source.header, config, assets, where=name)
        figures = measure_pipeline(config, assets, sources, seconds, warmup_batches=20)
        cases.append({"sequences": f"{how} {length}", **figures})
    return cases


def _mixture_config(stores: tuple[str, ...], length: int, *, packing: bool) -> DataConfig:
    """The world model on all corpora, 64 x 6,400 tokens a batch in sequences of ``length``."""
    return DataConfig(
        stores=stores,
        task="world_model",
        sequence_length=length,
        batch_size=64 * 6400 // length,
        frames=_WORLD_MODEL_FRAMES,
        packing=packing,
        read_threads=0,
        prefetch_batches=0,
    )


def mixture_lengths(name: str, share: float) -> EpisodeLengths:
    """A share of the corpus' episodes, all long enough for the world model's frames."""
    thousands, median = MIXTURE[name]
    least = _WORLD_MODEL_FRAMES * DATASETS[name].frame_spacing
    return EpisodeLengths(max(1, round(1000 * share * thousands)), median, least=least)


def measure_pipeline(
    config: DataConfig,
    assets: Assets,
    sources: Sequence[EpisodeSource] | None,
    seconds: float,
    warmup_batches: int = 2,
) -> dict[str, Any]:
    """Samples per second, bytes per sample, share of useful tokens and memory of a pipeline.

    Args:
      config: of the pipeline.
      assets: of its sequences.
      sources: in memory; None opens the stores of the config.
      seconds: how long it is measured.
      warmup_batches: before that.
    """
    batches = training_batches(config, assets, sources)
    with contextlib.closing(batches):
        for _ in range(warmup_batches):
            batches.next()
        samples = useful = tokens = 0
        wall, processor, read = time.perf_counter(), time.process_time(), _bytes_read()
        while time.perf_counter() - wall < seconds:
            batch = batches.next()
            # Segment ids count the samples of a sequence from 1; padding has 0.
            samples += int(batch.segment_ids.max(1).sum())
            useful, tokens = useful + int((batch.segment_ids > 0).sum()), tokens + batch.tokens.size
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        read = _bytes_read() - read
    return {
        "samples/s": round(samples / wall),
        "samples/CPU s": round(samples / processor),
        "KB read/sample": round(read / samples / 1e3, 1),
        "useful tokens %": round(100 * useful / tokens, 1),
        "peak memory MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def _bytes_read() -> int:
    """Bytes this process has asked the system to read; 0 where the system does not count them."""
    if not sys.platform.startswith("linux"):
        return 0
    lines = pathlib.Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


# ----------------------------------------------------------------------------
# Memory. The mixture lies on disk as token stores with as many episodes, steps, shards and records
# as published (times ``--share``). A frame is a single code there and the shards of a corpus are
# links to one file: what stays in memory is the stores' indices, the order of an epoch and the
# batches under way, which all have their real sizes, and no frame. Memory grows until every shard
# has been opened once.


def measure_memory(folder: pathlib.Path, share: float, epochs: float) -> list[dict[str, Any]]:
    """Resident memory before the stores are opened, after it, and ten times over the epochs."""
    for name in MIXTURE:
        if not (folder / name / MANIFEST).exists():
            _write_linked_store(folder / name, name, share)
    config = _mixture_config(tuple(str(folder / name) for name in MIXTURE), 6400, packing=False)
    assets = make_assets({}, [read_manifest(folder / name).header for name in MIXTURE])
    cases = []

    def record(when: str, samples: int = 0) -> None:
        memory = round(resident_megabytes())
        cases.append({"when": when, "samples": samples, "memory MB": memory})

    record("before")
    stores = open_stores(config, assets)
    episodes = sum(map(len, stores))
    shards = sum(len(store.manifest.shards) for store in stores)
    record(f"{episodes:,} episodes in {shards:,} shards open")
    steps = max(_MEMORY_READINGS, round(epochs * episodes / config.batch_size))
    with contextlib.closing(training_batches(config, assets, stores)) as batches:
        for step in range(1, steps + 1):
            batches.next()
            if step * _MEMORY_READINGS // steps > (step - 1) * _MEMORY_READINGS // steps:
                record(f"{100 * step // steps} % read", step * config.batch_size)
    return cases


def _write_linked_store(folder: pathlib.Path, name: str, share: float) -> None:
    """Writes one shard of a corpus, and links to it for all others."""
    lengths = mixture_lengths(name, share)
    one_shard = dataclasses.replace(lengths, episodes=_SHARD_EPISODES)
    write_store(folder, name, one_shard, one_code=True)
    manifest = read_manifest(folder)
    (shard,) = manifest.shards
    count = max(1, lengths.episodes // _SHARD_EPISODES)
    shards = [dataclasses.replace(shard, file=f"shards/{n:05d}.array_record") for n in range(count)]
    for copy in shards[1:]:
        os.link(folder / shard.file, folder / copy.file)
    manifest = dataclasses.replace(
        manifest,
        episodes=count * _SHARD_EPISODES,
        frames=count * manifest.frames,
        shards=tuple(shards),
    )
    write_json(folder / MANIFEST, json_values(manifest))


if __name__ == "__main__":
    cli.run(main)
