import numpy as np
import pytest
from univla_jax.sequences.windows import draw_start, window_steps

from univla_jax.errors import UserError


@pytest.mark.parametrize(
    ("steps", "frames", "spacing", "expected"),
    [(27, 2, 10, 20), (20, 2, 10, 20), (15, 2, 10, 10), (10, 1, 10, 10), (31, 6, 3, 18)],
)
def test_window_takes_whole_chunks(steps, frames, spacing, expected):
    assert window_steps(steps, frames, spacing) == expected


def test_shorter_than_a_chunk_is_refused():
    with pytest.raises(UserError, match="8 steps are fewer than one chunk of 10"):
        window_steps(8, 2, 10)


def test_every_start_that_fits_is_drawn():
    rng = np.random.default_rng(0)
    assert {draw_start(12, 10, rng) for _ in range(100)} == {0, 1, 2}
    assert draw_start(10, 10, rng) == 0


def test_the_asked_share_begins_on_whole_chunks():
    rng = np.random.default_rng(0)
    starts = [draw_start(34, 10, rng, spacing=5, aligned=0.5) for _ in range(2000)]
    on_chunks = sum(start % 5 == 0 for start in starts) / 2000
    assert 0.55 < on_chunks < 0.65 and set(starts) == set(range(25))  # 0.5 + 0.5 * 5 / 25
    always = {draw_start(34, 10, rng, spacing=5, aligned=1.0) for _ in range(200)}
    assert always == {0, 5, 10, 15, 20}
