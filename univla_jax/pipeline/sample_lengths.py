"""Longest sample: whether all samples of the stores fit their batch elements, before any is drawn.

A run must not end after hours at the one instruction that is too long. A shard's samples are first
bounded from above, by the length of its longest text in bytes and by the most tokens of an action
chunk. Only where that bound exceeds a batch element are its episodes read, their texts encoded,
and, where that is not enough, all of their action chunks.

Axes: T steps, A action dimensions, P state dimensions, h/w code grid.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import tqdm

from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.data.token_store import TokenStore
from univla_jax.episode import TURN
from univla_jax.errors import UserError
from univla_jax.pipeline.data_config import DataConfig
from univla_jax.pipeline.mixture import EpisodeSource, SampleBuilder
from univla_jax.sequences.tokens import Role
from univla_jax.tasks.base import ActionTask, SampleSpec, Task

_SLACK = 8  # tokens by which a text in a template may be longer than its bytes


@dataclasses.dataclass(frozen=True)
class LongestSample:
    """The longest sample of an episode.

    Attributes:
      tokens: in it; an upper bound where that fits a batch element.
      without_text: tokens of it that do not belong to the instruction.
      name: the episode.
    """

    tokens: int
    without_text: int
    name: str


def check_lengths(
    config: DataConfig,
    builder: SampleBuilder,
    sources: Sequence[EpisodeSource],
    *,
    progress: bool = True,
) -> None:
    """Checks that the samples of all sources have at most ``data.sequence_length`` tokens.

    Args:
      config: says what becomes of longer ones.
      builder: of the samples.
      sources: stores, or episodes in memory.
      progress: whether to say on standard error how many episodes are dropped or cut.

    Raises:
      UserError: some have more, and ``data.too_long`` is "error"; or nothing but text could be cut
        and is not enough.
    """
    limit, episodes = config.sequence_length, sum(map(len, sources))
    found = [
        longest
        for source in sources
        for episode in _suspects(builder.task, source, limit, progress)
        if (longest := longest_sample(builder.task, episode, limit)).tokens > limit
    ]
    if not found:
        return
    worst = max(found, key=lambda each: each.tokens)
    count = f"{len(found)} of {episodes} episodes have samples of more than {limit} tokens"
    if config.too_long == "error":
        raise UserError(
            f"data.sequence_length: {count}, the longest {worst.tokens} ({worst.name}); set it to "
            f"at least {worst.tokens}, or data.too_long to 'drop' or 'cut_text'"
        )
    bare = max(found, key=lambda each: each.without_text)
    if config.too_long == "cut_text" and bare.without_text > limit:
        raise UserError(
            f"data.sequence_length: {limit}, but a sample of {bare.name} has {bare.without_text} "
            f"tokens without its instruction; set it to at least that, or data.too_long to 'drop'"
        )
    if progress:
        what = "dropped" if config.too_long == "drop" else "shortened by words"
        print(f"data: {count}; these are {what}", file=sys.stderr)


def _each(texts: Sequence[str]) -> list[str]:
    """The texts, those of several questions one by one, because a sample has one of them."""
    return [part for text in texts for part in text.split(TURN)]


def longest_sample(task: Task, episode: TokenizedEpisode, limit: int) -> LongestSample:
    """The longest sample of an episode, an upper bound of it where that is at most ``limit``.

    A text that changes during the episode counts with its longest form.

    Raises:
      UserError: the episode has no sample; names it.
    """
    name = f"episode {episode.corpus}/{episode.episode_id}"
    count = lambda text: len(task.text_encoder.encode(text))  # noqa: E731
    instruction = max(episode.instructions, key=count)
    # One for every step, as it was: some texts say which steps a sample may be drawn from.
    texts = {
        kind: (max(_each(values), key=count),) * len(values)
        for kind, values in episode.texts.items()
    }
    longest = dataclasses.replace(episode, texts=texts)
    try:
        spec = task.longest_sample(longest, instruction)
        moments, fixed = _split_off_chunks(task, spec)
        tokens = fixed + moments * _most_chunk_tokens(task, episode)
        if isinstance(task, ActionTask):
            tokens += task.max_committed_tokens(episode.actions.shape[1])
        if tokens > limit and moments and task.action_tokenizer is not None:
            shown = task.continued(episode) if isinstance(task, ActionTask) else episode
            tokens = fixed + _most_window_tokens(task, shown, moments)
            tokens += _most_committed_tokens(task, episode)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    return LongestSample(tokens, tokens - count(instruction), name)


def _suspects(
    task: Task, source: EpisodeSource, limit: int, progress: bool
) -> Iterator[TokenizedEpisode]:
    """The episodes of which a sample may have more than ``limit`` tokens."""
    indices: list[int] = []
    if isinstance(source, TokenStore):
        start = 0
        for shard in source.manifest.shards:
            if shard.steps and _shard_bound(task, source, start, shard.text_bytes) > limit:
                indices += range(start, start + len(shard.steps))
            start += len(shard.steps)
    else:
        indices = list(range(len(source)))
    shown = progress and indices and isinstance(source, TokenStore)
    for index in tqdm.tqdm(indices, "measure samples", unit="episode", disable=not shown):
        yield source[index]


def _shard_bound(task: Task, store: TokenStore, first: int, text_bytes: int) -> float:
    """No sample of a shard has more tokens; infinity where the store does not tell."""
    # Stores written before they did; phrases and places, which are measured episode by episode.
    if not text_bytes or task.needs.groundings:
        return np.inf
    # An episode without an instruction that is long enough for whole windows, and without memory:
    # its codes and numbers are zeros. No tokenizer makes more tokens of a text than it has bytes.
    real, steps = store[first], max(max(shard.steps) for shard in store.manifest.shards)
    zeros = {
        view: np.broadcast_to(np.zeros((), np.uint16), (steps, *codes.shape[1:]))
        for view, codes in real.codes.items()
    }
    episode = dataclasses.replace(
        real,
        instruction="",
        paraphrases=(),
        # Not empty, for some texts say which steps a sample may be drawn from.
        texts=dict.fromkeys(real.texts, (".",) * steps),
        codes=zeros,
        actions=np.zeros((steps, real.actions.shape[1]), np.float32),
        state=None if real.state is None else np.zeros((steps, real.state.shape[1]), np.float32),
    )
    return longest_sample(task, episode, sys.maxsize).tokens + text_bytes + _SLACK


def _split_off_chunks(task: Task, spec: SampleSpec) -> tuple[int, int]:
    """Chunks of a sample, and its tokens without action and state ids, whose number varies."""
    ids, roles, vocabulary = spec.tokens.ids, spec.tokens.roles, task.vocabulary
    is_action = (roles == Role.ACTION) & (ids != vocabulary.boa) & (ids != vocabulary.eoa)
    chunks = int((ids == vocabulary.boa).sum()) if task.action_tokenizer is not None else 0
    return chunks, len(spec) - int((is_action | (roles == Role.STATE)).sum())


def _most_chunk_tokens(task: Task, episode: TokenizedEpisode) -> int:
    """The most ids of a chunk and the state before it."""
    if task.action_tokenizer is None:
        return 0
    chunk = task.action_tokenizer.max_tokens(task.settings.chunk_size, episode.actions.shape[1])
    if not task.settings.state or episode.state is None:
        return chunk
    return chunk + task.max_state_tokens(episode.state.shape[1])


def _most_window_tokens(task: Task, episode: TokenizedEpisode, moments: int) -> int:
    """The most action and state ids of ``moments`` chunks in a row, over all places of windows."""
    lengths = task.chunk_lengths(episode)
    size = task.settings.chunk_size
    starts = len(episode) - moments * size + 1
    # Where every window begins with a whole number of chunks, motions that do are often much
    # shorter in tokens than what lies across two of them.
    aligned = task.settings.aligned_windows >= 1 and not task.settings.max_committed
    places = range(0, starts, size if aligned else 1)
    return max(int(sum(lengths[start + m * size] for m in range(moments))) for start in places)


def _most_committed_tokens(task: Task, episode: TokenizedEpisode) -> int:
    """The most ids, boa and eoa included, of committed actions in a row, over all their places."""
    count = min(task.settings.max_committed, len(episode))
    if not count:
        return 0
    lengths = [len(ids) + 2 for ids in task.committed_ids(episode.corpus, episode.actions)]
    return int(np.lib.stride_tricks.sliding_window_view(lengths, count).sum(1).max())
