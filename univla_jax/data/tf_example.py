"""Reads single fields of serialized ``tf.train.Example`` records without parsing the others.

A robot episode may hold a megabyte of depth per step that nobody asked for. The record is a map of
names to lists of values; only its entries are walked here, and protobuf parses the lists wanted.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

# Example { Features features = 1; }   Features { map<string, Feature> feature = 1; }
# A map is a repeated message of the key as field 1 and the value as field 2.
_FIRST, _SECOND = 0x0A, 0x12  # tags of the fields 1 and 2, length-delimited


def index_fields(record: bytes | memoryview) -> dict[str, memoryview]:
    """Name of each field of an ``Example`` -> its serialized ``Feature``, nothing copied.

    Raises:
      ValueError: no such record.
    """
    found = {}
    for features in _messages(memoryview(record), _FIRST):
        for entry in _messages(features, _FIRST):
            name, value = b"", memoryview(b"")
            for tag, content in _delimited(entry):
                if tag == _FIRST:
                    name = bytes(content)
                elif tag == _SECOND:
                    value = content
            found[name.decode("utf-8")] = value
    return found


def parse_values(feature: memoryview) -> np.ndarray:
    """The values of a serialized ``Feature``: float32, int64 or objects (bytes), flat.

    Raises:
      ValueError: no such message.
    """
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_feature_pb2

    try:
        parsed = tf_feature_pb2.Feature.FromString(bytes(feature))
    except DecodeError as error:
        raise ValueError("the record is damaged: its values cannot be parsed") from error
    kind = parsed.WhichOneof("kind")
    if kind == "float_list":
        return np.array(parsed.float_list.value, np.float32)
    if kind == "int64_list":
        return np.array(parsed.int64_list.value, np.int64)
    values = np.empty(len(parsed.bytes_list.value), object)
    values[:] = parsed.bytes_list.value
    return values


def _messages(data: memoryview, tag: int) -> Iterator[memoryview]:
    return (content for found, content in _delimited(data) if found == tag)


def _delimited(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Tag and content of each length-delimited field of a message, which has no others."""
    start = 0
    while start < len(data):
        tag, start = data[start], start + 1
        if tag & 7 != 2 or tag >= 0x80:
            raise ValueError(f"the record is damaged or no tf.train.Example: tag {tag}")
        length = shift = 0
        while True:
            if start >= len(data) or shift > 63:
                raise ValueError("the record is damaged: it is cut short")
            byte, start = data[start], start + 1
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        if start + length > len(data):
            raise ValueError("the record is damaged: it is cut short")
        yield tag, data[start : start + length]
        start += length
