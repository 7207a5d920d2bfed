"""Parts of a benchmark joined, and runs of several seeds summed up."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image

from univla_jax.errors import UserError
from univla_jax.evaluation import closed_loop
from univla_jax.evaluation.closed_loop import EvaluateConfig
from univla_jax.evaluation.combined import join_parts, over_seeds, seeds_table
from univla_jax.evaluation.report import save_plot, series_of


def _evaluate(out, **options):
    config = EvaluateConfig(
        "tabletop_plus", conditions=("expert",), episodes_per_task=3, video_episodes=0, **options
    )
    return closed_loop.evaluate(config, None, out, progress=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    for name, tasks in (("whole", (0, 3, 4)), ("a", (0,)), ("b", (3, 4))):
        _evaluate(root / name, tasks=tasks)
    return root


def test_parts_become_what_one_run_would_have_been(folders, tmp_path):
    joined = join_parts([folders / "a", folders / "b"], tmp_path / "out")
    whole = closed_loop.read_report(folders / "whole")
    for report in (joined, whole):
        report["conditions"]["expert"].pop("latency")
    assert joined["conditions"] == whole["conditions"]
    assert joined["conditions"]["expert"]["ratios"]["kept under words"]["mean"] == 1.0
    assert set(joined["protocol"]["tasks"]) == set(whole["protocol"]["tasks"])
    assert (tmp_path / "out" / closed_loop.PAGE).exists()
    found = closed_loop.compare(tmp_path / "out", folders / "whole")
    assert found["pairs"] == 9 and found["difference"] == 0.0
    with pytest.raises(UserError):  # no evaluation goes on in it
        _evaluate(tmp_path / "out", tasks=(0,))


def _but(source, out, change):
    """A copy of an evaluation whose records are changed."""
    shutil.copytree(source, out)
    file = out / "episodes.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(change(record)) + "\n" for record in records))
    return out


def test_parts_that_disagree_are_refused(folders, tmp_path):
    other = _but(folders / "a", tmp_path / "other", lambda r: r | {"success": False})
    with pytest.raises(UserError, match="expert, task 0, trial 0 ended differently"):
        join_parts([folders / "a", other], tmp_path / "out")
    _evaluate(tmp_path / "short", tasks=(0,), max_steps=30)
    with pytest.raises(UserError, match="differ in max_steps: 40 and 30"):
        join_parts([folders / "a", tmp_path / "short"], tmp_path / "out")
    with pytest.raises(UserError, match="two or more different folders"):
        join_parts([folders / "a", folders / "a"], tmp_path / "out")


def test_seeds_have_a_mean_and_a_spread(folders, tmp_path):
    worse = _but(folders / "whole", tmp_path / "worse", lambda r: r | {"success": r["number"] != 3})
    found = over_seeds([folders / "whole", worse], tmp_path)
    assert found["mean"] == pytest.approx((1 + 6 / 9) / 2, abs=1e-4)
    assert found["tasks"][1] == ["words", 0.5, 0.7071] and found["tasks"][0] == ["clean", 1.0, 0.0]
    assert found["low"] < found["mean"] < found["high"] == 1.0
    assert "95 % of a run: " in seeds_table(found) and (tmp_path / "seeds.json").exists()
    with pytest.raises(UserError, match="differ in tasks"):
        over_seeds([folders / "whole", folders / "a"])


def test_a_plot_is_a_picture_with_a_bar_per_task(folders, tmp_path):
    report = closed_loop.read_report(folders / "whole")
    save_plot(tmp_path / "plot.png", *series_of(report), title="tabletop_plus")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.size[0] == 1200 and len(picture.convert("RGB").getcolors(1 << 20)) > 10
    with pytest.raises(UserError, match=r"expected a file named \.png"):
        save_plot(tmp_path / "plot.jpg", *series_of(report), title="")
