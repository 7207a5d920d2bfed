"""Texts of every kind, and those that are none."""

from __future__ import annotations

import numpy as np
import pytest

from univla_jax.data.instruction_text import decode_text


@pytest.mark.parametrize(
    "value",
    [
        "stack the cubes",
        b"stack the cubes",
        np.bytes_(b"stack the cubes"),
        np.array("stack the cubes"),
        np.array([b"stack the cubes"], object),
        np.array([[b"stack the cubes"]]),
        ["stack the cubes"],
        (b"stack the cubes",),
    ],
)
def test_texts_of_every_kind_are_read(value):
    assert decode_text(value) == "stack the cubes"


@pytest.mark.parametrize(
    "value", [None, float("nan"), np.nan, "", " \n", "None", "nan", "NULL", "N/A", [], np.array([])]
)
def test_no_text_is_empty(value):
    assert not decode_text(value).strip()


@pytest.mark.parametrize(
    "value",
    [
        "[b'stack the cubes']",
        "b'stack'",
        'b"stack the cube\'s lid"',
        "['stack']",
        '["stack", "pour"]',
        "('stack',)",
        "array(['stack'], dtype=object)",
        "tf.Tensor(b'stack', shape=(), dtype=string)",
        "<tf.Tensor: shape=(), dtype=string, numpy=b'stack'>",
        "bytearray(b'stack')",
    ],
)
def test_printed_objects_are_no_texts(value):
    with pytest.raises(ValueError, match="printed Python object"):
        decode_text(value)


@pytest.mark.parametrize(
    "value",
    [
        "pick up the 'red' block",
        "bring [the] cup",
        "b is for block",
        "array the cups in a line",
        "put 'a' on 'b'",
        "none of the cups may fall",
    ],
)
def test_sentences_with_quotes_and_brackets_are_texts(value):
    assert decode_text(value) == value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"\xff\xfe", "utf-8"),
        (3, "int 3 instead of a text"),
        (np.zeros(3), "3 texts instead of one"),
        ({"text": "stack"}, "dict"),
        (["stack", "pour"], "2 texts"),
        (2.5, "float"),
    ],
)
def test_anything_else_is_an_error(value, message):
    with pytest.raises(ValueError, match=message):
        decode_text(value)
