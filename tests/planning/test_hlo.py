"""What is read of a scheduled program."""

from __future__ import annotations

import dataclasses

import pytest

from tests.planning.programs import layers
from univla_jax.planning.hlo import Array, Program, attention_flops

PROGRAM = Program.parse(layers())


def test_computations_and_their_order():
    assert PROGRAM.entry == "main"
    assert [line.opcode for line in PROGRAM.computations["body"]] == [
        *("parameter", "get-tuple-element", "get-tuple-element", "call-start", "fusion"),
        *("call-done", "call-start", "fusion", "call-done", "all-gather", "tuple"),
    ]


def test_an_instruction():
    line = PROGRAM.by_name["product"]
    assert line.results == (Array("bf16", (4096, 1024)),) and line.result_bytes == 2**23
    assert line.operands == ("weights",) and line.called == {"calls": "add"}
    assert line.cycles == 1_750_000


def test_a_loop_runs_as_often_as_its_counter_says():
    assert PROGRAM.trip_count(PROGRAM.by_name["while.1"]) == 4


@pytest.mark.parametrize(
    ("name", "group"),
    [("all-gather.7", 64), ("reduce-scatter.7", 64), ("all-gather.8", 64), ("all-reduce.2", 0)],
)
def test_groups_in_all_notations(name, group):
    assert PROGRAM.by_name[name].group == group


def test_sizes_of_types():
    sizes = [Array(t, (8,)).size for t in ("pred", "s4", "bf16", "f8e4m3fn", "f32", "token")]
    assert sizes == [8, 4, 16, 8, 32, 0]


def test_attention_is_counted_by_its_products():
    expected = 2 * 2 * 32 * 3200 * 3200 * 128 / 2
    call = PROGRAM.by_name["splash_mha_fwd.1"]
    assert attention_flops(call) == expected
    squeezed = dataclasses.replace(call, text=call.text.replace("[1,", "["))
    assert attention_flops(squeezed) == expected
    assert attention_flops(PROGRAM.by_name["product"]) == 0
