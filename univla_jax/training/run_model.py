"""The decoder of a run: config, loss, sharded state and jitted steps, without any data or array."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from univla_jax.errors import UserError
from univla_jax.models import axes
from univla_jax.models.decoder import Decoder
from univla_jax.models.presets import DecoderConfig, preset
from univla_jax.tokenizers.vocabulary import Vocabulary
from univla_jax.training import batches, flops, sharding
from univla_jax.training.loss import MODALITIES, Modalities, weighted_cross_entropy
from univla_jax.training.metrics import TOKENS
from univla_jax.training.optimizer import make_optimizer, make_schedule
from univla_jax.training.state import TrainState, abstract_state, init_state, state_from_params
from univla_jax.training.step import LossFn, Step, make_eval_step, make_train_step
from univla_jax.training.train_config import LossConfig, ModelConfig, TrainConfig
from univla_jax.training.visual_rows import codebook_rows

_FROM_VOCABULARY = ("vocab_size", "pad_id")


@dataclasses.dataclass(frozen=True)
class RunModel:
    """What a config says about computation, over a mesh; building it allocates nothing.

    Attributes:
      config: the run's.
      model: the decoder.
      mesh: the devices, also those of a topology that is not here.
      optimizer: AdamW with the run's schedule.
      loss: of one batch, as sums.
      rules: sharding rules that fit this decoder.
      abstract: shapes, dtypes and shardings of the state.
      batch_sharding: of every array [B, S] of a batch.
    """

    config: TrainConfig
    model: Decoder
    mesh: Mesh
    optimizer: optax.GradientTransformation
    loss: LossFn
    rules: sharding.Rules
    abstract: TrainState
    batch_sharding: NamedSharding

    @classmethod
    def build(cls, config: TrainConfig, vocabulary: Vocabulary, mesh: Mesh) -> RunModel:
        """Puts the parts together.

        Raises:
          UserError: the batch does not divide over the mesh, or the model is misconfigured.
        """
        data = config.data
        batches.check_batch(
            mesh, data.batch_size, accumulation=config.accumulation, length=data.sequence_length
        )
        model = Decoder(decoder_config(config.model, vocabulary))
        optimizer = make_optimizer(config.optimizer, config.total_steps)
        return cls(
            config=config,
            model=model,
            mesh=mesh,
            optimizer=optimizer,
            loss=make_loss(model, vocabulary, config.loss),
            rules=model_rules(model.config, mesh),
            abstract=abstract_state(params_init(model), optimizer, mesh),
            batch_sharding=batches.batch_sharding(mesh, sequence=True),
        )

    @property
    def flops_per_token(self) -> float:
        """Operations of a training step per token, by the count of ``flops.py``."""
        length = self.config.data.sequence_length
        share = flops.head_share(self.config.loss.max_labelled, length)
        return flops.training_flops(self.model.config, length, share)

    @property
    def row_share(self) -> batches.RowShare:
        """The part of every batch that this process reads."""
        return batches.RowShare.of(self.batch_sharding, self.config.data.batch_size)

    def train_step(self) -> Step:
        """``step(state, batch) -> (state, metrics)``, not compiled yet."""
        return make_train_step(
            self.loss,
            self.optimizer,
            self.abstract,
            self.batch_sharding,
            schedule=make_schedule(self.config.optimizer, self.config.total_steps),
            seed=self.config.seed,
            accumulation=self.config.accumulation,
            normalisation=self.config.loss.normalisation,
            rules=self.rules,
        )

    def eval_step(self) -> Step:
        """``step(params, batch) -> sums``, not compiled yet."""
        return make_eval_step(self.loss, self.abstract, self.batch_sharding, rules=self.rules)

    def new_state(self, params: Any = None) -> TrainState:
        """The state at step 0, around ``params`` (donated) or random ones of the run's seed."""
        if params is not None:
            return state_from_params(params, self.optimizer, self.abstract)
        return init_state(params_init(self.model), self.optimizer, self.config.seed, self.abstract)

    def with_visual_rows(self, state: TrainState, codebook: np.ndarray, first: int) -> TrainState:
        """``state`` (donated) with embeddings of visual ids made from the tokenizer's codebook.

        Args:
          state: at step 0.
          codebook: float [K, E].
          first: id of code 0.
        """
        shape = self.model.config
        rows = codebook_rows(codebook, shape.hidden_size, shape.initializer_range, self.config.seed)

        def place(state: TrainState) -> TrainState:
            table = state.params["embedding"]
            table = table.at[first : first + len(rows)].set(rows.astype(table.dtype))
            return dataclasses.replace(state, params={**state.params, "embedding": table})

        return jax.jit(place, out_shardings=sharding.shardings(self.abstract), donate_argnums=0)(
            state
        )


def decoder_config(model: ModelConfig, vocabulary: Vocabulary) -> DecoderConfig:
    """The preset with its overrides, sized for the vocabulary.

    Raises:
      UserError: an unknown preset or field, or one that the vocabulary decides.
    """
    for name in _FROM_VOCABULARY:
        if name in model.overrides:
            raise UserError(f"model.overrides.{name}: comes from the vocabulary; remove it")
    return preset(
        model.preset, **model.overrides, vocab_size=vocabulary.size, pad_id=vocabulary.pad
    )


def params_init(model: Decoder) -> Callable[[jax.Array], Any]:
    """``init(key)`` of the parameters, boxed with their logical names."""

    def init(key: jax.Array) -> Any:
        tokens = jnp.zeros((1, 1), jnp.int32)
        return model.init(key, tokens, tokens)["params"]

    return init


def model_rules(config: DecoderConfig, mesh: Mesh) -> sharding.Rules:
    """Sharding rules without what this decoder's heads and widths do not allow."""
    sizes = {
        axes.ACTIVATION_HEADS: config.num_heads,
        axes.ACTIVATION_KV_HEADS: config.num_kv_heads,
        axes.ACTIVATION_MLP: config.mlp_size,
        axes.ACTIVATION_VOCAB: config.padded_vocab_size,
        axes.LOOKUP_EMBED: config.hidden_size,
        axes.LOSS_VOCAB: config.padded_vocab_size,
    }
    return sharding.activation_rules(mesh, sizes)


def make_loss(model: Decoder, vocabulary: Vocabulary, config: LossConfig) -> LossFn:
    """The weighted cross-entropy as the steps take it.

    Its metrics: ``<modality>_loss`` and ``<modality>_accuracy``, unweighted means over the labelled
    tokens of text, visual and action; ``tokens``, all but padding.
    """
    modalities = Modalities.of(vocabulary)

    def loss(
        params: Any, batch: Any, rng: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        total, weight, sums = weighted_cross_entropy(
            model,
            params,
            batch,
            modalities,
            max_labelled=config.max_labelled or None,
            chunks=config.chunks or None,
            train=rng is not None,
            dropout_key=rng if model.config.dropout else None,
        )
        return total, weight, _metrics(sums, batch)

    return loss


def _metrics(sums: dict[str, jax.Array], batch: Any) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for name in MODALITIES:
        count = sums[f"{name}_tokens"]
        metrics[f"{name}_loss"] = sums[f"{name}_nll"], count
        metrics[f"{name}_accuracy"] = sums[f"{name}_correct"], count
    return metrics | {TOKENS: jnp.sum(batch.segment_ids > 0).astype(jnp.float32)}
