"""The vision tokenizer as the rest of the package uses it: uint8 frames in, uint16 codes out.

Wraps the pure modules of ``vision_vq.py`` with weights, static batch shapes, files and a
fingerprint.

Axes: N frames, B videos, T frames of a video, H/W pixels, h/w grid, t latent frames, E latent
channels.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import flax
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from univla_jax.errors import UserError
from univla_jax.io import PathLike, dump_json, parse_json, read_files, write_files
from univla_jax.tokenizers.image import to_levels, to_pixels
from univla_jax.tokenizers.vision_vq import PRESETS, VisionConfig, VisionVQ, abstract_variables

__all__ = ["PRESETS", "FrameTokenizer", "VisionConfig", "VisionTokenizer"]

CONFIG_FILE = "config.json"
PARAMS_FILE = "params.safetensors"
_ACTIVATIONS_AT_ONCE = {"cpu": 2**21}  # floats of one full-resolution layer that a cache holds
_ACTIVATIONS_IN_MEMORY = 2**26  # the same of processors with fast memory


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
    """The video VQ with its weights.

    Computation is float32 with full-precision products, whatever the platform's default, so that
    codes agree between training data and policy and between machines.
    """

    def __init__(
        self, config: VisionConfig, variables: Mapping[str, Any], *, max_batch: int | None = None
    ):
        """Places the weights on the default device.

        Args:
          config: the shape.
          variables: ``{"params": ..., "batch_stats": ...}`` of ``VisionVQ``.
          max_batch: frames per call of the compiled functions; None chooses by their size.

        Raises:
          UserError: the variables are not those of ``config``.
        """
        self.config = config
        _check_variables(config, variables)
        self.variables = jax.tree.map(jnp.asarray, dict(variables))
        self._max_batch = max_batch

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return self.config.codebook_size

    @property
    def codebook(self) -> np.ndarray:
        """The codebook rows, float32 [K, E]."""
        return np.asarray(self.variables["params"]["quantize"]["embedding"])

    @property
    def factor(self) -> int:
        """Pixels per code along each side."""
        return self.config.factor

    def encode_frames(self, frames: np.ndarray) -> np.ndarray:
        """Codes of single images.

        Args:
          frames: uint8 [N, H, W, 3], RGB, H and W multiples of ``factor`` (see
            ``ImageSpec.resize``).

        Returns:
          uint16 [N, h, w].

        Raises:
          UserError: another dtype or shape.
        """
        self._check_frames(frames, 4)
        return self._batched("encode", to_pixels, frames).astype(np.uint16)

    def encode_video(self, frames: np.ndarray) -> np.ndarray:
        """Codes of videos, ``temporal_downsample_factor`` frames to one latent frame.

        Args:
          frames: uint8 [B, T, H, W, 3]; T is a multiple of the temporal factor.

        Returns:
          uint16 [B, t, h, w].

        Raises:
          UserError: another dtype or shape.
        """
        self._check_frames(frames, 5)
        return self._batched("encode", to_pixels, frames).astype(np.uint16)

    def latents(self, frames: np.ndarray) -> np.ndarray:
        """What is quantized: float32 [N, 1, h, w, E] of images or [B, t, h, w, E] of videos."""
        self._check_frames(frames, frames.ndim)
        return self._batched("latents", to_pixels, frames)

    def decode_codes(self, codes: np.ndarray) -> np.ndarray:
        """Pictures of codes.

        Args:
          codes: integers [N, h, w] in [0, codebook_size).

        Returns:
          uint8 [N, H, W, 3].

        Raises:
          UserError: a code outside the codebook, or another shape.
        """
        self._check_codes(codes, 3)
        return self._batched("decode", _to_int32, codes, to_levels)

    def decode_video(self, codes: np.ndarray) -> np.ndarray:
        """Videos of codes: integers [B, t, h, w] to uint8 [B, t * temporal factor, H, W, 3]."""
        self._check_codes(codes, 4)
        return self._batched("decode", _to_int32, codes, to_levels)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over the config and all weights; independent of the file format."""
        return fingerprint_of(self.config, sorted(self._flat().items()))

    def save(self, folder: PathLike) -> None:
        """Writes ``config.json`` and ``params.safetensors``, the config last."""
        write_files(folder, {PARAMS_FILE: safetensors.numpy.save(self._flat())})
        write_files(folder, {CONFIG_FILE: dump_json(self.config.to_dict())})

    @classmethod
    def load(cls, folder: PathLike, *, max_batch: int | None = None) -> VisionTokenizer:
        """Loads what ``save`` wrote.

        Raises:
          UserError: a file is missing, broken, or its weights are of another config.
        """
        files = read_files(folder, [CONFIG_FILE, PARAMS_FILE], what="vision tokenizer")
        values = parse_json(files[CONFIG_FILE], where=f"{folder}/{CONFIG_FILE}")
        try:
            flat = safetensors.numpy.load(files[PARAMS_FILE])
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise UserError(
                f"{folder}/{PARAMS_FILE} is broken ({error}); restore the file or fit again"
            ) from error
        variables = flax.traverse_util.unflatten_dict(flat, sep="/")
        return cls(VisionConfig.from_dict(values), variables, max_batch=max_batch)

    def _flat(self) -> dict[str, np.ndarray]:
        flat = flax.traverse_util.flatten_dict(self.variables, sep="/")
        return {name: np.asarray(value) for name, value in flat.items()}

    def _batched(
        self,
        method: str,
        prepare: Callable[[np.ndarray], np.ndarray],
        items: np.ndarray,
        finish: Callable[[np.ndarray], np.ndarray] = np.asarray,
    ) -> np.ndarray:
        """Runs a method of ``VisionVQ`` over items in batches of few static shapes.

        Each core of a CPU takes batches of its own: XLA splits small layers among cores badly.
        """
        cores = len(os.sched_getaffinity(0)) if jax.default_backend() == "cpu" else 1
        most = self._max_batch or self._batch_size(method, items)
        size = min(_power_of_two(-(-len(items) // cores)), most)

        def run(start: int) -> np.ndarray:
            batch = items[start : start + size]
            padding = [(0, size - len(batch))] + [(0, 0)] * (items.ndim - 1)
            out = _compiled(self.config, method)(self.variables, prepare(np.pad(batch, padding)))
            return finish(np.asarray(out)[: len(batch)])

        with concurrent.futures.ThreadPoolExecutor(cores) as threads:
            return np.concatenate(list(threads.map(run, range(0, len(items), size))))

    def _batch_size(self, method: str, items: np.ndarray) -> int:
        """The largest power of two up to 256 whose widest activations the processor holds."""
        time, height, width = items.shape[1:4] if items.ndim == 5 else (1, *items.shape[1:3])
        if method == "decode":
            height, width = (side * self.factor for side in items.shape[-2:])
            time = items.shape[1] * self.config.temporal_downsample_factor if items.ndim == 4 else 1
        limit = _ACTIVATIONS_AT_ONCE.get(jax.default_backend(), _ACTIVATIONS_IN_MEMORY)
        fitting = limit // (time * height * width * self.config.ch)
        return 1 << (min(256, max(1, fitting)).bit_length() - 1)

    def _check_frames(self, frames: np.ndarray, ndim: int) -> None:
        axes = "[N, H, W, 3]" if ndim == 4 else "[B, T, H, W, 3]"
        found = f"{frames.dtype} {list(frames.shape)}"
        channels = self.config.in_channels
        if frames.dtype != np.uint8 or frames.ndim != ndim or frames.shape[-1] != channels:
            raise UserError(f"frames are {found}, expected uint8 {axes}")
        if not len(frames) or any(side % self.factor or not side for side in frames.shape[-3:-1]):
            raise UserError(
                f"frames are {found}; expected at least one, with H and W multiples of "
                f"{self.factor}: resize them by their image spec"
            )
        period = self.config.temporal_downsample_factor
        if ndim == 5 and (frames.shape[1] % period or not frames.shape[1]):
            raise UserError(f"a video of {frames.shape[1]} frames; expected a multiple of {period}")

    def _check_codes(self, codes: np.ndarray, ndim: int) -> None:
        axes = "[N, h, w]" if ndim == 3 else "[B, t, h, w]"
        if not np.issubdtype(codes.dtype, np.integer) or codes.ndim != ndim or not codes.size:
            raise UserError(
                f"codes are {codes.dtype} {list(codes.shape)}, expected integers {axes}"
            )
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= self.codebook_size:
            wrong = low if low < 0 else high
            raise UserError(f"code {wrong} is outside the codebook of {self.codebook_size} rows")


def fingerprint_of(config: VisionConfig, weights: Iterable[tuple[str, np.ndarray]]) -> str:
    """sha256 (hex) over a config and weights given in order of their names."""
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

    return jax.jit(apply)


def _to_int32(codes: np.ndarray) -> np.ndarray:
    return codes.astype(np.int32)


def _power_of_two(count: int) -> int:
    """The smallest power of two that is at least ``count``."""
    return 1 << max(0, count - 1).bit_length()


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
