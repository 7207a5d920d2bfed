"""AdamW with the reference's learning-rate schedule, decay mask and gradient clipping.

Every formula follows PyTorch and transformers as the reference calls them (UniVLA
train/train_moe.py; transformers 4.44 ``cosine_with_min_lr``; torch ``clip_grad_norm_`` and
``optim.AdamW``), so that a trajectory can be compared step by step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from univla_jax.errors import UserError

Schedule = Callable[[Any], Any]

_UNDECAYED = frozenset({"scale", "bias"})
_MOMENTS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_CLIP_EPSILON = 1e-6  # added to the norm by torch.nn.utils.clip_grad_norm_


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Hyper-parameters of AdamW; the defaults are the reference's recipe.

    Attributes:
      learning_rate: the peak, reached after ``warmup_steps``.
      min_learning_rate: the floor at the end of the cosine.
      warmup_steps: linear warm-up from zero; step 0 has learning rate 0.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled decay of every parameter but norm scales and biases.
      clip_norm: largest global norm of the gradient; None leaves gradients as they are.
      moments_dtype: ``"float32"`` or ``"bfloat16"``, what both moments are stored in; the update is
        always computed in float32.
    """

    learning_rate: float = 8e-5
    min_learning_rate: float = 5e-6
    warmup_steps: int = 50
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-6
    weight_decay: float = 0.1
    clip_norm: float | None = 5.0
    moments_dtype: str = "float32"

    def __post_init__(self) -> None:
        """Refuses values under which training cannot go well.

        Raises:
          UserError: naming the field and its value.
        """
        if self.moments_dtype not in _MOMENTS:
            raise UserError(
                f"optimizer.moments_dtype: {self.moments_dtype!r}; "
                f"expected one of {', '.join(_MOMENTS)}"
            )
        if not 0 < self.min_learning_rate <= self.learning_rate:
            raise UserError(
                f"optimizer.min_learning_rate: {self.min_learning_rate}; expected above 0 and at "
                f"most learning_rate, which is {self.learning_rate}"
            )
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise UserError(
                f"optimizer.clip_norm: {self.clip_norm}; expected above 0, or None for no clipping"
            )


def cosine_with_min_lr(
    learning_rate: float, min_learning_rate: float, warmup_steps: int, total_steps: int
) -> Schedule:
    """Linear warm-up from zero, then half a cosine from the peak down to the floor.

    Args:
      learning_rate: the peak.
      min_learning_rate: the value at ``total_steps``.
      warmup_steps: length of the warm-up.
      total_steps: where the cosine ends.

    Returns:
      ``schedule(step)``: the rate of the optimizer step with that 0-based number. A Python or
      numpy step gives float64, a JAX one float32.
    """
    floor = min_learning_rate / learning_rate
    span = max(1, total_steps - warmup_steps)

    def schedule(step: Any) -> Any:
        xp = jnp if isinstance(step, jax.Array) else np
        warm = step / max(1, warmup_steps)
        cosine = 0.5 * (1.0 + xp.cos(xp.pi * (step - warmup_steps) / span))
        factor = xp.where(step < warmup_steps, warm, cosine * (1.0 - floor) + floor)
        return learning_rate * xp.maximum(factor, 0.0)

    return schedule


def decay_mask(params: Any) -> Any:
    """True for each parameter that is decayed: all but norm scales and biases.

    Embedding and head are decayed (reference: ``Trainer.get_decay_parameter_names`` with
    Emu3RMSNorm among its norm layers, modeling_emu3.py:126).
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: _last_name(path) not in _UNDECAYED, params
    )


def _last_name(path: tuple[Any, ...]) -> str:
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    return names[-1] if names else ""


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales gradients by ``min(1, max_norm / (norm + 1e-6))``, as torch's clip_grad_norm_."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        scale = jnp.minimum(1.0, max_norm / (optax.global_norm(updates) + _CLIP_EPSILON))
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def scale_by_adam(b1: float, b2: float, eps: float, dtype: Any) -> optax.GradientTransformation:
    """Adam's direction, computed in float32 with both moments stored in ``dtype``."""

    def init(params: Any) -> optax.ScaleByAdamState:
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params)
        return optax.ScaleByAdamState(
            jnp.zeros([], jnp.int32), zeros, jax.tree.map(jnp.copy, zeros)
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        count = optax.safe_increment(state.count)
        g32 = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
        mu = _moving_average(g32, state.mu, b1)
        nu = _moving_average(jax.tree.map(jnp.square, g32), state.nu, b2)
        correct1, correct2 = 1 - b1**count, 1 - b2**count
        direction = jax.tree.map(lambda m, v: m / correct1 / (jnp.sqrt(v / correct2) + eps), mu, nu)
        return direction, optax.ScaleByAdamState(count, _cast(mu, dtype), _cast(nu, dtype))

    return optax.GradientTransformation(init, update)


def _moving_average(new: Any, old: Any, decay: float) -> Any:
    return jax.tree.map(
        lambda n, o: decay * o.astype(jnp.float32) + (1 - decay) * n,
        new,
        old,
    )


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def make_schedule(config: OptimizerConfig, total_steps: int) -> Schedule:
    """The learning-rate schedule of a run of ``total_steps`` optimizer steps."""
    return cosine_with_min_lr(
        config.learning_rate, config.min_learning_rate, config.warmup_steps, total_steps
    )


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """AdamW as the reference trains: clip, Adam, decoupled decay, scheduled rate.

    Args:
      config: hyper-parameters.
      total_steps: length of the run, where the cosine reaches its floor.
    """
    clip = [] if config.clip_norm is None else [clip_by_global_norm(config.clip_norm)]
    return optax.chain(
        *clip,
        scale_by_adam(config.b1, config.b2, config.eps, _MOMENTS[config.moments_dtype]),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(make_schedule(config, total_steps)),
    )
