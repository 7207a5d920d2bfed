"""World model: given frames and an instruction in, the next frames out.

    bos text │ fmt(f0) │ boi "1*h*w" img → h*w codes │ eof eoi boi "1*h*w" img → h*w codes │ …

What stands between frames is fed, only visual codes are sampled, and one key/value cache grows over
all frames: no token is prefilled twice. Source: UniVLA
reference/Emu3/emu3/mllm/processing_emu3.py:527-546.

Axes: B batch, C context frames, N imagined frames, H/W pixels, h/w code grid.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np

from univla_jax.errors import UserError
from univla_jax.inference.loaded_model import LoadedModel, MakePlacement
from univla_jax.inference.sampler import Sampler, pad_prompts
from univla_jax.inference.sampling import GREEDY, Sampling
from univla_jax.tasks.base import FrameTask


class WorldModel:
    """Imagines frames of one camera for many episodes at once.

    Attributes:
      loaded: the model and its assets.
      corpus: whose camera it is.
      view: the camera.
    """

    def __init__(
        self, loaded: LoadedModel, *, corpus: str | None = None, view: str | None = None
    ) -> None:
        """Prepares a loaded model; see ``load``."""
        loaded.require_task(FrameTask, "imagining")
        record = loaded.record
        self.loaded = loaded
        self.corpus = record.find_corpus(corpus)
        views = record.views_of(self.corpus)
        self.view = view or views[0]
        self._vision = loaded.assets.require("vision")
        if self.view not in views:
            raise UserError(
                f"{loaded.folder} was not trained on view {view!r}, only on {', '.join(views)}"
            )
        self._spec = loaded.assets.image_spec(self.corpus, self.view)
        self._sampler = Sampler(loaded.model, loaded.params, placement=loaded.placement)

    @classmethod
    def load(
        cls,
        checkpoint: str | pathlib.Path,
        *,
        corpus: str | None = None,
        view: str | None = None,
        untrained: bool = False,
        seed: int = 0,
        place: MakePlacement | None = None,
    ) -> WorldModel:
        """Loads a checkpoint folder and nothing else.

        Args:
          checkpoint: a folder ``checkpoints/<step>``, or the workdir whose newest one is taken.
          corpus: whose camera it is; the only one by default.
          view: the camera; the first one trained on by default.
          untrained: random parameters instead of the saved ones, as a baseline.
          seed: of the random parameters.
          place: makes the placement of a model that is split over devices.

        Raises:
          UserError: no complete checkpoint, changed or missing assets, or a checkpoint that is no
            world model (a policy's makes garbled frames).
        """
        loaded = LoadedModel.from_checkpoint(
            checkpoint, untrained=untrained, seed=seed, place=place
        )
        return cls(loaded, corpus=corpus, view=view)

    @property
    def frame_spacing(self) -> int:
        """Control steps between two frames."""
        return self.loaded.record.corpora[self.corpus].frame_spacing

    @property
    def seconds_per_frame(self) -> float:
        """Time between two frames."""
        return self.frame_spacing / self.loaded.record.corpora[self.corpus].control_hz

    def resize(self, frames: np.ndarray) -> np.ndarray:
        """Camera frames uint8 [N, H, W, 3] at the size the tokenizer sees."""
        return self._spec.resize(frames)

    def encode(self, frames: np.ndarray) -> np.ndarray:
        """Codes uint16 [B, T, h, w] of resized frames uint8 [B, T, H, W, 3]."""
        return _per_frame(self._vision.encode_frames, frames)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Frames uint8 [B, T, H, W, 3] of codes [B, T, h, w]."""
        return _per_frame(self._vision.decode_codes, codes)

    def imagine(
        self,
        instructions: Sequence[str],
        context: np.ndarray,
        frames: int,
        *,
        sampling: Sampling = GREEDY,
        guidance: float = 1.0,
        motions: np.ndarray | None = None,
    ) -> np.ndarray:
        """Codes of the next frames.

        Args:
          instructions: of each episode; "" for none.
          context: integer [B, C, h, w] codes of the given frames, oldest first.
          frames: how many to imagine, N.
          sampling: how codes are sampled; episode i of any batch draws the same.
          guidance: how much more the instruction counts than it would by itself (classifier-free
            guidance against the same frames without instruction); 1 for no guidance.
          motions: float [B, n, A] in physical units, for a task whose frames follow from actions:
            those before, between and behind all frames but the last imagined one.

        Returns:
          uint16 [B, N, h, w].

        Raises:
          UserError: another number of episodes, or codes outside the codebook.
        """
        if len(instructions) != len(context):
            raise UserError(f"{len(instructions)} instructions for {len(context)} episodes")
        task, grid = self.loaded.task, context.shape[2:]
        if motions is not None:
            return self._imagine_moving(instructions, context, frames, motions, sampling)
        prompts = [task.prompt(text, codes) for text, codes in zip(instructions, context)]
        if guidance != 1:
            prompts += [task.prompt("", codes) for codes in context]
        decoding, separator = task.decoding(grid), task.separator(grid)
        pad = self.loaded.assets.vocabulary.pad
        tokens, lengths = pad_prompts(prompts, pad, batch_size=len(prompts))
        # All slots of the whole roll-out are reserved now: growing the cache later would compile
        # every following call again.
        slots = tokens.shape[1] + frames * (decoding.max_new_tokens + len(separator))
        state = self._sampler.prefill(tokens, lengths, slots=slots)
        imagined = []
        for number in range(frames):
            if number:
                state = self._sampler.extend(state, np.tile(separator, (len(prompts), 1)))
            generated, state = self._sampler.generate(
                state,
                max_new_tokens=decoding.max_new_tokens,
                allowed=decoding.allowed,
                sampling=sampling,
                key=jax.random.fold_in(jax.random.key(sampling.seed), number),
                guidance=guidance,
            )
            imagined.append(np.asarray(generated.tokens)[: len(context)])
        return task.parse(np.stack(imagined, axis=1), grid)

    def _imagine_moving(
        self,
        instructions: Sequence[str],
        context: np.ndarray,
        frames: int,
        motions: np.ndarray,
        sampling: Sampling,
    ) -> np.ndarray:
        """``imagine`` where what stands between two frames differs from episode to episode."""
        # The ids of motions differ in number, so each frame is prompted anew with those before it
        # as its context.
        task, grid, known = self.loaded.task, context.shape[2:], np.asarray(context)
        pad, decoding = self.loaded.assets.vocabulary.pad, task.decoding(grid)
        per_frame = (motions.shape[1] - task.PAST) // (context.shape[1] + frames - 1)
        for number in range(frames):
            count = task.PAST + per_frame * known.shape[1]
            prompts = [
                task.prompt(text, codes, moves[:count], self.corpus)
                for text, codes, moves in zip(instructions, known, motions)
            ]
            tokens, lengths = pad_prompts(prompts, pad, batch_size=len(prompts))
            slots = tokens.shape[1] + decoding.max_new_tokens
            state = self._sampler.prefill(tokens, lengths, slots=slots)
            generated, _ = self._sampler.generate(
                state,
                max_new_tokens=decoding.max_new_tokens,
                allowed=decoding.allowed,
                sampling=sampling,
                key=jax.random.fold_in(jax.random.key(sampling.seed), number),
            )
            imagined = task.parse(np.asarray(generated.tokens)[: len(known), None], grid)
            known = np.concatenate([known, imagined], axis=1)
        return known[:, context.shape[1] :]


def _per_frame(function: Callable[[np.ndarray], np.ndarray], items: np.ndarray) -> np.ndarray:
    """Applies a function of [N, ...] to [B, T, ...]."""
    out = function(items.reshape(-1, *items.shape[2:]))
    return out.reshape(*items.shape[:2], *out.shape[1:])
