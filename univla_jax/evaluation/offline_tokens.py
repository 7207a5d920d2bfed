"""Next-token accuracy over sequences whose past is the real one.

Axes: B rows, S sequence.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from univla_jax.inference.buckets import length_bucket
from univla_jax.inference.trained import TrainedModel
from univla_jax.sequences.examples import Batch
from univla_jax.sequences.packing import join
from univla_jax.training.loss import MODALITIES, Modalities, weighted_cross_entropy

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Asked:
    """A sequence and the places that count.

    Attributes:
      ids: int32 [S].
      asked: bool [S]; never the first.
    """

    ids: np.ndarray
    asked: np.ndarray


def batches(items: Sequence[Item], rows: int) -> Iterator[Sequence[Item]]:
    """Parts of at most ``rows`` items."""
    return (items[start : start + rows] for start in range(0, len(items), rows))


def next_token_accuracy(
    trained: TrainedModel, sequences: Sequence[Asked], rows: int
) -> dict[str, float]:
    """Share of the tokens asked for that the model holds likeliest after the real ones before them.

    Args:
      trained: the model.
      sequences: any number.
      rows: sequences computed together.

    Returns:
      by modality (``training.loss.MODALITIES``), those that are asked for.
    """
    modalities = Modalities.of(trained.assets.vocabulary)
    count = jax.jit(functools.partial(_count, trained.model, modalities))
    length = length_bucket(max((len(s.ids) for s in sequences), default=1))
    pad = trained.assets.vocabulary.pad
    right, total = np.zeros((2, len(MODALITIES)))
    for part in batches(sequences, rows):
        sums = count(trained.params, _batch(part, rows, length, pad))
        right += [float(sums[f"{name}_correct"]) for name in MODALITIES]
        total += [float(sums[f"{name}_tokens"]) for name in MODALITIES]
    shares = zip(MODALITIES, right, total, strict=True)
    return {name: round(float(r / t), 4) for name, r, t in shares if t}


def _batch(sequences: Sequence[Asked], rows: int, length: int, pad: int) -> Batch:
    samples = [[{"tokens": s.ids, "loss_weight": s.asked.astype(np.float32)}] for s in sequences]
    samples += [[]] * (rows - len(samples))
    return Batch(**join(samples, length=length, pad=pad))


def _count(model: Any, modalities: Modalities, params: Any, batch: Batch) -> dict[str, jax.Array]:
    return weighted_cross_entropy(model, params, batch, modalities)[2]
