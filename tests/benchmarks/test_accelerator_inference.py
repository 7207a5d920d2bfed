"""Decoding and frames at the size of a test, on both sides."""

from __future__ import annotations

import types

import pytest

from univla_jax.benchmarks import accelerator_inference
from univla_jax.benchmarks.accelerator_device import Sizes

SIZES = Sizes(
    preset="tiny", prompt=40, count=4, batches=(1, 2), vision="quickstart", frames=2, side=32,
    repeats=1,
)  # fmt: skip


def test_a_card_that_pytorch_does_not_see_is_said(monkeypatch):
    cuda = types.SimpleNamespace(is_available=lambda: False)
    torch = types.SimpleNamespace(__version__="2", cuda=cuda)
    monkeypatch.setattr(accelerator_inference, "import_peer", lambda: (torch, None))
    found = []
    accelerator_inference.measure_peer_decoding(SIZES, found.append)
    accelerator_inference.measure_peer_vision(SIZES, found.append)
    assert [f["skipped"] for f in found] == ["torch 2 finds no CUDA device"] * 2


def test_a_size_that_fails_does_not_stop_the_others(monkeypatch):
    def around(sampler, prompt, count, batch):
        if batch == 1:
            raise RuntimeError("RESOURCE_EXHAUSTED: 17 GiB")
        return batch

    quiet = types.SimpleNamespace(collect=lambda: None)
    monkeypatch.setattr(accelerator_inference, "gc", quiet)
    monkeypatch.setattr(accelerator_inference.DecodeProblem, "around", around)
    monkeypatch.setattr(accelerator_inference, "draw_params", lambda shapes, kind: shapes)
    monkeypatch.setattr(accelerator_inference, "copied_bytes_per_second", lambda sizes: 1.0)
    monkeypatch.setattr(accelerator_inference, "Sampler", lambda model, params: None)
    monkeypatch.setattr(
        accelerator_inference, "_decode_figures", lambda sizes, problem, copied: {"batch": problem}
    )
    found = []
    accelerator_inference.measure_decoding(SIZES, found.append)
    assert "RESOURCE_EXHAUSTED" in found[0]["error"] and found[1]["batch"] == 2


@pytest.mark.slow
def test_quantized_decoding_reads_less():
    found = []
    for kind in ("", "int8"):
        accelerator_inference.measure_decoding(SIZES, found.append, kind)
    assert [f["batch"] for f in found] == [1, 2, 1, 2] and all(f["ms_per_token"] > 0 for f in found)
    assert found[2]["bytes_per_token"] < found[0]["bytes_per_token"] < found[1]["bytes_per_token"]


@pytest.mark.slow
def test_the_peer_decodes_and_encodes_on_a_device_by_name():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    found = []
    accelerator_inference.measure_peer_decoding(SIZES, found.append, "cpu")
    accelerator_inference.measure_peer_vision(SIZES, found.append, "cpu")
    *decoded, encoded = found
    assert [f["batch"] for f in decoded] == [1, 2] and not any("error" in f for f in found)
    assert all(f["call_ms"] > 0 for f in decoded) and encoded["frames_per_second"] > 0
