"""Shows what a token store or dataset holds: a page to look at before training, and a table.

    python -m univla_jax.inspect --store=STORE [--vision=VISION_TOKENIZER_FOLDER]
    python -m univla_jax.inspect --source=DATASET --corpus=droid [--split=train]

The page has lengths, instructions, the distribution of every action dimension with those that
hardly move and the share that is clipped, duplicates, what was left out, and frames of a few
episodes: of a store those that the vision tokenizer makes of its codes. ``train --inspect`` shows
the training examples made of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import tqdm
from absl import flags

from univla_jax import cli
from univla_jax.data.data_report import (
    AnyEpisode,
    DataReport,
    Strip,
    make_report,
    make_strips,
    render_report,
)
from univla_jax.data.datasets import find_dataset_config
from univla_jax.data.token_store import TokenStore
from univla_jax.data.validation import EpisodesConfig, ValidEpisodes
from univla_jax.errors import UserError
from univla_jax.io import absolute_path
from univla_jax.tokenizers.vision import VisionTokenizer

_STORE = flags.DEFINE_string("store", None, "Token store", allow_override=True)
_SOURCE = flags.DEFINE_string("source", None, "Dataset folder, with --corpus", allow_override=True)
_CORPUS = flags.DEFINE_string("corpus", None, "Name of the dataset", allow_override=True)
_SPLIT = flags.DEFINE_string("split", "train", "Split of --source", allow_override=True)
_VISION = flags.DEFINE_string("vision", None, "Tokenizer that shows frames", allow_override=True)
_OUT = flags.DEFINE_string("out", "inspect.html", "The page", allow_override=True)
_EPISODES = flags.DEFINE_integer(
    "episodes", 0, "The most episodes read, evenly spread; 0 for all", allow_override=True
)
_STRIPS = flags.DEFINE_integer(
    "strips", 8, "Episodes of which frames are shown", allow_override=True
)


def inspect_store(
    folder: str, vision: VisionTokenizer | None = None, *, episodes: int = 0, strips: int = 8
) -> tuple[DataReport, list[Strip]]:
    """The report on a token store, and strips of frames where there is a vision tokenizer.

    Raises:
      UserError: no complete store there, or one of another vision tokenizer.
    """
    store = TokenStore(folder)
    manifest = store.manifest
    if vision is not None and vision.fingerprint != manifest.header.vision_fingerprint:
        raise UserError(f"--vision: token store {folder} was made with another vision tokenizer")
    whole = range(0, len(store), store.copies)  # without the copies behind each episode
    chosen = whole[:: -(-len(whole) // (episodes or len(whole)))] if len(whole) else whole
    report = make_report(
        (store[i] for i in tqdm.tqdm(chosen, "read", unit="episode")),
        name=folder,
        total=len(whole),
        chunk_size=manifest.header.min_frames,
        statistics=manifest.statistics,
        invalid=lambda: manifest.invalid_episodes,
    )
    if vision is None:
        return report, []
    shown = chosen[:: max(1, len(chosen) // strips)][:strips] if strips else []
    pictures = []
    for index in shown:
        codes = store[index].codes
        pictures += make_strips(
            store[index], lambda view, steps, codes=codes: vision.decode_codes(codes[view][steps])
        )
    return report, pictures


def inspect_source(
    folder: str, config: EpisodesConfig, *, strips: int = 8
) -> tuple[DataReport, list[Strip]]:
    """The report on a dataset, and strips of frames.

    Raises:
      UserError: no such dataset there.
    """
    views = list(find_dataset_config(config.corpus).views) if strips else []
    episodes = ValidEpisodes(config, folder, views)
    every, pictures = max(1, len(episodes) // max(strips, 1)), []

    def shown() -> Iterator[AnyEpisode]:
        for number, episode in enumerate(episodes):
            if strips and number % every == 0 and number // every < strips:
                frames = episode.frames
                pictures.extend(
                    make_strips(episode, lambda view, steps, frames=frames: frames[view][steps])
                )
            yield episode

    report = make_report(
        shown(),
        name=f"{folder}, {config.split}",
        total=sum(map(len, episodes.readers)),
        chunk_size=config.min_frames or 10,
        invalid=lambda: episodes.invalid,
    )
    return report, [_smaller(strip) for strip in pictures]


def _smaller(strip: Strip, height: int = 128) -> Strip:
    """A strip of at most so many rows, for the size of the page."""
    step = max(1, strip.picture.shape[0] // height)
    picture = np.ascontiguousarray(strip.picture[::step, ::step])
    return Strip(strip.view, strip.episode, strip.text, picture)


def main(argv: list[str]) -> None:
    """Runs the command."""
    del argv
    if bool(_STORE.value) == bool(_SOURCE.value):
        raise UserError("give --store=DIR, or --source=DIR with --corpus=NAME")
    if _STORE.value:
        vision = VisionTokenizer.load(_VISION.value) if _VISION.value else None
        found = inspect_store(_STORE.value, vision, episodes=_EPISODES.value, strips=_STRIPS.value)
    else:
        if not _CORPUS.value:
            raise UserError("--corpus: missing; name the dataset in univla_jax/data/datasets.py")
        config = EpisodesConfig(
            _CORPUS.value,
            _SPLIT.value,
            max_invalid_fraction=1.0,
            max_episodes=_EPISODES.value or None,
        )
        found = inspect_source(_SOURCE.value, config, strips=_STRIPS.value)
    report, strips = found
    path = absolute_path(_OUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_report(report, strips))
    print(cli.format_table(report.rows()))
    print(path)


if __name__ == "__main__":
    cli.run(main)
