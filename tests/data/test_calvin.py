"""CALVIN's folders of npz files."""

from __future__ import annotations

import numpy as np
import pytest

from univla_jax.data.datasets import DATASETS
from univla_jax.data.readers import open_reader
from univla_jax.errors import UserError

SENTENCES = ("push the button", "open the drawer", "lift the block")


def write(folder, frames=30, indices=((0, 9), (5, 16), (17, 29)), annotations=None):
    training = folder / "training"
    (training / "lang_annotations").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(frames):
        np.savez(
            training / f"episode_{number:07d}.npz",
            rgb_static=rng.integers(0, 256, (20, 20, 3), np.uint8),
            rgb_gripper=rng.integers(0, 256, (8, 8, 3), np.uint8),
            rel_actions=np.full(7, number, np.float64),
            actions=np.zeros(7),
            robot_obs=np.full(15, number, np.float64),
            scene_obs=np.zeros(24),
        )
    table = annotations or {
        "language": {"ann": list(SENTENCES), "task": ["a", "b", "c"], "emb": np.zeros((3, 1, 4))},
        "info": {"episodes": [], "indx": list(indices)},
    }
    np.save(training / "lang_annotations" / "auto_lang_ann.npy", table, allow_pickle=True)


def source(folder, split="train"):
    return open_reader(folder, DATASETS["calvin"], split)


def test_annotated_stretches_are_episodes(tmp_path):
    write(tmp_path)
    read = source(tmp_path)
    episodes = list(read)
    assert [e.instruction for e in episodes] == list(SENTENCES)
    assert [len(e) for e in episodes] == [10, 12, 13]
    np.testing.assert_array_equal(episodes[1].actions[:, 0], np.arange(5, 17))
    assert episodes[1].state.shape == (12, 15)
    assert episodes[1].frames["image"].shape == (12, 20, 20, 3)
    assert episodes[1].frames["wrist_image"].shape == (12, 8, 8, 3)
    assert read.episode_id(2) == episodes[2].episode_id == "train/0000017-0000029"


def test_splits_can_be_cut(tmp_path):
    write(tmp_path)
    assert len(source(tmp_path, "train[:67%]")) == 2
    assert source(tmp_path, "train[2:]")[0].instruction == SENTENCES[2]
    for split, message in (("validation", "no split 'validation'; it has train"), ("t[", "t")):
        with pytest.raises(UserError, match=message):
            source(tmp_path, split)
    with pytest.raises(UserError, match="holds no episodes"):
        source(tmp_path, "train[3:]")


def test_damage_is_named(tmp_path):
    write(tmp_path)
    read = source(tmp_path)
    frame = tmp_path / "training" / "episode_0000003.npz"
    frame.write_bytes(frame.read_bytes()[:300])
    with pytest.raises(UserError, match=r"episode_0000003.npz is damaged"):
        read[0]
    frame.unlink()
    with pytest.raises(UserError, match=r"no frame .*episode_0000003.npz"):
        read[0]
    assert len(read[2]) == 13
    with pytest.raises(UserError, match="is no CALVIN dataset"):
        source(tmp_path / "training")


def test_annotations_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    write(tmp_path, annotations={"language": Evil()})
    with pytest.raises(UserError, match=r"no annotation table: .*it holds .*print"):
        source(tmp_path)
