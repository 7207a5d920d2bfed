"""Deterministic mixture of tasks and token stores: any sample of the endless stream by its number.

    sample n ─► block n // M, slot n % M ─► store, its k-th draw ─► epoch, episode ─► window

A block of M slots holds every store in proportion and is shuffled anew, so every part of the stream
has the right proportions. The draws of a store go through shuffled epochs of all its episodes. In a
mixture of tasks each task has stores of its own in this sense, also where the folder is the same.
Everything is a function of the seed and ``n`` alone: whoever needs a sample can make it, and no
host, process or thread needs to know what the others do.

Grain's ``MapDataset.mix`` is not used: it truncates proportions to integers per block, and the
order of a component depends on its position in the chain of transforms.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from univla_jax.assets import Assets
from univla_jax.data.datasets import DATASETS
from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.data.token_store import StoreHeader, TokenStore
from univla_jax.errors import UserError
from univla_jax.pipeline.batch import Example
from univla_jax.pipeline.data_config import DataConfig, find_store
from univla_jax.tasks import make_task
from univla_jax.tasks.base import SampleSpec
from univla_jax.tokenizers.image import ImageSpec


class EpisodeSource(Protocol):
    """Random access to tokenized episodes: a token store, or a list in tests."""

    def __len__(self) -> int:
        """Number of episodes."""
        ...

    def __getitem__(self, index: int, /) -> TokenizedEpisode:
        """Episode ``index``."""
        ...


class Split:
    """The training or the held-out episodes of a source.

    With ``held_out_every=4`` the episodes 3, 7, 11, … are held out; with 0 both splits are the
    whole source. Augmented copies (``TokenStore.copies``) stay with their episode. With ``cameras``
    each of them makes an episode of its own, of that camera alone.
    """

    def __init__(
        self,
        source: EpisodeSource,
        held_out_every: int,
        *,
        held_out: bool,
        cameras: Sequence[str] = (),
        copies_per_epoch: int = 0,
    ) -> None:
        """Wraps ``source``; see the class and ``DataConfig.copies_per_epoch``."""
        self.source = source
        self._every = held_out_every
        self._held_out = held_out
        self._copies = getattr(source, "copies", 1)
        self._shown = min(copies_per_epoch or self._copies, self._copies)
        self._cameras = tuple(cameras)

    def __len__(self) -> int:
        """Episodes of this split in an epoch."""
        whole = len(self.source) // self._copies
        held_out = whole // self._every if self._every else 0
        if self._every:
            whole = held_out if self._held_out else whole - held_out
        return whole * self._shown * max(1, len(self._cameras))

    def __getitem__(self, index: int) -> TokenizedEpisode:
        """Episode ``index`` of this split; the first of its copies where not all are shown."""
        return self.at(index)

    def at(self, index: int, seed: Sequence[int] = ()) -> TokenizedEpisode:
        """Episode ``index`` in an epoch.

        Args:
          index: of an episode, a copy and a camera.
          seed: of the epoch; draws which copies are shown.
        """
        index, camera = divmod(index, max(1, len(self._cameras)))
        group, copy = divmod(index, self._shown)
        # Groups of ``every`` episodes give their last one to the held-out split. Copies of an
        # episode are neighbors in the store, so the arithmetic is on whole episodes.
        every, whole = self._every, group
        if every:
            whole = group * every + every - 1 if self._held_out else group + group // (every - 1)
        if seed and self._shown < self._copies:
            copy = int(np.random.default_rng((*seed, whole)).permutation(self._copies)[copy])
        episode = self.source[whole * self._copies + copy]
        if not self._cameras:
            return episode
        view = self._cameras[camera]
        return dataclasses.replace(episode, codes={view: episode.codes[view]})


def open_stores(config: DataConfig, assets: Assets) -> list[TokenStore]:
    """Opens the stores of every task and checks that they have what the task needs.

    Returns:
      one store per folder of ``config.stores``; of a mixture those of its first task, then those of
      the second, and so on.

    Raises:
      UserError: no complete store there, one of another vision tokenizer or other image sizes, one
        without the actions, states or texts of its task, or one with episodes shorter than a
        sample's smallest window.
    """
    opened: list[TokenStore] = []
    for number, part in enumerate(config.parts):
        if not part.stores:
            raise UserError("data.stores: none named; give the folders of one or more token stores")
        for folder in part.stores:
            where = f"token store {folder}"
            if config.mixture:
                where = f"data.mixture[{number}] ({config.titles[number]}): {where}"
            opened.append(_open_store(folder, part, assets, where))
    return opened


def _open_store(folder: str, config: DataConfig, assets: Assets, where: str) -> TokenStore:
    store = TokenStore(folder)
    check_store(store.manifest.header, config, assets, where=where)
    lacking = lacking_content(store, config)
    if lacking:
        raise UserError(
            f"{where}: has no {lacking}, which the task {config.task!r} needs; leave the store "
            "out, or take a task that does without"
        )
    # The episodes that there are decide, not the shortest that might have been kept.
    corpus = store.manifest.header.corpus
    needed = make_task(config.task, config.settings, assets).steps_needed(corpus)
    steps = [n for shard in store.manifest.shards for n in shard.steps]
    if short := sum(n < needed for n in steps):
        raise UserError(
            f"{where}: {short} of {len(steps)} episodes have fewer than the {needed} frames that a "
            f"sample takes, the shortest {min(steps)}; tokenize with min_frames={needed}, or take "
            "smaller chunks"
        )
    return store


def check_store(header: StoreHeader, config: DataConfig, assets: Assets, *, where: str) -> None:
    """Checks that the codes of a store mean what ``assets`` say.

    Args:
      header: of the store.
      config: of the task that is trained on it.
      assets: of the run.
      where: what to call the store.

    Raises:
      UserError: another vision tokenizer, other image sizes, or a view is missing.
    """
    assets.require_same_tokenizers({"vision": header.vision_fingerprint}, source=where)
    views = config.views or tuple(header.image_specs)
    unknown = sorted(set(views) - set(header.image_specs))
    if unknown and (not config.needs.single_view or config.views_together):
        raise UserError(f"{where}: no view {unknown[0]!r}, only {sorted(header.image_specs)}")
    # Codes only mean what the checkpoint thinks if frames were resized alike before encoding.
    specs = {v: ImageSpec.from_dict(s) for v, s in header.image_specs.items() if v in views}
    assets.require_same_image_specs(header.corpus, specs, source=where)


def make_split(config: DataConfig, source: EpisodeSource, *, held_out: bool) -> Split:
    """The split of a source that the config trains on or holds out.

    Tasks that show one camera get a sample of each of the corpus' ``world_model_views``, unless the
    config names views.
    """
    cameras: tuple[str, ...] = ()
    one_camera = config.needs.single_view and not config.views_together
    if one_camera and not config.views and len(source):
        episode = source[0]
        dataset = DATASETS.get(episode.corpus)
        named = () if dataset is None else dataset.world_model_views
        cameras = tuple(view for view in named if view in episode.codes)
    return Split(
        source,
        config.held_out_every,
        held_out=held_out,
        cameras=cameras,
        copies_per_epoch=config.copies_per_epoch,
    )


def mixture_weight(source: EpisodeSource) -> float:
    """The weight that the corpus of a source has in ``data/datasets.py``; 1 for an unknown one."""
    dataset = DATASETS.get(source[0].corpus) if len(source) else None
    return 1.0 if dataset is None else dataset.mixture_weight


def lacking_content(store: TokenStore, config: DataConfig) -> str:
    """What the task of ``config`` needs and the store does not have; empty where it has all."""
    if config.needs.actions and store.manifest.statistics is None:
        return "actions"
    if config.state and store.manifest.state_statistics is None:
        return "states"
    if config.needs.groundings and len(store) and not store[0].groundings:
        return "groundings"
    # Texts are a property of the dataset, so the first episode stands for all; one that lacks its
    # text all the same is an error when it is drawn.
    present = store[0].texts if config.needs.texts and len(store) else ()
    return next((f"{kind!r} text" for kind in config.needs.texts if kind not in present), "")


def with_held_out_stores(config: DataConfig, folders: Sequence[str]) -> DataConfig:
    """The config of an evaluation on whole stores.

    Each task takes the stores that it names for evaluation, else those that have what it needs.

    Raises:
      UserError: none of them has what a task of a mixture needs, or it names another one.
    """
    held_out = dataclasses.replace(config, stores=tuple(folders), weights=(), held_out_every=0)
    entries = []
    for entry, part in zip(config.mixture, config.parts):
        named = [find_store(n, folders, "evaluation.stores") for n in entry.evaluation_stores]
        if strange := [name for name in named if name not in folders]:
            raise UserError(
                f"evaluation.stores: the task {entry.title!r} names {strange[0]!r}, there are "
                f"{', '.join(folders)}"
            )
        lacking = {f: lacking_content(TokenStore(f), part) for f in named or folders}
        fitting = tuple(folder for folder, what in lacking.items() if not what)
        if not fitting:
            raise UserError(
                f"evaluation.stores: none has the {next(iter(lacking.values()))} that the task "
                f"{entry.title!r} needs; add one that has"
            )
        entries.append(dataclasses.replace(entry, stores=fitting, weights=()))
    return dataclasses.replace(held_out, mixture=tuple(entries))


def source_fingerprint(source: EpisodeSource) -> str:
    """What identifies the content of a source: its own ``fingerprint``, else a hash of its ids."""
    own = getattr(source, "fingerprint", None)
    if own:
        return str(own)
    digest = hashlib.sha256()
    for index in range(len(source)):
        episode = source[index]
        digest.update(f"{episode.corpus}/{episode.episode_id}/{len(episode.actions)}\n".encode())
    return digest.hexdigest()


class SampleTooLongError(UserError):
    """A sample of more tokens than a batch element has."""


class SampleBuilder:
    """Turns episodes into training examples of one task; picklable.

    Attributes:
      task: of the config.
      drop_long: whether another sample stands in for one that is too long.
    """

    def __init__(self, config: DataConfig, assets: Assets, task_id: int = 0) -> None:
        """Binds the task to vocabulary, tokenizers and action statistics of ``assets``.

        Args:
          config: of one task, of a mixture one of its ``parts``.
          assets: of the run.
          task_id: position of the task in the mixture.
        """
        self._config, self._task_id = config, task_id
        self.drop_long = config.too_long == "drop"
        self.task = make_task(config.task, config.settings, assets)

    def __call__(self, episode: TokenizedEpisode, rng: np.random.Generator) -> Example:
        """One training example; see ``draw`` and ``load``."""
        return self.load(self.draw(episode, rng))

    def draw(self, episode: TokenizedEpisode, rng: np.random.Generator) -> SampleSpec:
        """Draws a sample without reading its visual codes.

        Args:
          episode: from a token store.
          rng: draws the null prompt or the instruction, the window and the camera.

        Raises:
          SampleTooLongError: it has more tokens than ``sequence_length``.
          UserError: names the episode and what is wrong: shorter than one chunk, or a view, a text
            or the statistics missing.
        """
        instruction = episode.instruction
        if self._config.null_prompt_prob and rng.random() < self._config.null_prompt_prob:
            instruction = ""
        elif episode.paraphrases:
            instruction = str(rng.choice(episode.instructions))
        name = f"episode {episode.corpus}/{episode.episode_id}"
        cut = self._config.too_long == "cut_text"
        before = rng.bit_generator.state if cut else None
        try:
            spec = self.task.sample(episode, instruction, rng)
            while (excess := len(spec) - self._config.sequence_length) > 0 and cut and instruction:
                # The same draws give the same window and camera, with fewer words.
                rng.bit_generator.state = before
                instruction = self._shortened(instruction, excess)
                spec = self.task.sample(episode, instruction, rng)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        if excess > 0:
            raise SampleTooLongError(
                f"{name}: its sample has {len(spec)} tokens, more than "
                f"data.sequence_length={self._config.sequence_length}; set data.too_long='drop'"
            )
        return dataclasses.replace(spec, name=name, task_id=self._task_id)

    def load(self, spec: SampleSpec) -> Example:
        """The example of a drawn sample, at most ``sequence_length`` tokens.

        Raises:
          UserError: names the episode whose record is damaged or has a code outside the vocabulary.
        """
        try:
            tokens = spec.fill(self.task.vocabulary)
        except UserError as error:
            raise UserError(f"{spec.name}: {error}") from error
        return Example(tokens.ids, tokens.roles, spec.task_id, spec.actions)

    def _shortened(self, text: str, excess: int) -> str:
        """The first words of a text, at least ``excess`` tokens and one word fewer."""
        words, count = text.split(), lambda part: len(self.task.text_encoder.encode(part))
        most = count(text) - excess
        prefixes = range(len(words))
        kept = bisect.bisect_right(prefixes, most, key=lambda n: count(" ".join(words[:n]))) - 1
        return " ".join(words[: max(kept, 0)])


_FINE_BLOCK = 1000  # slots that are enough to keep uneven proportions within 0.05 %
_BLOCKS, _EPOCHS, _REDRAWS, _COPIES = 0, 1, 2, 3  # streams of random numbers
_MOST_REDRAWS = 1000


class SampleStream:
    """Samples by number; picklable and stateless."""

    def __init__(
        self,
        splits: Sequence[Split],
        proportions: Sequence[float],
        builders: Sequence[SampleBuilder],
        seed: int,
    ) -> None:
        """Binds the stream.

        Args:
          splits: the stores' training episodes, each at least one.
          proportions: of each store, positive, in any unit.
          builders: per store, episode to sample of its task.
          seed: of everything drawn.

        Raises:
          UserError: a store without episodes.
        """
        for number, split in enumerate(splits):
            if not len(split):
                raise UserError(f"data.stores[{number}]: holds no episode to train on")
        self._splits, self._builders, self._seed = splits, builders, seed
        self._slots = slots_per_store(proportions, sum(map(len, splits)))

    @property
    def epoch(self) -> int:
        """Samples after which the proportions are exact; with equal weights, one epoch of all."""
        return sum(self._slots)

    def draw(self, number: int) -> SampleSpec:
        """Sample ``number``, its codes not read yet; raises as ``SampleBuilder.draw``."""
        return self.sample(number)[1]

    def sample(self, number: int) -> tuple[TokenizedEpisode, SampleSpec]:
        """Sample ``number`` with its episode; raises as ``SampleBuilder.draw``."""
        store, epoch, index = self.locate(number)
        builder = self._builders[store]
        rng = np.random.default_rng((self._seed, _EPOCHS, store, epoch, index))
        for attempt in range(_MOST_REDRAWS):
            episode = self._splits[store].at(index, (self._seed, _COPIES, store, epoch))
            try:
                return episode, builder.draw(episode, rng)
            except SampleTooLongError:
                if not builder.drop_long:
                    raise
            # Another sample of the same store takes its place, a function of the number alone.
            rng = np.random.default_rng((self._seed, _REDRAWS, number, attempt))
            index = int(rng.integers(len(self._splits[store])))
        raise UserError(f"data.stores[{store}]: {_MOST_REDRAWS} samples in a row are too long")

    def load(self, spec: SampleSpec) -> Example:
        """The example of a drawn sample; raises as ``SampleBuilder.load``."""
        # Reading the codes depends on the vocabulary alone, which all builders share.
        return self._builders[0].load(spec)

    def locate(self, number: int) -> tuple[int, int, int]:
        """(store, epoch of the store, episode) of sample ``number``."""
        # The k-th sample of a store is found without counting through the stream: every block has
        # the same number of its slots, and within a block ``ranks`` tells how many came before.
        block, slot = divmod(number, self.epoch)
        stores, ranks = _shuffled_block(self._seed, block, self._slots)
        store = int(stores[slot])
        draw = block * self._slots[store] + int(ranks[slot])
        epoch, position = divmod(draw, len(self._splits[store]))
        order = _epoch_order(self._seed, store, epoch, len(self._splits[store]))
        return store, epoch, int(order[position])


def slots_per_store(proportions: Sequence[float], episodes: int) -> tuple[int, ...]:
    """Slots of each store in a block: as many as there are episodes, more where that is too coarse.

    Args:
      proportions: positive.
      episodes: of all stores.
    """
    exact = np.asarray(proportions, np.float64) / sum(proportions) * episodes
    if not np.allclose(exact, np.rint(exact)) or exact.min() < 1:
        exact = exact * -(-_FINE_BLOCK // episodes)
    # Largest remainders get the slots that rounding down left over.
    slots = np.floor(exact + 1e-9).astype(int)
    missing = round(exact.sum()) - slots.sum()
    slots[np.argsort(slots - exact, kind="stable")[:missing]] += 1
    return tuple(np.maximum(slots, 1).tolist())


@functools.lru_cache(4)
def _shuffled_block(seed: int, block: int, slots: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Store of each slot of a block, and how many of that store precede it."""
    stores = np.repeat(np.arange(len(slots), dtype=np.int32), slots)
    np.random.default_rng((seed, _BLOCKS, block)).shuffle(stores)
    ranks = np.empty(len(stores), np.int32)
    ranks[np.argsort(stores, kind="stable")] = np.concatenate([np.arange(n) for n in slots])
    return stores, ranks


@functools.lru_cache(64)
def _epoch_order(seed: int, store: int, epoch: int, episodes: int) -> np.ndarray:
    """The episodes of a store in the order of an epoch."""
    rng = np.random.default_rng((seed, _EPOCHS, store, epoch))
    return rng.permutation(episodes).astype(np.int32)
