"""Ego-status network: NAVSIM's blind baseline, a trajectory from speed, acceleration and command.

Eight inputs (velocity 2, acceleration 2, command 4), three hidden layers, eight motions out, mean
absolute error: the ``EgoStatusMLPAgent`` of navsim's devkit (github.com/autonomousvision/navsim).
It shows what a trajectory is worth that no camera had a part in. Small enough for NumPy.

Axes: N samples, D features.
"""

from __future__ import annotations

import dataclasses
import itertools
import os

import numpy as np

from univla_jax.errors import UserError

INPUTS = 8
"""The first numbers of a driving state (``data/ego_motion.py``): dynamics and command."""
_STEPS, _BATCH, _RATE = 3000, 256, 2e-3
_DECAYS = (0.9, 0.999)


@dataclasses.dataclass(frozen=True)
class EgoStatusMlp:
    """A fitted network.

    Attributes:
      weights: float32 [D, D'] of each layer.
      biases: float32 [D'] of each layer.
      scale: float32 [2, 24] mean and spread of the outputs.
    """

    weights: tuple[np.ndarray, ...]
    biases: tuple[np.ndarray, ...]
    scale: np.ndarray

    def __call__(self, states: np.ndarray) -> np.ndarray:
        """Motions float32 [N, 8, 3] for states [N, >= 8]."""
        out = _forward(self.weights, self.biases, _features(states))[-1]
        return (out * self.scale[1] + self.scale[0]).reshape(len(out), -1, 3)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the network to an ``.npz`` file."""
        arrays = {f"weight{i}": w for i, w in enumerate(self.weights)}
        arrays |= {f"bias{i}": b for i, b in enumerate(self.biases)}
        np.savez(path, scale=self.scale, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EgoStatusMlp:
        """Reads a network.

        Raises:
          UserError: there is none, or the file is damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                layers = range((len(stored.files) - 1) // 2)
                weights = tuple(stored[f"weight{i}"] for i in layers)
                return cls(weights, tuple(stored[f"bias{i}"] for i in layers), stored["scale"])
        except (OSError, KeyError, ValueError) as error:
            raise UserError(f"{path} is no ego-status network: {error}") from error


def fit_ego_status(
    states: np.ndarray, motions: np.ndarray, *, hidden: int = 128, seed: int = 0
) -> EgoStatusMlp:
    """Fits the network by Adam.

    Args:
      states: [N, >= 8].
      motions: [N, 8, 3] of the human or the expert.
      hidden: width of the three hidden layers.
      seed: of parameters and batches.
    """
    rng = np.random.default_rng(seed)
    inputs, targets = _features(states), np.asarray(motions, np.float32).reshape(len(motions), -1)
    scale = np.stack([targets.mean(0), np.abs(targets - targets.mean(0)).mean(0) + 1e-3])
    targets = (targets - scale[0]) / scale[1]
    sizes = (inputs.shape[1], hidden, hidden, hidden, targets.shape[1])
    params = [
        (rng.normal(size=(a, b)) * np.sqrt(2 / a)).astype(np.float32)
        for a, b in itertools.pairwise(sizes)
    ]
    params += [np.zeros(b, np.float32) for b in sizes[1:]]
    layers = len(sizes) - 1
    first = [np.zeros_like(p) for p in params]
    second = [np.zeros_like(p) for p in params]
    for step in range(_STEPS):
        chosen = rng.integers(len(inputs), size=min(_BATCH, len(inputs)))
        gradients = _gradients(params, layers, inputs[chosen], targets[chosen])
        rate = _RATE * 0.5 * (1 + np.cos(np.pi * step / _STEPS))
        for i, gradient in enumerate(gradients):
            first[i] += (1 - _DECAYS[0]) * (gradient - first[i])
            second[i] += (1 - _DECAYS[1]) * (gradient**2 - second[i])
            mean = first[i] / (1 - _DECAYS[0] ** (step + 1))
            spread = np.sqrt(second[i] / (1 - _DECAYS[1] ** (step + 1)))
            params[i] = params[i] - np.float32(rate) * mean / (spread + np.float32(1e-8))
    return EgoStatusMlp(tuple(params[:layers]), tuple(params[layers:]), scale.astype(np.float32))


def _features(states: np.ndarray) -> np.ndarray:
    features = np.array(states, np.float32)[:, :INPUTS]
    features[:, :4] /= np.float32(5.0)
    return features


def _forward(weights, biases, inputs: np.ndarray) -> list[np.ndarray]:
    """Activations of every layer, the inputs first; ReLU but for the last."""
    values = [inputs]
    for number, (weight, bias) in enumerate(zip(weights, biases)):
        out = values[-1] @ weight + bias
        values.append(out if number == len(weights) - 1 else np.maximum(out, 0))
    return values


def _gradients(
    params: list[np.ndarray], layers: int, inputs: np.ndarray, targets: np.ndarray
) -> list[np.ndarray]:
    """Of the mean absolute error: of all weights, then of all biases."""
    weights = params[:layers]
    values = _forward(weights, params[layers:], inputs)
    delta = np.sign(values[-1] - targets) / np.float32(targets.size)
    by_weight, by_bias = [], []
    for number in reversed(range(layers)):
        by_weight.append(values[number].T @ delta)
        by_bias.append(delta.sum(0))
        delta = (delta @ weights[number].T) * (values[number] > 0)
    return by_weight[::-1] + by_bias[::-1]
