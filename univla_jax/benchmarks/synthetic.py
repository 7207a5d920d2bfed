"""Synthetic stores, policies and decode problems of real sizes, for the benchmarks."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from univla_jax.assets import Assets
from univla_jax.benchmarks.measure import Spent, timed
from univla_jax.data.datasets import DATASETS, DatasetConfig
from univla_jax.data.token_record import TokenizedEpisode, block_steps
from univla_jax.data.token_store import StoreHeader, TokenStoreWriter
from univla_jax.inference import int8
from univla_jax.inference.decode_step import DecodeState, Generated
from univla_jax.inference.loaded_model import LoadedModel
from univla_jax.inference.policy import Policy
from univla_jax.inference.prefix_cache import GenerationRules, PrefixCache
from univla_jax.inference.sampler import Sampler
from univla_jax.models.decoder import Decoder, compute_logits
from univla_jax.models.decoder_config import DecoderConfig, preset
from univla_jax.normalization import ActionStatistics
from univla_jax.tasks.record import CorpusRecord, TaskRecord
from univla_jax.tokenizers.fast import FastTokenizer
from univla_jax.tokenizers.image import ImageSpec
from univla_jax.tokenizers.text import SentencePieceTextTokenizer
from univla_jax.tokenizers.vision import PRESETS, VisionTokenizer
from univla_jax.tokenizers.vision_vq import init_variables
from univla_jax.tokenizers.vocabulary import Vocabulary

# ----------------------------------------------------------------------------
# Token stores and assets of random content but real sizes, for the benchmarks.
#
# Axes: T steps, h/w code grid, A action dimensions.


CODEBOOK = 32_768
_FACTOR = 8
_ACTIONS = 7
_INSTRUCTIONS = [
    f"{verb} the {color} {thing} {place}"
    for verb in ("pick up", "push", "place", "move")
    for color in ("red", "blue", "black", "white")
    for thing in ("bowl", "mug", "block", "plate")
    for place in ("on the plate", "into the drawer", "next to the stove")
]


@dataclasses.dataclass(frozen=True)
class Lengths:
    """How long the episodes of a corpus are: normal in the logarithm.

    Attributes:
      episodes: how many.
      median: steps.
      spread: standard deviation of the logarithm.
      least: shortest kept.
    """

    episodes: int
    median: int
    spread: float = 0.35
    least: int = 10

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """int [episodes]."""
        drawn = self.median * np.exp(rng.normal(0, self.spread, self.episodes))
        return np.maximum(drawn.astype(int), self.least)


def grids(corpus: DatasetConfig, views: Sequence[str] = ()) -> dict[str, tuple[int, int]]:
    """Code grid (h, w) of the corpus' views at its own sizes."""
    chosen = views or tuple(corpus.image_sizes)
    return {
        v: (corpus.image_sizes[v][0] // _FACTOR, corpus.image_sizes[v][1] // _FACTOR)
        for v in chosen
    }


class SyntheticEpisodes:
    """Episodes by number; all codes are 0 and take no cached."""

    def __init__(self, corpus: str, lengths: Lengths, *, views: Sequence[str] = ()) -> None:
        """Draws the lengths; ``views`` are all by default."""
        self._corpus = DATASETS[corpus]
        self._grids = grids(self._corpus, views)
        self._steps = lengths.draw(np.random.default_rng(len(corpus)))
        self.fingerprint = f"synthetic {corpus}"

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self._steps)

    def __getitem__(self, index: int) -> TokenizedEpisode:
        """Episode ``index``."""
        steps = int(self._steps[index])
        zero = np.zeros((), np.uint16)
        codes = {v: np.broadcast_to(zero, (steps, *grid)) for v, grid in self._grids.items()}
        return _episode(self._corpus, index, codes, np.zeros((steps, 0), np.float32))


def write_store(
    folder: pathlib.Path,
    corpus: str,
    lengths: Lengths,
    views: Sequence[str] = (),
    *,
    one_code: bool = False,
) -> None:
    """Writes a token store of random codes and smooth actions of seven dimensions.

    Args:
      folder: of the store.
      corpus: name of the row.
      lengths: of its episodes.
      views: cameras; all by default.
      one_code: True writes a single code per frame, in as many records as the whole frames would
        take, for stores of which only the size of their index matters.
    """
    row, rng = DATASETS[corpus], np.random.default_rng(0)
    sizes = grids(row, views)
    block = block_steps(sizes)
    sizes = dict.fromkeys(sizes, (1, 1)) if one_code else sizes
    header = _header(row, sizes, lengths.episodes, block)
    writer = TokenStoreWriter(folder, header)
    steps = lengths.draw(rng)
    for number in range(header.num_shards):
        with writer.shard(number) as shard:
            for index in writer.source_range(number):
                codes = {
                    v: rng.integers(0, CODEBOOK, (steps[index], *grid), np.uint16)
                    for v, grid in sizes.items()
                }
                actions = smooth_actions(rng, int(steps[index]))
                shard.add(_episode(row, index, codes, actions))
    writer.finish()


def smooth_actions(rng: np.random.Generator, steps: int) -> np.ndarray:
    """float32 [T, 7] in -1...1: slow movement, and a gripper that opens and closes."""
    knots = rng.normal(0, 0.4, (steps // 8 + 2, _ACTIONS))
    places = np.linspace(0, len(knots) - 1, steps)
    curves = [np.interp(places, np.arange(len(knots)), column) for column in knots.T]
    actions = np.clip(np.stack(curves, 1), -1, 1).astype(np.float32)
    actions[:, -1] = np.where(actions[:, -1] > 0, 1, -1)
    return actions


def make_assets(statistics: Mapping, chunk: int = 10) -> Assets:
    """Text and FAST tokenizers fitted to the synthetic data, and the statistics given."""
    rng = np.random.default_rng(0)
    chunks = np.stack([smooth_actions(rng, chunk) for _ in range(2000)])
    action = FastTokenizer.fit(chunks, scale=10.0, vocabulary_size=2048)
    text = SentencePieceTextTokenizer.fit(_INSTRUCTIONS, 512)
    vocabulary = Vocabulary.from_scratch(text.vocabulary_size, CODEBOOK, action.vocabulary_size)
    return Assets(vocabulary, text, None, action, image_specs={}, statistics=statistics)


def _episode(
    row: DatasetConfig, index: int, codes: Mapping[str, np.ndarray], actions: np.ndarray
) -> TokenizedEpisode:
    instruction = _INSTRUCTIONS[index % len(_INSTRUCTIONS)]
    return TokenizedEpisode(instruction, codes, actions, row.control_hz, row.name, str(index))


def _header(
    row: DatasetConfig, sizes: Mapping[str, tuple[int, int]], episodes: int, block: int
) -> StoreHeader:
    return StoreHeader(
        corpus=row.name,
        split="train",
        control_hz=row.control_hz,
        source="synthetic",
        source_fingerprint="synthetic",
        source_episodes=episodes,
        episodes_per_shard=64,
        min_frames=row.min_frames,
        image_specs={view: {"size": list(row.image_sizes[view])} for view in sizes},
        grids=sizes,
        vision_fingerprint="synthetic",
        codebook_size=CODEBOOK,
        block_steps=block,
    )


# ----------------------------------------------------------------------------
# What the decode benchmark runs, each piece with the tokens it gives.
#
# Axes: B rows, S prompt tokens, N new tokens.


_OPENING, _TURN = 20, 600  # tokens of an instruction and of one observation in the episode


@dataclasses.dataclass(frozen=True)
class DecodeProblem:
    """One decoder with random weights, and what it continues.

    Attributes:
      sampler: the decoder.
      allowed: int32 [R] ids that may be chosen.
      prompt: int32 [B, S].
      count: N.
    """

    sampler: Sampler
    allowed: np.ndarray
    prompt: np.ndarray
    count: int


def make_problem(
    prompt: int, count: int, *, actions: int = 2048, name: str = "small", seed: int = 0
) -> DecodeProblem:
    """The preset with the action ids of Emu3's vocabulary, batch 1, float32.

    Args:
      prompt: S.
      count: N.
      actions: number of action ids.
      name: preset of the decoder.
      seed: of weights and prompt.
    """
    rng = np.random.default_rng(seed)
    model, params = random_decoder(name, rng)
    size = model.config.vocab_size
    last = (model.config.pad_id or size) - 1  # action ids end before the pad id
    allowed = np.arange(last - min(actions, last) + 1, last + 1, dtype=np.int32)
    tokens = rng.integers(0, min(size, last), (1, prompt)).astype(np.int32)
    return DecodeProblem(Sampler(model, params), allowed, tokens, count)


def random_decoder(name: str, rng: np.random.Generator, **changes: Any) -> tuple[Decoder, Any]:
    """A preset with some fields changed, in float32, with normal matrices and norms of 1.

    NumPy draws them: nothing is compiled.
    """
    model = Decoder(preset(name, dtype="float32", remat="none", dropout=0.0, **changes))
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens, tokens))["params"]

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if path[-1].key == "scale":
            return jnp.ones(leaf.shape, leaf.dtype)
        return jnp.asarray(0.05 * rng.standard_normal(leaf.shape, dtype=np.float32), leaf.dtype)

    return model, jax.tree_util.tree_map_with_path(draw, shapes)


def prefill(problem: DecodeProblem, sampler: Sampler | None = None) -> DecodeState:
    """The prompt read, with room for what follows."""
    slots = problem.prompt.shape[1] + problem.count + 8
    state = (sampler or problem.sampler).prefill(problem.prompt, slots=slots)
    jax.block_until_ready(state.batch)
    return state


def decode(problem: DecodeProblem, state: DecodeState, sampler: Sampler | None = None) -> Generated:
    """N tokens; ``state`` is consumed."""
    generated, _ = (sampler or problem.sampler).generate(
        state, max_new_tokens=problem.count, allowed=problem.allowed
    )
    jax.block_until_ready(generated.tokens)
    return generated


def decode_drafted(problem: DecodeProblem, state: DecodeState, draft_source: np.ndarray) -> tuple:
    """The same N tokens with drafts draft_source from int32 [B, H]; also the steps it took."""
    generated, _, steps = problem.sampler.generate_speculative(
        state, max_new_tokens=problem.count, allowed=problem.allowed, draft_source=draft_source
    )
    return np.asarray(generated.tokens), steps


def bytes_per_token(config: DecoderConfig, rows: int, slots: int, params: Any) -> int:
    """What one decode step must read: layers, the allowed rows of the head, and the cache."""
    layers = sum(x.nbytes for x in jax.tree.leaves(params["stack"]))
    item = jnp.dtype(config.dtype).itemsize
    head = rows * config.hidden_size * item
    cache = 2 * config.num_layers * slots * config.num_kv_heads * config.head_dim * item
    return layers + head + cache


def episode(problem: DecodeProblem, kept: str, calls: int = 4) -> list[tuple[Spent, np.ndarray]]:
    """Calls of a video policy with a window of two; time and ids of each.

    Args:
      problem: its prompt is cut into observations.
      kept: ``"nothing"`` reads every prompt anew; ``"cache"`` keeps what was read for the call
        before; ``"ahead"`` also reads what is known of the next prompt between calls, not timed.
      calls: how many.
    """
    rules = GenerationRules(problem.allowed, int(problem.allowed[-1]), problem.count)
    whole = _OPENING + 2 * _TURN + problem.count
    prefix_cache = PrefixCache(problem.sampler, rules, usual_lengths=(_TURN + 1, whole))
    prefix_cache.warmup(1)
    rng = np.random.default_rng(1)
    turns = rng.integers(0, _some_ids(problem), (calls, _TURN)).astype(np.int32)
    opening = problem.prompt[0, :_OPENING]
    window: list[np.ndarray] = []
    cached, results = None, []
    for turn in turns:
        window = [*window[-2:], turn]
        prompt = np.concatenate([opening, *window])
        (answer,), spent = timed(lambda p=prompt, m=cached: prefix_cache.complete([p], [m]))
        cached = None if kept == "nothing" else answer.cached_prefix
        results.append((spent, answer.ids))
        window.append(answer.ids)
        prefix = np.concatenate([opening, *window[-2:]])
        if kept == "ahead" and prefix_cache.should_prefill(prefix, cached):
            (cached,) = prefix_cache.prefill_ahead([prefix])
            jax.block_until_ready(cached.cache)  # done before the next call, so not in its time
    return results


def rollout(
    problem: DecodeProblem, frames: int, codes: int, rows: int, *, anew: bool
) -> tuple[Spent, Spent, np.ndarray]:
    """Frames of a world model over one cache, or with all read anew for each frame.

    Args:
      problem: the allowed ids stand for visual codes.
      frames: frames imagined.
      codes: codes of each.
      rows: episodes imagined together.
      anew: whether each frame starts with a prefill of all before it.

    Returns:
      time of reading, time of choosing, and the ids [B, frames * codes].
    """
    sampler, rng = problem.sampler, np.random.default_rng(2)
    known = rng.integers(0, _some_ids(problem), (rows, _OPENING + codes + 10)).astype(np.int32)
    between = np.tile(rng.integers(0, _some_ids(problem), 9).astype(np.int32), (rows, 1))
    slots = known.shape[1] + frames * (codes + between.shape[1])
    reading, choosing, chosen, state = [], [], [], None
    for frame in range(frames):

        def read(state=state, frame=frame, known=known):
            if frame and not anew:
                state = sampler.extend(state, between)
            else:
                state = sampler.prefill(known, slots=slots)
            jax.block_until_ready(state.batch)
            return state

        state, spent = timed(read)
        reading.append(spent)

        def choose(state=state):
            generated, state = sampler.generate(
                state, max_new_tokens=codes, allowed=problem.allowed
            )
            return np.asarray(generated.tokens), state

        (ids, state), spent = timed(choose)
        choosing.append(spent)
        chosen.append(ids)
        known = np.concatenate([known, ids, between], axis=1)
    return _total(reading), _total(choosing), np.concatenate(chosen, axis=1)


def agreement(problem: DecodeProblem, other: Sampler) -> float:
    """Share of the prompt's positions at which both choose the same allowed id."""
    places = np.arange(problem.prompt.shape[1])[None]

    def choices(sampler: Sampler) -> np.ndarray:
        params = int8.dequantize_params(sampler.params, np.float32)
        hidden, _ = sampler.model.apply({"params": params}, problem.prompt, places)
        logits = compute_logits(
            hidden, int8.dequantized_rows(params["head"], problem.allowed, np.float32)
        )
        return np.asarray(jnp.argmax(logits, axis=-1))

    return float(np.mean(choices(problem.sampler) == choices(other)))


def _some_ids(problem: DecodeProblem) -> int:
    return min(1000, problem.sampler.model.config.vocab_size)


def _total(times: list[Spent]) -> Spent:
    return Spent(sum(t.wall for t in times), sum(t.processor for t in times))


# ----------------------------------------------------------------------------
# A whole policy with random weights and real sizes: tokenizers, vocabulary, decoder, statistics.
#
# It sees two small cameras and writes FAST chunks of ten steps and seven dimensions. Weights are
# random, so what it does means nothing; how long it takes does.


CHUNK, DIMENSIONS = 10, 7
_SIDES = {"image": 32, "wrist_image": 16}  # pixels; 4 x 4 and 2 x 2 codes
_CORPUS = "synthetic"


def random_policy(preset: str, *, seed: int = 0) -> Policy:
    """A video policy around the decoder ``preset`` with as many ids as it needs."""
    one = (1.0,) * DIMENSIONS
    minus = (-1.0,) * DIMENSIONS
    statistics = ActionStatistics(mean=(0.0,) * DIMENSIONS, std=one, q01=minus, q99=one, count=1)
    assets = make_assets({_CORPUS: statistics}, CHUNK)
    ids = assets.vocabulary
    rng = np.random.default_rng(seed)
    model, params = random_decoder(preset, rng, vocab_size=ids.size, pad_id=ids.pad)
    config = dataclasses.replace(PRESETS["quickstart"], codebook_size=CODEBOOK)
    assets = dataclasses.replace(
        assets,
        vision=VisionTokenizer(config, init_variables(config, seed)),
        image_specs={
            view: ImageSpec(size=(side, side), factor=config.factor, min_pixels=side * side)
            for view, side in _SIDES.items()
        },
        model=dataclasses.asdict(model.config),
    )
    record = _task_record(config.factor)
    return Policy(LoadedModel(pathlib.Path("random"), assets, record, model, params))


def _task_record(factor: int) -> TaskRecord:
    grids = {view: (side // factor, side // factor) for view, side in _SIDES.items()}
    return TaskRecord(
        task="policy_video",
        frames=2,
        chunk_size=CHUNK,
        frame_spacing=0,
        sequence_length=512,
        views=tuple(_SIDES),
        corpora={_CORPUS: CorpusRecord(control_hz=10.0, frame_spacing=10, grids=grids)},
    )
