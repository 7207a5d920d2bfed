"""Readers of grounding data in the layouts it is published in, as rows of one form.

    RefCOCO, RefCOCO+, RefCOCOg   folder with refs(unc|google|umd).p and instances.json
                                  (github.com/lichengunc/refer)
    Qwen                          jsonl of {image, sent, bbox, width, height}
                                  (github.com/QwenLM/Qwen-VL eval_mm/evaluate_grounding.py)
    LLaVA, Qwen-VL, RoboPoint     JSON list of {id, image, conversations [{from, value}]}
                                  (github.com/wentaoyuan/RoboPoint README.md)
    PixMo-Points                  rows of {image_url, label, points [{x, y}], count}, in percent
                                  (github.com/allenai/molmo olmo/data/data_formatter.py)
    ECoT                          JSON: file -> episode -> {bboxes: per frame [(score, label, box)]}
                                  (github.com/MichalZawalski/embodied-CoT, 256 x 256 pixels)

A row names its picture and does not read it, so that a file is read without its pictures. Pickles
are unpickled with nothing that could run code (``safe_pickle.py``).
"""

from __future__ import annotations

import ast
import dataclasses
import io as memory
import json
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from univla_jax.data.grounding_annotations import Grounding, asked_for
from univla_jax.data.safe_pickle import load_plain
from univla_jax.errors import UserError
from univla_jax.io import absolute_path
from univla_jax.tokenizers.coordinates import Place

_ECOT_SIDE = 256
_BOX_MARKS = re.compile(r"<box>\((\d+),(\d+)\),\((\d+),(\d+)\)</box>")
_REF_MARKS = re.compile(r"<ref>(.*?)</ref>")
_NUMBER = r"\d+(?:\.\d+)?"
_BRACKETS = re.compile(rf"\[\s*({_NUMBER}(?:\s*,\s*{_NUMBER}){{3}})\s*\]")
_IMAGE_MARK = "<image>"


@dataclasses.dataclass(frozen=True)
class GroundingRow:
    """One phrase about one picture.

    Attributes:
      image: path of the picture below its folder, or its URL; of ECoT file, episode and frame.
      grounding: the phrase and what it means.
      source_id: of the row in its file.
      step: frame of a video or episode; 0 of a picture.
    """

    image: str
    grounding: Grounding
    source_id: str
    step: int = 0


def find_refcoco_splits(folder: str | os.PathLike[str]) -> tuple[str, ...]:
    """Splits of RefCOCO, RefCOCO+ or RefCOCOg, such as "unc_val", of the pickles in a folder.

    Raises:
      UserError: there is no such pickle, or a damaged one.
    """
    found: dict[str, None] = {}
    for path in sorted(absolute_path(folder).glob("refs(*).p")):
        with _reading(path):
            by = path.name[len("refs(") : -len(").p")]
            found |= dict.fromkeys(f"{by}_{ref['split']}" for ref in _unpickle(path))
    if not found:
        raise UserError(f"{folder}: no refs(unc).p, refs(google).p or refs(umd).p")
    return tuple(found)


def read_refcoco(folder: str | os.PathLike[str], split_by: str, split: str) -> list[GroundingRow]:
    """The sentences of a split of RefCOCO, RefCOCO+ or RefCOCOg.

    Args:
      folder: with ``refs(<split_by>).p`` and ``instances.json``.
      split_by: "unc", "google" or "umd".
      split: such as "val" or "testA".

    Raises:
      UserError: a file is missing or damaged, the pickle holds anything but plain values, or there
        is no such split.
    """
    root = absolute_path(folder)
    refs = _unpickle(root / f"refs({split_by}).p")
    instances = _json(root / "instances.json")
    with _reading(root):
        boxes = {a["id"]: a["bbox"] for a in instances["annotations"]}
        images = {i["id"]: i for i in instances["images"]}
        known = sorted({ref["split"] for ref in refs})
        chosen = [ref for ref in refs if ref["split"] == split]
        if not chosen:
            raise UserError(f"{root}: no split {split!r}, only {', '.join(known)}")
        rows = []
        for ref in chosen:
            image, (x, y, w, h) = images[ref["image_id"]], boxes[ref["ann_id"]]
            box = _box((x, y, x + w, y + h), image["width"], image["height"])
            rows += [
                GroundingRow(
                    str(image["file_name"]),
                    Grounding("", str(sentence["sent"]), "box", (box,)),
                    f"{ref['ref_id']}/{sentence['sent_id']}",
                )
                for sentence in ref["sentences"]
            ]
    return rows


def read_qwen_jsonl(path: str | os.PathLike[str]) -> list[GroundingRow]:
    """Rows of Qwen-VL's evaluation files, boxes in pixels.

    Raises:
      UserError: no such file, or a line of another form; names it.
    """
    rows = []
    for number, values in _json_lines(path):
        with _reading(path, f"line {number}"):
            box = _box(values["bbox"], values["width"], values["height"])
            truth = Grounding("", str(values["sent"]), "box", (box,))
            rows.append(GroundingRow(str(values["image"]), truth, str(number)))
    return rows


def read_chat(path: str | os.PathLike[str]) -> list[GroundingRow]:
    """The grounded turns of chats of LLaVA, Qwen-VL or RoboPoint; other turns are left out.

    An answer counts where it holds Qwen-VL's boxes (0 … 999 of the picture), RoboPoint's list of
    tuples (0 … 1; of two numbers points, of four boxes), or one box in brackets (0 … 1, as LLaVA
    has it). The phrase is the answer's ``<ref>``, else what the question asks for.

    Raises:
      UserError: no such file, or an entry of another form; names it.
    """
    rows = []
    for number, entry in enumerate(_json(path)):
        with _reading(path, f"entry {number}"):
            turns = entry["conversations"]
            for turn, (asked, said) in enumerate(zip(turns[::2], turns[1::2])):
                truth = _grounded_turn(str(asked["value"]), str(said["value"]))
                if truth is not None and "image" in entry:
                    rows.append(
                        GroundingRow(
                            str(entry["image"]), truth, f"{entry.get('id', number)}/{turn}"
                        )
                    )
    return rows


def read_pixmo_points(path: str | os.PathLike[str]) -> list[GroundingRow]:
    """Rows of PixMo-Points as jsonl; the pictures are URLs.

    Raises:
      UserError: no such file, or a line of another form; names it.
    """
    rows = []
    for number, values in _json_lines(path):
        with _reading(path, f"line {number}"):
            points = tuple((p["x"] / 100, p["y"] / 100) for p in values["points"])
            if "count" in values and values["count"] != len(points):
                raise ValueError(f"{len(points)} points, but a count of {values['count']}")
            _check_inside(points)
            phrase = str(values["label"])
            phrase = f"all {phrase}" if len(points) > 1 else phrase
            truth = Grounding("", phrase, "point", points)
            rows.append(GroundingRow(str(values["image_url"]), truth, str(number)))
    return rows


def read_ecot_boxes(
    path: str | os.PathLike[str], *, least_score: float = 0.0
) -> list[GroundingRow]:
    """The boxes of every frame of ECoT's episodes; of one label in one frame the likeliest.

    Args:
      path: JSON of file -> episode -> values, of which "bboxes" has a list per frame.
      least_score: of the detector, below which a box is left out.

    Raises:
      UserError: no such file, or an episode of another form; names it.
    """
    rows = []
    for file, episodes in _mapping(_json(path), path).items():
        for episode_id, values in _mapping(episodes, path).items():
            with _reading(path, f"{file}, episode {episode_id}"):
                for step, boxes in enumerate(values["bboxes"]):
                    best: dict[str, tuple[float, list[float]]] = {}
                    for confidence, label, box in boxes:
                        if confidence >= max(least_score, best.get(label, (0.0, []))[0]):
                            best[str(label)] = confidence, box
                    rows += [
                        GroundingRow(
                            f"{str(file).strip('/')}/{episode_id}/{step:05d}.png",
                            Grounding("", label, "box", (_box(b, _ECOT_SIDE, _ECOT_SIDE),)),
                            f"{file}/{episode_id}",
                            step,
                        )
                        for label, (_, b) in best.items()
                    ]
    return rows


# ----------------------------------------------------------------------------
# Places.


def _box(pixels: Any, width: float, height: float) -> Place:
    """A box of pixels (x1, y1, x2, y2), which may reach a little over the edge, in 0 … 1."""
    x1, y1, x2, y2 = (float(v) for v in pixels)
    if not (width > 0 and height > 0 and x1 < x2 and y1 < y2):
        raise ValueError(f"box {pixels} in a picture of {width} x {height}")
    ends = (x1 / width, y1 / height, x2 / width, y2 / height)
    box = tuple(min(max(v, 0.0), 1.0) for v in ends)
    if not (box[0] < box[2] and box[1] < box[3]):
        raise ValueError(f"box {pixels} lies outside a picture of {width} x {height}")
    return box


def _check_inside(places: tuple[Place, ...]) -> None:
    outside = [place for place in places if not all(0 <= v <= 1 for v in place)]
    if outside:
        raise ValueError(f"{outside[0]} lies outside the picture")


def _grounded_turn(question: str, answer: str) -> Grounding | None:
    """What a turn grounds; None of a turn in words."""
    question = question.replace(_IMAGE_MARK, "").strip()
    marked = [tuple(int(v) / 999 for v in m) for m in _BOX_MARKS.findall(answer)]
    places = tuple(marked or _listed_places(answer))
    if not places:
        return None
    _check_inside(places)
    sizes = {len(place) for place in places}
    if len(sizes) != 1:
        raise ValueError(f"boxes and points in one answer {answer[:60]!r}")
    named = _REF_MARKS.search(answer) or _REF_MARKS.search(question)
    asked = asked_for(question.splitlines()[0]) if question else None
    phrase = named[1].strip() if named else asked[0] if asked else question
    return Grounding("", phrase, "box" if sizes == {4} else "point", places)


def _listed_places(answer: str) -> list[Place]:
    """Places of RoboPoint's list of tuples, or of one box in brackets."""
    try:
        values = ast.literal_eval(answer.strip())
    except (ValueError, SyntaxError):
        found = _BRACKETS.search(answer)
        return [tuple(float(v) for v in found[1].split(","))] if found else []
    if isinstance(values, list) and values and all(isinstance(v, tuple) for v in values):
        places = [tuple(float(n) for n in place) for place in values]
        return places if all(len(place) in (2, 4) for place in places) else []
    if isinstance(values, list) and len(values) == 4:
        return [tuple(float(v) for v in values)]
    return []


# ----------------------------------------------------------------------------
# Files.


class _reading:
    """Turns whatever a malformed row leads to into an error that names it."""

    def __init__(self, path: Any, where: str = "") -> None:
        self._name = f"{path}: {where}" if where else str(path)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (KeyError, TypeError, ValueError, AttributeError, IndexError)):
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{self._name}: {what}; expected the published layout") from error


def _read(path: Any) -> bytes:
    path = absolute_path(path)
    if not path.is_file():
        raise UserError(f"no file {path}; download it first, or correct the path")
    return path.read_bytes()


def _json(path: Any) -> Any:
    try:
        return json.loads(_read(path))
    except ValueError as error:
        raise UserError(f"{path} is no JSON file: {error}") from error


def _json_lines(path: Any) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(_read(path).splitlines(), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}: line {number} is no JSON: {error}") from error


def _mapping(values: Any, path: Any) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise UserError(f"{path}: a {type(values).__name__}, expected file -> episode -> values")
    return values


def _unpickle(path: epath.Path) -> Any:
    content = _read(path)
    try:
        return load_plain(memory.BytesIO(content))
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: {error}") from error
    except Exception as error:  # whatever damaged bytes lead to
        raise UserError(f"{path} is no pickle that can be read: {error}") from error
