"""A checkpoint with random parameters that points and answers, as its assets say."""

from __future__ import annotations

import dataclasses

from tests.inference import tiny_checkpoint
from univla_jax.tasks import TaskRecord, records_to_json
from univla_jax.tokenizers.coordinates import location_symbols
from univla_jax.tokenizers.text import SentencePieceTextTokenizer
from univla_jax.tokenizers.vocabulary import Vocabulary


def save(folder, *names: str):
    """Writes the checkpoint of the named tasks, "grounding" and "question" by default."""
    assets = tiny_checkpoint.make_assets()
    base = dataclasses.replace(TaskRecord.from_json(assets.task), frames=1)
    views = {"question": ("image",), "grounding": ("image", "wrist_image")}
    records = [
        dataclasses.replace(base, task=name, views=views.get(name, base.views))
        for name in names or ("grounding", "question")
    ]
    words = [*tiny_checkpoint.WORDS, "where is the red block? point to yes no"] * 4
    text = SentencePieceTextTokenizer.fit(words, 1400, symbols=location_symbols())
    vocabulary = Vocabulary.from_scratch(
        text.vocabulary_size, assets.vision.codebook_size, assets.action.vocabulary_size
    )
    assets = dataclasses.replace(
        assets, text=text, vocabulary=vocabulary, task=records_to_json(records)
    )
    return tiny_checkpoint.save(folder, assets, scale=20)
