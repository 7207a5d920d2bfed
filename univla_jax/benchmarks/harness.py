"""What the benchmarks share: time and memory of this process, and random inputs of real sizes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from univla_jax.assets import Assets, LazyVisionTokenizer
from univla_jax.cli import format_table
from univla_jax.data.datasets import DATASETS, DatasetConfig
from univla_jax.data.token_record import TokenizedEpisode, block_steps
from univla_jax.data.token_store import StoreHeader, TokenStoreWriter
from univla_jax.episode import Observation
from univla_jax.inference.action_decoders import Session
from univla_jax.inference.loaded_model import LoadedModel
from univla_jax.inference.policy import Policy
from univla_jax.models.decoder import Decoder
from univla_jax.models.decoder_config import preset
from univla_jax.normalization import ActionStatistics
from univla_jax.simulators import StepResult
from univla_jax.simulators.tabletop.tabletop_benchmark import TabletopSimulator, trial_of
from univla_jax.tasks import CorpusRecord, TaskRecord
from univla_jax.tokenizers.fast import FastTokenizer
from univla_jax.tokenizers.image import ImageSpec
from univla_jax.tokenizers.text import SentencePieceTextTokenizer
from univla_jax.tokenizers.vision import VisionTokenizer
from univla_jax.tokenizers.vision_vq import PRESETS, init_variables
from univla_jax.tokenizers.vocabulary import Vocabulary
from univla_jax.training.run_assets import image_specs

JSON = flags.DEFINE_string("json", None, "Also writes the figures to this file")

_COPY_BYTES = 2**28  # beyond every cache


@dataclasses.dataclass(frozen=True)
class Elapsed:
    """Seconds of one piece of work.

    Attributes:
      wall: by the clock.
      processor: of all threads of this process, which other programs lengthen less.
    """

    wall: float = 0.0
    processor: float = 0.0

    def __add__(self, other: Elapsed) -> Elapsed:
        """One piece of work after the other."""
        return Elapsed(self.wall + other.wall, self.processor + other.processor)


def timed(work: Callable[[], Any]) -> tuple[Any, Elapsed]:
    """The result of ``work``, which waits for what it computes, and the time it took."""
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    return result, Elapsed(time.perf_counter() - wall, time.process_time() - processor)


def fastest(times: Sequence[Elapsed]) -> Elapsed:
    """The least of each: the time when nothing else disturbs."""
    return Elapsed(min(t.wall for t in times), min(t.processor for t in times))


def median(times: Sequence[Elapsed]) -> Elapsed:
    """The median of each."""
    wall, processor = ([getattr(t, name) for t in times] for name in ("wall", "processor"))
    return Elapsed(statistics.median(wall), statistics.median(processor))


def copy_bandwidth(repeats: int = 5) -> float:
    """Bytes per second that a copy in memory reads and writes together, the best of some."""
    source = np.ones(_COPY_BYTES // 8)
    target = np.empty_like(source)
    copies = [timed(lambda: np.copyto(target, source))[1] for _ in range(repeats)]
    return 2 * _COPY_BYTES / fastest(copies).wall


def resident_megabytes() -> float:
    """Resident memory of this process in MiB (Linux)."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@functools.cache
def compilations() -> list[float]:
    """Seconds of every compilation since the first call; the list goes on growing."""
    durations: list[float] = []

    def listen(event: str, seconds: float, **more: Any) -> None:
        del more
        if event.endswith("/backend_compile_duration"):
            durations.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return durations


# ----------------------------------------------------------------------------
# Output.


def save(figures: Any) -> None:
    """Writes the figures as JSON where ``--json`` says; nowhere without it."""
    if JSON.value:
        pathlib.Path(JSON.value).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def print_figures(title: str, figures: Mapping[str, Any]) -> None:
    """Prints one figure per line."""
    rows = [[name, _format(value)] for name, value in figures.items()]
    print(format_table([[title, ""], *rows]), flush=True)


def print_cases(cases: Sequence[Mapping[str, Any]]) -> None:
    """Prints one case per line, with the same figures in columns."""
    print(format_table([list(cases[0]), *(list(case.values()) for case in cases)]), flush=True)


def _format(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.3f}" if value < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


# ----------------------------------------------------------------------------
# Token stores, assets, decoders and policies of random content but real sizes.


CODEBOOK_SIZE = 32_768
_FACTOR = 8  # pixels per code along each side
_DIMENSIONS = 7  # of an action
_FINGERPRINT = "synthetic"  # of the vision tokenizer that random codes stand for
_INSTRUCTIONS = [
    f"{verb} the {color} {thing} {place}"
    for verb in ("pick up", "push", "place", "move")
    for color in ("red", "blue", "black", "white")
    for thing in ("bowl", "mug", "block", "plate")
    for place in ("on the plate", "into the drawer", "next to the stove")
]


# ----------------------------------------------------------------------------
# Episodes and token stores. Axes: T steps, h/w code grid.


@dataclasses.dataclass(frozen=True)
class EpisodeLengths:
    """Log-normal distribution of the lengths of a corpus' episodes.

    Attributes:
      episodes: number of episodes.
      median: steps.
      spread: standard deviation of the logarithm.
      least: shorter episodes are drawn out to this many steps.
    """

    episodes: int
    median: int
    spread: float = 0.35
    least: int = 10

    def sample(self, rng: np.random.Generator) -> np.ndarray:
        """Steps of each episode, int [episodes]."""
        steps = self.median * np.exp(rng.normal(0, self.spread, self.episodes))
        return np.maximum(steps.astype(int), self.least)


def _code_grids(dataset: DatasetConfig) -> dict[str, tuple[int, int]]:
    """Code grid (h, w) of each view."""
    return {view: (h // _FACTOR, w // _FACTOR) for view, (h, w) in dataset.image_sizes.items()}


class SyntheticEpisodes:
    """An ``EpisodeSource`` whose codes are all 0 and take no memory.

    Attributes:
      header: that a store of these episodes would have.
      fingerprint: what identifies them.
    """

    def __init__(self, corpus: str, lengths: EpisodeLengths) -> None:
        """Samples the lengths; the views are those of the corpus' ``DatasetConfig``."""
        self._dataset = DATASETS[corpus]
        self._grids = _code_grids(self._dataset)
        self._steps = lengths.sample(np.random.default_rng(len(corpus)))
        self.header = _header(self._dataset, lengths)
        self.fingerprint = f"synthetic {corpus}"

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self._steps)

    def __getitem__(self, index: int) -> TokenizedEpisode:
        """Episode ``index``."""
        steps = int(self._steps[index])
        zero = np.zeros((), np.uint16)
        codes = {v: np.broadcast_to(zero, (steps, *grid)) for v, grid in self._grids.items()}
        return _episode(self._dataset, index, codes, np.zeros((steps, 0), np.float32))


def write_store(
    folder: pathlib.Path,
    corpus: str,
    lengths: EpisodeLengths,
    *,
    one_code: bool = False,
) -> None:
    """Writes a token store of random codes and smooth actions of seven dimensions.

    Args:
      folder: of the store.
      corpus: name of its ``DatasetConfig``.
      lengths: of its episodes.
      one_code: whether to write a single code per frame, in as many records as whole frames would
        take, for stores of which only the size of their index matters.
    """
    dataset, rng = DATASETS[corpus], np.random.default_rng(0)
    grids = _code_grids(dataset)
    header = _header(dataset, lengths)
    if one_code:
        grids = dict.fromkeys(grids, (1, 1))
        header = dataclasses.replace(header, grids=grids)
    writer = TokenStoreWriter(folder, header)
    steps = lengths.sample(rng)
    for number in range(header.num_shards):
        with writer.shard(number) as shard:
            for index in writer.source_range(number):
                codes = {
                    v: rng.integers(0, CODEBOOK_SIZE, (steps[index], *grid), np.uint16)
                    for v, grid in grids.items()
                }
                actions = smooth_actions(rng, int(steps[index]))
                shard.add(_episode(dataset, index, codes, actions))
    writer.finish()


def smooth_actions(rng: np.random.Generator, steps: int) -> np.ndarray:
    """float32 [T, 7] in -1...1: slow movement, and a gripper that opens and closes."""
    knots = rng.normal(0, 0.4, (steps // 8 + 2, _DIMENSIONS))
    times = np.linspace(0, len(knots) - 1, steps)
    curves = [np.interp(times, np.arange(len(knots)), column) for column in knots.T]
    actions = np.clip(np.stack(curves, 1), -1, 1).astype(np.float32)
    actions[:, -1] = np.where(actions[:, -1] > 0, 1, -1)
    return actions


def _episode(
    dataset: DatasetConfig, index: int, codes: Mapping[str, np.ndarray], actions: np.ndarray
) -> TokenizedEpisode:
    instruction = _INSTRUCTIONS[index % len(_INSTRUCTIONS)]
    return TokenizedEpisode(
        instruction, codes, actions, dataset.control_hz, dataset.name, str(index)
    )


def _header(dataset: DatasetConfig, lengths: EpisodeLengths) -> StoreHeader:
    grids = _code_grids(dataset)
    return StoreHeader(
        corpus=dataset.name,
        split="train",
        control_hz=dataset.control_hz,
        source="synthetic",
        source_fingerprint="synthetic",
        source_episodes=lengths.episodes,
        episodes_per_shard=64,
        min_frames=lengths.least,
        image_specs={view: ImageSpec(size=dataset.image_sizes[view]).to_dict() for view in grids},
        grids=grids,
        vision_fingerprint=_FINGERPRINT,
        codebook_size=CODEBOOK_SIZE,
        block_steps=block_steps(grids),
    )


# ----------------------------------------------------------------------------
# Assets, decoders, and a whole policy of them. Weights are random, so what the policy does means
# nothing; how long it takes does.

_CHUNK = 10  # steps
_SIDES = {"image": 32, "wrist_image": 16}  # pixels; 4 x 4 and 2 x 2 codes
_CORPUS = "synthetic"


def make_assets(
    statistics: Mapping[str, ActionStatistics], headers: Sequence[StoreHeader] = ()
) -> Assets:
    """Text and FAST tokenizers fitted to the synthetic data, and the statistics given.

    The vision tokenizer has no weights: the codes of the stores are random.

    Args:
      statistics: of actions, by corpus.
      headers: of the stores, whose image specs are taken.
    """
    rng = np.random.default_rng(0)
    chunks = np.stack([smooth_actions(rng, _CHUNK) for _ in range(2000)])
    action = FastTokenizer.fit(chunks, scale=10.0, vocabulary_size=2048)
    text = SentencePieceTextTokenizer.fit(_INSTRUCTIONS, 512)
    vocabulary = Vocabulary.from_scratch(
        text.vocabulary_size, CODEBOOK_SIZE, action.vocabulary_size
    )
    vision = LazyVisionTokenizer(
        "none", fingerprint=_FINGERPRINT, codebook_size=CODEBOOK_SIZE, factor=_FACTOR
    )
    return Assets(vocabulary, text, vision, action, image_specs(headers), statistics)


def random_decoder(name: str, rng: np.random.Generator, **changes: Any) -> tuple[Decoder, Any]:
    """A float32 decoder and its parameters: normal matrices, norms of 1, drawn by NumPy.

    Args:
      name: preset.
      rng: of the parameters.
      **changes: fields of the preset to change.
    """
    model = Decoder(preset(name, dtype="float32", remat="none", dropout=0.0, **changes))
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens, tokens))["params"]

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if path[-1].key == "scale":
            return jnp.ones(leaf.shape, leaf.dtype)
        return jnp.asarray(0.05 * rng.standard_normal(leaf.shape, dtype=np.float32), leaf.dtype)

    return model, jax.tree_util.tree_map_with_path(draw, shapes)


def random_policy(preset: str, *, seed: int = 0) -> Policy:
    """A video policy of two small cameras and FAST chunks, around the decoder ``preset``."""
    zeros, ones, minus = ((value,) * _DIMENSIONS for value in (0.0, 1.0, -1.0))
    statistics = ActionStatistics(mean=zeros, std=ones, q01=minus, q99=ones, count=1)
    assets = make_assets({_CORPUS: statistics})
    ids = assets.vocabulary
    rng = np.random.default_rng(seed)
    model, params = random_decoder(preset, rng, vocab_size=ids.size, pad_id=ids.pad)
    config = dataclasses.replace(PRESETS["quickstart"], codebook_size=CODEBOOK_SIZE)
    assets = dataclasses.replace(
        assets,
        vision=VisionTokenizer(config, init_variables(config, seed)),
        image_specs={
            view: ImageSpec(size=(side, side), factor=config.factor, min_pixels=side * side)
            for view, side in _SIDES.items()
        },
        model=dataclasses.asdict(model.config),
    )
    grids = {view: (side // config.factor, side // config.factor) for view, side in _SIDES.items()}
    record = TaskRecord(
        task="policy_video",
        frames=2,
        chunk_size=_CHUNK,
        frame_spacing=0,
        sequence_length=512,
        views=tuple(_SIDES),
        corpora={_CORPUS: CorpusRecord(control_hz=10.0, frame_spacing=10, grids=grids)},
    )
    return Policy(LoadedModel(pathlib.Path("random"), assets, record, model, params))


# ----------------------------------------------------------------------------
# A policy of the embedded tabletop in held-out scenes.


@dataclasses.dataclass(frozen=True)
class PolicyCall:
    """One call of the plain policy.

    Attributes:
      observation: of the robot.
      session: the episode before the call; repeated calls get copies.
      ids: int32 [n] chosen.
    """

    observation: Observation
    session: Session
    ids: np.ndarray


def record_calls(policy: Policy, first_seed: int = 0) -> Iterator[list[PolicyCall]]:
    """The calls of one episode after the other, each executed chunk by chunk to its end."""
    simulator = TabletopSimulator(first_seed=first_seed)
    for index in itertools.count():
        simulator.reset(trial_of(index))
        session, ended, calls = policy.start(), False, []
        while not ended:
            observation = simulator.observe()
            # The session as it is before the call, without the cached prefix: the options keep
            # weights and caches of other kinds.
            before = dataclasses.replace(session, cached_prefix=None)
            (chunk,) = policy.act([observation], [session])
            calls.append(PolicyCall(observation, before, session.last_ids))
            ended = any(simulator.step(a) is StepResult.ENDED for a in chunk.actions)
        yield calls
