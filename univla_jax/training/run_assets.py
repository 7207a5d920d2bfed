"""The assets of a run: tokenizers from folders or an earlier stage, statistics from stores."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from univla_jax import tasks
from univla_jax.assets import Assets, spec_key
from univla_jax.checkpoints import assets_folder, barrier, find_checkpoint
from univla_jax.data.token_store import StoreHeader, TokenStore, compute_statistics
from univla_jax.errors import UserError
from univla_jax.models.decoder_config import DecoderConfig
from univla_jax.normalization import ActionStatistics
from univla_jax.pipeline.data_config import DataConfig
from univla_jax.tasks import CorpusRecord, TaskRecord, records_to_json, without_labels
from univla_jax.tasks.base import corpus_frame_spacing, ordered_views, policy_views
from univla_jax.tokenizers.action import ActionTokenizer, load_action_tokenizer
from univla_jax.tokenizers.image import ImageSpec
from univla_jax.tokenizers.text import TextTokenizer, load_text_tokenizer
from univla_jax.tokenizers.vision import VisionTokenizer
from univla_jax.tokenizers.vocabulary import Vocabulary
from univla_jax.training.train_config import FREE_MODEL_SETTINGS, TrainConfig

_EMU3_ACTIONS = 2048
_WHERE = "config.tokenizers"


FOLDER = "assets"


def build_assets(config: TrainConfig, own: epath.Path | None) -> Assets:
    """Everything that gives this run's token ids their meaning, but the model's settings.

    A run that has a checkpoint goes on with the tokenizers in it, whatever became of the folders
    they were taken from.

    Args:
      config: names the tokenizers, or the earlier stage they come from, and the token stores,
        whose image specs and action statistics become the run's. (That the stores' codes are of
        this vision tokenizer is checked where the data is opened.)
      own: the checkpoint that the run goes on from, None where it begins.

    Raises:
      UserError: a tokenizer is missing or does not fit the vocabulary or the earlier stage.
    """
    parts = [(part, [TokenStore(f) for f in part.stores]) for part in config.data.parts]
    stores = [store for _, opened in parts for store in opened]
    if not stores:
        raise UserError("config.data.stores: none named; give the folder of a token store")
    begun = find_checkpoint(config.init_from) if own is None and config.init_from else own
    earlier = None if begun is None else Assets.load(assets_folder(begun))
    found = mixture_statistics(parts)
    if config.tokenizers.statistics == "init_from":
        found |= {key: earlier.statistics[key] for key in found.keys() & earlier.statistics.keys()}
    return dataclasses.replace(
        earlier if own is not None else _new_assets(config, earlier, begun),
        image_specs=image_specs([store.manifest.header for store in stores]),
        statistics=found,
        task=records_to_json([task_record(part, opened) for part, opened in parts]),
    )


def store_assets(
    assets: Assets, workdir: epath.Path, own: epath.Path | None, *, force: bool = False
) -> Assets:
    """Copies the assets to ``<workdir>/assets``, where every checkpoint takes them from.

    Args:
      assets: of this run, the model's settings among them.
      workdir: its folder.
      own: the checkpoint that the run goes on from, None where it begins.
      force: take these assets although the checkpoint has others.

    Returns:
      the assets read back; the vision tokenizer's weights stay on disk until they are used.

    Raises:
      UserError: the run has a checkpoint with other assets.
    """
    folder = workdir / FOLDER
    if own is not None and not force and not _same_run(Assets.load(assets_folder(own)), assets):
        raise UserError(
            f"{own} was saved with other action statistics, image specs, task or model settings "
            "than this config gives: a token store was changed since the run was begun; restore "
            "it, or start in a new --workdir"
        )
    if jax.process_index() == 0 and not _holds(folder, assets):
        folder.rmtree(missing_ok=True)
        assets.save(folder)
    barrier("store_assets")
    return Assets.load(folder)


def _same_run(saved: Assets, assets: Assets) -> bool:
    """Whether assets are those of an earlier start, but for settings that may change."""
    free = {name: assets.model[name] for name in FREE_MODEL_SETTINGS if name in assets.model}
    # Settings that did not exist when the run was begun have their defaults.
    defaults = {field.name: field.default for field in dataclasses.fields(DecoderConfig)}
    added = {name: defaults[name] for name in assets.model if name not in saved.model}
    # A base may have been moved; its identity says whether it is the same.
    place = {name: assets.adapter[name] for name in ("base",) if name in assets.adapter}
    saved = dataclasses.replace(
        saved,
        model={**added, **saved.model, **free},
        adapter=saved.adapter and {**saved.adapter, **place},
    )
    # What of the tokens is learned may change too; it gives none of them another meaning.
    saved, assets = (
        dataclasses.replace(each, task=without_labels(each.task)) for each in (saved, assets)
    )
    return saved.fingerprint == assets.fingerprint


def _holds(folder: epath.Path, assets: Assets) -> bool:
    """Whether ``folder`` holds these assets, whole."""
    try:
        return folder.is_dir() and Assets.load(folder).fingerprint == assets.fingerprint
    except UserError:
        return False


def _new_assets(config: TrainConfig, earlier: Assets | None, begun: epath.Path | None) -> Assets:
    """Assets of the tokenizers alone, for a run that begins with an earlier stage or without."""
    assets = _tokenizers(config, earlier)
    if earlier is not None and config.warm_start == "exact":
        _check_earlier(assets, earlier, assets_folder(begun))
    return assets


def task_record(data: DataConfig, stores: Sequence[TokenStore]) -> TaskRecord:
    """What acting and imagining must repeat of the training sequences."""
    headers = [store.manifest.header for store in stores]
    return TaskRecord(
        task=data.task,
        frames=data.frames,
        chunk_size=data.chunk_size,
        frame_spacing=data.frame_spacing,
        sequence_length=data.sequence_length,
        views=_shown_views(data, headers[0]),
        corpora={
            header.corpus: CorpusRecord(
                control_hz=header.control_hz,
                frame_spacing=corpus_frame_spacing(data.settings, header.corpus),
                grids=header.grids,
                views=_shown_views(data, header),
            )
            for header in headers
        },
        state=data.state,
        views_together=data.views_together,
        max_committed=data.max_committed,
        advantage=data.advantage,
        question_first=data.question_first,
        wordless=data.wordless,
        state_steps=data.state_steps,
        labels=data.loss_on if data.loss_on != tasks.task_class(data.task).labels else "",
    )


def _shown_views(data: DataConfig, header: StoreHeader) -> tuple[str, ...]:
    """The cameras of a corpus that acting or imagining may be asked about."""
    single = data.needs.single_view and not data.views_together
    views = ordered_views if single else policy_views
    return data.views or tuple(views(header.corpus, list(header.grids)))


def image_specs(headers: Sequence[StoreHeader]) -> dict[str, ImageSpec]:
    """Image specs of stores: by view, and by ``spec_key`` where corpora differ in a view.

    Raises:
      UserError: two stores of one corpus were made with different specs of a view.
    """
    by_view: dict[str, dict[str, ImageSpec]] = {}
    for header in headers:
        for view, values in header.image_specs.items():
            spec = ImageSpec.from_dict(values)
            known = by_view.setdefault(view, {}).setdefault(header.corpus, spec)
            if spec != known:
                raise UserError(
                    f"token stores of the corpus {header.corpus!r}: view {view!r} was made with "
                    f"{spec} of {header.source}, elsewhere with {known}; make them with the same"
                )
    # A view on which all corpora agree has one entry, as in the checkpoints of a single corpus.
    specs: dict[str, ImageSpec] = {}
    for view, by_corpus in by_view.items():
        if len(set(by_corpus.values())) == 1:
            specs[view] = next(iter(by_corpus.values()))
        else:
            specs |= {spec_key(corpus, view): spec for corpus, spec in by_corpus.items()}
    return specs


def statistics(stores: Sequence[TokenStore]) -> dict[str, ActionStatistics]:
    """Action statistics per corpus, and its state's under ``state_key``.

    A corpus in one store keeps that store's; one in several (the four LIBERO suites) gets the
    statistics of all its episodes together.
    """
    by_corpus: dict[str, list[TokenStore]] = {}
    for store in stores:
        for corpus in store.statistics:
            by_corpus.setdefault(corpus, []).append(store)
    return {key: _joint(key, group) for key, group in by_corpus.items()}


def mixture_statistics(
    parts: Sequence[tuple[DataConfig, Sequence[TokenStore]]],
) -> dict[str, ActionStatistics]:
    """Statistics of all tasks' stores: those of a corpus come from the first task that has it.

    A policy named first so keeps the statistics of its demonstrations, whatever roll-outs of the
    same robot are learned from beside them: other ones would change what its actions mean.
    """
    found: dict[str, ActionStatistics] = {}
    for _, stores in sorted(parts, key=lambda part: not part[0].needs.actions):
        missing = [store for store in stores if store.statistics.keys() - found.keys()]
        found = statistics(missing) | found
    return found


def _joint(key: str, stores: Sequence[TokenStore]) -> ActionStatistics:
    if len(stores) == 1:
        return stores[0].statistics[key]
    return compute_statistics(stores, key, stores[0].manifest.header.min_frames)


def _tokenizers(config: TrainConfig, earlier: Assets | None) -> Assets:
    """Assets of the tokenizers alone."""
    folders = config.tokenizers
    text = load_text_tokenizer(folders.text) if folders.text else None
    vision = VisionTokenizer.load(folders.vision) if folders.vision else None
    action = load_action_tokenizer(folders.action) if folders.action else None
    if earlier is not None:
        text, vision = text or earlier.text, vision or earlier.vision
        action = action or earlier.action
    for name, part in (("text", text), ("vision", vision)):
        if part is None:
            raise UserError(f"{_WHERE}.{name} is empty; name the tokenizer's folder, or init_from")
    if action is None and config.data.needs.action_tokens:
        needing = next(part.task for part in config.data.parts if part.needs.action_tokens)
        raise UserError(f"{_WHERE}.action is empty, but the task {needing!r} needs it")
    for part in config.data.parts:
        if part.needs.action_tokens and action.horizon not in (None, part.chunk_size):
            raise UserError(
                f"{_WHERE}.action was fitted to chunks of {action.horizon} steps, data.chunk_size "
                f"is {part.chunk_size}; set it to that, or fit another"
            )
    if earlier is None or _has_others(earlier, text, vision, action):
        vocabulary = _vocabulary(folders.vocabulary, text, vision, action)
    elif earlier.action is None and action is not None:
        vocabulary = dataclasses.replace(earlier.vocabulary, action_size=action.vocabulary_size)
    else:
        vocabulary = earlier.vocabulary
    return Assets(vocabulary, text, vision, action, image_specs={}, statistics={})


def _has_others(earlier: Assets, *parts: Any) -> bool:
    """Whether an earlier stage had other tokenizers than these of text, vision and action."""
    theirs = (earlier.text, earlier.vision, earlier.action)
    pairs = [(own, had) for own, had in zip(parts, theirs) if had is not None and own is not None]
    return any(own.fingerprint != had.fingerprint for own, had in pairs)


def _vocabulary(
    kind: str, text: TextTokenizer, vision: VisionTokenizer, action: ActionTokenizer | None
) -> Vocabulary:
    if kind == "emu3":
        return Vocabulary.emu3(_EMU3_ACTIONS if action is None else action.vocabulary_size)
    if action is None:
        raise UserError(
            f"{_WHERE}.action is empty; a vocabulary from scratch is sized by all tokenizers, so "
            "that every stage shares its ids: fit the action tokenizer first"
        )
    return Vocabulary.from_scratch(
        text.vocabulary_size, vision.codebook_size, action.vocabulary_size
    )


def _check_earlier(assets: Assets, earlier: Assets, folder: epath.Path) -> None:
    """Raises UserError unless the earlier stage's parameters know these tokens."""
    prints = earlier.tokenizer_fingerprints
    if earlier.action is None:  # its vocabulary left the number of actions open
        del prints["vocabulary"]
    assets.require_same_tokenizers(prints, source=str(folder))
