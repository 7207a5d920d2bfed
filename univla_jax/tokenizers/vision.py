"""The vision tokenizer as the rest of the package uses it: uint8 frames in, uint16 codes out.

Wraps the pure modules of ``vision_vq.py`` with weights, static batch shapes, files and a
fingerprint.

Axes: N frames, H/W pixels, h/w code grid, K codebook size, E latent channels.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import flax
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from univla_jax.errors import UserError
from univla_jax.io import PathLike, dump_json, parse_json, read_files, write_files
from univla_jax.tokenizers.image import to_levels, to_pixels
from univla_jax.tokenizers.vision_vq import VisionConfig, VisionVQ, abstract_variables

ENCODER_DTYPES = ("float32", "bfloat16")
CONFIG_FILE = "config.json"
PARAMS_FILE = "params.safetensors"
# Floats of one full-resolution layer per call: what the caches of a CPU hold, and elsewhere what is
# far below the memory of any accelerator.
_ACTIVATIONS_PER_CALL = {"cpu": 2**21}
_ACTIVATIONS_PER_CALL_ELSEWHERE = 2**26
_MAX_BATCH = 256


class FrameTokenizer(Protocol):
    """What data preparation, policies and world models need of a vision tokenizer."""

    @property
    def codebook_size(self) -> int:
        """Number of codes; every code lies below it."""

    @property
    def factor(self) -> int:
        """Pixels per code along each side."""

    @property
    def fingerprint(self) -> str:
        """sha256 of shape and weights."""

    def encode_frames(self, frames: np.ndarray) -> np.ndarray:
        """uint8 [N, H, W, 3] to uint16 [N, h, w]."""

    def decode_codes(self, codes: np.ndarray) -> np.ndarray:
        """Integer [N, h, w] to uint8 [N, H, W, 3]."""

    def save(self, folder: PathLike) -> None:
        """Writes the files that ``VisionTokenizer.load`` reads."""


class VisionTokenizer:
    """The VQ tokenizer of single frames, with its weights.

    Computation is float32 with full-precision products, whatever the platform's default, so that
    codes agree between training data and policy and between machines. Frames are shared by all
    local accelerators.

    Attributes:
      config: shape of the network.
      variables: ``{"params": ..., "batch_stats": ...}`` of ``VisionVQ``, on every device.
    """

    def __init__(
        self,
        config: VisionConfig,
        variables: Mapping[str, Any],
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        """Places the weights.

        Args:
          config: shape of the network.
          variables: of ``VisionVQ``.
          devices: that share the frames; by default all local accelerators, or one CPU.

        Raises:
          UserError: the variables are not those of ``config``.
        """
        self.config = config
        _check_variables(config, variables)
        if devices is None:
            devices = jax.local_devices()[: 1 if jax.default_backend() == "cpu" else None]
        # One device takes the plain path, whose programs the cache of compilations holds already.
        self._num_devices = len(devices)
        self._sharding: NamedSharding | None = None
        if self._num_devices > 1:
            mesh = Mesh(np.array(devices), ("frames",))
            self._sharding = NamedSharding(mesh, PartitionSpec("frames"))
            replicated = NamedSharding(mesh, PartitionSpec())
            self.variables = jax.device_put(dict(variables), replicated)
        else:
            self.variables = jax.tree.map(jnp.asarray, dict(variables))

    @property
    def codebook_size(self) -> int:
        """Number of codes K."""
        return self.config.codebook_size

    @property
    def codebook(self) -> np.ndarray:
        """The codebook, float32 [K, E]."""
        return np.asarray(self.variables["params"]["quantize"]["embedding"])

    @property
    def factor(self) -> int:
        """Pixels per code along each side."""
        return self.config.factor

    def encode_frames(self, frames: np.ndarray, *, dtype: str = "float32") -> np.ndarray:
        """Encodes frames, each on its own.

        Args:
          frames: uint8 [N, H, W, 3], RGB, H and W multiples of ``factor`` (see
            ``ImageSpec.resize``).
          dtype: of the network's products, one of ``ENCODER_DTYPES``; the nearest code is always
            found in float32. Less exact products give other codes here and there.

        Returns:
          uint16 [N, h, w].

        Raises:
          UserError: another dtype or shape.
        """
        found, channels = f"{frames.dtype} {list(frames.shape)}", self.config.in_channels
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != channels:
            raise UserError(f"frames are {found}, expected uint8 [N, H, W, {channels}]")
        if not len(frames) or any(side % self.factor or not side for side in frames.shape[1:3]):
            raise UserError(
                f"frames are {found}; expected at least one, with H and W multiples of "
                f"{self.factor}: resize them by their image spec"
            )
        size = self._batch_size(*frames.shape[1:3])
        method = "encode" if dtype == "float32" else f"encode_{dtype}"
        return self._batched(method, to_pixels, frames, size).astype(np.uint16)

    def decode_codes(self, codes: np.ndarray) -> np.ndarray:
        """Decodes codes to frames.

        Args:
          codes: integers [N, h, w] in [0, codebook_size).

        Returns:
          uint8 [N, H, W, 3].

        Raises:
          UserError: a code outside the codebook, or another dtype or shape.
        """
        if not np.issubdtype(codes.dtype, np.integer) or codes.ndim != 3 or not codes.size:
            found = f"{codes.dtype} {list(codes.shape)}"
            raise UserError(f"codes are {found}, expected integers [N, h, w]")
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= self.codebook_size:
            wrong = low if low < 0 else high
            raise UserError(f"code {wrong} is outside the codebook of {self.codebook_size} codes")
        size = self._batch_size(*(self.factor * side for side in codes.shape[1:]))
        return self._batched("decode", lambda c: c.astype(np.int32), codes, size, to_levels)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over the config and all weights; independent of the file format."""
        return fingerprint_of(self.config, sorted(self._flat_variables().items()))

    def save(self, folder: PathLike) -> None:
        """Writes ``config.json`` and ``params.safetensors``, the config last."""
        write_files(folder, {PARAMS_FILE: safetensors.numpy.save(self._flat_variables())})
        write_files(folder, {CONFIG_FILE: dump_json(self.config.to_dict())})

    @classmethod
    def load(cls, folder: PathLike) -> VisionTokenizer:
        """Loads what ``save`` wrote.

        Raises:
          UserError: a file is missing, damaged, or its weights are of another config.
        """
        files = read_files(folder, [CONFIG_FILE, PARAMS_FILE], what="vision tokenizer")
        values = parse_json(files[CONFIG_FILE], where=f"{folder}/{CONFIG_FILE}")
        try:
            flat = safetensors.numpy.load(files[PARAMS_FILE])
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise UserError(
                f"{folder}/{PARAMS_FILE} is damaged ({error}); restore the file or fit again"
            ) from error
        variables = flax.traverse_util.unflatten_dict(flat, sep="/")
        return cls(VisionConfig.from_dict(values), variables)

    def _flat_variables(self) -> dict[str, np.ndarray]:
        flat = flax.traverse_util.flatten_dict(self.variables, sep="/")
        return {name: np.asarray(value) for name, value in flat.items()}

    def _batch_size(self, height: int, width: int) -> int:
        """The largest power of two up to 256 whose widest activations the processor holds."""
        backend = jax.default_backend()
        limit = _ACTIVATIONS_PER_CALL.get(backend, _ACTIVATIONS_PER_CALL_ELSEWHERE)
        fitting = limit // (height * width * self.config.ch)
        return 1 << (min(_MAX_BATCH, max(1, fitting)).bit_length() - 1)

    def _batched(
        self,
        method: str,
        prepare: Callable[[np.ndarray], np.ndarray],
        items: np.ndarray,
        max_batch: int,
        finish: Callable[[np.ndarray], np.ndarray] = np.asarray,
    ) -> np.ndarray:
        """Runs a method of ``VisionVQ`` over items in batches of few static shapes."""
        # Batches are powers of two and the last one is padded, so that any number of frames costs
        # few compilations. XLA splits layers of few channels among the cores of a CPU badly:
        # there, each core takes batches of its own on a thread instead.
        # On accelerators two batches are under way, so that a device need not wait for the host to
        # prepare its next one.
        on_cpu = jax.default_backend() == "cpu" and self._num_devices == 1
        workers = len(os.sched_getaffinity(0)) if on_cpu else 2
        shares = workers if on_cpu else self._num_devices
        per_share = min(1 << max(0, -(-len(items) // shares) - 1).bit_length(), max_batch)
        size = per_share * self._num_devices

        def run(start: int) -> np.ndarray:
            batch = items[start : start + size]
            padding = [(0, size - len(batch))] + [(0, 0)] * (items.ndim - 1)
            prepared = prepare(np.pad(batch, padding))
            if self._sharding is not None:
                prepared = jax.device_put(prepared, self._sharding)
            out = _compiled(self.config, method)(self.variables, prepared)
            return finish(np.asarray(out)[: len(batch)])

        with concurrent.futures.ThreadPoolExecutor(workers) as threads:
            return np.concatenate(list(threads.map(run, range(0, len(items), size))))


def fingerprint_of(config: VisionConfig, weights: Iterable[tuple[str, np.ndarray]]) -> str:
    """sha256 (hex) over a config and weights given in order of their names."""
    # Names, dtypes and shapes are hashed with the bytes, so that no two sets of weights look alike
    # by running into each other. Weights come one by one: a conversion hashes them as it streams.
    digest = hashlib.sha256(dump_json(config.to_dict()))
    for name, value in weights:
        digest.update(f"\0{name}\0{value.dtype}\0{value.shape}\0".encode())
        digest.update(np.ascontiguousarray(value).data)
    return digest.hexdigest()


@functools.cache
def _compiled(config: VisionConfig, method: str) -> Callable[[Any, np.ndarray], jax.Array]:
    """A jitted method of ``VisionVQ``, shared by all tokenizers of one shape."""
    model = VisionVQ(config)

    def apply(variables: Any, items: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return model.apply(variables, items, method=method)

    def encode_bfloat16(variables: Any, pixels: jax.Array) -> jax.Array:
        # The network's products in bfloat16, the codebook and its distances in float32: rounded
        # distances would be equal for many codes.
        rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
        latents = model.apply(rounded, pixels.astype(jnp.bfloat16), method="latents")
        with jax.default_matmul_precision("highest"):
            return model.apply(variables, latents.astype(jnp.float32), method="nearest")

    return jax.jit(encode_bfloat16 if method == "encode_bfloat16" else apply)


def _check_variables(config: VisionConfig, variables: Mapping[str, Any]) -> None:
    """Raises UserError naming the first difference between the weights and the config."""
    wanted = flax.traverse_util.flatten_dict(abstract_variables(config), sep="/")
    found = flax.traverse_util.flatten_dict(dict(variables), sep="/")
    for name in sorted(wanted.keys() | found.keys()):
        want, have = (_describe(tree.get(name)) for tree in (wanted, found))
        if want != have:
            raise UserError(
                f"vision tokenizer: weight {name} is {have}, the config needs {want}; "
                "config and weights belong to different tokenizers"
            )


def _describe(array: Any) -> str:
    return "absent" if array is None else f"{array.dtype}{list(array.shape)}"
