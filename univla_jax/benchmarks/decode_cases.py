"""What the decode benchmark runs, each piece with the tokens it gives.

Axes: B rows, S prompt tokens, N new tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from univla_jax.benchmarks.clocks import Spent, timed
from univla_jax.inference import int8
from univla_jax.inference.continuer import Continuer, Rules
from univla_jax.inference.decode_state import DecodeState, Generated
from univla_jax.inference.sampler import Sampler
from univla_jax.models.decoder import Decoder, project
from univla_jax.models.presets import DecoderConfig, preset

_OPENING, _TURN = 20, 600  # tokens of an instruction and of one observation in the episode


@dataclasses.dataclass(frozen=True)
class Problem:
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
) -> Problem:
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
    return Problem(Sampler(model, params), allowed, tokens, count)


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


def prefill(problem: Problem, sampler: Sampler | None = None) -> DecodeState:
    """The prompt read, with room for what follows."""
    slots = problem.prompt.shape[1] + problem.count + 8
    state = (sampler or problem.sampler).prefill(problem.prompt, slots=slots)
    jax.block_until_ready(state.rows)
    return state


def decode(problem: Problem, state: DecodeState, sampler: Sampler | None = None) -> Generated:
    """N tokens; ``state`` is consumed."""
    generated, _ = (sampler or problem.sampler).generate(
        state, max_new_tokens=problem.count, allowed=problem.allowed
    )
    jax.block_until_ready(generated.tokens)
    return generated


def decode_drafted(problem: Problem, state: DecodeState, copied: np.ndarray) -> tuple:
    """The same N tokens with drafts copied from int32 [B, H]; also the steps it took."""
    generated, _, steps = problem.sampler.generate_drafted(
        state, max_new_tokens=problem.count, allowed=problem.allowed, copied=copied
    )
    return np.asarray(generated.tokens), steps


def bytes_per_token(config: DecoderConfig, rows: int, slots: int, params: Any) -> int:
    """What one decode step must read: layers, the allowed rows of the head, and the cache."""
    layers = sum(x.nbytes for x in jax.tree.leaves(params["stack"]))
    item = jnp.dtype(config.dtype).itemsize
    head = rows * config.hidden_size * item
    cache = 2 * config.num_layers * slots * config.num_kv_heads * config.head_dim * item
    return layers + head + cache


def episode(problem: Problem, kept: str, calls: int = 4) -> list[tuple[Spent, np.ndarray]]:
    """Calls of a video policy with a window of two; time and ids of each.

    Args:
      problem: its prompt is cut into observations.
      kept: ``"nothing"`` reads every prompt anew; ``"cache"`` keeps what was read for the call
        before; ``"ahead"`` also reads what is known of the next prompt between calls, not timed.
      calls: how many.
    """
    rules = Rules(problem.allowed, int(problem.allowed[-1]), problem.count)
    whole = _OPENING + 2 * _TURN + problem.count
    continuer = Continuer(problem.sampler, rules, lengths=(_TURN + 1, whole))
    continuer.warm(1)
    rng = np.random.default_rng(1)
    turns = rng.integers(0, _some_ids(problem), (calls, _TURN)).astype(np.int32)
    opening = problem.prompt[0, :_OPENING]
    window: list[np.ndarray] = []
    memory, results = None, []
    for turn in turns:
        window = [*window[-2:], turn]
        prompt = np.concatenate([opening, *window])
        (answer,), spent = timed(lambda p=prompt, m=memory: continuer.answer([p], [m]))
        memory = None if kept == "nothing" else answer.memory
        results.append((spent, answer.ids))
        window.append(answer.ids)
        prefix = np.concatenate([opening, *window[-2:]])
        if kept == "ahead" and continuer.worth_reading(prefix, memory):
            (memory,) = continuer.read_ahead([prefix])
            jax.block_until_ready(memory.cache)  # done before the next call, so not in its time
    return results


def rollout(
    problem: Problem, frames: int, codes: int, rows: int, *, anew: bool
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
            jax.block_until_ready(state.rows)
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


def agreement(problem: Problem, other: Sampler) -> float:
    """Share of the prompt's positions at which both choose the same allowed id."""
    places = np.arange(problem.prompt.shape[1])[None]

    def choices(sampler: Sampler) -> np.ndarray:
        params = int8.restored(sampler.params, np.float32)
        hidden, _ = sampler.model.apply({"params": params}, problem.prompt, places)
        logits = project(hidden, int8.rows(params["head"], problem.allowed, np.float32))
        return np.asarray(jnp.argmax(logits, axis=-1))

    return float(np.mean(choices(problem.sampler) == choices(other)))


def _some_ids(problem: Problem) -> int:
    return min(1000, problem.sampler.model.config.vocab_size)


def _total(times: list[Spent]) -> Spent:
    return Spent(sum(t.wall for t in times), sum(t.processor for t in times))
