"""Statistics of actions and states, and normalization with them.

Axes: N steps, T steps of a chunk, A action dimensions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from univla_jax.config import build_config
from univla_jax.errors import UserError

QUANTILES, MIN_MAX, IDENTITY = "quantiles", "min_max", "identity"
NORMALIZATIONS = (QUANTILES, MIN_MAX, IDENTITY)
"""What becomes -1 and 1: the 1 % and 99 % quantile, the least and greatest value, or -1 and 1."""

_BINS = 5000
_EDGE_PADDING = 1e-10
_DIVISION_GUARD = 1e-8


@dataclasses.dataclass(frozen=True)
class ActionStatistics:
    """Per-dimension statistics of a dataset's raw actions or states, in physical units.

    Attributes:
      mean: A values.
      std: A values, population standard deviation.
      q01: A values that ``normalize`` maps to -1: the 1 % quantile, or what ``kinds`` says.
      q99: A values that ``normalize`` maps to 1: the 99 % quantile, or what ``kinds`` says.
      count: number of steps, 0 where it is not known.
      kinds: A of ``NORMALIZATIONS``; empty where all dimensions have quantiles.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    q01: tuple[float, ...]
    q99: tuple[float, ...]
    count: int = 0
    kinds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises UserError for fields that do not fit together."""
        fields = {name: getattr(self, name) for name in ("mean", "std", "q01", "q99")}
        lengths = {name: len(values) for name, values in fields.items()}
        if len(set(lengths.values())) != 1 or not len(self.mean):
            raise UserError(f"action statistics: fields of different lengths {lengths}")
        check_kinds(self.kinds, len(self.mean))
        if not all(np.isfinite(values).all() for values in fields.values()):
            raise UserError("action statistics: a value is not finite; recompute them")
        if np.any(np.asarray(self.q01) > self.q99):
            raise UserError(f"action statistics: q01 {self.q01} exceeds q99 {self.q99}")

    @property
    def action_dim(self) -> int:
        """Number of action dimensions A."""
        return len(self.mean)

    def normalize(self, actions: np.ndarray, *, clip: bool = True) -> np.ndarray:
        """Maps raw actions [..., A] to float32 in [-1, 1]: 2 (a - q01) / (q99 - q01 + 1e-8) - 1.

        Computed in float64 (UniVLA tools/pickle_gen/pickle_generation_libero.py:84-88).

        Args:
          actions: [..., A] in physical units.
          clip: False leaves values beyond the quantiles outside [-1, 1].

        Raises:
          UserError: another number of dimensions.
        """
        low, span, raw = self._prepare(actions)
        scaled = 2 * (raw - low) / (span + _DIVISION_GUARD) - 1
        return (np.clip(scaled, -1, 1) if clip else scaled).astype(np.float32)

    def unnormalize(self, actions: np.ndarray) -> np.ndarray:
        """Maps normalized actions [..., A] to float32 raw units: 0.5 (a + 1) (q99 - q01) + q01.

        Raises:
          UserError: another number of dimensions.
        """
        low, span, normalized = self._prepare(actions)
        return (0.5 * (normalized + 1) * span + low).astype(np.float32)

    def _prepare(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        array = np.asarray(actions, np.float64)
        if array.ndim == 0 or array.shape[-1] != self.action_dim:
            raise UserError(
                f"actions of shape {array.shape} do not fit statistics of {self.action_dim} "
                "dimensions; use the statistics of the same dataset"
            )
        return *self._range, array

    @functools.cached_property
    def _range(self) -> tuple[np.ndarray, np.ndarray]:
        """q01 and q99 - q01, float64 [A]."""
        low = np.asarray(self.q01, np.float64)
        return low, np.asarray(self.q99, np.float64) - low

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers for JSON."""
        # Without ``kinds`` where there are none, as in the files written before there were any.
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
            if name != "kinds" or value
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ActionStatistics:
        """The inverse of ``to_dict``.

        Raises:
          UserError: a missing or unknown key, or fields that do not fit together.
        """
        return build_config(cls, values, where="action statistics")


def check_kinds(kinds: Sequence[str], dimensions: int | None = None) -> None:
    """Raises UserError unless these are ``NORMALIZATIONS``, one per dimension or none."""
    unknown = sorted(set(kinds) - set(NORMALIZATIONS))
    if unknown:
        raise UserError(f"normalization {unknown[0]!r} is not one of {', '.join(NORMALIZATIONS)}")
    if kinds and dimensions not in (None, len(kinds)):
        raise UserError(f"{len(kinds)} normalizations for {dimensions} dimensions; give one each")


class RunningStatistics:
    """Mean, standard deviation and quantiles of a stream of steps whose range is known.

    The algorithm of ``RunningStats`` in UniVLA train/dataset/normalize_pi0.py, in float64, with a
    range that never changes: there, a batch that widens it moves old counts to the bins of their
    left edges, so that the quantiles depend on the order of the batches.
    """

    def __init__(self, low: np.ndarray, high: np.ndarray) -> None:
        """Starts empty.

        Args:
          low: least value [A] of all batches to come.
          high: greatest value [A].
        """
        self._low, self._high = np.asarray(low, np.float64), np.asarray(high, np.float64)
        self._count = 0
        self._mean, self._mean_of_squares = np.zeros_like(self._low), np.zeros_like(self._low)
        # 5,000 bins of equal width per dimension. The padding keeps the greatest value, and all
        # values of a constant dimension, inside the outermost edges.
        self._edges = [
            np.linspace(a - _EDGE_PADDING, b + _EDGE_PADDING, _BINS + 1)
            for a, b in zip(self._low, self._high)
        ]
        self._counts = [np.zeros(_BINS) for _ in self._edges]

    def update(self, batch: np.ndarray) -> None:
        """Adds steps [N, A].

        Raises:
          UserError: another number of dimensions, a value that is not finite, or one beyond the
            range.
        """
        steps = np.asarray(batch, np.float64)
        if steps.ndim != 2 or steps.shape[1] != len(self._low):
            raise UserError(f"batch of shape {steps.shape}, expected [N, {len(self._low)}]")
        if not np.isfinite(steps).all():
            raise UserError("batch holds a value that is not finite; drop the invalid episode")
        if np.any(steps < self._low) or np.any(steps > self._high):
            raise UserError("batch holds a value beyond the given range")
        if len(steps):
            self._accumulate(steps)

    def statistics(self, kinds: Sequence[str] = ()) -> ActionStatistics:
        """Statistics of all steps so far.

        A quantile is the left edge of the first bin whose cumulative count reaches its share. Where
        both quantiles of a dimension lie in one bin but its values do not, it moves in under two
        percent of the steps, as a rarely used gripper; between its quantiles it would never move
        again, so it takes "min_max" instead.

        Args:
          kinds: per dimension one of ``NORMALIZATIONS``; all "quantiles" when empty.

        Raises:
          UserError: fewer than two steps, or another number of kinds.
        """
        check_kinds(kinds, len(self._low))
        if self._count < 2:
            raise UserError(f"statistics need at least 2 steps, got {self._count}")
        variance = np.maximum(0, self._mean_of_squares - self._mean**2)
        low, high = np.array(self._quantile(0.01)), np.array(self._quantile(0.99))
        bins = (self._high - self._low) / _BINS
        frozen = (high - low < 1.5 * bins) & (self._high > self._low)
        found = np.array(kinds or [QUANTILES] * len(low))
        found[frozen & (found == QUANTILES)] = MIN_MAX
        low, high = (
            np.select([found == MIN_MAX, found == IDENTITY], [edge, bound], quantile)
            for quantile, edge, bound in ((low, self._low, -1.0), (high, self._high, 1.0))
        )
        return ActionStatistics(
            mean=tuple(self._mean.tolist()),
            std=tuple(np.sqrt(variance).tolist()),
            q01=tuple(low.tolist()),
            q99=tuple(high.tolist()),
            count=self._count,
            kinds=tuple(found.tolist()) if (found != QUANTILES).any() else (),
        )

    def _accumulate(self, steps: np.ndarray) -> None:
        self._count += len(steps)
        share = len(steps) / self._count
        self._mean = self._mean + (steps.mean(0) - self._mean) * share
        squares = (steps**2).mean(0)
        self._mean_of_squares = self._mean_of_squares + (squares - self._mean_of_squares) * share
        for i, edges in enumerate(self._edges):
            self._counts[i] += np.histogram(steps[:, i], bins=edges)[0]

    def _quantile(self, share: float) -> tuple[float, ...]:
        target = share * self._count
        pairs = zip(self._edges, self._counts)
        return tuple(float(edges[np.searchsorted(np.cumsum(n), target)]) for edges, n in pairs)


def stream_statistics(
    batches: Callable[[], Iterable[np.ndarray]], kinds: Sequence[str] = ()
) -> ActionStatistics:
    """Statistics of a stream too large for memory, in two passes: the range, then the histogram.

    The result does not depend on how the steps are cut into batches.

    Args:
      batches: called twice; each time yields the same batches [N, A].
      kinds: per dimension one of ``NORMALIZATIONS``; see ``RunningStatistics.statistics``.

    Raises:
      UserError: no steps, batches that do not fit together, values that are not finite, or another
        number of kinds.
    """
    # Two passes, because the bins of the histogram need the range first. Sorting all values would
    # give exact quantiles, but the actions of a large mixture do not fit into memory.
    low = high = None
    for batch in batches():
        if len(batch):
            least, greatest = np.min(batch, 0), np.max(batch, 0)
            low = least if low is None else np.minimum(low, least)
            high = greatest if high is None else np.maximum(high, greatest)
    if low is None:
        raise UserError("statistics need at least 2 steps, got 0")
    running = RunningStatistics(low, high)
    for batch in batches():
        running.update(batch)
    return running.statistics(kinds)


def sliding_windows(
    episodes: Sequence[np.ndarray], length: int, *, most: int | None = None
) -> np.ndarray:
    """Windows of ``length`` steps inside each episode, one step apart.

    Args:
      episodes: each [steps, A].
      length: T.
      most: when there are more, evenly spread ones are taken; None takes all.

    Returns:
      [N, T, A], in order.

    Raises:
      UserError: every episode is shorter than one window.
    """
    # Views, not copies, until the final concatenation, which takes every ``stride``-th window of
    # the whole sequence of them: a large corpus has more windows than fit into memory.
    long_enough = [np.asarray(actions) for actions in episodes if len(actions) >= length]
    if not long_enough:
        longest = max(map(len, episodes), default=0)
        raise UserError(f"chunks of {length} steps wanted, the longest episode has {longest}")
    windows = [np.lib.stride_tricks.sliding_window_view(a, length, axis=0) for a in long_enough]
    counts = np.array([len(each) for each in windows])
    stride = 1 if most is None else -(-int(counts.sum()) // most)
    firsts = -np.concatenate([[0], np.cumsum(counts)[:-1]]) % stride
    chosen = [each[first::stride] for each, first in zip(windows, firsts)]
    return np.concatenate(chosen).swapaxes(1, 2)


def state_key(corpus: str) -> str:
    """Key of a dataset's state statistics; its action statistics have its name as key."""
    return f"{corpus}/state"
