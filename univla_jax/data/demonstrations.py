"""Demonstrations of the embedded tabletop's scripted expert, written as an RLDS dataset."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import json
import multiprocessing
import os
import pathlib
from collections.abc import Iterator

from univla_jax.data.rlds_writer import check_description, write_rlds
from univla_jax.environments.tabletop_expert import DEMONSTRATION_SEEDS, demonstrate
from univla_jax.environments.tabletop_tasks import FAMILIES
from univla_jax.episode import Episode
from univla_jax.errors import UserError

EPISODES_PER_WORKER = 100  # fewer are drawn before another process has started


@dataclasses.dataclass(frozen=True)
class DemonstrationsConfig:
    """Which demonstrations are written.

    Attributes:
      train_episodes: episodes of the split ``train``.
      val_episodes: episodes of the split ``val``, which takes the seeds after those of ``train``.
      families: task families in turn, repeated ones more often; empty draws them at random.
      first_seed: place of the first seed in the range kept for demonstrations.
      image_format: ``"png"`` or ``"jpeg"``.
      version: version of the dataset.
    """

    train_episodes: int
    val_episodes: int
    families: tuple[str, ...] = ()
    first_seed: int = 0
    image_format: str = "png"
    version: str = "1.0.0"

    def __post_init__(self) -> None:
        """Checks the numbers."""
        if min(self.train_episodes, self.val_episodes) < 1 or self.first_seed < 0:
            raise UserError(
                f"config: train_episodes {self.train_episodes} and val_episodes "
                f"{self.val_episodes} must be at least 1, first_seed {self.first_seed} at least 0"
            )
        unknown = set(self.families) - set(FAMILIES)
        if unknown:
            raise UserError(
                f"config: families {sorted(unknown)} unknown; known: {', '.join(FAMILIES)}"
            )
        last = self.first_seed + self.train_episodes + self.val_episodes
        if last > len(DEMONSTRATION_SEEDS):
            raise UserError(
                f"config: {last} seeds wanted, {len(DEMONSTRATION_SEEDS)} are kept for "
                "demonstrations; ask for fewer episodes"
            )

    def seeds(self) -> dict[str, range]:
        """The seeds of each split."""
        start, middle = self.first_seed, self.first_seed + self.train_episodes
        return {
            "train": DEMONSTRATION_SEEDS[start:middle],
            "val": DEMONSTRATION_SEEDS[middle : middle + self.val_episodes],
        }


class _Episodes:
    """The demonstrations of some seeds in order, made on every core; its length is their number."""

    def __init__(self, seeds: range, families: tuple[str, ...]) -> None:
        self._seeds = seeds
        self._families = families or (None,)

    def __len__(self) -> int:
        return len(self._seeds)

    def __iter__(self) -> Iterator[Episode]:
        families = itertools.islice(itertools.cycle(self._families), len(self))
        workers = min(len(os.sched_getaffinity(0)), len(self) // EPISODES_PER_WORKER)
        if workers < 2:
            yield from map(_demonstrate, self._seeds, families)
            return
        # Spawned, because a fork of a process with JAX's threads may hang.
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool:
            yield from pool.map(_demonstrate, self._seeds, families, chunksize=16)


def _demonstrate(seed: int, family: str | None) -> Episode:
    return demonstrate(seed, family=family)


def write_demonstrations(config: DemonstrationsConfig, out: str | os.PathLike[str]) -> pathlib.Path:
    """Writes the dataset unless it is there.

    Returns:
      the version folder.

    Raises:
      UserError: a dataset of other demonstrations lies there.
    """
    description = "Scripted expert of the embedded tabletop: " + json.dumps(
        dataclasses.asdict(config), sort_keys=True
    )
    splits = {split: _Episodes(seeds, config.families) for split, seeds in config.seeds().items()}
    folder = write_rlds(
        out,
        "tabletop",
        config.version,
        splits,
        description=description,
        image_format=config.image_format,
    )
    check_description(folder, description)
    return folder
