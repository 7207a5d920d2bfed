"""Muon: momentum whose matrices are made orthogonal, for training small convolutional nets fast.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". Every kernel is seen
as a matrix [inputs, outputs] and its momentum replaced by the nearest orthogonal matrix, so that
all directions of a layer move alike. Biases, norms and kernels too narrow for that go through Adam.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from univla_jax.errors import UserError
from univla_jax.training.optimizer import clip_by_global_norm, cosine_with_min_lr

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_NARROW = 8  # a kernel with fewer inputs or outputs has no directions to balance
_ADAM_RMS = 0.2  # of an update of Adam, which orthogonal updates are scaled to


@dataclasses.dataclass(frozen=True)
class MuonConfig:
    """Hyper-parameters.

    Attributes:
      learning_rate: peak rate of the parameters trained by Adam, reached after ``warmup_steps``.
      min_learning_rate: the floor at the end of the cosine.
      kernel_factor: rate of the orthogonalized kernels relative to the others.
      warmup_steps: linear warm-up from zero.
      momentum: decay of the kernels' momentum (Nesterov).
      b1: decay of Adam's first moment.
      b2: decay of Adam's second moment.
      clip_norm: largest global norm of the gradient.
    """

    learning_rate: float = 2e-3
    min_learning_rate: float = 4e-5
    kernel_factor: float = 5.0
    warmup_steps: int = 50
    momentum: float = 0.9
    b1: float = 0.9
    b2: float = 0.99
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        """Refuses rates under which nothing is learned."""
        if not 0 < self.min_learning_rate <= self.learning_rate:
            raise UserError(
                f"optimizer.min_learning_rate: {self.min_learning_rate}; expected above 0 and at "
                f"most learning_rate, which is {self.learning_rate}"
            )


def make_muon(config: MuonConfig, total_steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of ``total_steps``, where the cosine reaches its floor."""
    schedule = cosine_with_min_lr(
        config.learning_rate, config.min_learning_rate, config.warmup_steps, total_steps
    )
    kernels = optax.chain(
        scale_by_orthogonal_momentum(config.momentum), optax.scale(config.kernel_factor)
    )
    others = optax.scale_by_adam(config.b1, config.b2)
    return optax.chain(
        clip_by_global_norm(config.clip_norm),
        optax.multi_transform({"kernel": kernels, "other": others}, _labels),
        optax.scale_by_learning_rate(schedule),
    )


def scale_by_orthogonal_momentum(momentum: float) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalized, at the root mean square of an update of Adam."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        state = jax.tree.map(average, state, updates)
        return jax.tree.map(_orthogonal_kernel, jax.tree.map(average, state, updates)), state

    def average(old: jax.Array, new: jax.Array) -> jax.Array:
        return momentum * old + (1 - momentum) * new

    return optax.GradientTransformation(lambda p: jax.tree.map(jnp.zeros_like, p), update)


def orthogonalize(matrix: jax.Array) -> jax.Array:
    """[m, n] -> about U V^T of its singular value decomposition, by five Newton-Schulz steps.

    The singular values come out between about 0.7 and 1.2, which serves as well as 1.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    a, b, c = _NEWTON_SCHULZ

    def step(_: int, x: jax.Array) -> jax.Array:
        square = x @ x.T
        return a * x + (b * square + c * square @ square) @ x

    out = jax.lax.fori_loop(0, _ITERATIONS, step, wide / (jnp.linalg.norm(wide) + 1e-7))
    return out if wide is matrix else out.T


def _orthogonal_kernel(kernel: jax.Array) -> jax.Array:
    matrix = kernel.reshape(-1, kernel.shape[-1])
    scale = _ADAM_RMS * max(matrix.shape) ** 0.5
    return (orthogonalize(matrix) * scale).reshape(kernel.shape)


def _labels(params: Any) -> Any:
    """``"kernel"`` for each leaf that is orthogonalized, ``"other"`` for the rest."""

    def label(path: tuple[Any, ...], leaf: jax.Array) -> str:
        inputs = leaf.size // leaf.shape[-1] if leaf.ndim > 1 else 0
        wide = path[-1].key == "kernel" and min(inputs, leaf.shape[-1]) >= _NARROW
        return "kernel" if wide else "other"

    return jax.tree_util.tree_map_with_path(label, params)
