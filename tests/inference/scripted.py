"""Parts that compile nothing: a sampler told what to say, vision told what to see, mean colours."""

from __future__ import annotations

import types

import numpy as np


class ScriptedSampler:
    """Answers each call with the next list of id rows; remembers the prompts."""

    def __init__(self, answers):
        self._answers = list(answers)
        self.prompts = []

    def prefill(self, tokens, lengths, *, slots):
        assert tokens.shape[1] <= slots
        self.prompts.append([row[:n] for row, n in zip(tokens, lengths)])

    def generate(self, state, *, max_new_tokens, allowed, stop_id, active):
        answers = self._answers.pop(0)
        tokens = np.full((len(active), max_new_tokens), -1)
        for row, ids in zip(tokens, answers):
            assert set(np.asarray(ids).tolist()) <= set(allowed.tolist())
            row[: len(ids)] = ids
        lengths = [len(ids) for ids in answers] + [0] * (len(active) - len(answers))
        stopped = [len(ids) > 0 and ids[-1] == stop_id for ids in answers]
        return types.SimpleNamespace(tokens=tokens, lengths=lengths, stopped=stopped), state


class ScriptedVision:
    """Gives the next codes [N, h, w], whatever the frames."""

    def __init__(self, codes, codebook_size=32768, factor=8):
        self._codes = list(codes)
        self.codebook_size, self.factor, self.fingerprint = codebook_size, factor, "scripted"

    def encode_frames(self, frames):
        return self._codes.pop(0)


class PatchVision:
    """Codes are the mean red of 8 x 8 patches in 16 steps; decodes to grey patches."""

    codebook_size, factor, fingerprint = 16, 8, "patches"

    def encode_frames(self, frames):
        n, height, width, _ = frames.shape
        red = frames[..., 0].reshape(n, height // 8, 8, width // 8, 8)
        return (red.mean((2, 4)) // 16).astype(np.uint16)

    def decode_codes(self, codes):
        grey = (codes * 16 + 8).astype(np.uint8).repeat(8, 1).repeat(8, 2)
        return np.repeat(grey[..., None], 3, -1)
