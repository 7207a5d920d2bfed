"""Grounding and questions on held-out frames of a token store, beside what a prior would give.

One frame of every episode is drawn, and of it a few phrases; everything is answered from the
store's codes. Floors: a box in the middle of the frame, the mean box of the store, the answer to
another phrase about the same frame, a black frame, and phrases about other frames. With a corpus
of the embedded tabletop its scripted gripper goes to the points (``pointed_touches.py``).
"""

from __future__ import annotations

import dataclasses
import os
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import tqdm

from univla_jax import io
from univla_jax.cli import format_table
from univla_jax.data.grounding_annotations import Grounding, ask_for, is_plural, parse_groundings
from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.errors import UserError
from univla_jax.evaluation import offline, pointed_touches
from univla_jax.evaluation.grounding_scores import Answered, score
from univla_jax.inference.answers import BATCH, Answerer
from univla_jax.inference.loaded_model import MakePlacement
from univla_jax.run_dir import write_config
from univla_jax.simulators.tabletop.tabletop_truth import held_out, seen_pair
from univla_jax.tasks.question import questions_at

REPORT = "grounding.json"
_IDENTITY = "grounding_evaluation.json"
_PHRASES = 6  # of a frame
_MOST_FLOOR_ROWS = 512
_BLACK = "black frame"
_COLUMNS = (
    "answers",
    "acc@0.25",
    "acc@0.5",
    "acc@0.75",
    "mean_iou",
    "point_in_mask",
    "f1",
    "absent_accuracy",
    "false_none",
    "parse_failures",
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One question for places about a frame.

    Attributes:
      truth: the phrase and what it means.
      codes: uint16 [1, h, w] of the frame.
      kind: of the places asked for.
    """

    truth: Grounding
    codes: np.ndarray
    kind: str

    @property
    def question(self) -> str:
        """What the model is asked."""
        return ask_for(self.truth.phrase, self.kind)


def evaluate(
    checkpoint: str | os.PathLike[str],
    store: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    episodes: int = 0,
    place: MakePlacement | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Scores the answers of a checkpoint and writes ``grounding.json``.

    Args:
      checkpoint: folder ``checkpoints/<step>``, or the workdir whose newest one is taken.
      store: token store with groundings, of episodes that were not trained on; its questions are
        scored too, where it has any and the checkpoint learned to answer them.
      out: folder of the report.
      episodes: how many of the store, from its beginning; 0 for all.
      place: makes the placement of a model that is split over devices.
      progress: whether to draw a progress bar on standard error.

    Returns:
      the report, also where it was finished already.

    Raises:
      UserError: ``out`` holds something else; a store of another vision tokenizer, or without
        groundings; a checkpoint that does not point; more episodes than there are.
    """
    opened = offline.open_held_out(checkpoint, store, out, episodes, name=_IDENTITY)
    folder, source, identity = opened
    if (io.absolute_path(out) / REPORT).exists():
        return io.read_json(io.absolute_path(out) / REPORT)
    answerer = Answerer.load(folder, corpus=source.manifest.header.corpus, place=place)
    prints = {"vision": source.manifest.header.vision_fingerprint}
    answerer.loaded.assets.require_same_tokenizers(prints, source=f"token store {store}")
    held = [source[i] for i in range(episodes or len(source))]
    if not held[0].groundings:
        raise UserError(f"{store}: it has no groundings; demonstrate with annotations=True")
    write_config(out, identity, name=_IDENTITY)
    report = {
        "checkpoint": str(folder),
        "store": str(store),
        "episodes": len(held),
        **scores(answerer, held, progress=progress),
    }
    if answerer.corpus == pointed_touches.CORPUS and answerer.points_in(pointed_touches.VIEW):
        report["touches"] = pointed_touches.scores(answerer, len(held))
    io.write_json(io.absolute_path(out) / REPORT, report)
    return report


def scores(
    answerer: Answerer, episodes: Sequence[TokenizedEpisode], *, progress: bool = True
) -> dict[str, Any]:
    """Figures of grounding, of its floors, and of questions."""
    steps = [int(np.random.default_rng([i, 7]).integers(len(e))) for i, e in enumerate(episodes)]
    shown = answerer.views("where is it?")
    rows = [
        row
        for i, (episode, step) in enumerate(zip(episodes, steps))
        for row in draw_rows(episode, step, shown, np.random.default_rng([i, 8]))
    ]
    ask = lambda rows, **how: ask_rows(answerer, rows, progress=progress, **how)  # noqa: E731
    truths = [row.truth for row in rows]
    constrained = ask(rows)
    groups = {"all": score(truths, constrained)}
    for view in shown:
        groups[view] = _of(rows, constrained, lambda row, v=view: row.truth.view == v)
    for name, belongs in (("seen pairs", seen_pair), ("held-out pairs", held_out)):
        found = _of(rows, constrained, lambda row, of=belongs: of(row.truth.phrase))
        groups |= {name: found} if found["answers"] else {}
    groups["free decoding"] = score(truths, ask(rows, constrained=False))
    return {
        "grounding": groups,
        "floors": floors(answerer, rows, ask),
        "questions": question_scores(answerer, episodes, steps),
    }


def draw_rows(
    episode: TokenizedEpisode, step: int, views: Sequence[str], rng: np.random.Generator
) -> list[Row]:
    """A few phrases about a frame, about as many with as without an answer where there are any."""
    known = parse_groundings(episode.groundings[step if len(episode.groundings) > 1 else 0])
    known = [g for g in known if (g.view or views[0]) in views]
    present, absent = ([g for g in known if bool(g.places) is has] for has in (True, False))
    drawn = [
        pool[int(n)]
        for pool, most in ((present, _PHRASES - 2), (absent, 2))
        for n in rng.permutation(len(pool))[:most]
    ]
    rows = []
    for truth in drawn:
        codes = np.asarray(episode.codes[truth.view or views[0]][step])[None]
        rows.append(Row(truth, codes, truth.kind))
    # The first single thing is also asked for as a point, so that masks are scored.
    single = next((r for r in rows if r.truth.places and not is_plural(r.truth.phrase)), None)
    if single is not None and single.kind == "box" and single.truth.masks:
        rows.append(dataclasses.replace(single, kind="point"))
    return rows


def ask_rows(
    answerer: Answerer, rows: Sequence[Row], *, constrained: bool = True, progress: bool = False
) -> list[Answered]:
    """The places that a model answers for each row."""
    answers: dict[int, Answered] = {}
    # Frames of one size share batches, so that few shapes are compiled.
    order = sorted(range(len(rows)), key=lambda i: rows[i].codes.shape)
    starts = range(0, len(order), BATCH)
    for start in tqdm.tqdm(starts, "ask", unit="batch", disable=not progress):
        part = order[start : start + BATCH]
        questions = [rows[i].question for i in part]
        codes = [[rows[i].codes] for i in part]
        found = answerer.answer_codes(questions, codes, constrained=constrained)
        answers |= {i: answer.places for i, answer in zip(part, found)}
    return [answers[i] for i in range(len(rows))]


def floors(answerer: Answerer, rows: Sequence[Row], ask: Any) -> dict[str, Any]:
    """What a prior gives: scores of answers that do not look at the frame or at the phrase."""
    single = [
        row
        for row in rows
        if row.kind == "box" and row.truth.places and not is_plural(row.truth.phrase)
    ][:_MOST_FLOOR_ROWS]
    if not single:
        return {}
    truths = [row.truth for row in single]
    boxes = np.array([truth.places[0] for truth in truths])
    mean = tuple(map(float, boxes.mean(0)))
    half = (boxes[:, 2:] - boxes[:, :2]).mean(0) / 2
    center = (*(0.5 - half), *(0.5 + half))
    others = [_other(row, single) for row in single]
    black = _black_codes(answerer, [row.codes for row in single])
    shuffled = np.roll(np.arange(len(single)), len(single) // 2)
    return {
        "center": score(truths, [[center]] * len(single)),
        "mean box": score(truths, [[mean]] * len(single)),
        "another phrase": score(truths, ask(others)),
        _BLACK: score(
            truths, ask([dataclasses.replace(r, codes=c) for r, c in zip(single, black)])
        ),
        "shuffled phrases": score(
            truths,
            ask([dataclasses.replace(r, truth=truths[i]) for r, i in zip(single, shuffled)]),
        ),
    }


def question_scores(
    answerer: Answerer, episodes: Sequence[TokenizedEpisode], steps: Sequence[int]
) -> dict[str, Any]:
    """Exact matches of words, of the first question of each frame; empty without any questions.

    Groups: all, by the first word of the question, and all about a black frame.
    """
    rows = [
        (*questions_at(episode, step)[0], episode, step)
        for episode, step in zip(episodes, steps)
        if {"question", "answer"} <= set(episode.texts)
    ]
    if not rows or not any(record.task == "question" for record in answerer.loaded.tasks):
        return {}
    right: dict[str, list[bool]] = defaultdict(list)
    views = answerer.views(rows[0][0])
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        asked = [row[0] for row in part]
        codes = [[np.asarray(e.codes[v][t])[None] for v in views] for _, _, e, t in part]
        blind = [_black_codes(answerer, shown) for shown in codes]
        answers = zip(answerer.answer_codes(asked, codes), answerer.answer_codes(asked, blind))
        for (answer, unseen), (question, truth, _, _) in zip(answers, part):
            for group in ("all", question.split()[0]):
                right[group].append(answer.text.strip() == truth)
            right[_BLACK].append(unseen.text.strip() == truth)
    return {
        group: {"questions": len(values), "exact": round(float(np.mean(values)), 4)}
        for group, values in right.items()
    }


def table(report: dict[str, Any]) -> str:
    """The report in a few lines."""
    lines = [["", *(name.replace("_", " ") for name in _COLUMNS)]]
    for group, found in {**report["grounding"], **report["floors"]}.items():
        values = [found.get(name) for name in _COLUMNS]
        lines.append([group, *("-" if v is None else f"{v:.4g}" for v in values)])
    text = format_table(lines)
    for group, found in report["questions"].items():
        text += f"\nquestions, {group}: {100 * found['exact']:.1f} % of {found['questions']} exact"
    for group, share in report.get("touches", {}).items():
        if group != "tables":
            text += f"\ntouches, {group}: {100 * share:.1f} % of {report['touches']['tables']}"
    return text


def _of(rows: Sequence[Row], answers: Sequence[Answered], belongs: Any) -> dict[str, Any]:
    kept = [(row.truth, answer) for row, answer in zip(rows, answers) if belongs(row)]
    return score([truth for truth, _ in kept], [answer for _, answer in kept])


def _other(row: Row, rows: Sequence[Row]) -> Row:
    """The same frame, asked for a thing somewhere else in it."""
    for other in rows:
        same_frame = other.codes.shape == row.codes.shape and (other.codes == row.codes).all()
        if same_frame and other.truth.places != row.truth.places:
            return dataclasses.replace(row, truth=other.truth)
    return dataclasses.replace(row, truth=rows[0].truth)


def _black_codes(answerer: Answerer, codes: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Codes of black frames of the same sizes."""
    shapes = [shown.shape for shown in codes]
    known = {shape: _black(answerer, shape) for shape in set(shapes)}
    return [known[shape] for shape in shapes]


def _black(answerer: Answerer, shape: tuple[int, ...]) -> np.ndarray:
    vision = answerer.loaded.assets.require("vision")
    height, width = (side * vision.factor for side in shape[1:])
    return vision.encode_frames(np.zeros((1, height, width, 3), np.uint8))
