"""Action tokenizers: the protocol, uniform bins, numbers as text, and loading from a folder.

FAST is in ``fast.py``. Codes 0 … vocabulary_size-1 become token ids through
``Vocabulary.action_ids``.

Axes: N chunks, T steps, A action dimensions. Bins and numbers encode all dimensions of a step
before the next step.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from etils import epath

from univla_jax.errors import UserError
from univla_jax.io import PathLike, dump_json, fingerprint, parse_json, read_files, write_files
from univla_jax.tokenizers import fast
from univla_jax.tokenizers.constrained import CodeGrammar, DecodedActions, bin_grammar, check_chunks
from univla_jax.tokenizers.fast import FastTokenizer

KIND_FILE = "action_tokenizer.json"


class ActionTokenizer(Protocol):
    """What tasks and policies need of an action tokenizer."""

    @property
    def vocabulary_size(self) -> int:
        """Number of action codes."""

    @property
    def fingerprint(self) -> str:
        """sha256 of the files it is saved as."""

    @property
    def horizon(self) -> int | None:
        """Steps of the chunks it was fitted to; None where any will do."""

    def max_tokens(self, horizon: int, action_dim: int) -> int:
        """Upper bound of the codes of a chunk in [-1, 1]."""

    def grammar(self, horizon: int, action_dim: int) -> CodeGrammar | None:
        """Grammar of the codes of a whole chunk; None where there is no such rule."""

    def encode(self, chunk: np.ndarray) -> list[int]:
        """Codes of one chunk float [T, A], normalized to [-1, 1]."""

    def encode_batch(self, chunks: np.ndarray) -> list[list[int]]:
        """Codes of chunks float [N, T, A], normalized to [-1, 1]."""

    def decode(self, ids: Sequence[int], horizon: int, action_dim: int) -> DecodedActions:
        """Decodes codes to a chunk, or says why they are none; never raises on codes."""

    def save(self, folder: PathLike) -> None:
        """Writes the files that ``load_action_tokenizer`` reads."""


class UniformBinTokenizer:
    """One code per value: the index of its bin in [-1, 1] (OpenVLA, arXiv 2406.09246).

    Source: UniVLA models/tokenizer/action_tokenizer.py. With 256 bin edges, codes are 1 … 256 and
    stand for the 255 bin centers, the last one for both 255 and 256.
    """

    kind = "uniform_bins"

    horizon = None  # any chunk can be encoded

    def __init__(self, bins: int = 256) -> None:
        """Bins of equal width over [-1, 1].

        Args:
          bins: number of edges, at least 2.

        Raises:
          UserError: fewer edges.
        """
        if bins < 2:
            raise UserError(f"uniform bins: bins={bins}, expected at least 2")
        self._edges = np.linspace(-1.0, 1.0, bins)
        self._centers = (self._edges[:-1] + self._edges[1:]) / 2
        self._files = {KIND_FILE: dump_json({"kind": self.kind, "bins": bins})}

    @property
    def vocabulary_size(self) -> int:
        """Codes 0 … bins; code 0 is never used."""
        return len(self._edges) + 1

    @property
    def fingerprint(self) -> str:
        """sha256 of the file it is saved as."""
        return fingerprint(self._files)

    def max_tokens(self, horizon: int, action_dim: int) -> int:
        """Codes of a chunk: one per value."""
        return horizon * action_dim

    def grammar(self, horizon: int, action_dim: int) -> CodeGrammar:
        """As many codes as there are values, none of them 0."""
        return bin_grammar(np.arange(self.vocabulary_size) > 0, horizon * action_dim)

    def codes(self, actions: np.ndarray) -> np.ndarray:
        """Codes 1 … bins of values of any shape, clipped to [-1, 1]; int64, same shape.

        Reproduces ``ActionTokenizer.__call__`` (action_tokenizer.py:39); there, the token id is
        the last text id minus this code.
        """
        # digitize counts the edges at or below a value, so codes begin at 1 and the value 1.0 alone
        # gets the code ``bins``, beyond the last bin; ``centers`` takes it back to that bin.
        return np.digitize(np.clip(np.asarray(actions, np.float64), -1.0, 1.0), self._edges)

    def centers(self, codes: np.ndarray) -> np.ndarray:
        """Bin centers of codes (action_tokenizer.py:86), clipped to the bins; float64."""
        index = np.asarray(codes, np.int64) - 1
        return self._centers[np.clip(index, 0, len(self._centers) - 1)]

    def encode(self, chunk: np.ndarray) -> list[int]:
        """Codes of one normalized chunk [T, A]; see ``encode_batch``."""
        return self.encode_batch(check_chunks(chunk, 2)[None])[0]

    def encode_batch(self, chunks: np.ndarray) -> list[list[int]]:
        """Codes of normalized chunks [N, T, A]; values beyond [-1, 1] are clipped.

        Raises:
          UserError: another number of axes, or a value that is not finite.
        """
        chunks = check_chunks(chunks, 3)
        return self.codes(chunks).reshape(len(chunks), -1).tolist()

    def decode(self, ids: Sequence[int], horizon: int, action_dim: int) -> DecodedActions:
        """Decodes codes to a chunk, or says why they are none; never raises on codes."""
        unknown = [int(i) for i in ids if not 1 <= i < self.vocabulary_size]
        if unknown:
            reason = f"action code {unknown[0]} outside [1, {self.vocabulary_size})"
            return DecodedActions.invalid(reason, horizon, action_dim)
        if len(ids) != horizon * action_dim:
            reason = f"{len(ids)} bins instead of {horizon * action_dim}"
            return DecodedActions.invalid(reason, horizon, action_dim)
        return DecodedActions(self.centers(np.asarray(ids)).reshape(horizon, action_dim))

    def save(self, folder: PathLike) -> None:
        """Writes the kind and the number of bins into ``folder``."""
        write_files(folder, self._files)


class NumberTextTokenizer:
    """Actions as decimal numbers, one line per step: ``0.12,-0.30,…``; one code per character.

    The "text" action format of UniVLA (arXiv 2506.19850), with an alphabet of its own so that it
    is independent of the text tokenizer.
    """

    kind = "number_text"
    _characters = "0123456789-.,\n"

    horizon = None  # any chunk can be encoded

    def __init__(self, decimals: int = 2) -> None:
        """Numbers with ``decimals`` digits after the point; raises UserError for less than 1."""
        if decimals < 1:
            raise UserError(f"number text: decimals={decimals}, expected at least 1")
        self._decimals = decimals
        self._number = re.compile(rf"-?[01]\.\d{{{decimals}}}")
        self._files = {KIND_FILE: dump_json({"kind": self.kind, "decimals": decimals})}

    @property
    def vocabulary_size(self) -> int:
        """Number of characters, 14."""
        return len(self._characters)

    @property
    def fingerprint(self) -> str:
        """sha256 of the file it is saved as."""
        return fingerprint(self._files)

    def max_tokens(self, horizon: int, action_dim: int) -> int:
        """Upper bound of the codes of a chunk: sign, digit, point, decimals, separator each."""
        return max(horizon * action_dim * (self._decimals + 4) - 1, 0)

    def grammar(self, horizon: int, action_dim: int) -> None:
        """None: numbers differ in length; ``decode`` finds what is no number."""
        del horizon, action_dim

    def encode(self, chunk: np.ndarray) -> list[int]:
        """Codes of one normalized chunk [T, A]; values beyond [-1, 1] are clipped.

        Raises:
          UserError: another number of axes, or a value that is not finite.
        """
        # Adding zero turns -0.0 into 0.0.
        chunk = np.round(np.clip(check_chunks(chunk, 2), -1, 1), self._decimals) + 0.0
        lines = (",".join(f"{value:.{self._decimals}f}" for value in step) for step in chunk)
        return [self._characters.index(c) for c in "\n".join(lines)]

    def encode_batch(self, chunks: np.ndarray) -> list[list[int]]:
        """Codes of normalized chunks [N, T, A]; see ``encode``."""
        return [self.encode(chunk) for chunk in check_chunks(chunks, 3)]

    def decode(self, ids: Sequence[int], horizon: int, action_dim: int) -> DecodedActions:
        """Decodes codes to a chunk, or says why they are none; never raises on codes."""
        unknown = [int(i) for i in ids if not 0 <= i < self.vocabulary_size]
        if unknown:
            reason = f"action code {unknown[0]} outside [0, {self.vocabulary_size})"
            return DecodedActions.invalid(reason, horizon, action_dim)
        text = "".join(self._characters[i] for i in ids)
        steps = [line.split(",") for line in text.split("\n")]
        if len(steps) != horizon or any(len(step) != action_dim for step in steps):
            lengths = [len(step) for step in steps]
            reason = f"lines of {lengths} numbers, not {horizon} of {action_dim}"
            return DecodedActions.invalid(reason, horizon, action_dim)
        for number in (number for step in steps for number in step):
            if not self._number.fullmatch(number) or abs(float(number)) > 1:
                reason = f"{number!r} is not a number in [-1, 1]"
                return DecodedActions.invalid(reason, horizon, action_dim)
        return DecodedActions(np.array(steps, dtype=np.float64))

    def save(self, folder: PathLike) -> None:
        """Writes the kind and the number of decimals into ``folder``."""
        write_files(folder, self._files)


_KINDS = {cls.kind: cls for cls in (UniformBinTokenizer, NumberTextTokenizer)}


def load_action_tokenizer(folder: PathLike) -> ActionTokenizer:
    """Loads FAST (``processor_config.json``) or the kind that ``action_tokenizer.json`` names.

    Raises:
      UserError: neither file, an unknown kind, or damaged files.
    """
    if (epath.Path(folder) / fast.CONFIG_FILE).is_file():
        return FastTokenizer.load(folder)
    files = read_files(folder, [KIND_FILE], what=f"action tokenizer (nor {fast.CONFIG_FILE})")
    where = f"{folder}/{KIND_FILE}"
    values = parse_json(files[KIND_FILE], where=where)
    kind = values.pop("kind", None)
    if kind not in _KINDS:
        raise UserError(f"{where}: unknown kind {kind!r}, expected one of {sorted(_KINDS)}")
    try:
        return _KINDS[kind](**values)
    except TypeError as error:
        raise UserError(f"{where}: {error}; restore the file") from error
