"""A trained decoder with all that gives its tokens meaning, read from a checkpoint folder alone."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from univla_jax.assets import Assets
from univla_jax.checkpoints import assets_folder, find_checkpoint, load_params
from univla_jax.config import build_config
from univla_jax.errors import UserError
from univla_jax.models.action_expert import ActionExpert, ActionExpertConfig
from univla_jax.models.decoder import Decoder
from univla_jax.models.decoder_config import DecoderConfig
from univla_jax.normalization import ActionStatistics
from univla_jax.sequences.text_encoder import TextEncoder
from univla_jax.training.losses import DECODER, EXPERT
from univla_jax.training.model_setup import params_init


@dataclasses.dataclass(frozen=True)
class CorpusSettings:
    """What a model was shown of one corpus.

    Attributes:
      control_hz: control rate in steps per second.
      frame_spacing: steps between two frames of a world model.
      grids: code grid (h, w) per view.
    """

    control_hz: float
    frame_spacing: int
    grids: Mapping[str, tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The sequence layout a model was trained on (``assets.layout``).

    Attributes:
      layout: ``"policy_video"``, ``"policy_image"``, ``"policy_flow"`` or ``"world_model"``.
      frames: moments per training sample; the history window of a video policy.
      chunk_size: steps of an action chunk.
      frame_spacing: steps between two frames of a world model; 0 means each corpus' own.
      sequence_length: the most tokens a training sample had.
      views: cameras in the order they are written.
      corpora: what was shown of each corpus.
      state: whether the proprioceptive state is written before each chunk.
    """

    layout: str
    frames: int
    chunk_size: int = dataclasses.field(metadata={"formerly": "action_frames"})
    frame_spacing: int
    sequence_length: int
    views: tuple[str, ...]
    corpora: Mapping[str, Any]
    state: bool = False

    @classmethod
    def of(cls, assets: Assets) -> Layout:
        """The layout that assets record.

        Raises:
          UserError: they were saved without one, or with unknown keys.
        """
        layout = build_config(cls, assets.layout, where="assets.layout")
        corpora = {
            name: build_config(CorpusSettings, values, where=f"assets.layout.corpora.{name}")
            for name, values in layout.corpora.items()
        }
        return dataclasses.replace(layout, corpora=corpora)

    def corpus(self, name: str | None = None) -> str:
        """The corpus ``name``, or the only one there is.

        Raises:
          UserError: unknown, or not named where there are several.
        """
        known = sorted(self.corpora)
        if name is None and len(known) == 1:
            return known[0]
        if name in self.corpora:
            return str(name)
        what = "name one" if name is None else f"{name!r} is not among them"
        raise UserError(f"the checkpoint was trained on the corpora {', '.join(known)}; {what}")


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A decoder ready to generate.

    Attributes:
      folder: the checkpoint ``.../checkpoints/<step>``.
      assets: tokenizers, vocabulary, image specs, statistics.
      layout: what the sequences look like.
      model: the decoder, without dropout; parameters are kept in its compute type.
      params: its parameters.
      expert: the action expert on top of it, or None.
      expert_params: its parameters.
    """

    folder: pathlib.Path
    assets: Assets
    layout: Layout
    model: Decoder
    params: Any
    expert: ActionExpert | None = None
    expert_params: Any = None

    @classmethod
    def from_checkpoint(
        cls, checkpoint: str | pathlib.Path, *, untrained: bool = False, seed: int = 0
    ) -> LoadedModel:
        """Reads a checkpoint; every file of its assets is verified.

        Args:
          checkpoint: a folder ``checkpoints/<step>``, or the workdir whose newest one is taken.
          untrained: random parameters instead of the saved ones, as a baseline.
          seed: of the random parameters.

        Raises:
          UserError: no complete checkpoint, assets that were changed or removed, or parameters of
            another model.
        """
        folder = find_checkpoint(checkpoint)
        assets = Assets.load(assets_folder(folder))
        layout = Layout.of(assets)
        model = Decoder(_inference_config(assets))
        expert = _expert(assets, model)
        init = params_init(model, expert)
        if untrained:  # "rbg" compiles faster than the default generator
            params = jax.jit(lambda key: nn.unbox(init(key)))(jax.random.key(seed, impl="rbg"))
        else:
            params = load_params(folder, nn.unbox(jax.eval_shape(init, jax.random.key(0))))
        if expert is None:
            return cls(folder, assets, layout, model, params)
        return cls(folder, assets, layout, model, params[DECODER], expert, params[EXPERT])

    @functools.cached_property
    def text_encoder(self) -> TextEncoder:
        """Words to token ids."""
        return TextEncoder(self.assets.vocabulary, self.assets.text)

    def statistics(self, key: str) -> ActionStatistics:
        """Of a corpus' actions, or under its ``state_key`` of its states.

        Raises:
          UserError: the assets hold none of it.
        """
        known = self.assets.statistics
        if key not in known:
            raise UserError(
                f"{self.folder}: the assets hold no statistics of {key!r}, only "
                f"of {', '.join(sorted(known)) or 'none'}"
            )
        return known[key]

    def require_layout(self, wanted: tuple[str, ...], purpose: str) -> None:
        """Raises UserError unless the model was trained on one of the layouts ``wanted``."""
        if self.layout.layout not in wanted:
            raise UserError(
                f"{self.folder} was trained on the layout {self.layout.layout!r}; {purpose} needs "
                f"a checkpoint of {' or '.join(map(repr, wanted))}"
            )


def _inference_config(assets: Assets) -> DecoderConfig:
    """The trained decoder's; casting the parameters once is what training does at every use."""
    config = build_config(DecoderConfig, assets.model, where="assets.model")
    return dataclasses.replace(config, dropout=0.0, remat="none", param_dtype=config.dtype)


def _expert(assets: Assets, model: Decoder) -> ActionExpert | None:
    if not assets.action_expert:
        return None
    config = build_config(ActionExpertConfig, assets.action_expert, where="assets.action_expert")
    return ActionExpert(config, model.config)
