"""The config of ``univla_jax.tokenize_dataset``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from univla_jax import config as strict
from univla_jax.data.corpora import Corpus, find_corpus
from univla_jax.errors import UserError
from univla_jax.tokenizers.image import ImageSpec


@dataclasses.dataclass(frozen=True)
class TokenizeConfig:
    """What is tokenised, and how.

    Attributes:
      corpus: name of the row in ``data/corpora.py``.
      splits: store name -> split of the dataset in TFDS notation, such as ``"train[:95%]"``.
      image_specs: view -> fields of its ``ImageSpec``; other views of the corpus are left out.
        Empty takes every view at the size in the corpus' row.
      batch_frames: frames per call of the tokenizer.
      episodes_per_shard: source episodes per shard, the unit of work that a kill can lose.
      min_frames: shortest episode kept, in frames; None takes the corpus' own.
      max_bad_share: share of broken episodes, in 0...1, beyond which a split fails.
      augmented_copies: randomly shifted copies of each episode, stored right behind it.
      max_shift: largest shift of a copy, as part of the frame's size.
      read_threads: threads that read, decode and resize ahead of the tokenizer.
    """

    corpus: str
    splits: Mapping[str, str]
    image_specs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    batch_frames: int = 64
    episodes_per_shard: int = 64
    min_frames: int | None = None
    max_bad_share: float = 0.05
    augmented_copies: int = 0
    max_shift: float = 0.1
    read_threads: int = 2

    def __post_init__(self) -> None:
        """Checks the numbers."""
        for name in ("batch_frames", "episodes_per_shard", "read_threads"):
            if getattr(self, name) < 1:
                raise UserError(f"config.{name}: {getattr(self, name)}, expected at least 1")
        if self.augmented_copies < 0:
            raise UserError(f"config.augmented_copies: {self.augmented_copies}, expected 0 or more")
        for name in ("max_bad_share", "max_shift"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"config.{name}: {getattr(self, name)}, expected 0...1")
        if not self.splits:
            raise UserError("config.splits must not be empty")

    def specs(self) -> dict[str, ImageSpec]:
        """The image specs by view.

        Raises:
          UserError: a wrong field, or none given for a corpus whose row has no sizes.
        """
        if self.image_specs:
            return {
                view: strict.build(ImageSpec, values, where=f"config.image_specs.{view}")
                for view, values in self.image_specs.items()
            }
        sizes = find_corpus(self.corpus).sizes
        if not sizes:
            raise UserError(
                f"config.image_specs: empty, and corpus {self.corpus!r} has no sizes of its own; "
                "give one per view"
            )
        return {view: ImageSpec(size=size) for view, size in sizes.items()}

    def row(self) -> Corpus:
        """The corpus with the chosen views only.

        Raises:
          UserError: unknown corpus, or a view that it does not have.
        """
        corpus = find_corpus(self.corpus)
        chosen = tuple(self.image_specs) or tuple(corpus.sizes)
        for view in chosen:
            if view not in corpus.views:
                raise UserError(
                    f"config.image_specs.{view}: corpus {corpus.name!r} has no such view; it has "
                    f"{', '.join(corpus.views)}"
                )
        views = {view: corpus.views[view] for view in chosen}
        return dataclasses.replace(
            corpus, views=views, min_frames=self.min_frames or corpus.min_frames
        )
