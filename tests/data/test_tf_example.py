"""Single fields of serialized examples."""

from __future__ import annotations

import numpy as np
import pytest
from tensorflow_datasets.proto import tf_example_pb2

from univla_jax.data.tf_example import index_fields, parse_values


def make_record():
    example = tf_example_pb2.Example()
    feature = example.features.feature
    feature["floats"].float_list.value.extend([0.5, -2.0])
    feature["numbers"].int64_list.value.extend([3, -1, 1 << 40])
    feature["texts"].bytes_list.value.extend([b"a", b"", "ä".encode()])
    feature["nothing"].SetInParent()
    feature["big"].bytes_list.value.append(bytes(300_000))
    return example.SerializeToString()


@pytest.mark.parametrize("view", [bytes, memoryview])
def test_fields_are_parsed_one_by_one(view):
    fields = index_fields(view(make_record()))
    assert set(fields) == {"floats", "numbers", "texts", "nothing", "big"}
    np.testing.assert_array_equal(parse_values(fields["floats"]), np.float32([0.5, -2]))
    assert parse_values(fields["numbers"]).tolist() == [3, -1, 1 << 40]
    assert parse_values(fields["texts"]).tolist() == [b"a", b"", "ä".encode()]
    assert len(parse_values(fields["nothing"])) == 0
    assert len(parse_values(fields["big"])[0]) == 300_000
    assert index_fields(b"") == {}


def test_unwanted_fields_are_not_copied():
    record = make_record()
    assert all(field.obj is record for field in index_fields(record).values())


@pytest.mark.parametrize(
    "record", [b"\xff\xff", b"\x0a\xff", b"\x0a\x05ab", b"\x08\x01", b"no example", b"\x0a" * 40]
)
def test_other_bytes_are_an_error(record):
    with pytest.raises(ValueError, match="the record is damaged"):
        index_fields(record)


def test_every_cut_is_noticed():
    record = make_record()
    for end in (1, 3, 10, len(record) // 2, len(record) - 1):
        with pytest.raises(ValueError, match="the record is damaged: it is cut short"):
            index_fields(record[:end])


def test_values_that_are_no_message_are_an_error():
    with pytest.raises(ValueError, match="its values cannot be parsed"):
        parse_values(memoryview(b"\x0a\xff\xff"))
