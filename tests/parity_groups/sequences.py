"""Groups 9 and 10: dataset samples, prompts, and calls of the policy wrappers in a row."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import numpy as np

from tests.parity_groups import lenient_fast, reference_samples
from tests.parity_groups.checks import Check, Golden, equal
from univla_jax.errors import UserError
from univla_jax.sequences.frames import frame_header, frame_separator
from univla_jax.sequences.tokens import TextEncoder
from univla_jax.tokenizers.action import UniformBinTokenizer
from univla_jax.tokenizers.vocabulary import Vocabulary


def lexicon_of(golden: Golden) -> TextEncoder:
    """The reference's words: special tokens in texts are special."""
    return TextEncoder(Vocabulary.emu3(), golden.text(), special_text=True)


def dataset(golden: Golden) -> Iterator[Check]:
    """Ids, masks, labels and actions of every recorded sample, and its errors."""
    arrays, text_encoder = golden.arrays("dataset"), lexicon_of(golden)
    for record in golden.json("dataset"):
        name, encode = record["id"], _encoder(golden, record)
        try:
            sample = reference_samples.dataset_sample(text_encoder, record, arrays, encode)
        except UserError:
            yield equal(name, "errors", True, bool(record["error"]))
            continue
        if record["error"]:
            yield equal(name, "errors", False, True)
            continue
        for key in record["out_keys"]:
            yield equal(name, key, sample[key], arrays[f"out|{name}|{key}"])


def _encoder(golden: Golden, record: Mapping) -> reference_samples.Encode:
    """Actions [T, A] to action codes as the record's arguments say."""

    def encode(actions: np.ndarray) -> np.ndarray:
        if record["args"]["actions_format"] == "openvla":
            return np.array(UniformBinTokenizer().encode(actions))
        tokenizer = golden.fast(record["args"]["action_tokenizer_path"])
        return np.array(lenient_fast.encode(tokenizer, actions[None])[0])

    return encode


def prompts(golden: Golden) -> Iterator[Check]:
    """Prompts of every mode, their parts, and the grammars of imagined frames."""
    arrays, text_encoder = golden.arrays("prompts"), lexicon_of(golden)
    for record in golden.json("prompts"):
        yield from _prompt(text_encoder, record, arrays)
    for key in arrays:
        if key.startswith("prefix_template|"):
            frames, height, width = written_size(text_encoder, arrays[key])
            ours = frame_separator(text_encoder, height, width, frames)
            yield equal(key, "prompt parts", ours, arrays[key])
        elif key.startswith("null_prompt|"):
            frames, height, width = written_size(text_encoder, arrays[key])
            yield equal(
                key, "prompt parts", frame_header(text_encoder, height, width, frames), arrays[key]
            )
        elif key.startswith("constrained_"):
            yield equal(key, "grammars", _grammar(text_encoder, key, len(arrays[key])), arrays[key])


def written_size(text_encoder: TextEncoder, ids: np.ndarray) -> tuple[int, int, int]:
    """(frames, height, width) as the text inside a frame's head says them."""
    words = text_encoder.text.decode([int(i) for i in ids if i < text_encoder.vocabulary.text_size])
    frames, height, width = map(int, words.split("*"))
    return frames, height, width


def _prompt(
    text_encoder: TextEncoder, record: Mapping, arrays: Mapping[str, np.ndarray]
) -> Iterator[Check]:
    """All rows of a prompt, right-padded as the reference pads, and what it says beside them."""
    name = record["name"]
    rows = reference_samples.prompt_rows(text_encoder, record, arrays)
    length = max(map(len, rows))
    pad = text_encoder.vocabulary.pad
    ours = np.stack([np.pad(row, (0, length - len(row)), constant_values=pad) for row in rows])
    mask = np.arange(length) < np.array([[len(row)] for row in rows])
    theirs = arrays[f"{name}|input_ids"], arrays[f"{name}|attention_mask"]
    yield equal(name, "prompts", np.stack([ours, mask]), np.stack(theirs))
    kinds = np.zeros_like(ours)  # one segment: nothing tells text from codes but their ids
    yield equal(name, "token types", kinds, arrays[f"{name}|token_type_ids"])
    size = reference_samples.video_size(record, arrays)
    yield equal(name, "video sizes", np.tile(size, (len(rows), 1)), arrays[f"{name}|video_size"])


def _grammar(text_encoder: TextEncoder, key: str, length: int) -> np.ndarray:
    found = re.fullmatch(r"constrained_(video|image)_h(\d+)w(\d+)(?:f(\d+))?", key)
    if found is None:
        raise ValueError(f"{key}: not a constrained_<kind>_h<H>w<W>[f<F>] array")
    height, width, frames = (int(n or 1) for n in found.groups()[1:])
    kind = "video" if found[1] == "video" else "picture"
    return reference_samples.grammar_rows(text_encoder, kind, height, width, frames, length)
