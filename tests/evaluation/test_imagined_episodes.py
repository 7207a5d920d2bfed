"""Continued episodes and pictures, and what cannot be continued."""

from __future__ import annotations

import shutil
import types

import numpy as np
import pytest
from PIL import Image

from univla_jax.data.video import read_frames
from univla_jax.errors import UserError
from univla_jax.evaluation import imagined_episodes
from univla_jax.evaluation.imagined_episodes import ImagineConfig, imagine, imagine_picture
from univla_jax.inference.sampling import Sampling


def test_episodes_that_are_too_short_are_named(demonstrations, world_model_checkpoint, tmp_path):
    with pytest.raises(UserError, match="no episode of split 'val' is longer than 9"):
        imagine(
            ImagineConfig(context=9),
            world_model_checkpoint,
            demonstrations,
            tmp_path,
            progress=False,
        )


def test_a_damaged_episode_is_skipped_and_named(demonstrations, tmp_path, capsys):
    shutil.copytree(demonstrations, tmp_path / "data")
    (shard,) = (tmp_path / "data").rglob("*val*record*")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    model = types.SimpleNamespace(view="image", frame_spacing=5, resize=lambda frames: frames)
    truths, too_short = imagined_episodes._read_episodes(ImagineConfig(), model, tmp_path / "data")
    assert (len(truths), too_short) == (3, 0)
    assert "1 broken (val/00000" in capsys.readouterr().err


def test_a_picture_of_ones_own(world_model_checkpoint, tmp_path):
    """Draws, guidance, another view and a video; no dataset is needed."""
    Image.fromarray(np.full((40, 40, 3), 90, np.uint8)).save(tmp_path / "in.png")
    config = ImagineConfig(frames=2, guidance=2.0, shown=2, view="wrist_image", mp4=True)
    out = tmp_path / "out"
    picture, hot = tmp_path / "in.png", Sampling(temperature=1.0)
    frames = imagine_picture(
        config, world_model_checkpoint, picture, "touch green", out, sampling=hot
    )
    assert frames.shape[:2] == (2, 2) and not np.array_equal(frames[0], frames[1])
    with Image.open(out / "draw1_frame2.png") as saved:
        np.testing.assert_array_equal(np.asarray(saved), frames[1, 1])
    video = read_frames(out / "imagined.mp4")
    assert len(video) >= 3 and (out / "imagined.gif").exists() and (out / "imagined.png").exists()
    (tmp_path / "no.png").write_text("no picture")
    with pytest.raises(UserError, match="no picture that can be read"):
        imagine_picture(config, world_model_checkpoint, tmp_path / "no.png", "", out)


def test_an_episode_scores_the_same_in_any_batch(demonstrations, world_model_checkpoint, tmp_path):
    """Batches that are not full are padded, and episodes that end early are not scored there."""
    reports = [
        imagine(
            ImagineConfig(episodes=3, frames=3, batch=batch, shown=1),
            world_model_checkpoint,
            demonstrations,
            tmp_path / str(batch),
            progress=False,
        )
        for batch in (2, 3)
    ]
    assert reports[0]["overall"] == reports[1]["overall"]
    assert reports[0]["per_frame"] == reports[1]["per_frame"]


@pytest.mark.parametrize("wrong", [{"frames": 0}, {"context": 0}, {"batch": 0}])
def test_config_mistakes_are_named(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"config.{name}"):
        ImagineConfig(**wrong)
