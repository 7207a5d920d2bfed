"""Group 12: the Emu3 text tokenizer and the vocabulary's special ids."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tests.parity_groups.checks import Check, Golden, equal
from univla_jax.tokenizers.vocabulary import Vocabulary


def text(golden: Golden) -> Iterator[Check]:
    """Ids and texts of strings, padded batches, special ids."""
    values, tokenizer, vocabulary = golden.json("text_tokenizer"), golden.text(), Vocabulary.emu3()
    for number, case in enumerate(values["strings"]):
        name = f"string {number}"
        ids = tokenizer.encode(case["text"], allow_special=True)
        yield equal(name, "ids", ids, case["ids"])
        yield equal(name, "decoded", tokenizer.decode(ids), case["decoded"])
        plain = tokenizer.decode([i for i in ids if i < tokenizer.vocabulary_size])
        yield equal(name, "decoded without special", plain, case["decoded_skip_special"])
    for name in (key for key in values if key.startswith("padded_")):
        yield from _padded(name, values, tokenizer, vocabulary)
    yield equal("vocabulary", "size", vocabulary.size, values["vocab_size"])
    yield equal("vocabulary", "special ids", [vocabulary.bov], values["first_visual"])
    yield equal("vocabulary", "special ids", [vocabulary.eov], values["last_visual"])
    for name, (_, ids) in values["special"].items():
        ours = [getattr(vocabulary, name.removesuffix("_token"))]
        yield equal("vocabulary", "special ids", ours, ids)


def _padded(name: str, values: dict, tokenizer, vocabulary: Vocabulary) -> Iterator[Check]:
    """``padded_longest`` and ``padded_max_<n>``: the first strings, right-padded."""
    theirs = np.atleast_2d(values[name]["input_ids"])
    rows = [
        tokenizer.encode(case["text"], allow_special=True)
        for case in values["strings"][: len(theirs)]
    ]
    length = None if name == "padded_longest" else int(name.rpartition("_")[2])
    length = length or max(map(len, rows))
    ids = [[*row, *[vocabulary.pad] * (length - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
    yield equal(name, "padded ids", ids, theirs)
    yield equal(name, "attention mask", mask, np.atleast_2d(values[name]["attention_mask"]))
