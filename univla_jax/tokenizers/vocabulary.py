"""Vocabulary layout: the token ids of text, visual codes and actions in one vocabulary.

Two layouts share one class:

    emu3           0 ........ 151,642 | 151,643 ... 151,853 | 151,854 ........ 184,621
                   text (tail: actions) specials (pad, bos…)  visual codes

    from scratch   0 ... text_size-1 | action_size ids | 12 specials | visual_size ids
                   text                actions           pad, bos…     visual codes

Action code ``a`` always has the id ``action_last - a`` (UniVLA train/datasets.py:200). In the Emu3
layout these ids are the tail of the text ids, as its checkpoints were trained; a model from scratch
gives actions ids of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from univla_jax.config import build_config
from univla_jax.errors import UserError

_SPECIALS = ("pad", "bos", "eos", "bot", "eot", "boa", "eoa", "eol", "eof", "img", "boi", "eoi")
_EMU3_TEXT_SIZE = 151_643
_EMU3_EXTRA = 151_646
_EMU3_VISUAL_START = 151_854
_EMU3_VISUAL_SIZE = 32_768


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The meaning of every token id of one model; hashable, no arrays inside.

    Attributes:
      size: number of ids V; every id lies in [0, size).
      text_size: ids 0 … text_size-1 come from the text tokenizer.
      pad: padding, on the right; never labeled.
      bos: begin of sequence.
      eos: end of sequence.
      bot: begin of thought (reasoning text).
      eot: end of thought.
      boa: begin of action.
      eoa: end of action.
      eol: end of line (unused by UniVLA's sequences, part of Emu3's image format).
      eof: end of frame.
      img: begin of the visual codes of an image.
      boi: begin of image.
      eoi: end of image.
      visual_start: id of visual code 0.
      visual_size: number of visual codes.
      action_size: number of action codes.
      action_last: id of action code 0; code ``a`` has the id ``action_last - a``.
    """

    size: int
    text_size: int
    pad: int
    bos: int
    eos: int
    bot: int
    eot: int
    boa: int
    eoa: int
    eol: int
    eof: int
    img: int
    boi: int
    eoi: int
    visual_start: int
    visual_size: int
    action_size: int
    action_last: int

    def __post_init__(self) -> None:
        """Raises UserError when blocks leave the vocabulary or the specials collide."""
        # Every id must have one meaning, or a policy would emit text where it meant an action. The
        # one overlap allowed is Emu3's: action ids are also the rarest text ids.
        specials = [getattr(self, name) for name in _SPECIALS]
        if len(set(specials)) != len(specials):
            raise UserError(f"vocabulary: special tokens share ids {sorted(specials)}")
        blocks = {
            "text": (0, self.text_size),
            "visual": (self.visual_start, self.visual_start + self.visual_size),
            "action": (self.action_first, self.action_last + 1),
        }
        for name, (start, stop) in blocks.items():
            if not 0 <= start < stop <= self.size:
                raise UserError(
                    f"vocabulary: {name} ids [{start}, {stop}) must be a non-empty part of "
                    f"[0, {self.size})"
                )
            inside = [i for i in specials if start <= i < stop]
            if inside:
                raise UserError(f"vocabulary: special ids {inside} lie among the {name} ids")
        if self.action_last >= self.bov and self.action_first <= self.eov:
            raise UserError("vocabulary: action ids and visual ids overlap")
        if max(specials) >= self.size or min(specials) < 0:
            raise UserError(f"vocabulary: special ids {specials} must lie in [0, {self.size})")

    @classmethod
    def emu3(cls, action_size: int = 2048) -> Vocabulary:
        """The 184,622 ids of Emu3 and of every published UniVLA checkpoint.

        Source: UniVLA configs/moe_fast_video.json and Emu3 tokenization_emu3.py; action ids
        ``last text id - a`` from train/datasets.py:200-201.

        Args:
          action_size: codes of the action tokenizer (FAST: 2,048 universal, 1,024 fitted ones;
            uniform bins: 257).
        """
        # Most specials are among the last of Emu3's 205 extras (196 bot ... 204 eos), the image
        # marks come right before the visual codes, and the ids in between are unused. Action codes
        # count down from the last text id, the rarest BPE token.
        extra = _EMU3_EXTRA
        return cls(
            size=_EMU3_VISUAL_START + _EMU3_VISUAL_SIZE,
            text_size=_EMU3_TEXT_SIZE,
            pad=_EMU3_TEXT_SIZE,
            bos=extra + 203,
            eos=extra + 204,
            bot=extra + 196,
            eot=extra + 197,
            boa=extra + 198,
            eoa=extra + 199,
            eol=extra + 200,
            eof=extra + 201,
            img=_EMU3_VISUAL_START - 3,
            boi=_EMU3_VISUAL_START - 2,
            eoi=_EMU3_VISUAL_START - 1,
            visual_start=_EMU3_VISUAL_START,
            visual_size=_EMU3_VISUAL_SIZE,
            action_size=action_size,
            action_last=_EMU3_TEXT_SIZE - 1,
        )

    @classmethod
    def from_scratch(cls, text_size: int, visual_size: int, action_size: int) -> Vocabulary:
        """The layout of a model trained from scratch: text, actions, specials, visual codes.

        Args:
          text_size: vocabulary size of the text tokenizer.
          visual_size: codebook size of the vision tokenizer.
          action_size: vocabulary size of the action tokenizer.
        """
        first_special = text_size + action_size
        specials = {name: first_special + i for i, name in enumerate(_SPECIALS)}
        visual_start = first_special + len(_SPECIALS)
        return cls(
            size=visual_start + visual_size,
            text_size=text_size,
            visual_start=visual_start,
            visual_size=visual_size,
            action_size=action_size,
            action_last=first_special - 1,
            **specials,
        )

    @property
    def bov(self) -> int:
        """Id of the first visual code."""
        return self.visual_start

    @property
    def eov(self) -> int:
        """Id of the last visual code."""
        return self.visual_start + self.visual_size - 1

    @property
    def action_first(self) -> int:
        """Lowest action id, that of code ``action_size - 1``."""
        return self.action_last - self.action_size + 1

    def special_names(self) -> dict[int, str]:
        """Id of each special token -> the name of its field."""
        return {getattr(self, name): name for name in _SPECIALS}

    def visual_ids(self, codes: ArrayLike) -> np.ndarray:
        """Token ids of visual codes; int32, shape of ``codes``.

        Raises:
          UserError: a code outside [0, visual_size).
        """
        codes = _in_range(codes, 0, self.visual_size, "visual code", "the codebook")
        return codes + np.int32(self.visual_start)

    def visual_codes(self, ids: ArrayLike) -> np.ndarray:
        """Visual codes of token ids; int32, shape of ``ids``.

        Raises:
          UserError: an id that is not a visual one.
        """
        ids = _in_range(ids, self.bov, self.eov + 1, "token id", "the visual ids")
        return ids - np.int32(self.visual_start)

    def action_ids(self, codes: ArrayLike) -> np.ndarray:
        """Token ids of action codes, ``action_last - code``; int32, shape of ``codes``.

        Raises:
          UserError: a code outside [0, action_size).
        """
        codes = _in_range(codes, 0, self.action_size, "action code", "the action vocabulary")
        return np.int32(self.action_last) - codes

    def action_codes(self, ids: ArrayLike) -> np.ndarray:
        """Action codes of token ids; int32, shape of ``ids``.

        Raises:
          UserError: an id that is not an action one.
        """
        ids = _in_range(ids, self.action_first, self.action_last + 1, "token id", "the action ids")
        return np.int32(self.action_last) - ids

    def to_dict(self) -> dict[str, int]:
        """All fields, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Vocabulary:
        """The inverse of ``to_dict``.

        Raises:
          UserError: an unknown or missing field, or inconsistent ids.
        """
        return build_config(cls, values, where="vocabulary")


def _in_range(values: ArrayLike, start: int, stop: int, what: str, of: str) -> np.ndarray:
    """``values`` as a new int32 array when all are integers in [start, stop), else UserError."""
    array = np.asarray(values)
    if array.size == 0:
        return np.zeros(array.shape, np.int32)
    if array.dtype.kind not in "iu":
        raise UserError(f"{what}s must be integers, got an array of {array.dtype}")
    # Codes are stored unsigned, so that there is no lower bound to look for: every frame of every
    # training sample comes through here.
    low = start if array.dtype.kind == "u" and not start else array.min()
    if low < start or array.max() >= stop:
        outside = (array < start) | (array >= stop)
        raise UserError(
            f"{what} {array[outside].flat[0]} lies outside {of} [{start}, {stop}); it was made "
            "with another tokenizer or vocabulary layout: use the one saved with the checkpoint"
        )
    return array.astype(np.int32)
