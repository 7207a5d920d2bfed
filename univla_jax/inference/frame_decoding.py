"""Frame decoding: the codes of one or several moments, drafted from the moment before them.

    prompt … img │ codes of camera 1 │ eof eoi boi "1*h*w" img │ codes of camera 2 │ eof eoi … │ …
                   chosen              fed                       chosen

With drafts all of this is one decode loop: what stands between two frames is forced there, a block
of drafts reaches across it into the next frame, and a code is drafted from the same cell one moment
earlier. Without drafts each separator is appended in a call of its own, which is cheaper than
decoding it token by token. The codes are the same in both cases, also sampled ones: a position
draws from its own key, whatever call chooses it.

Axes: B batch, N moments, h/w code grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from univla_jax.inference.decode_step import DecodeState
from univla_jax.inference.sampler import Sampler
from univla_jax.inference.sampling import GREEDY, Sampling
from univla_jax.inference.speculative import Drafts, block_size
from univla_jax.sequences.frames import FREE
from univla_jax.tasks.base import Task

Grid = tuple[int, int]


def imagine_moments(
    sampler: Sampler,
    state: DecodeState,
    task: Task,
    grids: Sequence[Grid],
    moments: int = 1,
    *,
    previous: Sequence[np.ndarray] | None = None,
    sampling: Sampling = GREEDY,
    guidance: float = 1.0,
    block: int | None = None,
    first: int = 0,
) -> tuple[list[np.ndarray], DecodeState]:
    """Chooses the codes of moments that follow each other.

    Args:
      sampler: of the model.
      state: up to the header of the first camera's frame; donated.
      task: says what stands between two frames.
      grids: of each camera.
      moments: N.
      previous: per camera codes [B, h, w] of the moment before, which drafts are copied from.
      sampling: how codes are chosen.
      guidance: see ``Sampler.generate``.
      block: tokens decoded per step, drafts included; by default as many as pay for this model
        and platform (``speculative.block_size``), 1 for no drafts.
      first: moments that earlier calls have chosen: those draw otherwise from the same seed.

    Returns:
      per camera codes uint16 [B, N, h, w], and the state behind the last code.
    """
    separators = [task.separator(grid) for grid in (*grids[1:], grids[0])]
    rules = [task.frame_decoding(grid) for grid in grids]
    # Every token of a moment: FREE where a code is chosen, and the ids behind each camera.
    cells = [np.full(rule.max_new_tokens, FREE) for rule in rules]
    period = sum(map(len, cells)) + sum(map(len, separators))
    if block is None:
        block = block_size(
            "frames",
            state.batch_size,
            min(2, moments) * period,
            hidden_size=sampler.model.config.hidden_size,
        )
    pieces = [piece for pair in zip(cells, separators) for piece in pair] * moments
    # Spans of one call each: all of it, or the codes of one frame between two separators.
    spans = [pieces[:-1]] if block > 1 else [[piece] for piece in pieces[:-1]]
    drafts = None
    if previous is not None and block > 1:
        source = [
            np.concatenate([_visual_ids(task, codes), np.tile(between, (len(codes), 1))], axis=1)
            for codes, between in zip(previous, separators)
        ]
        drafts = Drafts(np.concatenate(source, axis=1), period=period)
    tokens, num_drawn = [], first * period
    for span in spans:
        forced_ids = np.concatenate(span)
        if FREE not in forced_ids:
            state = sampler.extend(state, np.tile(forced_ids, (state.batch_size, 1)))
        else:
            generated, state = sampler.generate(
                state,
                max_new_tokens=len(forced_ids),
                allowed=rules[0].allowed,
                sampling=sampling,
                forced_ids=forced_ids if len(span) > 1 else None,
                guidance=guidance,
                drafts=drafts,
                block=block,
                num_drawn=num_drawn,
            )
            tokens.append(np.asarray(generated.tokens)[:, forced_ids == FREE])
        num_drawn += len(forced_ids)
    ids = np.concatenate(tokens, axis=1).reshape(state.batch_size, moments, -1)
    ends = np.cumsum([len(cell) for cell in cells])[:-1]
    frames = np.split(ids, ends, axis=2)
    return [task.parse_frames(own, grid) for own, grid in zip(frames, grids)], state


def extend_rows(sampler: Sampler, state: DecodeState, rows: Sequence[np.ndarray]) -> DecodeState:
    """Feeds each sequence ids int32 [n] of its own."""
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, ids in zip(tokens, rows):
        row[: len(ids)] = ids
    return sampler.extend(state, tokens, np.array([len(ids) for ids in rows], np.int32))


def _visual_ids(task: Task, codes: np.ndarray) -> np.ndarray:
    return task.vocabulary.visual_ids(codes).reshape(len(codes), -1).astype(np.int32)
