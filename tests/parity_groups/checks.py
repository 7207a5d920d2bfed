"""What every parity group is made of: the golden folder, single checks, and their summary.

A group is a generator of ``Check``: each compares one thing the package computed with what the
reference computed, at the tolerance of the golden README. Nothing here knows a value, a shape or a
config of a golden set; all of them are read from its files.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import safetensors.numpy

from tests.conftest import REPOSITORY
from univla_jax.tokenizers.fast import FastTokenizer
from univla_jax.tokenizers.text import TiktokenTextTokenizer

EXACT = 0.0


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
      case: the case of the group it belongs to.
      quantity: what was compared.
      error: the largest difference found, or how many entries differ; never NaN.
      tolerance: the largest error that passes; ``EXACT`` counts differing entries.
      unit: ``"absolute"``, ``"relative"`` or ``"differing"``.
      note: something to report that is no error.
    """

    case: str
    quantity: str
    error: float
    tolerance: float
    unit: str = "absolute"
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance


def close(case: str, quantity: str, ours: Any, theirs: Any, tolerance: float, **more: Any) -> Check:
    """The largest absolute difference; infinite where shapes or NaNs differ."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    error = np.inf
    if ours.shape == theirs.shape:
        error = float(np.max(np.abs(ours - theirs), initial=0.0))
    return Check(case, quantity, np.inf if np.isnan(error) else error, tolerance, **more)


def relative(case: str, quantity: str, ours: Any, theirs: Any, tolerance: float) -> Check:
    """The largest relative difference; equal entries have none, not even zeros."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    error = np.inf
    if ours.shape == theirs.shape:
        size = np.where(ours == theirs, 1.0, np.abs(theirs))
        with np.errstate(divide="ignore"):
            error = float(np.max(np.abs(ours - theirs) / size, initial=0.0))
    return Check(case, quantity, np.inf if np.isnan(error) else error, tolerance, "relative")


def equal(case: str, quantity: str, ours: Any, theirs: Any, *, note: str = "") -> Check:
    """How many entries differ; infinite where shapes differ. Strings compare as one entry."""
    if isinstance(ours, np.ndarray) or isinstance(theirs, np.ndarray):
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        same_shape = ours.shape == theirs.shape
        error = float(np.count_nonzero(ours != theirs)) if same_shape else np.inf
    else:
        error = float(ours != theirs)
    return Check(case, quantity, error, EXACT, "differing", note)


@dataclasses.dataclass(frozen=True)
class Golden:
    """A golden folder and the tokenizer files that belong to it.

    Attributes:
      folder: the golden files.
      text_vocabulary: folder of the stand-in ``emu3.tiktoken``.
      fast_tokenizers: folder of the FAST tokenizers by name.
    """

    folder: pathlib.Path
    text_vocabulary: pathlib.Path
    fast_tokenizers: pathlib.Path

    @classmethod
    def beside(
        cls,
        folder: pathlib.Path,
        text_vocabulary: pathlib.Path | None = None,
        fast_tokenizers: pathlib.Path | None = None,
    ) -> Golden:
        """The tokenizer files lie beside the golden folder or beside the checkout, unless given."""
        folder = pathlib.Path(folder).resolve()
        return cls(
            folder,
            text_vocabulary or _beside(folder, "text_vocabulary"),
            fast_tokenizers or _beside(folder, "fast_tokenizers"),
        )

    def json(self, name: str) -> Any:
        """The parsed ``<name>.json``."""
        return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """All arrays of ``<name>.npz``."""
        return _arrays(self.folder / f"{name}.npz")

    def state(self, name: str) -> dict[str, np.ndarray]:
        """All tensors of ``<name>.safetensors``."""
        return safetensors.numpy.load_file(self.folder / f"{name}.safetensors")

    def text(self) -> TiktokenTextTokenizer:
        """The text tokenizer."""
        return _text(self.text_vocabulary)

    def fast(self, name: str) -> FastTokenizer:
        """One FAST tokenizer."""
        return _fast(self.fast_tokenizers / name)


def _beside(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The first of the usual places of a tokenizer folder, of those that there are."""
    places = [folder.parent / name, folder / name, REPOSITORY.parent / "shared" / name]
    return next((place for place in places if place.is_dir()), places[0])


@functools.lru_cache(maxsize=4)
def _arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(path) as found:
        return dict(found)


@functools.lru_cache(maxsize=2)
def _text(folder: pathlib.Path) -> TiktokenTextTokenizer:
    return TiktokenTextTokenizer.load(folder)


@functools.lru_cache(maxsize=8)
def _fast(folder: pathlib.Path) -> FastTokenizer:
    return FastTokenizer.load(folder)


Run = Callable[[Golden], Iterator[Check]]


@dataclasses.dataclass(frozen=True)
class Group:
    """One golden group.

    Attributes:
      number: of the item in the golden README.
      name: as ``--group`` takes it.
      files: files of the golden folder it reads.
      run: makes its checks.
    """

    number: str
    name: str
    files: tuple[str, ...]
    run: Run

    def found(self, golden: Golden) -> bool:
        """Whether any of its files is there."""
        return any((golden.folder / file).exists() for file in self.files)


@dataclasses.dataclass(frozen=True)
class Result:
    """What came out of a group.

    Attributes:
      group: its name.
      number: its item.
      checks: all comparisons; empty when it could not run.
      problem: why it could not run, else empty.
    """

    group: str
    number: str
    checks: tuple[Check, ...]
    problem: str = ""

    @property
    def status(self) -> str:
        """``"pass"``, ``"fail"`` or ``"cannot run"``."""
        if self.problem:
            return "cannot run"
        return "pass" if all(check.passed for check in self.checks) else "fail"

    @property
    def cases(self) -> int:
        """Number of different cases."""
        return len({check.case for check in self.checks})

    def worst(self, quantity: str | None = None) -> Check:
        """The check nearest to (or furthest beyond) its tolerance, of one quantity or of all."""
        checks = [c for c in self.checks if quantity in (None, c.quantity)]
        return max(checks, key=lambda c: (not c.passed, c.error / (c.tolerance or 1.0)))

    def quantities(self) -> dict[str, int]:
        """Number of checks per quantity, in order of appearance."""
        counts: dict[str, int] = {}
        for check in self.checks:
            counts[check.quantity] = counts.get(check.quantity, 0) + 1
        return counts


def run_group(group: Group, golden: Golden) -> Result:
    """Runs one group; whatever it raises becomes the problem it reports."""
    try:
        checks = tuple(group.run(golden))
    except Exception as error:  # a group that cannot run is a result, not the end of the run
        message = f"{type(error).__name__}: {error}"
        return Result(group.name, group.number, (), message)
    problem = "" if checks else "no case found in its files"
    return Result(group.name, group.number, checks, problem)
