"""Grounding data in its published layouts, written by hand."""

from __future__ import annotations

import json
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from univla_jax.data.datasets import find_dataset_config
from univla_jax.data.grounding_annotations import parse_groundings
from univla_jax.data.grounding_files import (
    read_chat,
    read_ecot_boxes,
    read_pixmo_points,
    read_qwen_jsonl,
    read_refcoco,
)
from univla_jax.data.readers import open_reader
from univla_jax.errors import UserError

REF = {
    "ref_id": 7,
    "ann_id": 70,
    "category_id": 1,
    "image_id": 700,
    "file_name": "COCO_train2014_000000000700_0.jpg",
    "split": "val",
    "sent_ids": [1, 2],
    "sentences": [
        {"raw": "Left man!", "sent": "left man", "sent_id": 1, "tokens": ["left", "man"]},
        {"raw": "guy", "sent": "guy", "sent_id": 2, "tokens": ["guy"]},
    ],
}
INSTANCES = {
    "images": [{"id": 700, "file_name": "COCO_700.png", "width": 100, "height": 50}],
    "annotations": [{"id": 70, "image_id": 700, "bbox": [10, 5, 40, 20], "category_id": 1}],
}


@pytest.fixture
def refcoco(tmp_path):
    refs = [REF, {**REF, "ref_id": 8, "split": "testA", "sentences": REF["sentences"][:1]}]
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=0))
    (tmp_path / "instances.json").write_text(json.dumps(INSTANCES))
    (tmp_path / "images").mkdir()
    Image.fromarray(np.full((50, 100, 3), 9, np.uint8)).save(tmp_path / "images" / "COCO_700.png")
    return tmp_path


def places(rows):
    return [(row.image, row.grounding.phrase, row.grounding.places) for row in rows]


def test_refcoco(refcoco):
    box = (0.1, 0.1, 0.5, 0.5)
    rows = read_refcoco(refcoco, "unc", "val")
    assert places(rows) == [("COCO_700.png", "left man", (box,)), ("COCO_700.png", "guy", (box,))]
    assert [row.source_id for row in rows] == ["7/1", "7/2"]
    with pytest.raises(UserError, match="no split 'test', only testA, val"):
        read_refcoco(refcoco, "unc", "test")
    with pytest.raises(UserError, match=r"no file .*refs\(umd\).p"):
        read_refcoco(refcoco, "umd", "val")


def test_refcoco_becomes_episodes_of_one_step(refcoco):
    reader = open_reader(refcoco, find_dataset_config("refcoco"), "unc_val")
    assert len(reader) == 1
    episode = reader[0]
    assert episode.frames["image"].shape == (1, 50, 100, 3)
    assert episode.instruction == "where is left man?"
    assert [g.phrase for g in parse_groundings(episode.groundings[0])] == ["left man", "guy"]
    with pytest.raises(UserError, match="unc_val"):
        open_reader(refcoco, find_dataset_config("refcoco"), "train")


class Malicious:
    """Would make a folder if it were unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_is_refused_and_not_run(refcoco):
    target = refcoco / "made"
    (refcoco / "refs(unc).p").write_bytes(pickle.dumps([Malicious(target)]))
    with pytest.raises(UserError, match=r"refused.*mkdir, which could run code"):
        read_refcoco(refcoco, "unc", "val")
    (refcoco / "refs(unc).p").write_bytes(pickle.dumps([REF])[:-20])
    with pytest.raises(UserError, match="refs"):
        read_refcoco(refcoco, "unc", "val")
    assert not target.exists()


def test_qwen_jsonl(tmp_path):
    line = {"image": "a.jpg", "sent": "cup", "bbox": [10, 0, 110, 50], "width": 100, "height": 50}
    path = tmp_path / "refcoco_val.jsonl"
    path.write_text(json.dumps(line) + "\n\n" + json.dumps({**line, "bbox": [1, 2, 3, 4]}))
    assert places(read_qwen_jsonl(path)) == [
        ("a.jpg", "cup", ((0.1, 0.0, 1.0, 1.0),)),
        ("a.jpg", "cup", ((0.01, 0.04, 0.03, 0.08),)),
    ]
    path.write_text(json.dumps({**line, "bbox": [5, 5, 5, 9]}))
    with pytest.raises(UserError, match=r"line 1: box \[5, 5, 5, 9\]"):
        read_qwen_jsonl(path)
    path.write_text(json.dumps({"image": "a.jpg"}))
    with pytest.raises(UserError, match="line 1: no 'bbox'; expected the published layout"):
        read_qwen_jsonl(path)


def turn(asked, said):
    return [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]


def test_chats_of_llava_qwen_and_robopoint(tmp_path):
    chats = [
        {
            "id": "q",
            "image": "a.jpg",
            "conversations": [
                *turn("<image>\nFind it", "<ref>the cup</ref><box>(0,111),(999,222)</box>"),
                *turn("What color?", "It is red."),
            ],
        },
        {
            "id": "r",
            "image": "b.jpg",
            "conversations": turn(
                "<image>\nPoint to free space.\nYour answer is a list.", "[(0.25, 0.5), (1, 0.125)]"
            ),
        },
        {
            "id": "l",
            "image": "c.jpg",
            "conversations": turn("Where is the dog?", "[0.1,0.2,0.3,0.4]"),
        },
        {"id": "t", "conversations": turn("hello", "world")},
    ]
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(chats))
    assert places(read_chat(path)) == [
        ("a.jpg", "the cup", ((0.0, 111 / 999, 1.0, 222 / 999),)),
        ("b.jpg", "free space", ((0.25, 0.5), (1.0, 0.125))),
        ("c.jpg", "the dog", ((0.1, 0.2, 0.3, 0.4),)),
    ]
    path.write_text(json.dumps([{"id": 1, "image": "x", "conversations": turn("a", "[(2, 0)]")}]))
    with pytest.raises(UserError, match=r"entry 0: \(2.0, 0.0\) lies outside the picture"):
        read_chat(path)


def test_pixmo_points(tmp_path):
    row = {
        "image_url": "https://host/x/a.jpg?w=1",
        "label": "cats",
        "points": [{"x": 50.0, "y": 25.0}, {"x": 0, "y": 100}],
        "count": 2,
        "collection_method": "pointing",
    }
    path = tmp_path / "points.jsonl"
    none = {**row, "points": [], "count": 0, "label": "dogs"}
    path.write_text(f"{json.dumps(row)}\n{json.dumps(none)}\n")
    assert places(read_pixmo_points(path)) == [
        (row["image_url"], "all cats", ((0.5, 0.25), (0.0, 1.0))),
        (row["image_url"], "dogs", ()),
    ]
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.jpg")
    reader = open_reader(path, find_dataset_config("grounding"), "train")
    assert len(reader) == 1 and len(parse_groundings(reader[0].groundings[0])) == 2
    path.write_text(json.dumps({**row, "count": 3}))
    with pytest.raises(UserError, match="line 1: 2 points, but a count of 3"):
        read_pixmo_points(path)


def test_ecot_boxes(tmp_path):
    frames = [
        [[0.5, "cup", [0, 64, 128, 256]], [0.9, "cup", [64, 64, 128, 128]]],
        [[0.2, "pan", [0, 0, 256, 256]]],
    ]
    values = {"episode_id": 3, "file_path": "/data/a.npy", "bboxes": frames}
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps({"/data/a.npy": {"3": values}}))
    rows = read_ecot_boxes(path)
    assert places(rows) == [
        ("data/a.npy/3/00000.png", "cup", ((0.25, 0.25, 0.5, 0.5),)),
        ("data/a.npy/3/00001.png", "pan", ((0.0, 0.0, 1.0, 1.0),)),
    ]
    assert [row.step for row in rows] == [0, 1]
    assert [r.grounding.phrase for r in read_ecot_boxes(path, least_score=0.5)] == ["cup"]


def test_pictures_outside_the_folder_are_refused(tmp_path):
    line = {"image": "../a.jpg", "sent": "cup", "bbox": [0, 0, 1, 1], "width": 2, "height": 2}
    (tmp_path / "rows.jsonl").write_text(json.dumps(line))
    reader = open_reader(tmp_path / "rows.jsonl", find_dataset_config("grounding"), "train")
    with pytest.raises(UserError, match="lies outside the dataset's folder"):
        reader[0]
