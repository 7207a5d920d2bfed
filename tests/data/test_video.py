"""Videos: parts of them at a rate, frames by number, uneven times and turned pictures."""

from __future__ import annotations

import fractions
import struct

import numpy as np
import pytest

from univla_jax.data.datasets import DATASETS
from univla_jax.data.readers import open_reader
from univla_jax.data.video import VideoFrames, read_frames
from univla_jax.errors import UserError

av = pytest.importorskip("av")


def write_video(
    path, frames, rate=4, begin=0.0, codec="mpeg4", size=(16, 32), times=None, **options
):
    """Grey frames of the given levels, the first one at ``begin`` seconds, or all at ``times``."""
    frames = list(frames)
    times = [begin + number / rate for number in range(len(frames))] if times is None else times
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.gop_size = 3
        for level, time in zip(frames, times):
            picture = av.VideoFrame.from_ndarray(np.full((*size, 3), level, np.uint8), "rgb24")
            picture.pts = round(time * 1000)
            picture.time_base = fractions.Fraction(1, 1000)
            for packet in stream.encode(picture):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def write_frames(path, frames, rate=4):
    """Any frames, nearly without loss."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "0"})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode(None))


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


def test_unevenly_spaced_frames_are_sampled_by_their_time(tmp_path):
    path = tmp_path / "a.mkv"
    times = [0, 0.1, 0.2, 0.3, 1.5, 1.6, 2.0, 3.1]
    write_video(path, range(0, 80, 10), rate=10, codec="libx264", times=times)
    assert levels(read_frames(path)) == list(range(8))
    # At 0, 0.5, 1.0, ... the nearest frame; the one at 0.3 s and the one at 2 s are shown for long.
    assert levels(read_frames(path, hz=2.0)) == [0, 3, 4, 4, 6, 6, 7]
    assert levels(read_frames(path, hz=1.0, start=1.0)) == [4, 6, 7]


def test_rates_above_the_videos_repeat_frames(tmp_path):
    write_video(tmp_path / "a.mp4", range(0, 50, 10), rate=2)
    assert levels(read_frames(tmp_path / "a.mp4", hz=4.0)) == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    assert levels(read_frames(tmp_path / "a.mp4", hz=3.0, end=1.0)) == [0, 1, 1]


@pytest.mark.parametrize("hz", [1.0, 5.0, 7.0, 12.0])
def test_common_rates_of_twelve_frames_a_second(tmp_path, hz):
    write_video(tmp_path / "a.webm", range(0, 240, 10), rate=12, codec="libvpx-vp9", crf="10")
    instants = np.arange(0, 24 / 12, 1 / hz)
    nearest = [min(range(24), key=lambda n: (round(abs(n / 12 - t), 6), n)) for t in instants]
    assert levels(read_frames(tmp_path / "a.webm", hz=hz)) == nearest


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"bf": "2", "g": "12"}),
        ("a.mp4", "mpeg4", {}),
        ("a.mkv", "libx264", {"bf": "3", "g": "250"}),
        ("a.webm", "libvpx-vp9", {"crf": "10"}),
        ("a.mp4", "libsvtav1", {"preset": "12"}),
        ("a.avi", "mpeg4", {}),
        ("a.mov", "libx264", {}),
    ],
)
def test_frames_are_found_by_number(tmp_path, name, codec, options):
    size = (64, 64) if codec == "libsvtav1" else (16, 32)
    write_video(tmp_path / name, range(0, 240, 8), rate=10, codec=codec, size=size, **options)
    frames = VideoFrames(tmp_path / name)
    assert len(frames) == 30
    for numbers in (range(30), range(5), range(11, 14), range(29, 30), range(13, 30)):
        shown = frames.read(numbers).mean((1, 2, 3)) / 8
        assert np.rint(shown).astype(int).tolist() == list(numbers)
    with pytest.raises(UserError, match="has 30 frames, not 28 to 31"):
        frames.read(range(28, 32))


@pytest.mark.parametrize(
    ("turns", "matrix"), [(3, (0, 1, -1, 0)), (1, (0, -1, 1, 0)), (2, (-1, 0, 0, -1))]
)
def test_frames_are_turned_as_the_file_says(tmp_path, turns, matrix):
    """The matrix of a phone's track header, in 16.16 fixed point."""
    path = tmp_path / "a.mp4"
    upright = np.tile(np.arange(0, 256, 8, np.uint8)[None, :, None], (16, 1, 3))
    write_frames(path, [upright] * 2)
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (value * 65536 for value in matrix)
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    expected = np.rot90(upright, turns)
    for found in (read_frames(path)[0], VideoFrames(path).read(range(2))[1]):
        assert found.shape == expected.shape
        assert np.abs(found.astype(int) - expected).max() < 12


def test_unlabeled_videos_get_the_default_instruction(tmp_path):
    write_video(tmp_path / "x" / "walk.mp4", range(0, 240, 10))
    (episode,) = open_reader(tmp_path, DATASETS["1x"], "train")
    assert episode.instruction == DATASETS["1x"].default_instruction
    with pytest.raises(UserError, match=r"no folder .* of videos"):
        open_reader(tmp_path / "x" / "nothing", DATASETS["1x"], "train")
