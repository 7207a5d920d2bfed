"""The plan of acting: reading a prompt and decoding tokens, as the policy server does it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from univla_jax.inference import decode_step
from univla_jax.inference.sampler import length_bucket
from univla_jax.inference.sampling import GREEDY
from univla_jax.models.decoder import Decoder
from univla_jax.models.decoder_config import DecoderConfig
from univla_jax.planning.topologies import GIB, Compiled, Topology, compile_for, shard_bytes
from univla_jax.planning.training_plan import gib
from univla_jax.tokenizers.vocabulary import Vocabulary
from univla_jax.training import hardware, sharding
from univla_jax.training.hardware import Chip
from univla_jax.training.model_setup import decoder_config, model_rules, params_init
from univla_jax.training.sharding import MeshConfig, make_mesh
from univla_jax.training.train_config import TrainConfig


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """What prefill and decoding need on a slice; sizes are bytes per chip.

    Attributes:
      topology: name of the slice.
      chips: in it.
      copies: of the model in the slice, each split over ``chips / copies`` chips.
      rows: robots per copy.
      prompt_tokens: of each robot, bucket included.
      new_tokens: the most that are decoded per call.
      parameters: bytes, in the compute type.
      cache: bytes of keys and values.
      prefill_total: bytes at the worst moment of reading the prompt.
      decode_total: bytes at the worst moment of decoding.
      usable: bytes which a program may use on this chip.
      fits: whether the compiler placed both.
      prefill_seconds: reading the prompt takes at least that long, by arithmetic.
      token_seconds: each decoded token takes at least that long, by memory traffic.
      compile_seconds: of both programs.
    """

    topology: str
    chips: int
    copies: int
    rows: int
    prompt_tokens: int
    new_tokens: int
    parameters: int
    cache: int
    prefill_total: int
    decode_total: int
    usable: int
    fits: bool
    prefill_seconds: float
    token_seconds: float
    compile_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dataclasses.asdict(self)


def plan_decoding(config: TrainConfig, topology: Topology, *, rows: int = 1) -> DecodePlan:
    """Compiles prefill and the decode loop of a recipe's policy or world model for a slice.

    The heads are split over as many chips as share the key heads evenly; chips beyond that hold
    further copies.

    Args:
      config: the recipe.
      topology: the slice.
      rows: robots per copy.
    """
    vocabulary = Vocabulary.emu3()
    decoder = inference_config(decoder_config(config.model, vocabulary))
    parts = math.gcd(len(topology.devices), decoder.num_kv_heads)
    mesh = make_mesh(MeshConfig(data=-1, fsdp=1, tensor=parts), topology.devices)
    job = _Job.of(config, vocabulary, decoder, mesh, rows)
    with jax.set_mesh(mesh), nn.logical_axis_rules(model_rules(decoder, mesh)):
        prefill, decode = job.prefill(), job.decode()
    chip, copies = topology.chip, len(topology.devices) // parts
    cache = shard_bytes(job.rows.cache)
    return DecodePlan(
        topology=topology.name,
        chips=len(topology.devices),
        copies=copies,
        rows=rows,
        prompt_tokens=job.prompt,
        new_tokens=job.count,
        parameters=shard_bytes(job.params),
        cache=cache,
        prefill_total=prefill.total,
        decode_total=decode.total,
        usable=int(chip.hbm_gib * GIB),
        fits=prefill.fits and decode.fits,
        prefill_seconds=prefill_seconds(decoder, chip, rows * job.prompt, job.prompt, parts),
        token_seconds=token_seconds(job, decoder, chip, cache),
        compile_seconds=prefill.seconds + decode.seconds,
    )


def inference_config(decoder: DecoderConfig) -> DecoderConfig:
    """The decoder as it is loaded for acting: no dropout, weights in the compute type."""
    return dataclasses.replace(decoder, dropout=0.0, remat="none", param_dtype=decoder.dtype)


def prefill_seconds(
    decoder: DecoderConfig, chip: Chip, tokens: int, length: int, parts: int
) -> float:
    """Shortest time to read ``tokens`` in rows of ``length`` on ``parts`` chips."""
    return tokens * hardware.token_flops(decoder, length, 0.0) / parts / (chip.teraflops * 1e12)


def token_seconds(job: _Job, decoder: DecoderConfig, chip: Chip, cache: int) -> float:
    """Shortest time of one decoded token: all layers, the chosen head rows and the cache."""
    weights = shard_bytes(job.params["stack"])
    head = job.choices * decoder.hidden_size * decoder.compute_dtype.itemsize
    return (weights + head + cache) / (chip.gigabytes_per_second * 1e9)


@dataclasses.dataclass(frozen=True)
class _Job:
    """Abstract arguments of both programs."""

    model: Decoder
    mesh: Mesh
    params: Any
    rows: Any
    prompt: int
    count: int
    choices: int

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        vocabulary: Vocabulary,
        decoder: DecoderConfig,
        mesh: Mesh,
        rows: int,
    ) -> _Job:
        model = Decoder(decoder)
        boxed = jax.eval_shape(params_init(model), jax.random.key(0))
        params = sharding.place(boxed, mesh)
        acts = config.data.needs.actions
        labeled = config.loss.max_labeled or config.data.sequence_length
        count = -(-labeled // config.data.frames)
        prompt = length_bucket(config.data.sequence_length)
        choices = vocabulary.action_size + 2 if acts else vocabulary.visual_size
        state = jax.eval_shape(
            lambda: decode_step.prefill(
                model,
                sharding.unbox(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)),
                jnp.zeros((rows * mesh.shape["data"], prompt), jnp.int32),
                jnp.ones((rows * mesh.shape["data"],), jnp.int32),
                slots=length_bucket(prompt + count),
            )
        )
        return cls(model, mesh, params, _placed(state, mesh), prompt, count, choices)

    def prefill(self) -> Compiled:
        tokens = self._array((self._batch, self.prompt), jnp.int32)
        lengths = self._array((self._batch,), jnp.int32)
        slots = self.rows.cache.slots
        arguments = (self.model, self.params, tokens, lengths)
        lowered = decode_step.prefill.lower(*arguments, slots=slots)
        return compile_for(lowered, shard_bytes(arguments[1:]))

    def decode(self) -> Compiled:
        ids = self._array((self.choices,), jnp.int32, split=False)
        active = self._array((self._batch,), bool)
        lowered = decode_step.generate.lower(
            self.model,
            self.params,
            rows=self.rows,
            layers=None,
            ids=ids,
            stop=self._array((), jnp.int32, split=False),
            keys=None,
            active=active,
            forced=None,
            form=None,
            count=self.count,
            sampling=GREEDY,
            window=self.rows.cache.slots,
            guidance=1,
        )
        return compile_for(lowered, shard_bytes((self.params, self.rows)))

    @property
    def _batch(self) -> int:
        return self.rows.lengths.shape[0]

    def _array(self, shape: tuple[int, ...], dtype: Any, split: bool = True) -> Any:
        spec = PartitionSpec("data") if split else PartitionSpec()
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, spec))


def _placed(rows: Any, mesh: Mesh) -> Any:
    """Rows split over copies, the cache also over key heads."""

    def leaf(x: Any) -> jax.ShapeDtypeStruct:
        is_cache = x.ndim == 5  # [L, B, M, K, C]
        spec = (None, "data", None, "tensor") if is_cache else ("data",)
        split = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split)

    return jax.tree.map(leaf, rows)


def describe(plan: DecodePlan) -> str:
    """A plan in a few lines."""
    fits = "fits" if plan.fits else "DOES NOT FIT"
    chunk = plan.prefill_seconds + plan.new_tokens * plan.token_seconds
    lines = [
        (
            "slice",
            f"{plan.topology}, {plan.chips} chips, {plan.copies} cop(ies) of the model, "
            f"{plan.rows} row(s) each",
        ),
        ("prompt", f"{plan.prompt_tokens} tokens, then up to {plan.new_tokens} decoded ones"),
        ("parameters", gib(plan.parameters)),
        ("cache", gib(plan.cache)),
        ("prefill", f"{gib(plan.prefill_total)} in total, {gib(plan.usable)} usable: {fits}"),
        ("decoding", f"{gib(plan.decode_total)} in total"),
        (
            "time",
            f"at least {1e3 * plan.prefill_seconds:.1f} ms to read the prompt, "
            f"{1e3 * plan.token_seconds:.2f} ms per token, {1e3 * chunk:.0f} ms for all tokens",
        ),
        ("compilation", f"{plan.compile_seconds:.0f} s"),
    ]
    return "\n".join(f"{name:<16}{value}" for name, value in lines)
