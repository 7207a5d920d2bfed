"""The loop's order, its exact resume and the ways it stops."""

from __future__ import annotations

import os
import signal

import jax
import numpy as np
import pytest

from tests.training import toy
from univla_jax import io
from univla_jax.checkpoints import CheckpointConfig, Checkpointer
from univla_jax.errors import UserError
from univla_jax.training import metrics
from univla_jax.training.metrics import MetricsLogger
from univla_jax.training.preemption import Preempted, SigtermHandler
from univla_jax.training.train_loop import fit

TOTAL = 10


def _run(workdir, *, batches=None, every=3, **options):
    """Trains the toy in ``workdir``, from its newest checkpoint if there is one."""
    batches = batches or toy.Batches()
    state = toy.create()
    with Checkpointer(workdir, CheckpointConfig(every=every)) as saver:
        state = saver.restore(toy.template(state), batches) or state
        with MetricsLogger(
            workdir, start_step=int(state.step), total_steps=TOTAL, progress=False
        ) as log:
            return fit(
                state,
                toy.step,
                batches,
                total_steps=TOTAL,
                checkpointer=saver,
                logger=log,
                **options,
            )


def _lines(workdir):
    return io.read_jsonl(workdir / metrics.FILE)


def _assert_same(folder, other, state, other_state):
    assert (folder / metrics.FILE).read_bytes() == (other / metrics.FILE).read_bytes()
    jax.tree.map(np.testing.assert_array_equal, state, other_state)


def test_trains_to_the_end_and_saves_it(tmp_path):
    state = _run(tmp_path)
    assert int(state.step) == TOTAL
    assert [line["step"] for line in _lines(tmp_path)] == list(range(TOTAL))
    assert _lines(tmp_path)[-1]["loss"] < _lines(tmp_path)[0]["loss"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["10", "9"]


@pytest.mark.parametrize("crash", [1, 3, 4, 7, 9])
def test_a_crash_and_a_resume_leave_no_trace(tmp_path, crash):
    """The data source breaks before batch ``crash``; the second start ends bit-equal."""
    whole = _run(tmp_path / "whole")
    with pytest.raises(UserError, match=f"ended before step {crash}"):
        _run(tmp_path / "cut", batches=toy.Batches(end=crash))
    _assert_same(tmp_path / "whole", tmp_path / "cut", whole, _run(tmp_path / "cut"))


def test_sigterm_saves_the_step_at_hand(tmp_path):
    whole = _run(tmp_path / "whole")

    class Shoot(toy.Batches):
        def __next__(self):
            if self.position == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__next__()

    with SigtermHandler() as watch, pytest.raises(Preempted) as stopped:
        _run(tmp_path / "cut", batches=Shoot(), stop=watch)
    assert stopped.value.step == 5
    assert (tmp_path / "cut" / "checkpoints" / "5").is_dir()
    _assert_same(tmp_path / "whole", tmp_path / "cut", whole, _run(tmp_path / "cut"))


@pytest.mark.parametrize("poison", [5, 6])
def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path, poison):
    """Also when the poisoned step is the one right before a checkpoint (step 6 saves state 6)."""
    with pytest.raises(UserError, match=f"loss is nan at step {poison}"):
        _run(tmp_path, batches=toy.Batches(poison=poison))
    good = {5: "3", 6: "6"}[poison]
    assert max(p.name for p in (tmp_path / "checkpoints").iterdir()) == good
    assert [line["step"] for line in _lines(tmp_path)] == list(range(poison))


class _Evaluation:
    def due(self, step):
        return step > 0 and step % 4 == 0

    def __call__(self, state):
        return {"eval/norm": float((state.params["w"] ** 2).sum())}


def test_evaluation_lines_survive_a_crash(tmp_path):
    whole = _run(tmp_path / "whole", evaluation=_Evaluation())
    evaluated = [line["step"] for line in _lines(tmp_path / "whole") if "eval/norm" in line]
    assert evaluated == [4, 8, 10]
    with pytest.raises(UserError):
        _run(tmp_path / "cut", batches=toy.Batches(end=8), every=4, evaluation=_Evaluation())
    again = _run(tmp_path / "cut", every=4, evaluation=_Evaluation())
    _assert_same(tmp_path / "whole", tmp_path / "cut", whole, again)
