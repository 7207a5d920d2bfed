"""Decoder calls and time of frames and action chunks with drafts, beside without.

    python -m univla_jax.benchmarks.draft_speed --world_model=DIR --source=RLDS --policy=DIR
    python -m univla_jax.benchmarks.draft_speed --policy=DIR --source=RLDS --recorded
    python -m univla_jax.benchmarks.draft_speed --preset=quickstart --sequences=1,2,4

Every frame and every chunk is made twice, in turns: token by token, and in blocks of drafts. Both
must be the same. Frames follow single frames of held-out episodes, one episode at a time; chunks
are those of a policy of the embedded tabletop in held-out scenes, with its observations and
histories, or with ``--recorded`` of any policy at the observations of held-out episodes, a chunk
apart. ``--source`` takes several datasets with commas. A call is one pass of the decoder over new
tokens after the prompt, of one token or of a block; the first token needs none. ``--preset`` times
calls of several tokens, drafts aside.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags, logging

from univla_jax import cli
from univla_jax.benchmarks.harness import (
    Elapsed,
    PolicyCall,
    print_figures,
    random_decoder,
    record_calls,
    save,
    timed,
)
from univla_jax.episode import Episode, Observation
from univla_jax.evaluation.imagined_episodes import ImagineConfig, valid_episodes
from univla_jax.inference.decode_step import DecodeState
from univla_jax.inference.imagination import WorldModel
from univla_jax.inference.policy import Policy
from univla_jax.inference.sampler import Sampler
from univla_jax.inference.sampling import GREEDY, Sampling

_TIMED_BLOCKS, _TIMED_IDS = (1, 2, 4, 8, 16, 32), 4096

WAYS = {
    "greedy": {"sampling": GREEDY},
    "sampled": {"sampling": Sampling(1.0)},
    "guided": {"sampling": GREEDY, "guidance": 1.5},
}

WORLD_MODEL = flags.DEFINE_string("world_model", "", "World model: checkpoint or workdir")
SOURCE = flags.DEFINE_string("source", "", "RLDS folders with held-out episodes, with commas")
CORPUS = flags.DEFINE_string("corpus", "tabletop", "Corpus of the episodes", allow_override=True)
SPLIT = flags.DEFINE_string("split", "val", "Split held out from training", allow_override=True)
POLICY = flags.DEFINE_string("policy", "", "Policy: checkpoint or workdir")
RECORDED = flags.DEFINE_bool(
    "recorded", False, "Chunks at the observations of --source instead of the tabletop's scenes"
)
FRAMES = flags.DEFINE_integer("frames", 1000, "Frames to imagine")
FIRST_FRAME = flags.DEFINE_integer("first_frame", 0, "Given frames left out, for runs in pieces")
IN_A_ROW = flags.DEFINE_integer("in_a_row", 3, "Frames imagined after each given one")
PROMPTS = flags.DEFINE_integer("prompts", 1000, "Action chunks to predict")
FIRST_SEED = flags.DEFINE_integer(
    "first_seed", 500, "First scene among those held out", allow_override=True
)
WAY = flags.DEFINE_multi_enum("way", list(WAYS), list(WAYS), "How frames and chunks are chosen")
PRESET = flags.DEFINE_string(
    "preset", "", "Decoder of which calls are timed by tokens", allow_override=True
)
PROMPT = flags.DEFINE_integer("prompt", 128, "With --preset: tokens cached", allow_override=True)
SEQUENCES = flags.DEFINE_list("sequences", ["1"], "With --preset: sequences decoded together")
BLOCK = flags.DEFINE_integer(
    "block",
    None,
    "Tokens decoded per call; by default what the platform's table says",
    allow_override=True,
)


class CallCounter:
    """Counts the calls of a sampler's decoder after prefill.

    Attributes:
      calls: so far.
    """

    def __init__(self, sampler: Sampler) -> None:
        """Counts from now on."""
        self._steps: list[jax.Array | int] = []
        generate, extend = sampler.generate, sampler.extend

        def counted_generate(*arguments: Any, **options: Any) -> Any:
            generated, state = generate(*arguments, **options)
            self._steps.append(generated.steps)
            return generated, state

        def counted_extend(*arguments: Any, **options: Any) -> Any:
            self._steps.append(1)
            return extend(*arguments, **options)

        sampler.generate, sampler.extend = counted_generate, counted_extend

    @property
    def calls(self) -> int:
        """Calls so far."""
        return sum(map(int, self._steps))


def compare_frames(
    model: WorldModel,
    given: Sequence[tuple[str, np.ndarray]],
    in_a_row: int,
    *,
    block: int | None = None,
    **way: Any,
) -> dict[str, Any]:
    """Frames after each given one, with drafts and without.

    Args:
      model: the world model.
      given: instruction and codes [h, w].
      in_a_row: frames after each.
      block: tokens per call, drafts included.
      **way: options of ``WorldModel.imagine``.

    Returns:
      number of frames, how many are the same, and per frame calls, milliseconds and their ratios.
    """
    counter, totals, same = CallCounter(model._sampler), _Totals(), 0
    for turn, (words, codes) in enumerate([given[0], *given]):  # the first one compiles
        own = []
        for name, size in (("plain", 1), ("drafts", block)):
            before = counter.calls
            imagined, spent = timed(
                lambda w=words, c=codes, s=size: model.imagine(
                    [w], c[None, None], in_a_row, block=s, **way
                )
            )
            own.append(imagined)
            if turn:
                totals.add(name, counter.calls - before, spent)
        same += int(np.sum(np.all(own[0] == own[1], axis=(0, 2, 3)))) if turn else 0
    count = len(given) * in_a_row
    return {"frames": count, "same": same, **totals.per(count, "frame")}


def compare_chunks(policies: dict[str, Policy], calls: Sequence[PolicyCall]) -> dict[str, Any]:
    """Chunks of the same observations, with drafts and without.

    Args:
      policies: "plain" and "drafts", of one checkpoint.
      calls: observation and session of each chunk.

    Returns:
      number of chunks, how many are the same, tokens per call, and calls and milliseconds per chunk
      with their ratios.
    """
    counters = {name: CallCounter(p.action_decoder._sampler) for name, p in policies.items()}
    totals, same, tokens = _Totals(), 0, 0
    for policy in policies.values():
        policy.warmup(1)
    for call in calls:
        chosen = []
        for name, policy in policies.items():
            session, before = dataclasses.replace(call.session), counters[name].calls
            _, spent = timed(lambda p=policy, s=session, c=call: p.act([c.observation], [s]))
            totals.add(name, counters[name].calls - before, spent)
            chosen.append(session.last_ids)
        same, tokens = same + np.array_equal(*chosen), tokens + len(chosen[0])
    figures = totals.per(len(calls), "chunk")
    per_call = {f"tokens per call, {name}": tokens / totals.calls[name] for name in policies}
    return {"chunks": len(calls), "same": int(same), **per_call, **figures}


def call_times(
    preset: str, batch_size: int, prompt: int, *, tokens: int = 33, rounds: int = 2
) -> dict[int, float]:
    """Milliseconds of processor time per call of a random decoder, by tokens per call.

    Args:
      preset: of the decoder.
      batch_size: sequences decoded together.
      prompt: tokens cached before.
      tokens: chosen after the prompt, nearly each in a call of its own: no draft is looked up.
      rounds: of which the least time counts, behind one that compiles.
    """
    rng = np.random.default_rng(0)
    sampler = Sampler(*random_decoder(preset, rng, vocab_size=_TIMED_IDS, pad_id=0))
    given = rng.integers(0, _TIMED_IDS, (batch_size, prompt)).astype(np.int32)
    times: dict[int, list[float]] = {block: [] for block in _TIMED_BLOCKS}
    for _ in range(rounds + 1):
        for block, own in times.items():
            state = sampler.prefill(given, slots=prompt + tokens + block)
            jax.block_until_ready(state.batch)

            def decode(state: DecodeState = state, block: int = block) -> int:
                generated, _ = sampler.generate(
                    state, max_new_tokens=tokens, allowed=np.arange(256), block=block
                )
                return int(generated.steps)

            steps, spent = timed(decode)
            own.append(1e3 * spent.processor / steps)
    return {block: min(own[1:]) for block, own in times.items()}


class _Totals:
    """Calls and times of both ways."""

    def __init__(self) -> None:
        self.calls: collections.Counter[str] = collections.Counter()
        self._times: dict[str, Elapsed] = {}

    def add(self, name: str, calls: int, spent: Elapsed) -> None:
        self.calls[name] += calls
        self._times[name] = self._times.get(name, Elapsed()) + spent

    def per(self, count: int, unit: str) -> dict[str, float]:
        """Means of both, and how many times more the plain way takes."""
        figures = {}
        for title, values in (
            (f"calls per {unit}", self.calls),
            (f"ms per {unit}", {n: 1e3 * t.wall for n, t in self._times.items()}),
            (f"processor ms per {unit}", {n: 1e3 * t.processor for n, t in self._times.items()}),
        ):
            figures |= {f"{title}, {name}": value / count for name, value in values.items()}
            figures[f"{title}, ratio"] = values["plain"] / values["drafts"]
        return figures


def held_out_episodes(
    sources: str, corpus: str, split: str, views: Sequence[str]
) -> Iterator[Episode]:
    """Episodes of each dataset of ``sources`` in turn, so that few of them show all."""
    config = ImagineConfig(corpus=corpus, split=split)
    each = [valid_episodes(config, source, views) for source in sources.split(",")]
    for episodes in itertools.zip_longest(*each):
        yield from (episode for episode in episodes if episode is not None)


def held_out_frames(
    model: WorldModel, source: str, corpus: str, split: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Instruction and codes [h, w] of frames of held-out episodes, one spacing apart."""
    for episode in held_out_episodes(source, corpus, split, [model.view]):
        frames = model.resize(episode.frames[model.view][:: model.frame_spacing])
        for codes in model.encode(frames[None])[0]:
            yield episode.instruction, codes


def held_out_calls(policy: Policy, count: int, first_seed: int) -> list[PolicyCall]:
    """The first ``count`` calls of a policy in held-out scenes."""
    calls = itertools.chain.from_iterable(record_calls(policy, first_seed))
    return list(itertools.islice(calls, count))


def recorded_calls(policy: Policy, episodes: Iterable[Episode]) -> Iterator[PolicyCall]:
    """Calls of a policy at recorded observations, a chunk apart, an episode after the other."""
    for episode in episodes:
        session = policy.start()
        for step in range(0, len(episode), policy.chunk_size):
            observation = Observation(
                episode.instruction,
                {view: frames[step] for view, frames in episode.frames.items()},
                None if episode.state is None else episode.state[step],
            )
            # The session as before the call, for both ways to decode from; without its prefix,
            # so that neither profits from the other's prefill.
            before = dataclasses.replace(session, cached_prefix=None)
            policy.act([observation], [session])
            yield PolicyCall(observation, before, session.last_ids)


def main(argv: list[str]) -> None:
    """Runs the command."""
    del argv
    logging.set_verbosity(logging.WARNING)
    figures: dict[str, Any] = {}
    for size in map(int, SEQUENCES.value if PRESET.value else ()):
        own = call_times(PRESET.value, size, PROMPT.value)
        title = f"{PRESET.value}, {size} sequence(s)"
        figures[title] = {f"ms per call of {n} token(s)": ms for n, ms in own.items()}
    if WORLD_MODEL.value:
        given = None
        for name in WAY.value:
            model = WorldModel.load(WORLD_MODEL.value)
            if given is None:
                count = -(-FRAMES.value // IN_A_ROW.value)
                frames = held_out_frames(model, SOURCE.value, CORPUS.value, SPLIT.value)
                first = FIRST_FRAME.value
                given = list(itertools.islice(frames, first, first + count))
            figures[f"frames, {name}"] = compare_frames(
                model, given, IN_A_ROW.value, block=BLOCK.value, **WAYS[name]
            )
    if POLICY.value:
        for name in WAY.value:
            if "guidance" in WAYS[name]:  # of frames alone
                continue
            policies = {
                way: Policy.load(POLICY.value, block=block, sampling=WAYS[name]["sampling"])
                for way, block in (("plain", 1), ("drafts", BLOCK.value))
            }
            plain = policies["plain"]
            if RECORDED.value:
                views = list(plain.views)
                held_out = held_out_episodes(SOURCE.value, CORPUS.value, SPLIT.value, views)
                calls = list(itertools.islice(recorded_calls(plain, held_out), PROMPTS.value))
            else:
                calls = held_out_calls(plain, PROMPTS.value, FIRST_SEED.value)
            figures[f"actions, {name}"] = compare_chunks(policies, calls)
    for name, own in figures.items():
        print_figures(name, own)
    save(figures)


if __name__ == "__main__":
    cli.run(main)
