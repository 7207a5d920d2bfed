"""Assets of a checkpoint: everything but the weights that acting and imagining need.

One folder, written whole or not at all, and checked file by file when it is loaded::

    assets/
      assets.json   vocabulary, image specs, statistics, task, model and expert settings, sha256 of
                    every other file, fingerprints of the tokenizers
      text/ vision/ action/   the files of the tokenizers
      continuations.npy       of a policy, what its drafts are looked up in; not part of the
                              fingerprint, since it changes no token

Loading a folder with a changed, missing or extra file is an error: a policy with other statistics
or another tokenizer runs and scores nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from univla_jax.errors import UserError
from univla_jax.io import (
    PathLike,
    hash_files,
    new_folder,
    parse_json,
    read_files,
    write_bytes,
    write_json,
)
from univla_jax.normalization import ActionStatistics
from univla_jax.tokenizers.action import ActionTokenizer, load_action_tokenizer
from univla_jax.tokenizers.continuations import Continuations
from univla_jax.tokenizers.image import ImageSpec
from univla_jax.tokenizers.text import TextTokenizer, load_text_tokenizer
from univla_jax.tokenizers.vision import VisionTokenizer
from univla_jax.tokenizers.vocabulary import Vocabulary

_FILE = "assets.json"
_CONTINUATIONS = "continuations.npy"
_FORMAT = 1
_ORBAX_MARKER = "commit_success.txt"
_PARTS = ("text", "vision", "action")
_TASK = "layout"  # key of ``Assets.task`` in the file, which is older than the name
_SETTINGS = ("vocabulary", "image_specs", "statistics", _TASK, "model")
_OPTIONAL = ("action_expert", "adapter")  # only where there is one


class LazyVisionTokenizer:
    """A ``VisionTokenizer`` on disk whose weights are loaded when it is first used.

    Training on stored tokens never uses them, and published weights are large.

    Attributes:
      folder: where ``VisionTokenizer.save`` wrote it; must stay while this object is in use.
      fingerprint: of the tokenizer.
      codebook_size: number of codes.
      factor: pixels per code along each side.
    """

    def __init__(
        self, folder: PathLike, *, fingerprint: str, codebook_size: int, factor: int
    ) -> None:
        """Describes the tokenizer in ``folder`` without loading it."""
        self.folder = epath.Path(folder)
        self.fingerprint = fingerprint
        self.codebook_size = codebook_size
        self.factor = factor

    def load(self) -> VisionTokenizer:
        """The tokenizer itself; loaded at the first call."""
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
          UserError: the folder is gone.
        """
        if not self.folder.is_dir():
            raise UserError(f"vision tokenizer: folder {self.folder} was removed; restore it")
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if path.is_file():
                write_bytes(folder / path.name, path.read_bytes())

    @property
    def variables(self) -> dict[str, Any]:
        """The weights on their device, loaded now if they were not."""
        return self._tokenizer.variables

    @functools.cached_property
    def _tokenizer(self) -> VisionTokenizer:
        return VisionTokenizer.load(os.fspath(self.folder))


@dataclasses.dataclass(frozen=True)
class Assets:
    """The tokenizers, the vocabulary and all settings that give token ids their meaning.

    Attributes:
      vocabulary: the token ids.
      text: text tokenizer; its ids are the text ids of the vocabulary.
      vision: vision tokenizer, or None where a checkpoint came without one. After ``load`` it is
        a ``LazyVisionTokenizer``.
      action: action tokenizer, or None for a model without actions.
      image_specs: how camera frames become tokenizer input, by view; by ``spec_key`` where the
        corpora of a run have a view of the same name and another spec. ``image_spec`` finds it.
      statistics: per dataset, the action statistics used for normalization; its state's under
        ``state_key``.
      task: what it was trained on and how (``tasks.records_to_json``), as JSON values.
      model: settings of the decoder, as JSON values.
      action_expert: settings of the action expert on top of it; empty where there is none.
      adapter: of a checkpoint that holds an adapter alone: ``base``, the checkpoint folder that it
        belongs to, its ``identity`` and the settings ``lora``; empty for a whole model.
      continuations: what follows what in the action chunks of the training set; None where nothing
        was fitted, as in converted and older checkpoints.
    """

    vocabulary: Vocabulary
    text: TextTokenizer
    vision: VisionTokenizer | LazyVisionTokenizer | None
    action: ActionTokenizer | None
    image_specs: Mapping[str, ImageSpec]
    statistics: Mapping[str, ActionStatistics]
    task: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    action_expert: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    adapter: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    continuations: Continuations | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Raises UserError when the parts do not fit together."""
        vocabulary = self.vocabulary
        _require_equal("text", self.text.vocabulary_size, "text ids", vocabulary.text_size)
        if self.action is not None and self.action.vocabulary_size > vocabulary.action_size:
            raise UserError(
                f"the action tokenizer has {self.action.vocabulary_size} codes, the vocabulary "
                f"{vocabulary.action_size}; make the vocabulary for this tokenizer"
            )
        # Parts that do not fit together would run all the same, with ids that mean something else
        # or actions cut to other dimensions. Everything that can be compared is compared here, the
        # one place that every way to make or load assets goes through.
        dimensions = self.action_expert.get("action_dim")
        for corpus in self.task.get("corpora", {}) if dimensions else ():
            found = self.statistics[corpus].action_dim if corpus in self.statistics else "no"
            if found != dimensions:
                raise UserError(
                    f"the action expert makes {dimensions} dimensions, the actions of corpus "
                    f"{corpus!r} have {found}; set action_expert.action_dim to theirs"
                )
        if self.vision is None:
            return
        _require_equal("vision", self.vision.codebook_size, "codes", vocabulary.visual_size)
        for view, spec in self.image_specs.items():
            if spec.factor != self.vision.factor:
                raise UserError(
                    f"image spec of view {view!r} has factor {spec.factor}, the vision tokenizer "
                    f"{self.vision.factor}; set the spec's factor to the tokenizer's"
                )

    @property
    def fingerprint(self) -> str:
        """sha256 over all settings and tokenizer files; equal assets have equal fingerprints."""
        return _sha256_json({**self._settings(), "parts": self.tokenizer_fingerprints})

    @property
    def tokenizer_fingerprints(self) -> dict[str, str]:
        """Fingerprints of ``"vocabulary"`` and of those of text, vision and action there are."""
        parts = {name: getattr(self, name) for name in _PARTS}
        prints = {name: part.fingerprint for name, part in parts.items() if part is not None}
        return {"vocabulary": _sha256_json(self.vocabulary.to_dict()), **prints}

    def require(self, name: str) -> Any:
        """The tokenizer ``"vision"`` or ``"action"``, where it cannot be done without.

        Raises:
          UserError: these assets have none.
        """
        part = getattr(self, name)
        if part is None:
            raise UserError(
                f"these assets hold no {name} tokenizer; use a checkpoint or assets folder that "
                "has one"
            )
        return part

    def require_same_tokenizers(self, fingerprints: Mapping[str, str], *, source: str) -> None:
        """Checks that something else was made with these tokenizers.

        Args:
          fingerprints: of a token store or another checkpoint, under the names of
            ``tokenizer_fingerprints``; only the names given are compared.
          source: what has them, for the message, for example ``"token store /data/store"``.

        Raises:
          UserError: one differs; names both fingerprints.
        """
        ours = self.tokenizer_fingerprints
        for name, theirs in sorted(fingerprints.items()):
            if ours.get(name) != theirs:
                thing = "vocabulary" if name == "vocabulary" else f"{name} tokenizer"
                raise UserError(
                    f"{source} was made with another {thing} (fingerprint {theirs}) than this "
                    f"run's ({ours.get(name, 'none')}); make it again with these assets, or use "
                    "the assets it was made with"
                )

    def image_spec(self, corpus: str, view: str) -> ImageSpec:
        """How frames of a camera of ``corpus`` become tokenizer input.

        Raises:
          UserError: these assets hold no spec of it.
        """
        found = self.image_specs.get(spec_key(corpus, view)) or self.image_specs.get(view)
        if found is None:
            known = sorted(self.image_specs)
            raise UserError(
                f"these assets hold no image spec of view {view!r} of corpus {corpus!r}, only of "
                f"{', '.join(known) or 'none'}"
            )
        return found

    def require_same_image_specs(
        self, corpus: str, specs: Mapping[str, ImageSpec], *, source: str
    ) -> None:
        """Checks that something else preprocesses the frames of a corpus as these assets do.

        Args:
          corpus: whose cameras they are.
          specs: per view; only the views given are compared.
          source: what has them, for the message.

        Raises:
          UserError: a view is unknown or its spec differs; names both.
        """
        for view, theirs in sorted(specs.items()):
            ours = self.image_spec(corpus, view)
            if ours != theirs:
                raise UserError(
                    f"{source}: view {view!r} was made with {theirs}, these assets have {ours}; "
                    "use the same image spec"
                )

    def save(self, folder: PathLike) -> None:
        """Writes the folder; it appears whole or not at all.

        Args:
          folder: absent, empty, or holding these very assets already.

        Raises:
          UserError: the folder holds something else.
        """
        folder = epath.Path(folder)
        if folder.exists() and any(folder.iterdir()):
            self._require_same_folder(folder)
            return
        with new_folder(folder) as partial:
            for name in _PARTS:
                part = getattr(self, name)
                if part is not None:
                    part.save(partial / name)
            if self.continuations is not None:
                write_bytes(partial / _CONTINUATIONS, self.continuations.to_bytes())
            write_json(partial / _FILE, self._record(hash_files(partial)))

    @classmethod
    def load(cls, folder: PathLike, *, lazy_vision: bool = True) -> Assets:
        """Reads a folder written by ``save`` after checking every file.

        Args:
          folder: the assets folder of a checkpoint, or a stand-alone one.
          lazy_vision: load the weights of the vision tokenizer when it is first used; the folder
            must stay until then. False loads them now.

        Raises:
          UserError: a file is missing, changed, or does not belong there.
        """
        folder = epath.Path(folder)
        record = _read_record(folder)
        _check_files(folder, record["files"])
        vision = None
        if record["vision"] is not None:
            lazy = LazyVisionTokenizer(folder / "vision", **record["vision"])
            vision = lazy if lazy_vision else lazy.load()
        has_action = "action" in record["parts"]
        continuations, table = None, folder / _CONTINUATIONS
        if _CONTINUATIONS in record["files"]:
            continuations = Continuations.from_bytes(table.read_bytes(), where=str(table))
        assets = cls(
            vocabulary=Vocabulary.from_dict(record["vocabulary"]),
            text=load_text_tokenizer(folder / "text"),
            vision=vision,
            action=load_action_tokenizer(folder / "action") if has_action else None,
            image_specs={k: ImageSpec.from_dict(v) for k, v in record["image_specs"].items()},
            statistics={k: ActionStatistics.from_dict(v) for k, v in record["statistics"].items()},
            task=record[_TASK],
            model=record["model"],
            continuations=continuations,
            **{name: record.get(name, {}) for name in _OPTIONAL},
        )
        if assets.fingerprint != record["fingerprint"]:
            raise UserError(
                f"{folder}/{_FILE}: was changed after it was written (fingerprint "
                f"{assets.fingerprint}, recorded {record['fingerprint']}); restore it"
            )
        return assets

    def _settings(self) -> dict[str, Any]:
        # Keys for expert and adapter only where there is one: checkpoints saved before there were
        # any keep their fingerprint.
        parts = {name: getattr(self, name) for name in _OPTIONAL}
        return {
            "vocabulary": self.vocabulary.to_dict(),
            "image_specs": {k: v.to_dict() for k, v in self.image_specs.items()},
            "statistics": {k: v.to_dict() for k, v in self.statistics.items()},
            _TASK: dict(self.task),
            "model": dict(self.model),
            **{name: dict(part) for name, part in parts.items() if part},
        }

    def _record(self, files: dict[str, str]) -> dict[str, Any]:
        """The content of assets.json."""
        vision = None
        if self.vision is not None:
            names = ("fingerprint", "codebook_size", "factor")
            vision = {name: getattr(self.vision, name) for name in names}
        return {
            "format": _FORMAT,
            **self._settings(),
            "vision": vision,
            "parts": self.tokenizer_fingerprints,
            "files": files,
            "fingerprint": self.fingerprint,
        }

    def _require_same_folder(self, folder: epath.Path) -> None:
        if not (folder / _FILE).exists() or Assets.load(folder).fingerprint != self.fingerprint:
            raise UserError(f"{folder}: holds other files already; choose another folder")


def spec_key(corpus: str, view: str) -> str:
    """Key of the image spec that a view has in one corpus alone."""
    return f"{corpus}/{view}"


def _require_equal(name: str, tokenizer: int, what: str, vocabulary: int) -> None:
    if tokenizer != vocabulary:
        raise UserError(
            f"the {name} tokenizer has {tokenizer} {what}, the vocabulary {vocabulary}; use the "
            "tokenizer the vocabulary was made for"
        )


def _read_record(folder: epath.Path) -> dict[str, Any]:
    """assets.json with all its keys."""
    where = f"{folder}/{_FILE}"
    record = parse_json(read_files(folder, [_FILE], what="checkpoint assets")[_FILE], where=where)
    needed = {"format", *_SETTINGS, "vision", "parts", "files", "fingerprint"}
    if record.keys() - {*_OPTIONAL} != needed:
        wrong = sorted((record.keys() - {*_OPTIONAL}) ^ needed)
        raise UserError(f"{where}: missing or unknown keys {wrong}; restore the file")
    if record["format"] != _FORMAT:
        raise UserError(f"{where}: format {record['format']}, this version reads {_FORMAT}")
    return record


def _check_files(folder: epath.Path, recorded: Mapping[str, str]) -> None:
    """Raises UserError unless the folder holds exactly the recorded files, unchanged."""
    # The recorded hashes cover every file but assets.json itself, whose own fingerprint is checked
    # after it is parsed, and the marker that Orbax adds to the folders of a finished checkpoint.
    found = hash_files(folder)
    for own in (_FILE, _ORBAX_MARKER):
        found.pop(own, None)
    verdicts = {
        "was removed; restore it from another checkpoint of the run": recorded.keys()
        - found.keys(),
        "is not one of its files; remove it": found.keys() - recorded.keys(),
        "was changed after the checkpoint was written; restore it": {
            name for name in found.keys() & recorded.keys() if found[name] != recorded[name]
        },
    }
    for verdict, names in verdicts.items():
        if names:
            raise UserError(f"checkpoint assets {folder}: {min(names)} {verdict}")


def _sha256_json(value: Any) -> str:
    try:
        content = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"assets: task and model must be JSON values ({error})") from error
    return hashlib.sha256(content.encode()).hexdigest()
