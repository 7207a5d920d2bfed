"""Continued episodes and pictures, and what cannot be continued."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.inference import tiny_checkpoint
from univla_jax.data.video import read_frames
from univla_jax.errors import UserError
from univla_jax.evaluation.imagined_episodes import ImagineConfig, imagine, imagine_picture
from univla_jax.inference.sampling import Sampling
from univla_jax.simulators.tabletop.tabletop_expert import (
    DemonstrationsConfig,
    write_demonstrations,
)


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demonstrations")
    config = DemonstrationsConfig(train_episodes=1, val_episodes=4, families=("place",))
    write_demonstrations(config, folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    assets = tiny_checkpoint.make_assets(layout="world_model", frames=3)
    return tiny_checkpoint.save(tmp_path_factory.mktemp("world_model"), assets)


def test_episodes_that_are_too_short_are_named(demonstrations, checkpoint, tmp_path):
    with pytest.raises(UserError, match="no episode of split 'val' is longer than 9"):
        imagine(ImagineConfig(context=9), checkpoint, demonstrations, tmp_path, progress=False)


def test_a_picture_of_ones_own(checkpoint, tmp_path):
    """Draws, guidance, another view and a video; no dataset is needed."""
    Image.fromarray(np.full((40, 40, 3), 90, np.uint8)).save(tmp_path / "in.png")
    config = ImagineConfig(frames=2, guidance=2.0, shown=2, view="wrist_image", mp4=True)
    out = tmp_path / "out"
    picture, hot = tmp_path / "in.png", Sampling(temperature=1.0)
    frames = imagine_picture(config, checkpoint, picture, "touch green", out, sampling=hot)
    assert frames.shape[:2] == (2, 2) and not np.array_equal(frames[0], frames[1])
    with Image.open(out / "draw1_frame2.png") as saved:
        np.testing.assert_array_equal(np.asarray(saved), frames[1, 1])
    video = read_frames(out / "imagined.mp4")
    assert len(video) >= 3 and (out / "imagined.gif").exists() and (out / "imagined.png").exists()
    (tmp_path / "no.png").write_text("no picture")
    with pytest.raises(UserError, match="no picture that can be read"):
        imagine_picture(config, checkpoint, tmp_path / "no.png", "", out)


def test_an_episode_scores_the_same_in_any_batch(demonstrations, checkpoint, tmp_path):
    """Batches that are not full are padded, and episodes that end early are not scored there."""
    reports = [
        imagine(
            ImagineConfig(episodes=3, frames=3, batch=batch, shown=1),
            checkpoint,
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
