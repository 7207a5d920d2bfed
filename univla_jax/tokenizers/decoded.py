"""What decoding action tokens gives, shared by all action tokenizers."""

from __future__ import annotations

import dataclasses

import numpy as np

from univla_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DecodedActions:
    """A decoded chunk, or the statement that the tokens were none.

    Attributes:
      actions: float64 [T, A], normalised. All zeros when not valid: a placeholder of the right
        shape, not a prediction and not "no motion".
      valid: whether the tokens were exactly one chunk.
      reason: why not, empty when valid.
    """

    actions: np.ndarray
    valid: bool = True
    reason: str = ""


def invalid(reason: str, horizon: int, action_dim: int) -> DecodedActions:
    """The result of tokens that are no chunk of [horizon, action_dim]."""
    return DecodedActions(np.zeros((horizon, action_dim)), valid=False, reason=reason)


def checked_chunks(chunks: np.ndarray, ndim: int) -> np.ndarray:
    """Chunks [N, T, A] (``ndim`` 3) or one chunk [T, A] (``ndim`` 2) as float64.

    Raises:
      UserError: another number of axes, or a value that is not finite.
    """
    array = np.asarray(chunks, np.float64)
    if array.ndim != ndim:
        shape = "[chunks, steps, dimensions]" if ndim == 3 else "[steps, dimensions]"
        raise UserError(f"actions of shape {array.shape}, expected {shape}")
    if not np.isfinite(array).all():
        raise UserError("actions hold a value that is not finite; leave such episodes out")
    return array
