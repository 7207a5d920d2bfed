"""World model: frames and an instruction in, the next frames out, alone or after given actions.

    imagine    bos text │ fmt(f0) │ boi "1*h*w" img → h*w codes │ eof eoi boi "1*h*w" img → … │ …
    roll out   bos text │ fmt(v1) fmt(v2) boa a a eoa boi "1*h*w" img → codes │ … │ boa a a eoa …

What stands between frames is fed, only visual codes are sampled, and one key/value cache grows over
all frames: no token is prefilled twice. Source: UniVLA
reference/Emu3/emu3/mllm/processing_emu3.py:527-546.

Axes: B batch, C context frames, N imagined frames or action chunks, T steps of a chunk, A action
dimensions, H/W pixels, h/w code grid.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from univla_jax.episode import Observation
from univla_jax.errors import UserError
from univla_jax.inference.frame_decoding import extend_rows, imagine_moments
from univla_jax.inference.loaded_model import LoadedModel, MakePlacement
from univla_jax.inference.observations import ObservationEncoder
from univla_jax.inference.sampler import Sampler, pad_prompts
from univla_jax.inference.sampling import GREEDY, Sampling
from univla_jax.sequences.tokens import Role
from univla_jax.tasks import TaskRecord, task_class
from univla_jax.tasks.base import FrameTask
from univla_jax.tasks.policy_video import PolicyVideo


@dataclasses.dataclass(frozen=True)
class RollOut:
    """What given actions lead to, as imagined.

    Attributes:
      codes: per camera uint16 [N, h, w] after each chunk, [B, N, h, w] of a batch.
      frames: per camera uint8 [N, H, W, 3], the same as pictures; [B, N, H, W, 3] of a batch.
    """

    codes: Mapping[str, np.ndarray]
    frames: Mapping[str, np.ndarray]


class WorldModel:
    """Imagines frames for many episodes at once.

    Attributes:
      loaded: the model and its assets.
      corpus: whose cameras these are.
      view: the camera of ``imagine``, ``resize``, ``encode`` and ``decode``.
    """

    def __init__(
        self, loaded: LoadedModel, *, corpus: str | None = None, view: str | None = None
    ) -> None:
        """Prepares a loaded model; see ``load``."""
        # A checkpoint may imagine frames by themselves, by given actions, or both; one of the two
        # is enough to be loaded, and the other then says what is missing when it is asked for.
        self._base = loaded
        try:
            model = loaded.select(FrameTask, Role.VISION, "imagining")
        except UserError as error:
            if not any(_follows_actions(record) for record in loaded.tasks):
                raise error from None
            model = self._acted()
        self.corpus = model.record.find_corpus(corpus)
        self.view = view or model.record.views_of(self.corpus)[0]
        self.loaded = self._of_view(model, self.view)
        self._vision = loaded.assets.require("vision")
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
          UserError: no complete checkpoint, changed or missing assets, or a checkpoint that never
            learned frames (a policy's makes garbled ones).
        """
        loaded = LoadedModel.from_checkpoint(
            checkpoint, untrained=untrained, seed=seed, place=place
        )
        return cls(loaded, corpus=corpus, view=view)

    @property
    def frame_spacing(self) -> int:
        """Control steps between two frames of ``imagine``."""
        return self.loaded.record.corpora[self.corpus].frame_spacing

    @property
    def seconds_per_frame(self) -> float:
        """Time between two frames of ``imagine``."""
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
        context: np.ndarray | Mapping[str, np.ndarray],
        frames: int,
        *,
        sampling: Sampling = GREEDY,
        guidance: float = 1.0,
        motions: np.ndarray | None = None,
        block: int | None = None,
    ) -> np.ndarray | dict[str, np.ndarray]:
        """Codes of the next frames.

        No frame is imagined after more moments than the model was trained to see in a row: beyond
        them it goes on from the last half.

        Args:
          instructions: of each episode; "" for none.
          context: integer [B, C, h, w] codes of the given frames of ``view``, oldest first; or all
            cameras together, each by name.
          frames: how many to imagine, N.
          sampling: how codes are sampled; episode i of any batch draws the same.
          guidance: how much more the instruction counts than it would by itself (classifier-free
            guidance against the same frames without instruction); 1 for no guidance.
          motions: float [B, n, A] in physical units, for a task whose frames follow from actions:
            those before, between and behind all frames but the last imagined one. Of the frames
            before an imagined one such a task is shown the latest, as many as in training.
          block: tokens decoded per step, drafts included; the codes are the same. By default as
            many as pay on this platform (``speculative.block_size``), 1 for no drafts.

        Returns:
          uint16 [B, N, h, w], by name where the context is.

        Raises:
          UserError: another number of episodes, codes outside the codebook, or a model that was not
            trained on these cameras together.
        """
        together = isinstance(context, Mapping)
        model = self._together(context) if together else self._alone()
        names = model.record.views_of(self.corpus) if together else (self.view,)
        views = [context[name] for name in names] if together else [context]
        count = len(views[0])
        if len(instructions) != count:
            raise UserError(f"{len(instructions)} instructions for {count} episodes")
        if motions is not None:
            return self._imagine_moving(instructions, context, frames, motions, sampling, block)
        window, task, grids = _window(model), model.task, [view.shape[2:] for view in views]
        known, given = [np.asarray(view) for view in views], views[0].shape[1]
        texts = [*instructions, *([""] * count if guidance != 1 else [])]
        done = 0
        while done < frames:
            shown = min(given, window - 1) if not done else window // 2
            moments = min(frames - done, window - shown)
            rows = [[view[i % count, -shown:] for view in known] for i in range(len(texts))]
            prompts = [task.prompt(text, *row) for text, row in zip(texts, rows)]
            tokens, lengths = pad_prompts(
                prompts, self.loaded.assets.vocabulary.pad, batch_size=len(prompts)
            )
            # All slots of these moments are reserved now: growing the cache later would compile
            # every following call again.
            moment = sum(h * w + len(task.separator((h, w))) for h, w in grids)
            slots = tokens.shape[1] + (moments + 2) * moment
            codes, _ = imagine_moments(
                self._sampler,
                self._sampler.prefill(tokens, lengths, slots=slots),
                task,
                grids,
                moments,
                previous=[np.stack(view)[:, -1] for view in zip(*rows)] if shown else None,
                sampling=sampling,
                guidance=guidance,
                block=block,
                first=done,
            )
            known = [np.append(old, new[:count], axis=1) for old, new in zip(known, codes)]
            done += moments
        imagined = [view[:, given:] for view in known]
        return dict(zip(names, imagined)) if together else imagined[0]

    def _imagine_moving(
        self,
        instructions: Sequence[str],
        context: np.ndarray,
        frames: int,
        motions: np.ndarray,
        sampling: Sampling,
        block: int | None,
    ) -> np.ndarray:
        """``imagine`` where what stands between two frames differs from episode to episode."""
        # The ids of motions differ in number, so each frame is prompted anew with those before it
        # as its context. Those are at most as many as stood before a frame in training: a longer
        # prompt ends at positions that the decoder never saw, and what it draws there is noise.
        task, grid, known = self.loaded.task, context.shape[2:], np.asarray(context)
        pad, slots = self.loaded.assets.vocabulary.pad, 2 * task.frame_decoding(grid).max_new_tokens
        per_frame = (motions.shape[1] - task.PAST) // (context.shape[1] + frames - 1)
        most = _window(self.loaded) - 1
        for number in range(frames):
            first = max(0, known.shape[1] - most)
            moves = motions[:, per_frame * first : task.PAST + per_frame * known.shape[1]]
            prompts = [
                task.prompt(text, codes, own, self.corpus)
                for text, codes, own in zip(instructions, known[:, first:], moves)
            ]
            tokens, lengths = pad_prompts(prompts, pad, batch_size=len(prompts))
            (codes,), _ = imagine_moments(
                self._sampler,
                self._sampler.prefill(tokens, lengths, slots=tokens.shape[1] + slots),
                task,
                [grid],
                previous=[known[:, -1]],
                sampling=sampling,
                block=block,
                first=number,
            )
            known = np.append(known, codes, axis=1)
        return known[:, context.shape[1] :]

    def roll_out(
        self,
        observation: Observation | Sequence[Observation],
        chunks: np.ndarray,
        *,
        sampling: Sampling = GREEDY,
        block: int | None = None,
    ) -> RollOut:
        """Frames that follow given actions.

        The cache grows over as many chunks as the model was trained to see in a row; a longer
        roll-out goes on from its last half.

        Args:
          observation: of all cameras, or one per episode.
          chunks: float [N, T, A] in physical units, [B, N, T, A] for several episodes.
          sampling: how codes are sampled.
          block: as in ``imagine``.

        Raises:
          UserError: the model was not trained to imagine by actions; an observation without a view
            or of another size; chunks of another shape, or not finite.
        """
        model, single = self._acted(), isinstance(observation, Observation)
        observations = [observation] if single else list(observation)
        actions = np.asarray(chunks, np.float32)
        actions = actions[None] if single else actions
        self._check_chunks(model, actions, len(observations))
        codes = self._roll_out(model, observations, actions, sampling, block)
        frames = {view: self.decode(own) for view, own in codes.items()}
        if single:
            return RollOut(
                {v: c[0] for v, c in codes.items()}, {v: f[0] for v, f in frames.items()}
            )
        return RollOut(codes, frames)

    @property
    def chunk_size(self) -> int:
        """Steps T of an action chunk of ``roll_out``.

        Raises:
          UserError: the model was not trained to imagine by actions.
        """
        return self._acted().record.chunk_size

    @property
    def action_views(self) -> tuple[str, ...]:
        """The cameras of ``roll_out``.

        Raises:
          UserError: the model was not trained to imagine by actions.
        """
        return self._acted().record.views_of(self.corpus)

    def _roll_out(
        self,
        model: LoadedModel,
        observations: Sequence[Observation],
        actions: np.ndarray,
        sampling: Sampling,
        block: int | None,
    ) -> dict[str, np.ndarray]:
        """Codes uint16 [B, N, h, w] per camera."""
        record, task = model.record, model.task
        views = record.views_of(self.corpus)
        encoder = ObservationEncoder(model.assets, record, self.corpus)
        for i, observation in enumerate(observations):
            encoder.check(observation, f"observation {i}")
        # moments[v] are the codes [B, 1 + n, h, w] of camera v: seen, then imagined.
        moments = [np.stack(view) for view in zip(*encoder.encode(observations))]
        grids = [view.shape[2:] for view in moments]
        ids = [task.chunk_ids(task.normalize(self.corpus, own)) for own in actions]
        state, shown = None, 0
        for number in range(actions.shape[1]):
            if state is None or shown == record.frames:
                first = max(0, number + 1 - max(1, record.frames // 2))
                prompts = [
                    task.build(
                        observation.instruction,
                        [view[i, first:] for view in moments],
                        ids[i][first:number],
                    ).ids
                    for i, observation in enumerate(observations)
                ]
                tokens, lengths = pad_prompts(
                    prompts, model.assets.vocabulary.pad, batch_size=len(prompts)
                )
                shown = number + 1 - first
                slots = record.sequence_length + sum(h * w for h, w in grids)
                state = self._sampler.prefill(tokens, lengths, slots=slots)
                fed = [task.outcome(own[number], grids[0]) for own in ids]
            else:
                fed = [
                    np.append(task.next_action, task.outcome(own[number], grids[0])) for own in ids
                ]
            state = extend_rows(self._sampler, state, fed)
            codes, state = imagine_moments(
                self._sampler,
                state,
                task,
                grids,
                previous=[view[:, -1] for view in moments],
                sampling=sampling,
                block=block,
                first=number,
            )
            moments = [np.append(old, new, axis=1) for old, new in zip(moments, codes)]
            shown += 1
        return {view: codes[:, 1:] for view, codes in zip(views, moments)}

    def _check_chunks(self, model: LoadedModel, actions: np.ndarray, count: int) -> None:
        size = model.record.chunk_size
        width = model.statistics(self.corpus).action_dim
        if actions.ndim != 4 or actions.shape[0] != count or not actions.shape[1]:
            raise UserError(f"chunks of shape {list(actions.shape)} for {count} episodes")
        if actions.shape[2:] != (size, width):
            raise UserError(
                f"chunks of {actions.shape[2]} steps and {actions.shape[3]} dimensions; the model "
                f"was trained on {size} and {width}"
            )
        if not np.isfinite(actions).all():
            raise UserError("chunks with values that are not finite")

    # The tasks of the checkpoint that make frames.

    def _acted(self) -> LoadedModel:
        """The model as a video policy that learned frames."""
        model = self._base.select(
            PolicyVideo, Role.VISION, "imagining what given actions do", moments=2
        )
        if model.record.state:
            raise UserError(
                f"{model.folder} was shown proprioceptive states, which imagined moments do not "
                "have; train the frames of a task without data.state"
            )
        return model

    def _alone(self) -> LoadedModel:
        """The model as a world model of one camera."""
        self._base.select(FrameTask, Role.VISION, "imagining frames without actions")
        if self.loaded.record.views_together:
            views = ", ".join(self.loaded.record.views_of(self.corpus))
            raise UserError(
                f"{self.loaded.folder} imagines the cameras {views} together; give the codes of "
                "each by name"
            )
        return self.loaded

    def _of_view(self, model: LoadedModel, view: str) -> LoadedModel:
        """The model as a world model of this camera, rather alone than with others."""
        records = _same_task(self._base, model)
        known = dict.fromkeys(v for record in records for v in record.views_of(self.corpus))
        fitting = [record for record in records if view in record.views_of(self.corpus)]
        if not fitting:
            raise UserError(
                f"{model.folder} was not trained on view {view!r}, only on {', '.join(known)}"
            )
        return model.with_record(min(fitting, key=lambda r: r.views_together))

    def _together(self, context: Mapping[str, np.ndarray]) -> LoadedModel:
        """The model as a world model of these cameras together."""
        model = self._base.select(FrameTask, Role.VISION, "imagining frames without actions")
        for record in _same_task(self._base, model):
            if record.views_together and set(record.views_of(self.corpus)) == set(context):
                return model.with_record(record)
        raise UserError(
            f"{model.folder} was not trained on the views {', '.join(sorted(context))} together; "
            "train the task 'world_model' with views_together=True"
        )


def _follows_actions(record: TaskRecord) -> bool:
    """Whether a task learned the frames behind given actions."""
    is_video = issubclass(task_class(record.task), PolicyVideo)
    return is_video and record.learned(Role.VISION) and record.frames > 1


def _same_task(loaded: LoadedModel, model: LoadedModel) -> list[TaskRecord]:
    """The records of ``loaded`` that are of the same task as ``model``'s."""
    return [record for record in loaded.tasks if record.task == model.record.task]


def _window(model: LoadedModel) -> int:
    """The most moments in a row that the model was trained on.

    Raises:
      UserError: none follows another.
    """
    if model.record.frames < 2:
        raise UserError(
            f"{model.folder} was trained on single frames, so none follows another; train with "
            "data.frames of at least 2"
        )
    return model.record.frames


def _per_frame(function: Callable[[np.ndarray], np.ndarray], items: np.ndarray) -> np.ndarray:
    """Applies a function of [N, ...] to [B, T, ...]."""
    out = function(items.reshape(-1, *items.shape[2:]))
    return out.reshape(*items.shape[:2], *out.shape[1:])
