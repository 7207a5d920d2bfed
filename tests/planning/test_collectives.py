"""Bytes, overlap and time of the collectives of a program written out in ``programs.py``."""

from __future__ import annotations

import dataclasses

import pytest

from tests.planning.programs import layers
from univla_jax.planning.collectives import COMPUTE_SCALE, analyze
from univla_jax.planning.hlo import Program
from univla_jax.training.hardware import CHIPS

MIB = 2**20
V6E = CHIPS["v6e"]


def _traffic(chip=V6E, text=None):
    return analyze(Program.parse(text or layers()), chip, (8, 8))


def test_bytes_of_each_kind_count_every_turn_of_a_loop():
    assert _traffic().bytes_by_kind == {
        "all-gather": 2 * 4 * 8 * MIB,
        "all-reduce": MIB // 4 + MIB // 4,
        "reduce-scatter": 4 * 8 * MIB,
    }


def test_what_is_asynchronous():
    found = {c.name: (c.asynchronous, c.in_loop, c.runs) for c in _traffic().collectives}
    assert found == {
        "all-reduce-start": (True, False, 1),
        "all-gather.7.call-start": (True, True, 4),
        "reduce-scatter.7.call-start": (True, True, 4),
        "all-gather.8": (False, True, 4),
        "all-reduce.2": (False, False, 1),
    }


def test_transfers_behind_a_long_product_cost_nothing():
    by_name = {c.name: c for c in _traffic().collectives}
    hidden = by_name["all-gather.7.call-start"]
    # 63 / 64 of 8 MiB over one line along each of two axes, and a microsecond per link
    assert hidden.seconds == pytest.approx(8 * MIB * 63 / 64 / 180e9 + 16e-6)
    assert hidden.exposed == 0 and hidden.hidden_bytes == 4 * 8 * MIB
    synchronous = by_name["all-gather.8"]
    assert synchronous.exposed == pytest.approx(synchronous.seconds)
    assert synchronous.hidden_bytes == 0
    assert by_name["all-reduce-start"].exposed == by_name["all-reduce-start"].seconds


def test_a_product_too_short_hides_only_a_part():
    text = layers().replace('"1750000"', '"17500"')  # 10 microseconds
    gather = _traffic(text=text).collectives[1]
    waited = gather.seconds - 10e-6 * COMPUTE_SCALE
    assert gather.exposed == pytest.approx(waited)
    assert gather.hidden_bytes == pytest.approx(
        gather.total_bytes * 10e-6 * COMPUTE_SCALE / gather.seconds
    )


def test_the_step_is_arithmetic_and_what_stays_exposed():
    traffic = _traffic()
    exposed = sum(c.exposed * c.runs for c in traffic.collectives)
    assert traffic.exposed_seconds == pytest.approx(exposed)
    assert traffic.compute_seconds > 4 * 2e-3 * COMPUTE_SCALE
    assert traffic.step_seconds == traffic.compute_seconds + traffic.exposed_seconds
    assert 0.6 < traffic.hidden_share < traffic.asynchronous_share < 0.7


def test_what_is_named_as_a_fault():
    traffic = _traffic()
    assert [c.name for c in traffic.synchronous_in_loops] == ["all-gather.8"]
    assert [c.name for c in traffic.surprises] == ["all-gather.8"]
    text = traffic.describe()
    assert "1 synchronous: all-gather" in text["in every layer"]
    assert "closed_call/dot_general" in text["resharding"]


def test_a_ring_closed_by_a_wrap_around_link_is_twice_as_fast():
    closed = dataclasses.replace(V6E, wraparound=8)
    open_line, ring = (_traffic(chip).collectives[1].seconds for chip in (V6E, closed))
    assert open_line - 16e-6 == pytest.approx(2 * (ring - 16e-6))
