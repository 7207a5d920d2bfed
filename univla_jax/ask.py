"""Asks a checkpoint about a picture: prints the answer, and draws what it points to.

    python -m univla_jax.ask --checkpoint=WORKDIR --image=PNG "where is the red block?"
    python -m univla_jax.ask --checkpoint=WORKDIR --image=PNG "how many blocks are there?"

"where is …", "where are all …", "locate …" and "point to …" are answered with boxes or points in
integers 0 … 999 of the picture's width and height, or with "none"; other questions in words. Places
are drawn into ``--out``, by default ``answer.png`` beside the picture. ``--free`` lets the model
write whatever it likes instead of only what is a place. Several cameras of a question are given as
``--image=A.png,B.png``, in the order in which the checkpoint sees them.
"""

from __future__ import annotations

from absl import flags, logging

from univla_jax import cli
from univla_jax.episode import Observation
from univla_jax.errors import UserError
from univla_jax.evaluation.drawn_answers import draw_answer, read_picture
from univla_jax.inference.answers import Answerer
from univla_jax.io import absolute_path
from univla_jax.training.model_setup import mesh_flags

CHECKPOINT = cli.string_flag("checkpoint", "checkpoint, or the workdir of its training")
IMAGE = flags.DEFINE_list("image", None, "picture; one per camera where there are several")
OUT = cli.string_flag("out", "PNG with the places drawn in", required=False)
CORPUS = cli.string_flag("corpus", "corpus whose cameras these are", required=False)
VIEW = cli.string_flag("view", "camera of a picture that is pointed in", required=False)
FREE = flags.DEFINE_bool("free", False, "decode any text, not only places")
MESH = mesh_flags()


def main(argv: list[str]) -> None:
    """Runs the command."""
    logging.set_verbosity(logging.WARNING)
    question = " ".join(argv[1:]).strip()
    if not question:
        raise UserError('no question; add one, such as "where is the red block?"')
    if not IMAGE.value:
        raise UserError("--image: missing; name the picture that the question is about")
    pictures = [read_picture(path) for path in IMAGE.value]
    answerer = Answerer.load(CHECKPOINT.value, corpus=CORPUS.value, place=MESH())
    views = answerer.views(question)
    if len(pictures) == 1 and VIEW.value:
        views = (VIEW.value,)
    if len(pictures) != len(views) and not answerer.asks_for_places(question):
        raise UserError(
            f"--image: {len(pictures)} pictures, but the checkpoint answers about "
            f"{', '.join(views)}; give one of each, with commas between them"
        )
    observation = Observation(question, dict(zip(views, pictures)))
    (answer,) = answerer.answer(
        [observation], constrained=not FREE.value, view=VIEW.value or next(iter(observation.frames))
    )
    print(answer.text)
    if answer.places:
        out = absolute_path(OUT.value or absolute_path(IMAGE.value[0]).parent / "answer.png")
        draw_answer(pictures[0], answer.places, out)
        print(out)


if __name__ == "__main__":
    cli.run(main, arguments=64)
