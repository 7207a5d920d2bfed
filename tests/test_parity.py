"""The golden groups through the package, and the command that runs them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from tests import parity
from tests.conftest import REPOSITORY
from tests.parity_groups.checks import Check, Golden, close, equal, relative

GROUPS = parity.groups(Golden.beside(REPOSITORY.parent / "shared" / "golden"))


@pytest.mark.parametrize("name", [group.name for group in GROUPS])
def test_golden_group(golden_dir, name):
    group = next(g for g in GROUPS if g.name == name)
    if not group.found(Golden.beside(golden_dir)):
        pytest.skip(f"no file of the group {name} in the golden folder")
    parity.assert_parity(golden_dir, name)


def _gripper(folder, shift=0.0):
    raw = np.float32([0.0, 0.5, 1.0])
    arrays = {"binarize|some|in": raw, "binarize|some|out": np.float32([0, 1, 1]) + shift}
    np.savez(folder / "gripper.npz", **arrays)


def test_another_set_passes_and_is_reported(tmp_path, capsys):
    _gripper(tmp_path)
    report = tmp_path / "report.json"
    assert parity.main([f"--golden={tmp_path}", f"--json={report}"]) == 0
    assert "1 of 1 groups pass" in capsys.readouterr().out
    (group,) = json.loads(report.read_text())
    assert (group["group"], group["status"], group["cases"]) == ("gripper", "pass", 1)
    assert group["quantities"]["exact conventions"]["largest_error"] == 0


def test_a_difference_fails(tmp_path, capsys):
    _gripper(tmp_path, shift=np.float32(1e-3))
    assert parity.main([f"--golden={tmp_path}"]) == 1
    assert "FAIL at binarize|some" in capsys.readouterr().out


def test_a_group_that_cannot_run_fails(tmp_path, capsys):
    (tmp_path / "action_bins.json").write_text("{}")
    assert parity.main([f"--golden={tmp_path}", "--group=bins"]) == 1
    assert "cannot run: FileNotFoundError" in capsys.readouterr().out
    np.savez(tmp_path / "gripper.npz")
    assert parity.main([f"--golden={tmp_path}", "--group=11"]) == 1
    assert "no case found" in capsys.readouterr().out


def test_wrong_calls(tmp_path, capsys):
    assert parity.main([f"--golden={tmp_path}"]) == 1
    assert parity.main([f"--golden={tmp_path}", "--group=decodr"]) == 2
    assert "known are vq_a, image" in capsys.readouterr().err


def test_a_third_vision_tokenizer_would_be_found(golden_dir, tmp_path):
    shutil.copy(golden_dir / "vq_b_config.json", tmp_path / "vq_c_config.json")
    chosen = parity.select(Golden.beside(tmp_path), "1")
    assert [(group.number, group.name) for group in chosen] == [("1c", "vq_c")]


@pytest.mark.parametrize("compare", [close, relative])
def test_shapes_and_nans_never_pass(compare):
    assert not compare("", "", np.zeros(3), np.zeros((3, 1)), 1.0).passed
    assert not compare("", "", [np.nan], [0.0], 1.0).passed
    assert compare("", "", [], [], 0.0).passed


def test_differing_entries_are_counted():
    assert equal("", "", np.array([1, 2, 3]), np.array([1, 0, 0])).error == 2
    assert not equal("", "", np.zeros(2), np.zeros(3)).passed
    assert relative("", "", [0.0, 2.2], [0.0, 2.0], 0.0).error == pytest.approx(0.1)
    assert Check("", "", 1.0, 1.0).passed
