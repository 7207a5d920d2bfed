"""Memory per chip and lower bound on the time of prefill and decoding on a slice."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from univla_jax.errors import UserError
from univla_jax.inference import decode_loop, decode_step
from univla_jax.inference.sampler import length_bucket
from univla_jax.inference.sampling import GREEDY
from univla_jax.inference.speculative import Drafts
from univla_jax.models import quantized_weights
from univla_jax.models.decoder import Decoder
from univla_jax.models.decoder_config import DecoderConfig
from univla_jax.planning.collectives import analyze
from univla_jax.planning.hlo import Program
from univla_jax.planning.topologies import (
    GIB,
    CompiledProgram,
    Topology,
    compile_ahead,
    format_gib,
)
from univla_jax.tokenizers.continuations import Continuations
from univla_jax.tokenizers.vocabulary import Vocabulary
from univla_jax.training import hardware, sharding
from univla_jax.training.model_setup import decoder_config, model_rules, params_init
from univla_jax.training.sharding import MeshConfig, make_mesh, shard_bytes
from univla_jax.training.train_config import TrainConfig


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """What prefill and decoding need on a slice; sizes are bytes per chip.

    Attributes:
      topology: name of the slice.
      chips: number of chips in it.
      copies: of the model in the slice, each split over ``chips / copies`` chips.
      batch_size: robots per copy.
      prompt_tokens: of each robot, padded to its length bucket.
      new_tokens: the most that are decoded per call.
      int8: whether kernels and head are in eight bits.
      parameters: bytes; in the compute dtype but for those in eight bits.
      cache: bytes of keys and values.
      prefill_total: bytes at the worst moment of prefill.
      decode_total: bytes at the worst moment of decoding.
      usable: bytes that a program may use on this chip.
      fits: whether the compiler placed both.
      prefill_seconds: lower bound on prefill, by arithmetic.
      token_seconds: lower bound on each decoded token, by memory traffic.
      call_seconds: of a call of the decoder in the decode loop, by the number of its tokens: what
        the compiler's estimates add up to. Empty for devices that are no TPUs.
      compile_seconds: of all programs.
    """

    topology: str
    chips: int
    copies: int
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    int8: bool
    parameters: int
    cache: int
    prefill_total: int
    decode_total: int
    usable: int
    fits: bool
    prefill_seconds: float
    token_seconds: float
    call_seconds: Mapping[int, float]
    compile_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dataclasses.asdict(self)

    def describe(self) -> str:
        """A few lines of text."""
        fits, usable = "fits" if self.fits else "DOES NOT FIT", format_gib(self.usable)
        call = self.prefill_seconds + self.new_tokens * self.token_seconds
        lines = {
            "slice": f"{self.topology}, {self.chips} chips, {self.copies} cop(ies) of the model, "
            f"{self.batch_size} robot(s) each",
            "prompt": f"{self.prompt_tokens} tokens, then up to {self.new_tokens} decoded ones",
            "parameters": format_gib(self.parameters) + (" in eight bits" if self.int8 else ""),
            "cache": format_gib(self.cache),
            "prefill": f"{format_gib(self.prefill_total)} in total",
            "decoding": f"{format_gib(self.decode_total)} in total",
            "memory": f"{format_gib(max(self.prefill_total, self.decode_total))} of {usable} "
            f"usable: {fits}",
            "time": f"at least {1e3 * self.prefill_seconds:.1f} ms of prefill, "
            f"{1e3 * self.token_seconds:.2f} ms per token, {1e3 * call:.0f} ms for all tokens",
            "predicted": ", ".join(
                f"{1e3 * seconds:.2f} ms per call of {tokens} token(s)"
                for tokens, seconds in self.call_seconds.items()
            )
            or "nothing, the devices are no TPUs",
            "compilation": f"{self.compile_seconds:.0f} s",
        }
        if not self.fits:
            eight_bits = "" if self.int8 else "weights in eight bits (--int8), "
            fewer = "fewer robots (--batch_size), " if self.batch_size > 1 else ""
            lines["remedy"] = f"{eight_bits}{fewer}or more chips (--topology)"
        return "\n".join(f"{name:<16}{value}" for name, value in lines.items())


def plan_decoding(
    config: TrainConfig,
    topology: Topology,
    *,
    batch_size: int = 1,
    blocks: Sequence[int] = (1,),
    int8: bool = False,
) -> DecodePlan:
    """Compiles prefill and the decode loop of a recipe's policy or world model for a slice.

    The attention heads are split over as many chips as divide the key heads evenly; chips beyond
    that hold further copies of the model.

    Args:
      config: the recipe.
      topology: the slice.
      batch_size: robots per copy.
      blocks: tokens of a call of the decoder, drafts included; the loop is compiled for each.
      int8: whether kernels and head are in eight bits, as ``serve --int8`` stores them.

    Raises:
      UserError: no block, one below 1, one longer than what is decoded, or the package that
        quantizes is not installed.
    """
    vocabulary, chip = Vocabulary.emu3(), topology.chip
    # As loaded for inference: no dropout, weights in the compute dtype.
    trained = decoder_config(config.model, vocabulary)
    decoder = dataclasses.replace(trained, dropout=0.0, remat="none", param_dtype=trained.dtype)
    parts = math.gcd(len(topology.devices), decoder.num_kv_heads)
    mesh = make_mesh(MeshConfig(data=-1, fsdp=1, tensor=parts), topology.devices)
    programs = _DecodePrograms.of(config, vocabulary, decoder, mesh, batch_size, int8)
    with jax.set_mesh(mesh), nn.logical_axis_rules(model_rules(decoder, mesh)):
        if not blocks or min(blocks) < 1 or max(blocks) > programs.new_tokens:
            raise UserError(
                f"blocks of {', '.join(map(str, blocks)) or 'no'} tokens, expected 1 to the "
                f"{programs.new_tokens} that a call of the policy or world model decodes"
            )
        prefill = programs.compile_prefill()
        loops = {block: programs.compile_decode(block) for block in sorted(set(blocks))}
    # Prefill is bound by arithmetic: the prompt's tokens through all layers, none through the head.
    prompt, cache = programs.prompt_tokens, shard_bytes(programs.batch.cache)
    prefill_flops = batch_size * prompt * hardware.token_flops(decoder, prompt, 0.0)
    # A decode step reads all layers, the head rows of the ids that may be chosen, and the cache.
    head = programs.num_allowed * decoder.hidden_size
    head *= 1 if int8 else decoder.compute_dtype.itemsize
    traffic = shard_bytes(programs.params["stack"]) + head + cache
    return DecodePlan(
        topology=topology.name,
        chips=len(topology.devices),
        copies=len(topology.devices) // parts,
        batch_size=batch_size,
        prompt_tokens=prompt,
        new_tokens=programs.new_tokens,
        int8=int8,
        parameters=shard_bytes(programs.params),
        cache=cache,
        prefill_total=prefill.peak,
        decode_total=max(loop.peak for loop in loops.values()),
        usable=int(chip.hbm_gib * GIB),
        fits=all(program.fits for program in (prefill, *loops.values())),
        prefill_seconds=prefill_flops / parts / (chip.teraflops * 1e12),
        token_seconds=traffic / (chip.gigabytes_per_second * 1e9),
        call_seconds={
            block: _call_seconds(loop, topology)
            for block, loop in loops.items()
            if loop.text and topology.devices[0].platform == "tpu"
        },
        compile_seconds=sum(program.seconds for program in (prefill, *loops.values())),
    )


def _call_seconds(loop: CompiledProgram, topology: Topology) -> float:
    """Of one turn of the decode loop, which is the longest of a program's loops."""
    program = Program.parse(loop.text)
    bodies = {
        line.called["body"]
        for line in program.computations[program.entry]
        if line.opcode == "while"
    }
    turns = (analyze(program, topology.chip, topology.shape, body) for body in bodies)
    return max(turn.step_seconds for turn in turns)


@dataclasses.dataclass(frozen=True)
class _DecodePrograms:
    """Prefill and the decode loop with abstract, sharded arguments.

    Attributes:
      model: the decoder.
      mesh: devices of the slice.
      params: abstract parameters.
      batch: abstract sequences after prefill, with their cache.
      prompt_tokens: padded length of a prompt.
      new_tokens: the most that are decoded per call.
      num_allowed: number of ids that may be chosen.
      acts: whether those are actions.
    """

    model: Decoder
    mesh: Mesh
    params: Any
    batch: Any
    prompt_tokens: int
    new_tokens: int
    num_allowed: int
    acts: bool

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        vocabulary: Vocabulary,
        decoder: DecoderConfig,
        mesh: Mesh,
        batch_size: int,
        int8: bool,
    ) -> _DecodePrograms:
        model = Decoder(decoder)
        abstract = jax.eval_shape(params_init(model), jax.random.key(0))
        if int8:
            abstract = jax.eval_shape(quantized_weights.quantize_params, abstract)
        params = sharding.with_shardings(abstract, mesh)
        acts = config.data.needs.actions
        # A sample has ``frames`` chunks or frames to predict, and one call makes one of them.
        labeled = config.loss.max_labeled or config.data.sequence_length
        new_tokens = -(-labeled // config.data.frames)
        prompt = length_bucket(config.data.sequence_length)
        # Shapes of the sequences after prefill, with their cache. The parameters are made of zeros
        # inside, where nothing is computed: prefill takes them without the sharding annotations.
        batch = jax.eval_shape(
            lambda: decode_step.prefill(
                model,
                nn.unbox(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)),
                jnp.zeros((batch_size * mesh.shape["data"], prompt), jnp.int32),
                jnp.ones((batch_size * mesh.shape["data"],), jnp.int32),
                slots=length_bucket(prompt + new_tokens),
            )
        )
        num_allowed = vocabulary.action_size + 2 if acts else vocabulary.visual_size
        sharded = jax.tree.map(lambda x: _shard_over_copies(x, mesh), batch)
        return cls(model, mesh, params, sharded, prompt, new_tokens, num_allowed, acts)

    def compile_prefill(self) -> CompiledProgram:
        count = len(self.batch.lengths)
        tokens = self._abstract((count, self.prompt_tokens), jnp.int32)
        lengths = self._abstract((count,), jnp.int32)
        slots = self.batch.cache.slots
        return compile_ahead(
            decode_step.prefill.lower(self.model, self.params, tokens, lengths, slots=slots)
        )

    def compile_decode(self, block: int) -> CompiledProgram:
        # Actions are looked up in a table, frames are copied from the one before.
        count, table = len(self.batch.lengths), None
        period = 0 if self.acts or block == 1 else self.new_tokens
        if self.acts and block > 1:
            shape = Continuations().table.shape
            table = self._abstract(shape, jnp.int32, split=False)
        return compile_ahead(
            decode_loop.generate.lower(
                self.model,
                self.params,
                batch=self.batch,
                layers=None,
                ids=self._abstract((self.num_allowed,), jnp.int32, split=False),
                stop_id=self._abstract((), jnp.int32, split=False),
                keys=None,
                active=self._abstract((count,), bool),
                forced_ids=None,
                grammar=None,
                drafts=Drafts(self._abstract((count, period), jnp.int32), table, period),
                num_drawn=self._abstract((), jnp.int32, split=False),
                max_new_tokens=self.new_tokens,
                sampling=GREEDY,
                window=self.batch.cache.slots,
                guidance=1,
                block=block,
            )
        )

    def _abstract(self, shape: tuple[int, ...], dtype: Any, split: bool = True) -> Any:
        spec = PartitionSpec("data") if split else PartitionSpec()
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, spec))


def _shard_over_copies(leaf: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """The batch axis split over copies of the model; the cache [L, B, M, K, C] over K as well."""
    spec = (None, "data", None, "tensor") if leaf.ndim == 5 else ("data",)
    placement = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement)
