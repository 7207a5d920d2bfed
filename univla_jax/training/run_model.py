"""The model of a run: config, loss, sharded state and jitted steps, without any data or array."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from univla_jax import config as strict
from univla_jax.errors import UserError
from univla_jax.models import axes
from univla_jax.models.action_expert import ActionExpert, ActionExpertConfig
from univla_jax.models.decoder import Decoder
from univla_jax.models.presets import DecoderConfig, preset
from univla_jax.tokenizers.vocabulary import Vocabulary
from univla_jax.training import batches, checkpoint_folder, flops, sharding
from univla_jax.training.flow_loss import DECODER, EXPERT
from univla_jax.training.optimizer import make_optimizer, make_schedule
from univla_jax.training.run_loss import make_loss
from univla_jax.training.state import TrainState, abstract_state, init_state, state_from_params
from univla_jax.training.step import LossFn, Step, make_eval_step, make_train_step
from univla_jax.training.train_config import ModelConfig, TrainConfig
from univla_jax.training.visual_rows import codebook_rows

_FROM_VOCABULARY = ("vocab_size", "pad_id")


@dataclasses.dataclass(frozen=True)
class RunModel:
    """What a config says about computation, over a mesh; building it allocates nothing.

    Attributes:
      config: the run's.
      model: the decoder.
      expert: the action expert on top of it, or None.
      mesh: the devices, also those of a topology that is not here.
      optimizer: AdamW with the run's schedule.
      loss: of one batch, as sums.
      rules: sharding rules that fit decoder and expert.
      abstract: shapes, dtypes and shardings of the state.
      batch_sharding: of every array [B, S] of a batch.
    """

    config: TrainConfig
    model: Decoder
    expert: ActionExpert | None
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
        expert = None
        if config.has_expert:
            expert = ActionExpert(expert_config(config.model, model.config), model.config)
            if mesh.shape["context"] > 1:
                raise UserError(
                    f"mesh.context: {mesh.shape['context']}, but chunks of the layout "
                    f"{data.layout!r} are not split along time; set it to 1"
                )
        optimizer = make_optimizer(config.optimizer, config.total_steps)
        return cls(
            config=config,
            model=model,
            expert=expert,
            mesh=mesh,
            optimizer=optimizer,
            loss=make_loss(model, vocabulary, config.loss, expert),
            rules=model_rules(model.config, mesh, expert),
            abstract=abstract_state(params_init(model, expert), optimizer, mesh),
            batch_sharding=batches.batch_sharding(mesh, sequence=True),
        )

    @property
    def flops_per_token(self) -> float:
        """Operations of a training step per token, by the count of ``flops.py``.

        Of an expert those of its layers count, over [hidden ; actions].
        """
        length = self.config.data.sequence_length
        share = flops.head_share(self.config.loss.max_labelled, length)
        count = flops.training_flops(self.model.config, length, share)
        if self.expert is not None:
            joint = length + self.config.data.action_frames
            stack = self.expert.config.stack(self.model.config)
            count += flops.training_flops(stack, joint, 0.0) * joint / length
        return count

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
        init = params_init(self.model, self.expert)
        return init_state(init, self.optimizer, self.config.seed, self.abstract)

    def earlier_params(self, checkpoint: pathlib.Path) -> Any:
        """The parameters of an earlier stage; an expert that it does not have starts anew.

        Raises:
          UserError: a checkpoint of another model.
        """
        template, joint = self.abstract.params, checkpoint_folder.has_part(checkpoint, EXPERT)
        load = functools.partial(checkpoint_folder.load_params, checkpoint)
        if self.expert is None:
            return load(template, part=DECODER if joint else "")
        if joint:
            return load(template)
        fresh = jax.jit(
            lambda key: sharding.unbox(params_init(self.model, self.expert)(key)[EXPERT]),
            out_shardings=sharding.shardings(template[EXPERT]),
        )
        return {
            DECODER: load(template[DECODER]),
            EXPERT: fresh(jax.random.key(self.config.seed)),
        }

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
            decoder = state.params if self.expert is None else state.params[DECODER]
            table = decoder["embedding"]
            table = table.at[first : first + len(rows)].set(rows.astype(table.dtype))
            decoder = {**decoder, "embedding": table}
            params = decoder if self.expert is None else {**state.params, DECODER: decoder}
            return dataclasses.replace(state, params=params)

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


def expert_config(model: ModelConfig, decoder: DecoderConfig) -> ActionExpertConfig:
    """The expert's settings: the decoder's heads and the config's changes.

    Raises:
      UserError: an unknown field, or sizes that do not fit the decoder.
    """
    heads = {"num_heads": decoder.num_heads, "num_kv_heads": decoder.num_kv_heads}
    fields = {**heads, **model.action_expert}
    config = strict.build(ActionExpertConfig, fields, where="config.model.action_expert")
    config.stack(decoder)
    return config


def params_init(model: Decoder, expert: ActionExpert | None = None) -> Callable[[jax.Array], Any]:
    """``init(key)`` of the parameters, boxed with their logical names.

    With an expert they are ``{"decoder": ..., "action_expert": ...}``.
    """

    def init(key: jax.Array) -> Any:
        tokens = jnp.zeros((1, 1), jnp.int32)
        decoder = model.init(key, tokens, tokens)["params"]
        if expert is None:
            return decoder
        actions = jnp.zeros((1, 1, expert.config.action_dim))
        hidden = jnp.zeros((1, 1, model.config.hidden_size))
        key = jax.random.fold_in(key, 1)
        return {
            DECODER: decoder,
            EXPERT: expert.init(key, actions, jnp.zeros(1), hidden)["params"],
        }

    return init


def model_rules(
    config: DecoderConfig, mesh: Mesh, expert: ActionExpert | None = None
) -> sharding.Rules:
    """Sharding rules without what the heads and widths of decoder and expert do not allow."""
    sizes = {
        axes.ACTIVATION_HEADS: config.num_heads,
        axes.ACTIVATION_KV_HEADS: config.num_kv_heads,
        axes.ACTIVATION_MLP: config.mlp_size,
        axes.ACTIVATION_VOCAB: config.padded_vocab_size,
        axes.LOOKUP_EMBED: config.hidden_size,
        axes.LOSS_VOCAB: config.padded_vocab_size,
    }
    if expert is not None:
        stack = expert.config.stack(config)
        others = {
            axes.ACTIVATION_HEADS: stack.num_heads,
            axes.ACTIVATION_KV_HEADS: stack.num_kv_heads,
            axes.ACTIVATION_MLP: stack.mlp_size,
        }
        sizes |= {name: math.gcd(sizes[name], size) for name, size in others.items()}
    return sharding.activation_rules(mesh, sizes)
