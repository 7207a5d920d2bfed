"""How fast, how full and how small the data pipeline is, on synthetic data of real sizes.

    python -m univla_jax.benchmarks.data_speed [--seconds=5] [--workers=0] [--folder=DIR]
        [--json=FILE]

* LIBERO: the video policy's recipe (two views of 25 x 25 codes, two chunks of ten actions, FAST,
  rows of 3,200 tokens) from a store on disk, padded and packed; the reference feeds 10.5 samples a
  second on a like machine.
* World model: the mixture of all corpora with their published lengths, sizes and weights; share of
  useful tokens of rows padded to 6,400 and packed to a few lengths, and the memory it takes.

Everything runs in one process and one thread unless ``--workers`` says otherwise. Samples per
second are given by the clock and by the processor's time, which other work on the machine disturbs
less.
"""

from __future__ import annotations

import contextlib
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
from univla_jax.benchmarks.measure import save
from univla_jax.benchmarks.synthetic import Lengths, SyntheticEpisodes, make_assets, write_store
from univla_jax.cli import format_table
from univla_jax.data.datasets import DATASETS
from univla_jax.data.token_store import TokenStore
from univla_jax.pipeline.data_config import DataConfig
from univla_jax.pipeline.dataset import BatchIterator, training_batches
from univla_jax.pipeline.mixture import EpisodeSource

SECONDS = flags.DEFINE_float("seconds", 5.0, "How long each case is measured")
WORKERS = flags.DEFINE_integer("workers", 0, "Worker processes of the pipeline")
FOLDER = flags.DEFINE_string("folder", None, "Keeps the synthetic store here; a temporary folder")

# episodes in thousands and median steps, as published
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
WORLD_MODEL_FRAMES = 6
_SHARE = 0.01  # of the episodes, which packing and speed do not depend on
_PACKED_LENGTHS = (6400, 12_800, 25_600)


def main(argv: list[str]) -> None:
    """Runs the command."""
    del argv
    with kept_folder() as folder:
        figures = {"libero": libero(folder, SECONDS.value, WORKERS.value)}
    figures["world_model"] = world_model(SECONDS.value)
    save(figures)


def libero(folder: pathlib.Path, seconds: float, workers: int, episodes: int = 400) -> list[dict]:
    """The LIBERO recipe from disk; one dictionary of figures per case."""
    store_folder = folder / "libero"
    if not (store_folder / "manifest.json").exists():
        write_store(store_folder, "libero", Lengths(episodes, median=140))
    store = TokenStore(store_folder)
    assets = make_assets(store.statistics)
    cases = [("padded", 3200, False), ("packed", 3200, True), ("packed", 8000, True)]
    rows = []
    for how, length, packing in cases:
        config = DataConfig(
            stores=("libero",),
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
        rows.append({"rows": f"{how} {length}", **measure(config, assets, [store], seconds)})
    print(format_table([list(rows[0]), *(list(row.values()) for row in rows)]))
    return rows


def world_model(seconds: float) -> list[dict]:
    """The mixture of all corpora in memory; one dictionary of figures per case."""
    sources = [SyntheticEpisodes(name, mixture_lengths(name, _SHARE)) for name in MIXTURE]
    assets = make_assets({})
    rows = []
    for how, length in (("padded", 6400), *(("packed", length) for length in _PACKED_LENGTHS)):
        config = mixture_config(length, packing=how == "packed")
        figures = measure(config, assets, sources, seconds, warm_batches=20)
        rows.append({"rows": f"{how} {length}", **figures})
    print(format_table([list(rows[0]), *(list(row.values()) for row in rows)]))
    return rows


def mixture_config(length: int, *, packing: bool) -> DataConfig:
    """The world model on all corpora, in rows of ``length`` tokens, 64 x 6,400 a batch."""
    return DataConfig(
        stores=tuple(MIXTURE),
        task="world_model",
        sequence_length=length,
        batch_size=64 * 6400 // length,
        weights=tuple(DATASETS[name].mixture_weight for name in MIXTURE),
        frames=WORLD_MODEL_FRAMES,
        packing=packing,
        read_threads=0,
        prefetch_batches=0,
    )


def mixture_lengths(name: str, share: float) -> Lengths:
    """A share of the corpus' episodes, all long enough for six frames."""
    thousands, median = MIXTURE[name]
    least = WORLD_MODEL_FRAMES * DATASETS[name].frame_spacing
    return Lengths(max(1, round(1000 * share * thousands)), median, least=least)


def measure(
    config: DataConfig,
    assets: Assets,
    sources: Sequence[EpisodeSource],
    seconds: float,
    warm_batches: int = 2,
) -> dict[str, Any]:
    """Samples per second, bytes per sample, share of useful tokens and memory of a pipeline."""
    batches = training_batches(config, assets, sources)
    for _ in range(warm_batches):
        batches.next()
    with contextlib.closing(batches):
        return _measure(batches, seconds)


def _measure(batches: BatchIterator, seconds: float) -> dict[str, Any]:
    samples = useful = tokens = 0
    clock, processor, read = time.perf_counter(), time.process_time(), _bytes_read()
    while time.perf_counter() - clock < seconds:
        batch = batches.next()
        samples += int(batch.segment_ids.max(1).sum())
        useful, tokens = useful + int((batch.segment_ids > 0).sum()), tokens + batch.tokens.size
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    return {
        "samples/s": round(samples / clock),
        "samples/CPU s": round(samples / processor),
        "KB read/sample": round((_bytes_read() - read) / samples / 1e3, 1),
        "useful tokens %": round(100 * useful / tokens, 1),
        "peak memory MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def _bytes_read() -> int:
    """Bytes this process has asked the system to read; 0 where it does not say."""
    if not sys.platform.startswith("linux"):
        return 0
    lines = pathlib.Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


@contextlib.contextmanager
def kept_folder() -> Iterator[pathlib.Path]:
    """The folder that ``--folder`` names, or a temporary one."""
    if FOLDER.value:
        pathlib.Path(FOLDER.value).mkdir(parents=True, exist_ok=True)
        yield pathlib.Path(FOLDER.value)
        return
    made = pathlib.Path(tempfile.mkdtemp(prefix="univla_benchmark_"))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


if __name__ == "__main__":
    cli.run(main)
