"""Time per episode and memory of the readers of raw data, beside reading everything each time.

    python -m univla_jax.benchmarks.reader_speed [--parts=lerobot,rlds] [--json=FILE]

* ``lerobot``: a v3 file of 100 MB with 3,000 episodes, whose columns are read once for all of them,
  beside reading the file for each episode; memory after a part of the episodes and after all.
* ``rlds``: steps with one camera and four depth maps that nobody asked for, as in FMB, beside
  parsing every field with TFDS; with the camera, whose pictures cost the same both ways, and
  without, as tokenizers of texts and actions are fitted.
* ``videos``: segments of a long video, beside decoding it from its beginning to each of them.

Everything runs in one process and one thread. Written to a temporary folder, 300 MB at most.
"""

from __future__ import annotations

import dataclasses
import io
import json
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

from univla_jax import cli
from univla_jax.benchmarks.harness import (
    Elapsed,
    print_cases,
    resident_megabytes,
    save,
    timed,
)
from univla_jax.data.datasets import DATASETS, DatasetConfig
from univla_jax.data.image_decoding import decode_images
from univla_jax.data.readers import open_reader
from univla_jax.data.video import read_frames
from univla_jax.errors import UserError
from univla_jax.io import Shard, ShardedRecords, tfrecord_frame

PARTS = flags.DEFINE_list(
    "parts", ["lerobot", "rlds", "videos"], "What is measured", allow_override=True
)

_STEPS, _DIMENSIONS = 300, 14  # of the LeRobot episodes: 3,000 are 100 MB
_SIDE = 256  # of the RLDS pictures


def main(argv: list[str]) -> None:
    """Runs the command."""
    del argv
    parts = {"lerobot": measure_lerobot, "rlds": measure_rlds, "videos": measure_videos}
    unknown = sorted(set(PARTS.value) - set(parts))
    if unknown:
        raise UserError(f"--parts: {unknown[0]!r}, expected some of {', '.join(parts)}")
    figures = {}
    for part in PARTS.value:
        with tempfile.TemporaryDirectory(prefix="univla_benchmark_") as folder:
            figures[part] = parts[part](pathlib.Path(folder))
        print_cases(figures[part])
    save(figures)


def _case(what: str, total: Elapsed, episodes: int, peer: float | None = None) -> dict[str, Any]:
    each = 1e3 * total.processor / episodes
    return {
        "what": what,
        "episodes": episodes,
        "ms of processor each": round(each, 3),
        "times faster": round(peer / each, 1) if peer else "",
        "memory MB": round(resident_megabytes()),
    }


def _read_all(read: Callable[[int], int], count: int) -> Elapsed:
    return timed(lambda: [read(index) for index in range(count)])[1]


# ----------------------------------------------------------------------------
# LeRobot v3: many episodes to a file.


def measure_lerobot(
    folder: pathlib.Path, episodes: int = 3000, compared: int = 5
) -> list[dict[str, Any]]:
    """Figures of a packed file, one dictionary per case."""
    from pyarrow import parquet

    path = _write_lerobot(folder, episodes)
    config = dataclasses.replace(DATASETS["aloha"], views={}, image_sizes={})

    def read_whole(index: int) -> int:
        table = parquet.read_table(path)
        table = table.take(np.flatnonzero(table["episode_index"].to_numpy() == index))
        return len([np.asarray(table[name].to_pylist()) for name in table.column_names])

    size = path.stat().st_size / 1e6
    whole = _read_all(read_whole, compared)
    cases = [_case(f"the file of {size:.0f} MB for each", whole, compared)]
    peer = cases[0]["ms of processor each"]
    reader = open_reader(folder, config, "train")
    part = max(1, episodes // 10)
    first = _read_all(lambda index: len(reader[index]), part)
    cases.append(_case("its first tenth, once", first, part, peer))
    everything = _read_all(lambda index: len(reader[index]), episodes)
    cases.append(_case("all of it, again", everything, episodes, peer))
    return cases


def _write_lerobot(folder: pathlib.Path, episodes: int) -> pathlib.Path:
    import pyarrow as pa
    from pyarrow import parquet

    features = {
        name: {"dtype": "float32", "shape": [_DIMENSIONS]}
        for name in ("action", "observation.state")
    }
    info = {
        "codebase_version": "v3.0",
        "fps": DATASETS["aloha"].control_hz,
        "splits": {"train": f"0:{episodes}"},
        "features": features,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": None,
    }
    path = folder / info["data_path"].format(chunk_index=0, file_index=0)
    for parent in (folder / "meta" / "episodes" / "chunk-000", path.parent):
        parent.mkdir(parents=True)
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    tasks = pa.table({"task_index": [0], "__index_level_0__": ["fold the towel"]})
    parquet.write_table(tasks, folder / "meta" / "tasks.parquet")
    rng, total = np.random.default_rng(0), episodes * _STEPS
    values = [pa.array(rng.normal(size=total * _DIMENSIONS).astype(np.float32)) for _ in features]
    table = {
        name: pa.FixedSizeListArray.from_arrays(flat, _DIMENSIONS)
        for name, flat in zip(features, values)
    }
    table["episode_index"] = np.repeat(np.arange(episodes), _STEPS)
    table["task_index"] = np.zeros(total, int)
    parquet.write_table(pa.table(table), path)
    rows = {"episode_index": list(range(episodes)), "length": [_STEPS] * episodes}
    rows |= {f"data/{name}": [0] * episodes for name in ("chunk_index", "file_index")}
    places = folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    parquet.write_table(pa.table(rows), places)
    return path


# ----------------------------------------------------------------------------
# RLDS: fields that nobody asked for.


def measure_rlds(
    folder: pathlib.Path, episodes: int = 3, steps: int = 30, side: int = _SIDE
) -> list[dict[str, Any]]:
    """Figures of steps with unused depth, one dictionary per case."""
    import tensorflow_datasets as tfds

    shard = _write_rlds(folder, episodes, steps, side)
    features = tfds.builder_from_directory(folder).info.features
    records = ShardedRecords([Shard(str(shard), episodes)])
    skip = {"steps": {"observation": {"image_side_1": tfds.decode.SkipDecoding()}}}

    def parse(index: int) -> list[bytes]:
        example = features.deserialize_example_np(bytes(records[index]), decoders=skip)
        return [step["observation"]["image_side_1"] for step in example["steps"]]

    config = DatasetConfig(
        "fmb_like",
        views={"image": "observation/image_side_1"},
        control_hz=10.0,
        frame_spacing=5,
        state=None,
    )
    size, cases = shard.stat().st_size / 1e6 / episodes, []
    for how, views, peer in (
        ("no camera", {}, parse),
        ("one camera", config.views, lambda index: decode_images(parse(index))),
    ):
        everything = _read_all(lambda index, peer=peer: len(peer(index)), episodes)
        what = f"every field of {size:.0f} MB an episode, {how}"
        cases.append(_case(what, everything, episodes))
        reader = open_reader(folder, dataclasses.replace(config, views=views), "train")
        wanted = _read_all(lambda index, reader=reader: len(reader[index]), episodes)
        slow = cases[-1]["ms of processor each"]
        cases.append(_case(f"the fields in use, {how}", wanted, episodes, slow))
    return cases


def _write_rlds(folder: pathlib.Path, episodes: int, steps: int, side: int) -> pathlib.Path:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.proto import tf_example_pb2

    kinds, rng = tfds.features, np.random.default_rng(0)
    names = [f"image_{name}_depth" for name in ("side_1", "side_2", "wrist_1", "wrist_2")]
    depth = {name: kinds.Tensor(shape=(side, side), dtype=np.float32) for name in names}
    image = kinds.Image(shape=(side, side, 3), encoding_format="jpeg")
    step = {
        "observation": {"image_side_1": image, **depth},
        "action": kinds.Tensor(shape=(7,), dtype=np.float32),
        "language_instruction": kinds.Text(),
    }
    features = kinds.FeaturesDict({"steps": kinds.Dataset(step)})
    path = folder / "fmb_like-train.tfrecord-00000-of-00001"
    records = []
    for _ in range(episodes):
        # By hand: TFDS would take minutes to write the depth number by number.
        entries = tf_example_pb2.Example()
        feature = entries.features.feature
        for name in names:
            values = rng.random(steps * side * side, np.float32)
            feature[f"steps/observation/{name}"].float_list.value.extend(values)
        pictures = [_jpeg(rng, side) for _ in range(steps)]
        feature["steps/observation/image_side_1"].bytes_list.value.extend(pictures)
        feature["steps/action"].float_list.value.extend(np.zeros(7 * steps))
        feature["steps/language_instruction"].bytes_list.value.extend([b"insert"] * steps)
        records.append(entries.SerializeToString())
    path.write_bytes(b"".join(map(tfrecord_frame, records)))
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name="fmb_like", split="train", filetype_suffix="tfrecord"
    )
    info = tfds.core.SplitInfo(
        name="train", shard_lengths=[episodes], num_bytes=1, filename_template=template
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features, split_infos=[info], version="1.0.0", check_data=False
    )
    return path


def _jpeg(rng: np.random.Generator, side: int) -> bytes:
    buffer = io.BytesIO()
    small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
    small.resize((side, side)).save(buffer, "jpeg")
    return buffer.getvalue()


# ----------------------------------------------------------------------------
# Videos: segments of a long one.


def measure_videos(
    folder: pathlib.Path, seconds: int = 120, segments: int = 12, side: int = 240
) -> list[dict[str, Any]]:
    """Figures of a long video by segment, one dictionary per case."""
    path = folder / "long.mp4"
    _write_video(path, seconds, side)
    each = seconds / segments
    listed = [[i * each, (i + 1) * each, f"part {i}"] for i in range(segments)]
    (folder / "train.json").write_text(json.dumps({"long": listed}))
    hz = DATASETS["1x"].control_hz
    reader = open_reader(folder, DATASETS["1x"], "train")
    cut = _read_all(lambda index: len(reader[index]), segments)
    cases = [_case(f"{each:g} s of {seconds} s, by segment", cut, segments)]
    whole = _read_all(lambda index: len(read_frames(path, end=(index + 1) * each, hz=hz)), segments)
    return [_case("from the beginning for each", whole, segments), *cases]


def _write_video(path: pathlib.Path, seconds: int, side: int, rate: int = 30) -> None:
    import av

    rng = np.random.default_rng(0)
    picture = np.asarray(
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((side, side))
    )
    with av.open(str(path), "w") as container:
        options = {"preset": "ultrafast", "g": str(2 * rate)}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = side, side, "yuv420p"
        for number in range(seconds * rate):
            shown = np.roll(picture, number, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shown, "rgb24")))
        container.mux(stream.encode(None))


if __name__ == "__main__":
    cli.run(main)
