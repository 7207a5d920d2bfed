"""Columns of Parquet files: row groups, bounded memory, and what is no column of numbers."""

from __future__ import annotations

import numpy as np
import pytest

from univla_jax.data.parquet_columns import ParquetColumns, column_values
from univla_jax.errors import UserError

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three files of 100 rows in groups of 16; rows tell their number."""
    folder, paths = tmp_path_factory.mktemp("parquet"), []
    for number in range(3):
        rows = np.arange(100) + 1000 * number
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.repeat(rows, 4)), 4)
        table = pa.table({"vector": vectors, "number": rows, "episode": rows // 10})
        paths.append(folder / f"{number}.parquet")
        parquet.write_table(table, paths[-1], row_group_size=16)
    return paths


def test_rows_are_read_over_row_groups_in_bounded_memory(files):
    columns, rng = ParquetColumns(max_bytes=3000), np.random.default_rng(0)
    for _ in range(200):
        number, start = rng.integers(3), rng.integers(100)
        rows = range(start, rng.integers(start, 101))
        read = columns.read(files[number], "vector", rows)
        expected = np.repeat(np.arange(100)[rows.start : rows.stop] + 1000 * number, 4)
        np.testing.assert_array_equal(read.reshape(-1), expected)
        assert columns._bytes == sum(c.nbytes for c in columns._columns.values()) <= 3000


def test_rows_of_a_value_are_found(files):
    columns = ParquetColumns()
    assert columns.rows_with(files[1], "episode", 107) == range(70, 80)
    assert len(columns.rows_with(files[1], "episode", 7)) == 0
    assert columns.num_rows(files[0]) == 100
    assert columns.names(files[0]) == ["vector", "number", "episode"]


def test_rows_that_do_not_lie_together_are_an_error(tmp_path):
    parquet.write_table(pa.table({"episode": [0, 1, 0]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="rows of episode 0 do not lie together"):
        ParquetColumns().rows_with(tmp_path / "a.parquet", "episode", 0)


def test_files_that_are_missing_or_damaged_are_named(tmp_path):
    columns, path = ParquetColumns(), tmp_path / "a.parquet"
    with pytest.raises(UserError, match=r"no file .*a.parquet"):
        columns.names(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=r"a.parquet is damaged: .*git lfs pull"):
        columns.names(path)


VALUES = {
    "numbers": ([1, 2], np.array([1, 2])),
    "flags": ([True, False], np.array([True, False])),
    "vectors": ([[1.5, 2], [3, 4]], np.array([[1.5, 2], [3, 4]])),
    "matrices": ([[[1, 2]], [[3, 4]]], np.array([[[1, 2]], [[3, 4]]])),
    "texts": (["a", None], np.array(["a", None], object)),
    "bytes": ([b"a", b"b"], np.array([b"a", b"b"], object)),
    "cells": ([{"bytes": b"a"}, None], np.array([{"bytes": b"a"}, None], object)),
}


@pytest.mark.parametrize("case", VALUES)
def test_columns_become_arrays(case):
    values, expected = VALUES[case]
    chunks = [pa.array(values[:1]), pa.array(values[1:], pa.array(values[:1]).type)]
    found = column_values(pa.chunked_array(chunks))
    np.testing.assert_array_equal(found, expected)
    assert (found.dtype == object) == (expected.dtype == object)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, None], "a value of step 1 is null"),
        ([[1, 2], None], "a value of step 1 is null"),
        ([[1, 2], [3, None]], "a value of step 1 is null"),
        ([[[1], [2]], [[3], [None]]], "a value of step 1 is null"),
        ([[1, 2], [3]], "vectors of 1 to 2 numbers"),
    ],
)
def test_nulls_and_uneven_vectors_are_errors(values, message):
    with pytest.raises(ValueError, match=message):
        column_values(pa.chunked_array([pa.array(values)]))
