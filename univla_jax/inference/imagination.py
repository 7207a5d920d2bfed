"""The world model: given frames and an instruction in, the next frames out.

    bos text │ fmt(f0) │ boi "1*h*w" img → h*w codes │ eof eoi boi "1*h*w" img → h*w codes │ …

The structure is fed, only visual codes are chosen, and one cache grows over all frames: no token
is read twice. Source: processing_emu3.py:527-546 of UniVLA reference/Emu3.

Axes: B episodes, C context frames, N imagined frames, H/W pixels, h/w code grid.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from univla_jax.errors import UserError
from univla_jax.inference.loaded_model import LoadedModel
from univla_jax.inference.sampler import Sampler, pad_prompts
from univla_jax.inference.sampling import GREEDY, Sampling
from univla_jax.sequences.frames import frame_separator
from univla_jax.sequences.prompts import imagine_prompt


class WorldModel:
    """Imagines frames of one camera for many episodes at once.

    Attributes:
      trained: the model and its assets.
      corpus: row whose camera it is.
      view: the camera.
    """

    def __init__(
        self, trained: LoadedModel, *, corpus: str | None = None, view: str | None = None
    ) -> None:
        """Prepares a loaded model; see ``load``."""
        trained.require_layout(("world_model",), "imagining")
        layout = trained.layout
        self.trained = trained
        self.corpus = layout.corpus(corpus)
        self.view = view or layout.views[0]
        self._vision = trained.assets.require("vision")
        if self.view not in layout.views or self.view not in trained.assets.image_specs:
            raise UserError(
                f"{trained.folder} was not trained on view {view!r}, only on "
                f"{', '.join(layout.views)}"
            )
        self._sampler = Sampler(trained.model, trained.params)
        vocabulary = trained.assets.vocabulary
        self._visual = vocabulary.visual_ids(np.arange(vocabulary.visual_size))

    @classmethod
    def load(
        cls,
        checkpoint: str | pathlib.Path,
        *,
        corpus: str | None = None,
        view: str | None = None,
        untrained: bool = False,
        seed: int = 0,
    ) -> WorldModel:
        """Loads a checkpoint folder and nothing else.

        Args:
          checkpoint: a folder ``checkpoints/<step>``, or the workdir whose newest one is taken.
          corpus: row whose camera it is; the only one by default.
          view: the camera; the first one trained on by default.
          untrained: random parameters instead of the saved ones, as a baseline.
          seed: of the random parameters.

        Raises:
          UserError: no complete checkpoint, changed or missing assets, or a checkpoint that is no
            world model (a policy's makes garbled frames).
        """
        trained = LoadedModel.from_checkpoint(checkpoint, untrained=untrained, seed=seed)
        return cls(trained, corpus=corpus, view=view)

    @property
    def frame_spacing(self) -> int:
        """Control steps between two frames."""
        return self.trained.layout.corpora[self.corpus].frame_spacing

    @property
    def seconds_per_frame(self) -> float:
        """Time between two frames."""
        return self.frame_spacing / self.trained.layout.corpora[self.corpus].control_hz

    def resize(self, frames: np.ndarray) -> np.ndarray:
        """Camera frames uint8 [N, H, W, 3] at the size the tokenizer sees."""
        return self.trained.assets.image_specs[self.view].resize(frames)

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
    ) -> np.ndarray:
        """Codes of the next frames.

        Args:
          instructions: the task of each episode; "" for none.
          context: integer [B, C, h, w] codes of the given frames, oldest first.
          frames: how many to imagine, N.
          sampling: how codes are chosen; episode i of any batch draws the same.
          guidance: how much more the instruction counts than it would by itself (classifier-free
            guidance against the same frames without instruction); 1 for no guidance.

        Returns:
          uint16 [B, N, h, w].

        Raises:
          UserError: another number of episodes, or codes outside the codebook.
        """
        if len(instructions) != len(context):
            raise UserError(f"{len(instructions)} instructions for {len(context)} episodes")
        text_encoder, grid = self.trained.text_encoder, context.shape[2:]
        between = frame_separator(text_encoder, *grid)
        prompts = [imagine_prompt(text_encoder, t, c) for t, c in zip(instructions, context)]
        if guidance != 1:
            prompts += [imagine_prompt(text_encoder, "", c) for c in context]
        tokens, lengths = pad_prompts(prompts, text_encoder.vocabulary.pad, batch_size=len(prompts))
        size = int(np.prod(grid))
        slots = tokens.shape[1] + frames * (size + len(between))
        state = self._sampler.prefill(tokens, lengths, slots=slots)
        imagined = []
        for number in range(frames):
            if number:
                state = self._sampler.extend(state, np.tile(between, (len(prompts), 1)))
            generated, state = self._sampler.generate(
                state,
                max_new_tokens=size,
                allowed=self._visual,
                sampling=sampling,
                key=jax.random.fold_in(jax.random.key(sampling.seed), number),
                guidance=guidance,
            )
            imagined.append(np.asarray(generated.tokens)[: len(context)])
        codes = text_encoder.vocabulary.visual_codes(np.stack(imagined, 1))
        return codes.reshape(len(context), frames, *grid).astype(np.uint16)


def _per_frame(function, items: np.ndarray) -> np.ndarray:
    """Applies a function of [N, ...] to [B, T, ...]."""
    out = function(items.reshape(-1, *items.shape[2:]))
    return out.reshape(*items.shape[:2], *out.shape[1:])
