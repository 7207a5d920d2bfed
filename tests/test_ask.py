"""The command that asks a checkpoint about a picture."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.conftest import REPOSITORY
from tests.inference import tiny_grounded
from univla_jax.evaluation.drawn_answers import draw_answer, read_picture
from univla_jax.tokenizers.coordinates import parse_places


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_grounded.save(tmp_path_factory.mktemp("grounded"))


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(np.full((24, 24, 3), 90, np.uint8)).save(path)
    return path


def run(folder, *arguments):
    environment = dict(os.environ, PYTHONPATH=str(REPOSITORY), JAX_PLATFORMS="cpu")
    command = [sys.executable, "-m", "univla_jax.ask", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_answer_is_printed_and_drawn(checkpoint, picture, tmp_path):
    given = (f"--checkpoint={checkpoint}", f"--image={picture.name}")
    done = run(tmp_path, *given, "where", "are all blocks?")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    places = parse_places(lines[0], 4)
    assert places is not None
    assert (tmp_path / "answer.png").exists() == bool(places) == (len(lines) == 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image=picture.png"], "no question"),
        (["what?"], "--image: missing"),
        (["--image=absent.png", "what?"], "no picture absent.png"),
    ],
)
def test_mistakes_are_one_line(tmp_path, picture, arguments, message):
    done = run(tmp_path, "--checkpoint=absent", *arguments)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def test_boxes_and_points_are_drawn_where_they_are(tmp_path):
    draw_answer(
        np.zeros((32, 32, 3), np.uint8), [(0.25, 0.25, 0.5, 0.75), (0.9, 0.9)], tmp_path / "a.png"
    )
    drawn = read_picture(tmp_path / "a.png")
    assert drawn.shape == (256, 256, 3)
    green = drawn[..., 1] > 100
    rows, columns = np.where(green[:, :200])
    assert (columns.min(), columns.max()) == (63, 127) or abs(columns.min() - 64) <= 1
    assert abs(rows.max() - 191) <= 1
    assert green[229, 229] and not green[128, 96]
