"""Judge: an observation and an instruction in, how likely and how soon it will be done out.

Axes: B observations, K values.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np

from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.episode import Observation
from univla_jax.inference.loaded_model import LoadedModel
from univla_jax.inference.observations import ObservationEncoder
from univla_jax.inference.sampler import Sampler, pad_prompts
from univla_jax.sequences.tokens import Role
from univla_jax.tasks.value import Judgement, Value

_BATCH = 32  # moments of an episode judged together


class Judge:
    """Judges moments of several episodes at once.

    Attributes:
      loaded: the model and its assets.
      corpus: whose cameras these are.
    """

    def __init__(self, loaded: LoadedModel, *, corpus: str | None = None) -> None:
        """Prepares a loaded model; see ``load``."""
        self.loaded = loaded.select(Value, Role.VALUE, "judging")
        self.corpus = self.loaded.record.find_corpus(corpus)
        self._encoder = ObservationEncoder(loaded.assets, self.loaded.record, self.corpus)
        self._sampler = Sampler(loaded.model, loaded.params, placement=loaded.placement)

    @classmethod
    def load(cls, checkpoint: str | pathlib.Path, *, corpus: str | None = None) -> Judge:
        """Loads a checkpoint folder and nothing else.

        Args:
          checkpoint: a folder ``checkpoints/<step>``, or the workdir whose newest one is taken.
          corpus: whose cameras these are; the only one by default.

        Raises:
          UserError: no complete checkpoint, changed or missing assets, or a checkpoint that was not
            trained on the task "value".
        """
        return cls(LoadedModel.from_checkpoint(checkpoint), corpus=corpus)

    @property
    def seconds_per_chunk(self) -> float:
        """Time that one chunk of ``Judgement.chunks`` takes."""
        record = self.loaded.record
        return record.chunk_size / record.corpora[self.corpus].control_hz

    def judge(self, observations: Sequence[Observation]) -> list[Judgement]:
        """What the model says about each observation and its instruction.

        Raises:
          UserError: an observation without a view, or with a frame of another size.
        """
        for i, observation in enumerate(observations):
            self._encoder.check(observation, f"observation {i}")
        instructions = [observation.instruction for observation in observations]
        return self.judge_codes(instructions, self._encoder.encode(observations))

    def judge_codes(
        self,
        instructions: Sequence[str],
        views: Sequence[Sequence[np.ndarray]],
        chunks: Sequence[np.ndarray] | None = None,
    ) -> list[Judgement]:
        """What the model says about moments whose frames are encoded already.

        Args:
          instructions: of each moment.
          views: per moment and camera integer [N, h, w] codes, of the moment and of those before.
          chunks: per moment float [N - 1, T, A], what was executed between them in physical units;
            None where no earlier moments are shown.
        """
        task, ids = self.loaded.task, [[]] * len(views)
        if chunks is not None:
            ids = [task.chunk_ids(task.normalize(self.corpus, own)) for own in chunks]
        return self._judge([task.build(*parts).ids for parts in zip(instructions, views, ids)])

    def judge_episode(self, episode: TokenizedEpisode) -> list[Judgement]:
        """What the model says about every step of a stored episode.

        It sees the frames of the step and, as in training, earlier ones with the actions between.
        """
        task, found = self.loaded.task, []
        # Every batch has the same shape, so that one program serves all episodes.
        for start in range(0, len(episode), _BATCH):
            steps = list(range(start, min(start + _BATCH, len(episode))))
            filled = steps + steps[:1] * (_BATCH - len(steps))
            prompts = [task.prompt(episode, step) for step in filled]
            found += self._judge(prompts)[: len(steps)]
        return found

    def _judge(self, prompts: Sequence[np.ndarray]) -> list[Judgement]:
        """Judgements at the ends of prompts."""
        tokens, lengths = pad_prompts(prompts, self.loaded.assets.vocabulary.pad)
        state = self._sampler.prefill(tokens, lengths)
        probabilities = np.exp(self._sampler.next_log_probs(state, self.loaded.task.ids))
        return self.loaded.task.parse(probabilities[: len(prompts)])
