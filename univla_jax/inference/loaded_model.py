"""Loaded model: decoder, assets and task of a checkpoint folder, and nothing else."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, Protocol

import flax.linen as nn
import jax

from univla_jax.adapters import load_model_params
from univla_jax.assets import Assets
from univla_jax.checkpoints import acting_names, assets_folder, find_checkpoint
from univla_jax.config import build_config
from univla_jax.errors import UserError
from univla_jax.models.action_expert import (
    DECODER,
    EXPERT,
    ActionExpert,
    ActionExpertConfig,
    params_init,
)
from univla_jax.models.decoder import Decoder
from univla_jax.models.decoder_config import DecoderConfig
from univla_jax.models.placement import LOCAL, Placement
from univla_jax.models.quantized_weights import check_installed, quantize_leaf
from univla_jax.normalization import ActionStatistics
from univla_jax.sequences.tokens import Role
from univla_jax.tasks import TaskRecord, make_task, records_from_json, task_class
from univla_jax.tasks.base import Task


class MakePlacement(Protocol):
    """Chooses the devices of a model whose sizes are known."""

    def __call__(self, config: DecoderConfig, *, expert: ActionExpert | None) -> Placement:
        """The placement of a decoder, and of the expert on top of it."""
        ...


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A decoder ready to generate.

    Attributes:
      folder: the checkpoint ``.../checkpoints/<step>``.
      assets: tokenizers, vocabulary, image specs, statistics.
      record: a task it was trained on, and its settings.
      model: the decoder, without dropout; parameters are kept in its compute type.
      params: its parameters.
      expert: the action expert on top of it, or None.
      expert_params: its parameters.
      placement: on which devices all of them are.
      records: all tasks it was trained on; empty where ``record`` is the only one.
    """

    folder: pathlib.Path
    assets: Assets
    record: TaskRecord
    model: Decoder
    params: Any
    expert: ActionExpert | None = None
    expert_params: Any = None
    placement: Placement = LOCAL
    records: tuple[TaskRecord, ...] = ()

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str | pathlib.Path,
        *,
        untrained: bool = False,
        averaged: bool = True,
        seed: int = 0,
        int8: bool = False,
        place: MakePlacement | None = None,
    ) -> LoadedModel:
        """Loads a checkpoint; every file of its assets is verified, an adapter merged.

        Args:
          checkpoint: a folder ``checkpoints/<step>``, or the workdir whose newest one is taken.
          untrained: random parameters instead of the saved ones, as a baseline.
          averaged: the moving averages where the run kept some; False takes its last parameters.
          seed: of the random parameters.
          int8: kernels and head in eight bits, each quantized as soon as it is read.
          place: makes the placement of decoder and expert; one device by default.

        Raises:
          UserError: no complete checkpoint, assets that were changed or removed, parameters of
            another model, an adapter whose base is not there, or no averages to leave aside.
        """
        folder = find_checkpoint(checkpoint)
        if not averaged and not acting_names(folder):
            raise UserError(f"{folder} holds no averages; train with config.optimizer.ema_decay")
        assets = Assets.load(assets_folder(folder))
        records = records_from_json(assets.task)
        model = Decoder(inference_config(assets))
        expert = None
        if assets.action_expert:
            settings = build_config(
                ActionExpertConfig, assets.action_expert, where="assets.action_expert"
            )
            expert = ActionExpert(settings, model.config)
        placement = LOCAL if place is None else place(model.config, expert=expert)
        if int8:
            check_installed()
        init = params_init(model, expert)
        template = placement.place(jax.eval_shape(init, jax.random.key(0)))
        if untrained:
            params = _draw_params(init, template, placement, seed)
            params = _quantized(params) if int8 else params
        else:
            convert = _quantize if int8 else None
            params = load_model_params(
                folder, assets.adapter, template, averaged=averaged, convert=convert
            )
        if expert is None:
            return cls(
                folder, assets, records[0], model, params, placement=placement, records=records
            )
        decoder, own = params[DECODER], params[EXPERT]
        return cls(
            folder, assets, records[0], model, decoder, expert, own, placement, records=records
        )

    @functools.cached_property
    def task(self) -> Task:
        """The task of ``record``, which builds its prompts and parses its output."""
        return make_task(self.record.task, self.record.settings, self.assets)

    def statistics(self, key: str) -> ActionStatistics:
        """Of a corpus' actions, or under its ``state_key`` of its states.

        Raises:
          UserError: the assets hold none of it.
        """
        known = self.assets.statistics
        if key not in known:
            raise UserError(
                f"{self.folder}: the assets hold no statistics of {key!r}, only "
                f"of {', '.join(sorted(known)) or 'none'}"
            )
        return known[key]

    def select(
        self, kind: type[Task], role: Role, purpose: str, *, moments: int = 1
    ) -> LoadedModel:
        """The same model with the record of a task it was trained on.

        Args:
          kind: of the task.
          role: of tokens that it must have learned.
          purpose: what it is needed for, for the message.
          moments: the fewest moments that its sequences must have had. Of several fitting tasks
            that with the most moments is taken where more than one is asked for, else the first.

        Raises:
          UserError: it was trained on no such task.
        """
        fitting = [
            record
            for record in self.tasks
            if issubclass(task_class(record.task), kind)
            and record.learned(role)
            and record.frames >= moments
        ]
        if not fitting:
            trained = ", ".join(dict.fromkeys(repr(record.task) for record in self.tasks))
            several = "s" if "," in trained else ""
            raise UserError(
                f"{self.folder} was trained on the task{several} {trained}, which "
                f"{'are' if several else 'is'} not made for {purpose}"
            )
        # ``max`` keeps the first of equals.
        record = max(fitting, key=lambda r: r.frames) if moments > 1 else fitting[0]
        return self.with_record(record)

    @property
    def tasks(self) -> tuple[TaskRecord, ...]:
        """All tasks it was trained on."""
        return self.records if self.record in self.records else (self.record,)

    def with_record(self, record: TaskRecord) -> LoadedModel:
        """The same model with another of its records."""
        return self if record is self.record else dataclasses.replace(self, record=record)


def _quantize(name: str, x: jax.Array) -> Any:
    """A parameter of a checkpoint in eight bits; those of an expert stay as they are."""
    return x if EXPERT in name.split("/") else quantize_leaf(name, x)


def _quantized(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, x: _quantize(jax.tree_util.keystr(path, simple=True, separator="/"), x), params
    )


def _draw_params(
    init: Callable[[jax.Array], Any], template: Any, placement: Placement, seed: int
) -> Any:
    """Random parameters where restored ones would be."""
    # "rbg" compiles faster than the default generator. The sharding commits the parameters to their
    # device, as restoring does: else all that a trained model has compiled would be compiled again.
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda x: x.sharding or device, template)
    draw = jax.jit(lambda key: nn.unbox(init(key)), out_shardings=shardings)
    with placement.scope():
        return draw(jax.random.key(seed, impl="rbg"))


def inference_config(assets: Assets) -> DecoderConfig:
    """The trained decoder's; casting the parameters once is what training does at every use."""
    settings = build_config(DecoderConfig, assets.model, where="assets.model")
    return dataclasses.replace(settings, dropout=0.0, remat="none", param_dtype=settings.dtype)
