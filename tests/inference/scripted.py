"""Parts that compile nothing: a decoder told what to say, vision told what to see, mean colors."""

from __future__ import annotations

import numpy as np

from univla_jax.inference.prefix_cache import Completion


class ScriptedPrefixCache:
    """Answers each call with the next list of id rows; remembers the prompts."""

    def __init__(self, answers, allowed):
        self._answers, self._allowed = list(answers), set(allowed.tolist())
        self.prompts = []

    def complete(self, prompts, cached_prefixes, *, keys, timer):
        self.prompts.append(list(prompts))
        answers = [np.asarray(ids) for ids in self._answers.pop(0)]
        assert all(set(ids.tolist()) <= self._allowed for ids in answers)
        return [Completion(ids, None, 0) for ids, _ in zip(answers, prompts, strict=True)]


class ScriptedVision:
    """Gives the next codes [N, h, w], whatever the frames."""

    def __init__(self, codes, codebook_size=32768, factor=8):
        self._codes = list(codes)
        self.codebook_size, self.factor, self.fingerprint = codebook_size, factor, "scripted"

    def encode_frames(self, frames):
        return self._codes.pop(0)


class PatchVision:
    """Codes are the mean red of 8 x 8 patches in 16 steps; decodes to gray patches."""

    codebook_size, factor, fingerprint = 16, 8, "patches"

    def encode_frames(self, frames):
        n, height, width, _ = frames.shape
        red = frames[..., 0].reshape(n, height // 8, 8, width // 8, 8)
        return (red.mean((2, 4)) // 16).astype(np.uint16)

    def decode_codes(self, codes):
        gray = (codes * 16 + 8).astype(np.uint8).repeat(8, 1).repeat(8, 2)
        return np.repeat(gray[..., None], 3, -1)
