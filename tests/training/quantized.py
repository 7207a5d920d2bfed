"""Loss curves of a tiny decoder on a random Markov chain, with products of any precision."""

from __future__ import annotations

import jax
import numpy as np

from univla_jax.pipeline.batch import Batch
from univla_jax.pipeline.data_config import DataConfig
from univla_jax.sequences.tokens import Role
from univla_jax.tokenizers.vocabulary import Vocabulary
from univla_jax.training.model_setup import TrainSetup
from univla_jax.training.optimizer import OptimizerConfig
from univla_jax.training.sharding import to_global
from univla_jax.training.train_config import ModelConfig, TrainConfig

ROWS, LENGTH = 8, 16
VOCABULARY = Vocabulary.from_scratch(40, 30, 20)


def batches(seed: int = 0):
    """Endless batches of a random Markov chain: each token has four possible successors."""
    rng = np.random.default_rng(seed)
    successors = rng.integers(0, VOCABULARY.size, (VOCABULARY.size, 4))
    while True:
        tokens = np.zeros((ROWS, LENGTH), np.int32)
        tokens[:, 0] = rng.integers(0, VOCABULARY.size, ROWS)
        for i in range(1, LENGTH):
            choice = np.minimum(rng.geometric(0.7, ROWS) - 1, 3)
            tokens[:, i] = successors[tokens[:, i - 1], choice]
        roles = np.full(tokens.shape, Role.VISION, np.uint8)
        positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
        yield Batch(tokens, roles, np.zeros_like(roles), positions, np.ones_like(tokens))


def loss_curve(quantization: str | None, steps: int) -> np.ndarray:
    """Losses of every step; the same batches and the same start for every precision."""
    config = TrainConfig(
        total_steps=steps,
        model=ModelConfig(
            "tiny",
            {"dtype": "bfloat16", "quantization": quantization},
        ),
        data=DataConfig(
            stores=(),
            task="world_model",
            sequence_length=LENGTH,
            batch_size=ROWS,
            vision_weight=1.0,
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, min_learning_rate=3e-4, warmup_steps=20),
    )
    setup = TrainSetup.on_devices(config, VOCABULARY, jax.devices()[:1])
    state, step, losses = setup.new_state(), setup.train_step(), []
    for _, batch in zip(range(steps), batches()):
        state, metrics = step(state, to_global(batch, setup.batch_sharding))
        losses.append(metrics["loss"])
    return np.asarray(jax.device_get(losses))
