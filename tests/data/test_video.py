"""Folders of videos."""

from __future__ import annotations

import fractions
import json

import numpy as np
import pytest

from univla_jax.data.datasets import DATASETS
from univla_jax.data.readers import open_reader
from univla_jax.data.video import read_frames
from univla_jax.errors import UserError

av = pytest.importorskip("av")


def write_video(path, frames, rate=4, begin=0.0, codec="mpeg4", **options):
    """Grey frames of the given levels, the first one at ``begin`` seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        stream.gop_size = 3
        for number, level in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.full((16, 32, 3), level, np.uint8), "rgb24")
            picture.pts = round((begin + number / rate) * 1000)
            picture.time_base = fractions.Fraction(1, 1000)
            for packet in stream.encode(picture):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def levels(frames):
    return np.rint(frames.mean((1, 2, 3)) / 10).astype(int).tolist()


def test_parts_of_a_video_are_read(tmp_path):
    write_video(tmp_path / "a.mp4", range(0, 240, 10))
    path = tmp_path / "a.mp4"
    assert levels(read_frames(path)) == list(range(24))
    assert levels(read_frames(path, hz=1.0)) == [0, 4, 8, 12, 16, 20]
    assert levels(read_frames(path, start=2.0, end=2.75)) == [8, 9, 10]
    with pytest.raises(UserError, match="has no frames between 6 and its end s"):
        read_frames(path, start=6.0)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged or no video"):
        read_frames(path)


def test_labeled_videos(tmp_path):
    for name in ("7", "12"):
        write_video(tmp_path / "videos" / f"{name}.mp4", range(0, 240, 10))
    labels = [{"id": "12", "label": "pushing a cup"}, {"id": "7", "label": "folding paper"}]
    (tmp_path / "train.json").write_text(json.dumps(labels))
    (tmp_path / "validation.json").write_text(json.dumps({"99": "tearing paper"}))
    corpus = DATASETS["something_something"]
    read = open_reader(tmp_path, corpus, "train")
    assert [read[i].instruction for i in range(2)] == ["pushing a cup", "folding paper"]
    assert read[0].actions.shape == (30, 0) and read[0].frames["image"].shape == (30, 16, 32, 3)
    assert read.episode_id(1) == "train/7"
    with pytest.raises(UserError, match="validation/99 cannot be read: no video '99'"):
        open_reader(tmp_path, corpus, "validation")[0]


def test_unlabeled_videos_get_the_default_instruction(tmp_path):
    write_video(tmp_path / "x" / "walk.mp4", range(0, 240, 10))
    (episode,) = open_reader(tmp_path, DATASETS["1x"], "train")
    assert episode.instruction == DATASETS["1x"].default_instruction
    with pytest.raises(UserError, match=r"no folder .* of videos"):
        open_reader(tmp_path / "x" / "nothing", DATASETS["1x"], "train")
