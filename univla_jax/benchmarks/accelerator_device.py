"""Sizes, weights and times of ``benchmarks.accelerator``, and its part that measures the device."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from univla_jax.benchmarks.harness import timed
from univla_jax.integrity import path_name
from univla_jax.models.quantized_weights import quantize_leaf
from univla_jax.planning.topologies import GIB
from univla_jax.training import hardware

Emit = Callable[[Mapping[str, Any]], None]
_NO_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
      preset: of the decoder.
      smaller: presets to train in full where ``preset`` does not fit, the largest first.
      prompt: tokens.
      count: new tokens.
      batches: prompts of a call.
      length: tokens of a training sequence.
      micro_batches: sequences of a training step, the most first; the first that fits is timed.
      vision: preset of the vision tokenizer.
      frames: per call.
      side: height and width of a frame in pixels.
      repeats: the most; the fastest counts.
      budget: seconds of the part; no repeat begins after half of it.
    """

    preset: str = "emu3_8b"
    smaller: tuple[str, ...] = ("base", "small")
    prompt: int = 1300
    count: int = 50
    batches: tuple[int, ...] = (1, 8)
    length: int = 3200
    micro_batches: tuple[int, ...] = (4, 2, 1)
    vision: str = "emu3"
    frames: int = 64
    side: int = 200
    repeats: int = 5
    budget: float = 60.0
    began: float = dataclasses.field(default_factory=time.monotonic)

    def turns(self) -> Iterator[int]:
        """Numbers of the repeats, at least one."""
        for turn in range(self.repeats):
            if turn and time.monotonic() - self.began > self.budget / 2:
                return
            yield turn


# ----------------------------------------------------------------------------
# The device, and weights that look random.


def measure_device(sizes: Sizes, emit: Emit) -> None:
    """Name, memory, and what of its data sheet plain copies and products reach."""
    device = jax.devices()[0]
    chip = hardware.find_chip(device)
    emit(
        {
            "device": device.device_kind,
            "backend": jax.default_backend(),
            "jax": jax.__version__,
            "memory_gib": memory_limit() / GIB,
            "sheet_bytes_per_second": chip and chip.gigabytes_per_second * 1e9,
            "sheet_flops": chip and chip.teraflops * 1e12,
        }
    )
    emit({"copied_bytes_per_second": copied_bytes_per_second(sizes)})
    side = 8192 if jax.default_backend() != "cpu" else 512
    left = jnp.ones((side, side), jnp.bfloat16)
    multiply = jax.jit(lambda x: x @ x)
    seconds = fastest_seconds(sizes, lambda: multiply(left))
    emit({"product_side": side, "product_flops": 2 * side**3 / seconds})


def copied_bytes_per_second(sizes: Sizes) -> float:
    """Bytes that a copy on the device reads and writes together."""
    on_cpu = jax.default_backend() == "cpu"
    source = jnp.zeros(2**24 if on_cpu else 2**29, jnp.float32)  # 64 MiB, 2 GiB
    copy = jax.jit(lambda x: x + 1)
    return 2 * source.nbytes / fastest_seconds(sizes, lambda: copy(source))


def memory_limit() -> int:
    """Bytes that this process may use of the device; 0 where it does not say."""
    return int((jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0))


def peak_memory() -> int:
    """Bytes of the device at the worst moment of this process; 0 where it does not say."""
    return int((jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0))


def draw_params(abstract: Any, kind: str = "") -> Any:
    """Parameters on the device, array by array: hashes of their indices, and norms of 1.

    Args:
      abstract: shapes, with or without shardings.
      kind: of ``quantized_weights.KINDS``, or empty for none.
    """

    def leaf(path: Any, x: jax.ShapeDtypeStruct) -> Any:
        name = path_name(path)

        # Fused into one pass over the array; a random generator would need its bits first.
        def draw() -> Any:
            if name.endswith("scale"):
                return jnp.ones(x.shape, x.dtype)
            index = jnp.uint32(len(name))
            for axis in range(len(x.shape)):
                own = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
                index = (index ^ own) * jnp.uint32(2654435761)
                index = (index ^ (index >> 15)) * jnp.uint32(2246822519)
                index ^= index >> 13
            value = 0.07 * (index.astype(jnp.float32) / 2.0**32 - 0.5)  # deviation 0.02
            return value.astype(x.dtype)

        drawn = jax.jit(draw)
        made = drawn() if not kind else jax.jit(lambda: quantize_leaf(name, draw(), kind))()
        return jax.block_until_ready(made)

    return jax.tree_util.tree_map_with_path(leaf, abstract)


def fastest_seconds(sizes: Sizes, work: Callable[[], Any]) -> float:
    """Seconds of the fastest repeat, after one that compiles."""
    jax.block_until_ready(work())
    return min(timed(lambda: jax.block_until_ready(work()))[1].wall for _ in sizes.turns())


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of JAX or PyTorch says that the device's memory is full."""
    return any(text in f"{type(error).__name__} {error}" for text in _NO_MEMORY)


def describe_error(error: BaseException) -> str:
    """Type and first line of an error."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
