"""Time of prefill and of each decoded token, beside transformers' Emu3 and beside memory bandwidth.

    python -m univla_jax.benchmarks.decode_speed [--parts=decode,reuse,options] [--json=FILE]
    python -m univla_jax.benchmarks.decode_speed --parts=decode --prompt=200 --count=10 \\
        --repeats=1                                                             # quick
    python -m univla_jax.benchmarks.decode_speed --nopeer                       # without PyTorch

* ``decode``: one prompt and its action tokens, with the same weights in
  ``Emu3ForCausalLM.generate`` (key-value cache, sdpa, a mask on the logits). "Bytes" is what a step
  must read (layers, the head rows of the allowed ids, the cache) at the speed at which this machine
  copies memory.
* ``reuse``: calls of an episode over a cached prefix, and a world model's rollout over one cache,
  beside prefill without a cache.
* ``options``: int8 weights and speculative decoding, beside plain float32.

Hidden size 512, 8 layers, 8 heads (2 of keys), mlp 1,792, 184,622 ids, float32, random weights; a
prompt of 1,300 tokens and 50 action tokens, batch 1. What is compared alternates in one process;
every figure is the best of ``--repeats``. The peer needs ``pip install 'univla_jax[parity]'``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging

from univla_jax import cli
from univla_jax.benchmarks.harness import (
    Elapsed,
    copy_bandwidth,
    fastest,
    print_figures,
    random_decoder,
    save,
    timed,
)
from univla_jax.benchmarks.transformers_peer import PEER, greedy_generator
from univla_jax.errors import UserError
from univla_jax.inference.decode_step import DecodeState, Generated
from univla_jax.inference.prefix_cache import GenerationRules, PrefixCache
from univla_jax.inference.sampler import Sampler
from univla_jax.inference.speculative import Drafts
from univla_jax.models import quantized_weights
from univla_jax.models.decoder import compute_logits

PRESET = cli.string_flag("preset", "decoder", default="small")
PROMPT = flags.DEFINE_integer("prompt", 1300, "Prompt tokens")
COUNT = flags.DEFINE_integer("count", 50, "New tokens")
REPEATS = flags.DEFINE_integer(
    "repeats", 3, "How often everything is timed; the fastest counts", allow_override=True
)
PARTS = flags.DEFINE_list(
    "parts", ["decode", "reuse", "options"], "What is measured", allow_override=True
)


@dataclasses.dataclass(frozen=True)
class DecodeProblem:
    """A decoder with random weights, and a prompt to continue.

    Attributes:
      sampler: the decoder.
      allowed: int32 [R] ids that may be chosen.
      prompt: int32 [B, S].
      count: N, number of new tokens.
    """

    sampler: Sampler
    allowed: np.ndarray
    prompt: np.ndarray
    count: int

    @classmethod
    def random(cls, preset: str, prompt: int, count: int, *, actions: int = 2048) -> DecodeProblem:
        """The preset with the action ids of Emu3's vocabulary, batch 1, float32.

        Args:
          preset: of the decoder.
          prompt: S.
          count: N.
          actions: number of action ids.
        """
        model, params = random_decoder(preset, np.random.default_rng(0))
        return cls.around(Sampler(model, params), prompt, count, actions=actions)

    @classmethod
    def around(
        cls, sampler: Sampler, prompt: int, count: int, batch: int = 1, *, actions: int = 2048
    ) -> DecodeProblem:
        """Random prompts [B, S] of a decoder, and the action ids of Emu3's vocabulary."""
        config = sampler.model.config
        last = (config.pad_id or config.vocab_size) - 1  # action ids end before the pad id
        allowed = np.arange(last - min(actions, last) + 1, last + 1, dtype=np.int32)
        tokens = np.random.default_rng(0).integers(0, last, (batch, prompt)).astype(np.int32)
        return cls(sampler, allowed, tokens, count)

    def prefill(self, sampler: Sampler | None = None) -> DecodeState:
        """The cache of the prompt, with room for what follows."""
        slots = self.prompt.shape[1] + self.count + 8
        state = (sampler or self.sampler).prefill(self.prompt, slots=slots)
        jax.block_until_ready(state.batch)
        return state

    def decode(self, state: DecodeState, sampler: Sampler | None = None) -> Generated:
        """N tokens; ``state`` is consumed."""
        generated, _ = (sampler or self.sampler).generate(
            state, max_new_tokens=self.count, allowed=self.allowed
        )
        jax.block_until_ready(generated.tokens)
        return generated

    def decode_speculative(
        self, state: DecodeState, draft_source: np.ndarray
    ) -> tuple[np.ndarray, int]:
        """The same N tokens with drafts from int32 [B, H], and the number of decode steps."""
        generated, _ = self.sampler.generate(
            state,
            max_new_tokens=self.count,
            allowed=self.allowed,
            drafts=Drafts(draft_source, period=draft_source.shape[1]),
            block=4,
        )
        return np.asarray(generated.tokens), int(generated.steps)

    def random_ids(self, rng: np.random.Generator, *shape: int) -> np.ndarray:
        """int32 ids of the given shape."""
        size = min(1000, self.sampler.model.config.vocab_size)
        return rng.integers(0, size, shape).astype(np.int32)


# ----------------------------------------------------------------------------
# Decoding one prompt.


def measure_decoding(problem: DecodeProblem, repeats: int, *, peer: bool) -> dict[str, Any]:
    """Prefill and decoding, beside the peer and beside memory bandwidth."""
    sampler = problem.sampler
    config, params, count = sampler.model.config, sampler.params, problem.count
    generate = greedy_generator(config, params, problem.allowed) if peer else None
    times: dict[str, list[Elapsed]] = {}
    ours = theirs = None
    for turn in range(repeats + 1):  # the first one compiles
        state, prefill = timed(problem.prefill)
        generated, decode = timed(lambda s=state: problem.decode(s))
        ours = np.asarray(generated.tokens)
        spent = {"prefill": prefill, "decode": decode, "call": prefill + decode}
        if generate is not None:
            _, first = timed(lambda: generate(problem.prompt, 1))
            theirs, call = timed(lambda: generate(problem.prompt, count))
            spent |= {"peer_first": first, "peer_call": call}
        for name, value in spent.items() if turn else ():
            times.setdefault(name, []).append(value)
    best = {name: fastest(own) for name, own in times.items()}
    step_bytes = bytes_per_token(problem)
    bandwidth = copy_bandwidth()
    token_ms, token_processor_ms = (
        1e3 * seconds / count for seconds in dataclasses.astuple(best["decode"])
    )
    figures: dict[str, Any] = {
        "prefill_ms": 1e3 * best["prefill"].wall,
        "decode_ms_per_token": token_ms,
        "decode_processor_ms_per_token": token_processor_ms,
        "call_ms": 1e3 * best["call"].wall,
        "bytes_per_token": step_bytes,
        "copy_bytes_per_second": bandwidth,
        "bytes_ms_per_token": 1e3 * step_bytes / bandwidth,
        "decode_over_bytes": token_ms * bandwidth / (1e3 * step_bytes),
    }
    if theirs is None:
        return figures
    # The peer does not separate prefill from decoding, but its first token comes with the prefill.
    first, call = best["peer_first"], best["peer_call"]
    peer_token_ms = 1e3 * (call.wall - first.wall) / (count - 1)
    peer_processor_ms = 1e3 * (call.processor - first.processor) / (count - 1)
    return figures | {
        "peer_decode_ms_per_token": peer_token_ms,
        "peer_decode_processor_ms_per_token": peer_processor_ms,
        "peer_call_ms": 1e3 * call.wall,
        "decode_times_faster": peer_token_ms / token_ms,
        "decode_times_less_processor": peer_processor_ms / token_processor_ms,
        "call_times_faster": call.wall / best["call"].wall,
        "call_times_less_processor": call.processor / best["call"].processor,
        "equal_tokens": float(np.mean(ours == theirs)),
    }


def bytes_per_token(problem: DecodeProblem) -> int:
    """Bytes a decode step must read: layers, the head rows of the allowed ids, and the cache."""
    config = problem.sampler.model.config
    layers = quantized_weights.num_bytes(problem.sampler.params["stack"])
    item = config.compute_dtype.itemsize
    head = len(problem.allowed) * config.hidden_size * item
    slots = problem.prompt.shape[1] + problem.count
    cache = 2 * config.num_layers * slots * config.num_kv_heads * config.head_dim * item
    return layers + head + len(problem.prompt) * cache


# ----------------------------------------------------------------------------
# Reusing caches.

_INSTRUCTION, _OBSERVATION = 20, 600  # tokens of an episode's prompts
_FRAMES, _CODES, _EPISODES = 6, 64, 8  # of a rollout


def measure_reuse(problem: DecodeProblem, repeats: int) -> dict[str, Any]:
    """Calls of an episode and a rollout with kept caches, beside prefill without a cache."""
    kinds = ("uncached", "cached", "ahead")
    runs: dict[str, list] = {kind: [] for kind in kinds}
    for _ in range(repeats):
        for kind in kinds:
            runs[kind].append(run_episode(problem, kind))
    figures: dict[str, Any] = {}
    later: dict[str, list[float]] = {}
    for kind, own in runs.items():
        calls = [fastest([run[call][0] for run in own]).wall for call in range(len(own[0]))]
        figures[f"call_ms_{kind}"] = [round(1e3 * seconds, 1) for seconds in calls]
        later[kind] = calls[1:]  # the first call has nothing to reuse
    uncached, ahead = (1e3 * float(np.median(later[kind])) for kind in ("uncached", "ahead"))
    figures |= {
        "second_call_cached_times_faster": later["uncached"][0] / later["cached"][0],
        "later_calls_ms_uncached": uncached,
        "later_calls_ms_ahead": ahead,
        "later_calls_ahead_times_faster": uncached / ahead,
        "calls_give_equal_tokens": all(
            np.array_equal(ids, first)
            for own in runs.values()
            for (_, ids), (_, first) in zip(own[0], runs["uncached"][0])
        ),
    }
    rollouts: dict[bool, list[tuple[Elapsed, Elapsed, np.ndarray]]] = {False: [], True: []}
    for turn in range(repeats + 1):  # the first one compiles
        for uncached, own in rollouts.items():
            run = run_rollout(problem, _FRAMES, _CODES, _EPISODES, uncached=uncached)
            own += [run] if turn else []
    prefill = {key: fastest([p for p, _, _ in own]) for key, own in rollouts.items()}
    whole = {key: fastest([p + d for p, d, _ in own]) for key, own in rollouts.items()}
    return figures | {
        "rollout_episodes": _EPISODES,
        "rollout_prefill_ms": 1e3 * prefill[False].wall,
        "rollout_prefill_uncached_ms": 1e3 * prefill[True].wall,
        "rollout_ms": 1e3 * whole[False].wall,
        "rollout_uncached_ms": 1e3 * whole[True].wall,
        "rollout_times_faster": whole[True].wall / whole[False].wall,
        "rollout_times_less_processor": whole[True].processor / whole[False].processor,
        "rollout_equal_tokens": float(np.mean(rollouts[True][0][2] == rollouts[False][0][2])),
    }


def run_episode(
    problem: DecodeProblem, kind: str, calls: int = 4
) -> list[tuple[Elapsed, np.ndarray]]:
    """Time and ids of each call of a video policy with a window of two observations.

    Args:
      problem: its prompt is cut into an instruction and observations.
      kind: ``"uncached"`` prefills every prompt whole; ``"cached"`` keeps the prefix of the call
        before; ``"ahead"`` also prefills what is known of the next prompt between calls, untimed.
      calls: how many.
    """
    rules = GenerationRules(problem.allowed, int(problem.allowed[-1]), problem.count)
    whole = _INSTRUCTION + 2 * _OBSERVATION + problem.count
    prefix_cache = PrefixCache(problem.sampler, rules, usual_lengths=(_OBSERVATION + 1, whole))
    prefix_cache.warmup(1)
    observations = problem.random_ids(np.random.default_rng(1), calls, _OBSERVATION)
    instruction = problem.prompt[0, :_INSTRUCTION]
    window: list[np.ndarray] = []
    cached, results = None, []
    for observation in observations:
        window = [*window[-2:], observation]
        prompt = np.concatenate([instruction, *window])
        (completion,), spent = timed(lambda p=prompt, c=cached: prefix_cache.complete([p], [c]))
        cached = None if kind == "uncached" else completion.cached_prefix
        results.append((spent, completion.ids))
        window.append(completion.ids)
        prefix = np.concatenate([instruction, *window[-2:]])
        if kind == "ahead" and prefix_cache.should_prefill(prefix, cached):
            (cached,) = prefix_cache.prefill_ahead([prefix])
            jax.block_until_ready(cached.cache)  # done before the next call, so not in its time
    return results


def run_rollout(
    problem: DecodeProblem, frames: int, codes: int, episodes: int, *, uncached: bool
) -> tuple[Elapsed, Elapsed, np.ndarray]:
    """A world model's frames over one cache, or with a prefill of all before for each frame.

    Args:
      problem: its allowed ids stand for visual codes.
      frames: number of imagined frames.
      codes: codes of each.
      episodes: B, imagined together.
      uncached: whether each frame starts with a prefill.

    Returns:
      time of prefill, time of decoding, and the ids [B, frames * codes].
    """
    sampler, rng = problem.sampler, np.random.default_rng(2)
    tokens = problem.random_ids(rng, episodes, _INSTRUCTION + codes + 10)
    between = np.tile(problem.random_ids(rng, 9), (episodes, 1))  # layout tokens of a frame
    slots = tokens.shape[1] + frames * (codes + between.shape[1])
    prefill_time = decode_time = Elapsed()
    chosen, state = [], None
    for frame in range(frames):

        def prefill(state=state, frame=frame, tokens=tokens):
            if frame and not uncached:
                state = sampler.extend(state, between)
            else:
                state = sampler.prefill(tokens, slots=slots)
            jax.block_until_ready(state.batch)
            return state

        def decode(state):
            generated, state = sampler.generate(
                state, max_new_tokens=codes, allowed=problem.allowed
            )
            return np.asarray(generated.tokens), state

        state, spent = timed(prefill)
        prefill_time += spent
        (ids, state), spent = timed(lambda s=state: decode(s))
        decode_time += spent
        chosen.append(ids)
        tokens = np.concatenate([tokens, ids, between], axis=1)
    return prefill_time, decode_time, np.concatenate(chosen, axis=1)


# ----------------------------------------------------------------------------
# Options.


def measure_options(problem: DecodeProblem, repeats: int) -> dict[str, Any]:
    """int8 weights and speculative decoding with perfect drafts, beside plain float32."""
    params = problem.sampler.params
    quantized = Sampler(problem.sampler.model, quantized_weights.quantize_params(params))
    times: dict[str, list[Elapsed]] = {"float32": [], "int8": [], "speculative": []}
    for turn in range(repeats + 1):  # the first one compiles
        state = problem.prefill()
        plain, float32_time = timed(lambda s=state: problem.decode(s))
        tokens = np.asarray(plain.tokens)
        state = problem.prefill(quantized)
        int8_generated, int8_time = timed(lambda s=state: problem.decode(s, quantized))
        state = problem.prefill()
        (speculative, steps), speculative_time = timed(
            lambda s=state, t=tokens: problem.decode_speculative(s, t)
        )
        for own, spent in zip(times.values(), (float32_time, int8_time, speculative_time)):
            own += [spent] if turn else []
    return {
        "float32_bytes": quantized_weights.num_bytes(params),
        "int8_bytes": quantized_weights.num_bytes(quantized.params),
        **{f"{n}_ms_per_token": 1e3 * fastest(t).wall / problem.count for n, t in times.items()},
        "int8_same_choice": _agreement(problem, quantized),
        "int8_equal_tokens": float(np.mean(np.asarray(int8_generated.tokens) == tokens)),
        "speculative_steps": steps,
        "speculative_equal_tokens": float(np.mean(speculative == tokens)),
    }


def _agreement(problem: DecodeProblem, other: Sampler) -> float:
    """Share of the prompt's positions at which both choose the same allowed id."""
    positions = np.arange(problem.prompt.shape[1])[None]

    def choices(sampler: Sampler) -> np.ndarray:
        params = quantized_weights.dequantize_params(sampler.params, np.float32)
        hidden, _ = sampler.model.apply({"params": params}, problem.prompt, positions)
        head = quantized_weights.dequantized_rows(params["head"], problem.allowed, np.float32)
        return np.asarray(jnp.argmax(compute_logits(hidden, head), axis=-1))

    return float(np.mean(choices(problem.sampler) == choices(other)))


def main(argv: list[str]) -> None:
    """Runs the command."""
    del argv
    logging.set_verbosity(logging.WARNING)
    parts = {
        "decode": lambda: measure_decoding(problem, REPEATS.value, peer=PEER.value),
        "reuse": lambda: measure_reuse(problem, REPEATS.value),
        "options": lambda: measure_options(problem, REPEATS.value),
    }
    unknown = sorted(set(PARTS.value) - set(parts))
    if unknown:
        raise UserError(f"--parts: {unknown[0]!r}, expected some of {', '.join(parts)}")
    problem = DecodeProblem.random(PRESET.value, PROMPT.value, COUNT.value)
    report = {"backend": jax.default_backend(), "jax": jax.__version__}
    for part in PARTS.value:
        report[part] = parts[part]()
        print_figures(part, report[part])
    save(report)


if __name__ == "__main__":
    cli.run(main)
