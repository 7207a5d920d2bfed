"""A vision tokenizer on disk, whose weights are read only when it is used."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from univla_jax.errors import UserError
from univla_jax.tokenizers.files import PathLike

if TYPE_CHECKING:
    from univla_jax.tokenizers.vision import VisionTokenizer


class StoredVision:
    """Has the methods of ``VisionTokenizer``; training on stored tokens needs none of its weights.

    Attributes:
      folder: where ``VisionTokenizer.save`` wrote it; must stay while this object is in use.
      fingerprint: of the tokenizer.
      codebook_size: number of codes.
      factor: pixels per code along each side.
    """

    def __init__(
        self, folder: PathLike, *, fingerprint: str, codebook_size: int, factor: int
    ) -> None:
        """Describes the tokenizer in ``folder`` without reading it."""
        self.folder = epath.Path(folder)
        self.fingerprint = fingerprint
        self.codebook_size = codebook_size
        self.factor = factor

    def load(self) -> VisionTokenizer:
        """The tokenizer itself; read at the first call."""
        return self._tokenizer

    def encode_frames(self, frames: np.ndarray) -> np.ndarray:
        """``VisionTokenizer.encode_frames``: uint8 [N, H, W, 3] → uint16 [N, h, w]."""
        return self._tokenizer.encode_frames(frames)

    def decode_codes(self, codes: np.ndarray) -> np.ndarray:
        """``VisionTokenizer.decode_codes``: [N, h, w] → uint8 [N, H, W, 3]."""
        return self._tokenizer.decode_codes(codes)

    @property
    def codebook(self) -> np.ndarray:
        """``VisionTokenizer.codebook``: float32 [K, E]."""
        return self._tokenizer.codebook

    def save(self, folder: PathLike) -> None:
        """Copies the files of the folder, whatever they are.

        Raises:
          UserError: the folder they lay in is gone.
        """
        if not self.folder.is_dir():
            raise UserError(f"vision tokenizer: folder {self.folder} was removed; restore it")
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if path.is_file():
                path.copy(folder / path.name)

    @functools.cached_property
    def _tokenizer(self) -> VisionTokenizer:
        from univla_jax.tokenizers.vision import VisionTokenizer

        return VisionTokenizer.load(os.fspath(self.folder))
