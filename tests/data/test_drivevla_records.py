"""DriveVLA-W0's records, written by hand in its layout."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from tests.data.test_navsim import Malicious
from univla_jax.data.drivevla_records import TEST, TRAINVAL, read_records
from univla_jax.data.ego_motion import COMMANDS
from univla_jax.data.token_store import TokenStore
from univla_jax.data.tokenize import TokenizeConfig, tokenize
from univla_jax.errors import UserError


class Vision:
    fingerprint, codebook_size, factor = "f" * 64, 32768, 8


def write(folder, name="navsim_emu_vla_256_144_trainval_pre_1s.pkl", count=2, **changes):
    rng = np.random.default_rng(0)
    (folder / "vq" / "log").mkdir(parents=True)
    records = []
    for number in range(count):
        images = [f"vq/log/{number}_{i}.npy" for i in range(14)]
        for i in (3, 5):
            codes = np.full((1, 18, 32), 100 * number + i, np.int64)
            np.save(folder / images[i], codes)
        scaled = rng.uniform(-1, 1, (14, 3))
        record = {
            "token": f"{number:016x}",
            "text": [COMMANDS[0]] * 12,
            "image": images[2:],
            "action": scaled[2:],
            "pre_1s_text": [COMMANDS[2]] * 12,
            "pre_1s_image": images[:12],
            "pre_1s_action": scaled[:12],
        }
        records.append({**record, **changes})
    path = folder / name
    path.write_bytes(pickle.dumps(records))
    return path, records


def imported(path, out):
    tokenize(TokenizeConfig("navsim", {"train": "navtrain"}), path, out, Vision)
    return TokenStore(out / path.stem)


def test_records_become_a_store(tmp_path):
    path, records = write(tmp_path)
    store = imported(path, tmp_path / "store")
    assert len(store) == 2
    episode = store[1]
    assert episode.instruction == "go left" and episode.texts["token"][3] == f"{1:016x}"
    assert np.unique(episode.codes["image"][3]) == 105
    assert np.unique(episode.codes["previous_image"][3]) == 103
    moved = TRAINVAL.unnormalize(records[1]["action"])
    np.testing.assert_allclose(episode.actions, moved, atol=1e-6)
    status = episode.state[3]
    past = TRAINVAL.unnormalize(records[1]["pre_1s_action"])[:5]
    np.testing.assert_allclose(status[12:].reshape(5, 3), past, atol=1e-6)
    np.testing.assert_allclose(status[18:].reshape(3, 3), moved[:3], atol=1e-6)
    assert status[0] == pytest.approx(past[-1, 0] / 0.5)
    assert status[4:12].tolist() == [1, 0, 0, 0, 0, 0, 1, 0]


def test_the_test_set_is_scaled_by_its_own_statistics(tmp_path):
    path, records = write(tmp_path, "navsim_emu_vla_256_144_test_pre_1s.pkl", 1)
    episode = imported(path, tmp_path / "store")[0]
    np.testing.assert_allclose(episode.actions, TEST.unnormalize(records[0]["action"]), atol=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"text": ["fly"] * 12}, "unknown command"),
        ({"action": np.full((12, 3), np.nan)}, "its motions are not finite"),
        ({"image": ["gone.npy"] * 12}, "no codes .*gone.npy"),
    ],
)
def test_bad_records(tmp_path, changes, message):
    path, _ = write(tmp_path, **changes)
    with pytest.raises(UserError, match=f"record 0+: {message}"):
        imported(path, tmp_path / "store")


def test_files_that_are_no_records(tmp_path):
    path, records = write(tmp_path)
    records[1]["token"] = Malicious(tmp_path / "owned")
    path.write_bytes(pickle.dumps(records))
    with pytest.raises(UserError, match="which could run code"):
        read_records(path)
    assert not (tmp_path / "owned").exists()
    path.write_bytes(pickle.dumps([{"token": "a"}]))
    with pytest.raises(UserError, match="number 0 has no 'text'"):
        read_records(path)
