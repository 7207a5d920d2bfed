"""Windows of actions, and the folders of finished fits."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from univla_jax import run_dir
from univla_jax.data.tokenizer_fitting import TextFitConfig, sliding_windows
from univla_jax.errors import UserError


def test_windows_stay_inside_their_episode():
    episodes = [np.arange(4)[:, None], np.array([[9]]), np.array([[7], [8]])]
    assert sliding_windows(episodes, 2)[..., 0].tolist() == [[0, 1], [1, 2], [2, 3], [7, 8]]
    two = np.arange(6).reshape(3, 2)
    np.testing.assert_array_equal(sliding_windows([two], 2), [two[:2], two[1:]])
    with pytest.raises(UserError, match="chunks of 5 steps wanted, the longest episode has 4"):
        sliding_windows(episodes, 5)


def test_a_folder_is_complete_when_marked(tmp_path):
    config = TextFitConfig("blocks", symbols=("1*2*2",))
    assert run_dir.read_fit_report(tmp_path, config) is None
    run_dir.write_fit_report(tmp_path, config, source="blocks:1.0.0", report={"ids": 3})
    assert run_dir.read_fit_report(tmp_path, config) == {"ids": 3}
    other = dataclasses.replace(config, split="val")
    with pytest.raises(UserError, match=r"another config: split was 'train', is 'val'"):
        run_dir.read_fit_report(tmp_path, other)
    assert run_dir.read_fit_report(tmp_path, other, free=["split"]) == {"ids": 3}
    (tmp_path / run_dir.FIT_FILE).write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        run_dir.read_fit_report(tmp_path, config)
