"""The page of training examples."""

from __future__ import annotations

import dataclasses
import html

import numpy as np

from tests.pipeline import small
from univla_jax.pipeline.example_page import render_examples


class Pictures:
    """A vision tokenizer whose frames are gray by their code."""

    codebook_size = 12
    factor = 8
    fingerprint = "pictures"

    def decode_codes(self, codes):
        gray = np.kron(codes, np.ones((1, 8, 8))) * 20
        return np.repeat(gray[..., None], 3, -1).astype(np.uint8)


class Words(small.Letters):
    def decode(self, ids):
        return "".join(map(chr, ids))


def page(episodes=None, **changes):
    given = dataclasses.replace(small.assets(), vision=Pictures(), text=Words())
    store = episodes or small.store(12, "<")
    return " ".join(render_examples(small.config(**changes), given, 3, [store]).split())


def test_the_page_shows_frames_actions_and_labeled_tokens():
    shown = page()
    assert shown.count("<section>") == 3
    assert shown.count("data:image/png;base64,") == 3 * 2 * 2
    assert shown.count("<polyline") == 3 * 2 and "view1 step" in shown
    assert "action 1: -0.905 to 1" in shown and "steps 0 to 1" in shown
    assert "4 codes <small>0</small>" in shown
    assert 'class="learned" style="background:#ffd8a8"' in shown
    assert html.escape("<boa>") in shown


def test_instructions_are_escaped():
    assert "<h2>&lt;" in page()


def test_videos_without_actions_have_no_curves():
    videos = small.Store(
        "videos",
        [dataclasses.replace(e, actions=np.zeros((len(e), 0), "f4")) for e in small.store(12)],
    )
    shown = page(videos, task="world_model", frame_spacing=2, vision_weight=0.5)
    assert "4 codes <small>0.5</small>" in shown and "<svg" not in shown
