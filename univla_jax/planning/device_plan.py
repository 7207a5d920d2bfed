"""Plan of a training step on one accelerator by count, and what to change where it does not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from univla_jax.cli import format_table
from univla_jax.errors import UserError
from univla_jax.models.decoder import Decoder
from univla_jax.planning.memory_count import MemoryCount, count_memory
from univla_jax.planning.topologies import GIB, format_gib
from univla_jax.tokenizers.vocabulary import Vocabulary
from univla_jax.training import hardware
from univla_jax.training.hardware import CARDS, Chip
from univla_jax.training.model_setup import TrainSetup, remat_for
from univla_jax.training.sharding import batch_parts
from univla_jax.training.train_config import TrainConfig

# What a program may use of the memory by count: the compiler's own buffers, its copies and the gaps
# between arrays are not counted. Counted totals of the 8.5 B decoder stand beside the TPU
# compiler's in configs/README.md.
USABLE = 0.85

_SMALL_STATE = {
    "model.overrides.param_dtype": "bfloat16",
    "optimizer.moments_dtype": "int8",
    "optimizer.rounding": "stochastic",
}
_LORA = {"model.lora.rank": 16}
_CHANGES: Sequence[Mapping[str, Any]] = (
    {},
    {"optimizer.offload": True},
    {"optimizer.moments_dtype": "bfloat16"},
    {"optimizer.moments_dtype": "int8"},
    _SMALL_STATE,
    _SMALL_STATE | {"optimizer.offload": True},
    _LORA,
    _LORA | {"model.lora.base": "int8"},
    _LORA | {"model.lora.base": "int4"},
)
"""What makes a step smaller, from that which changes training least."""


@dataclasses.dataclass(frozen=True)
class DevicePlan:
    """What a train step needs on one accelerator, by count.

    Attributes:
      device: name of the card or chip.
      changes: keys of the config that were changed, and their values.
      batch_size: sequences of a step.
      accumulation: micro-batches of a step.
      remat: preset of what the backward pass keeps.
      memory: bytes.
      usable: bytes that may be counted on this device.
      seconds: lower bound on the time of a step, by arithmetic.
    """

    device: str
    changes: dict[str, Any]
    batch_size: int
    accumulation: int
    remat: str
    memory: MemoryCount
    usable: int
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether the count stays below what may be used."""
        return self.memory.total <= self.usable

    @property
    def flags(self) -> str:
        """The changes as flags of ``train``."""
        return " ".join(f"--config.{key}={value}" for key, value in self.changes.items())

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        values = dataclasses.asdict(self)
        return values | {"total": self.memory.total, "fits": self.fits, "flags": self.flags}

    def describe(self) -> str:
        """Some lines of text."""
        memory, fits = self.memory, "fits" if self.fits else "DOES NOT FIT"
        lines = {
            "device": self.device + (f", with {self.flags}" if self.changes else ""),
            "step": f"{self.batch_size} sequences in {self.accumulation} micro-batch(es), remat "
            f"{self.remat!r}",
            "parameters": format_gib(memory.parameters),
            "optimizer": format_gib(memory.optimizer),
            "gradients": format_gib(memory.gradients),
            "activations": f"{format_gib(memory.kept)} kept, and {format_gib(memory.layer)} of one "
            f"layer or {format_gib(memory.loss)} of the loss",
            "total": f"{format_gib(memory.total)} counted of {format_gib(self.usable)}: {fits}",
            **({"host": format_gib(memory.host)} if memory.host else {}),
            "step time": f"at least {self.seconds:.3f} s",
        }
        return "\n".join(f"{name:<16}{value}" for name, value in lines.items())


def find_card(name: str) -> Chip:
    """The data sheet of one accelerator by its name.

    Raises:
      UserError: none of that name.
    """
    if name not in CARDS:
        raise UserError(f"--device={name}: unknown; expected one of {', '.join(CARDS)}")
    return CARDS[name]


def plan_device(config: TrainConfig, chip: Chip) -> DevicePlan:
    """The step as the config has it.

    Raises:
      UserError: the config wants several devices.
    """
    setup = TrainSetup.on_devices(config, Vocabulary.emu3(), jax.devices()[:1])
    return _plan(setup, chip, {})


def search_device(config: TrainConfig, chip: Chip) -> list[DevicePlan]:
    """The config, then its smaller variations, each with the fewest micro-batches that fit."""
    return [plan for _, plan in smaller_plans(config, chip, jax.devices()[:1])]


def smaller_plans(
    config: TrainConfig, chip: Chip, devices: Sequence[jax.Device]
) -> Iterator[tuple[TrainConfig, DevicePlan]]:
    """The config with each of ``_CHANGES``, and what it takes on devices of this kind.

    Micro-batches are as few as fit by count, or of one sequence per device where none fits. A
    config that trains adapters already is changed in their base alone.
    """
    for changes in _CHANGES:
        if config.model.lora.enabled and changes and "model.lora.base" not in changes:
            continue
        own = {key: value for key, value in changes.items() if _get(config, key) != value}
        if changes and not own:
            continue
        setup = TrainSetup.on_devices(_with(config, own), Vocabulary.emu3(), devices)
        fewest, setups = config.accumulation, []
        for accumulation in range(fewest, config.data.batch_size + 1):
            parts = batch_parts(setup.mesh) * accumulation
            if config.data.batch_size % parts == 0:
                changed = dataclasses.replace(setup.config, accumulation=accumulation)
                setups.append(dataclasses.replace(setup, config=changed))
        for setup in setups:
            count = setup.config.accumulation
            more = {"accumulation": count} if count != fewest else {}
            plan = _plan(setup, chip, own | more)
            if plan.fits:
                break
        yield setup.config, plan


def search_table(plans: Sequence[DevicePlan]) -> str:
    """One line per plan."""
    header = ["total", "", "remat", "micro-batches", "step at least", "changes"]
    lines = [
        [
            format_gib(plan.memory.total),
            "fits" if plan.fits else "does not fit",
            plan.remat,
            str(plan.accumulation),
            f"{plan.seconds:.2f} s",
            plan.flags or "none",
        ]
        for plan in plans
    ]
    return format_table([header, *lines], left=len(header))


def _plan(setup: TrainSetup, chip: Chip, changes: dict[str, Any]) -> DevicePlan:
    config = setup.config
    remat = remat_for(
        config, setup.model.config, chip, setup.mesh, setup.abstract, setup.is_trained
    )
    decoder = dataclasses.replace(setup.model.config, remat=remat)
    setup = dataclasses.replace(setup, model=Decoder(decoder))
    tokens = config.data.batch_size * config.data.sequence_length
    flops = setup.flops_per_token
    flops += hardware.recomputed_flops(decoder, config.data.sequence_length)
    return DevicePlan(
        device=chip.name,
        changes=changes,
        batch_size=config.data.batch_size,
        accumulation=config.accumulation,
        remat=remat,
        memory=count_memory(setup),
        usable=int(USABLE * chip.hbm_gib * GIB),
        seconds=tokens * flops / setup.mesh.size / (chip.teraflops * 1e12),
    )


def _get(config: Any, key: str) -> Any:
    """The value of a dotted key; None for an override that is not set."""
    for name in key.split("."):
        config = config.get(name) if isinstance(config, Mapping) else getattr(config, name)
    return config


def _with(config: Any, changes: Mapping[str, Any]) -> Any:
    """The config with some dotted keys changed."""
    for key, value in changes.items():
        config = _replaced(config, key.split("."), value)
    return config


def _replaced(config: Any, path: Sequence[str], value: Any) -> Any:
    name, *rest = path
    if isinstance(config, Mapping):
        return {**config, name: value}
    inner = _replaced(getattr(config, name), rest, value) if rest else value
    return dataclasses.replace(config, **{name: inner})
