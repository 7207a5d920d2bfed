"""How a policy turns prompts into normalised actions: by choosing tokens, or by following a flow.

Axes: B robots, S prompt tokens, T steps of a chunk, A action dimensions, D model.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from univla_jax.errors import UserError
from univla_jax.inference.buckets import length_bucket, pad_prompts
from univla_jax.inference.continuer import Continuer, Rules
from univla_jax.inference.flow import sample_actions
from univla_jax.inference.forms import Form
from univla_jax.inference.int8 import restored
from univla_jax.inference.memory import Memory
from univla_jax.inference.sampler import Sampler
from univla_jax.inference.session import Session
from univla_jax.inference.stopwatch import Stopwatch
from univla_jax.inference.trained import TrainedModel
from univla_jax.models.action_expert import ActionExpert
from univla_jax.models.decoder import Decoder
from univla_jax.tokenizers.decoded import DecodedActions, invalid


@dataclasses.dataclass(frozen=True)
class HeadAnswer:
    """What a head says about one robot.

    Attributes:
      decoded: normalised actions float64 [T, A], valid or not.
      ids: int32 [n], what the history keeps as this chunk's action.
      memory: what the cache holds now, or None.
      steered: how many ids are not the likeliest, because those would make no whole chunk.
    """

    decoded: DecodedActions
    ids: np.ndarray
    memory: Memory | None = None
    steered: int = 0


class ActionHead(Protocol):
    """What a policy needs of a head."""

    def answer(
        self, prompts: Sequence[np.ndarray], sessions: Sequence[Session], stopwatch: Stopwatch
    ) -> list[HeadAnswer]:
        """One answer per prompt, int32 [n] each, of the sessions in the same order."""
        ...

    def prepare(self, lengths: Sequence[int], rows: int | None) -> None:
        """Told once: new tokens of the usual calls, and the rows of every batch if fixed."""
        ...

    def warm(self, rows: int) -> None:
        """Compiles what calls with ``rows`` rows use."""
        ...

    def worth_reading(self, prefix: np.ndarray, session: Session) -> bool:
        """Whether reading the beginning of a session's next prompt now would save time then."""
        ...

    def read_ahead(self, prefixes: Sequence[np.ndarray], sessions: Sequence[Session]) -> None:
        """Reads the beginnings of the next prompts."""
        ...


class TokenHead:
    """Greedy action ids up to eoa, decoded by the checkpoint's action tokenizer.

    The grammar of FAST and of bins leaves nothing but whole chunks; how often it had to overrule
    the model is counted. What does not decode to a whole chunk all the same is not valid.

    Attributes:
      rules: what may be generated.
      continuer: reads and chooses.
    """

    def __init__(
        self,
        trained: TrainedModel,
        chunk: tuple[int, int],
        *,
        max_new_tokens: int | None = None,
        draft: int = 0,
        free_form: bool = False,
    ) -> None:
        """Takes the tokenizer of a checkpoint.

        Args:
          trained: the model and its assets.
          chunk: T and A.
          max_new_tokens: the most ids of a chunk, its eoa included; by default what the longest
            legal chunk needs.
          draft: tokens read per step when guessing from the chunk before, 0 for one at a time.
          free_form: any action ids in any order, as the reference has it.
        """
        vocabulary, tokenizer = trained.assets.vocabulary, trained.assets.require("action")
        self._vocabulary, self._tokenizer, self._chunk = vocabulary, tokenizer, chunk
        longest = tokenizer.max_tokens(*chunk) + 1
        codes = vocabulary.action_ids(np.arange(tokenizer.vocabulary_size))
        grammar = None if free_form else tokenizer.grammar(*chunk)
        form = None if grammar is None else Form.of(grammar, codes, vocabulary.eoa)
        allowed = np.append(codes, vocabulary.eoa)
        count = max_new_tokens or longest
        self.rules = Rules(allowed, vocabulary.eoa, count, form=form, draft=draft)
        self._sampler = Sampler(trained.model, trained.params)

    def prepare(self, lengths: Sequence[int], rows: int | None) -> None:
        """Fixes the shapes; see ``Continuer``."""
        self.continuer = Continuer(self._sampler, self.rules, lengths=lengths, rows=rows)

    def answer(
        self, prompts: Sequence[np.ndarray], sessions: Sequence[Session], stopwatch: Stopwatch
    ) -> list[HeadAnswer]:
        """See ``ActionHead``."""
        memories = [session.memory for session in sessions]
        for session in sessions:
            session.memory = None  # the call consumes it
        before = [session.last_ids for session in sessions]
        answers = self.continuer.answer(prompts, memories, copied=before, stopwatch=stopwatch)
        return [HeadAnswer(self.decode(a.ids), a.ids, a.memory, a.steered) for a in answers]

    def decode(self, ids: np.ndarray) -> DecodedActions:
        """The chunk that generated ids [n] mean, their eoa included."""
        if not len(ids) or ids[-1] != self._vocabulary.eoa:
            return invalid(f"no end of action within {len(ids)} tokens", *self._chunk)
        codes = self._vocabulary.action_codes(ids[:-1]).tolist()
        return self._tokenizer.decode(codes, *self._chunk)

    def warm(self, rows: int) -> None:
        """See ``ActionHead``."""
        self.continuer.warm(rows)

    def worth_reading(self, prefix: np.ndarray, session: Session) -> bool:
        """See ``ActionHead``."""
        return self.continuer.worth_reading(prefix, session.memory)

    def read_ahead(self, prefixes: Sequence[np.ndarray], sessions: Sequence[Session]) -> None:
        """See ``ActionHead``."""
        for session, memory in zip(sessions, self.continuer.read_ahead(prefixes)):
            session.memory = memory


class FlowHead:
    """Actions from noise through the action expert, which reads the prompt's hidden states.

    The noise of a robot depends on its session's seed and number of chunks alone, so that a batch
    gives what each robot gets alone.
    """

    def __init__(
        self,
        trained: TrainedModel,
        expert: ActionExpert,
        params: Any,
        chunk: tuple[int, int],
        *,
        steps: int = 20,
    ) -> None:
        """Takes an expert trained on top of a decoder.

        Args:
          trained: the decoder and its assets.
          expert: the expert.
          params: its parameters.
          chunk: T and A.
          steps: Euler steps from noise to actions.
        """
        self._trained, self._expert, self._params = trained, expert, params
        self._chunk, self._steps = chunk, steps

    def prepare(self, lengths: Sequence[int], rows: int | None) -> None:
        """Fixes the rows of every batch; prompts are padded to a bucket."""
        self._rows, self._usual = rows, lengths[1:]

    def answer(
        self, prompts: Sequence[np.ndarray], sessions: Sequence[Session], stopwatch: Stopwatch
    ) -> list[HeadAnswer]:
        """See ``ActionHead``; the history keeps an eoa, since there are no action ids."""
        trained = self._trained
        tokens, lengths = pad_prompts(prompts, trained.assets.vocabulary.pad, rows=self._rows)
        with stopwatch.part("read") as results:
            hidden = _hidden(trained.model, trained.params, tokens)
            results.append(hidden)
        with stopwatch.part("write") as results:
            seeds = [(s.seed, s.chunks) for s in sessions]
            seeds += seeds[:1] * (len(tokens) - len(seeds))
            noise = jnp.stack([_noise(*seed, self._chunk) for seed in seeds])
            actions = sample_actions(
                self._expert, self._params, hidden, noise, steps=self._steps, lengths=lengths
            )
            results.append(actions)
        closing = np.array([trained.assets.vocabulary.eoa], np.int32)
        rows = np.asarray(actions, np.float64)[: len(prompts)]
        return [HeadAnswer(self._checked(row), closing) for row in rows]

    def warm(self, rows: int) -> None:
        """Compiles the buckets of the usual prompts; the flow has no cache to fix shapes by."""
        session = Session(history=None)
        for length in sorted({length_bucket(length) for length in self._usual}):
            prompt = np.full(length, self._trained.assets.vocabulary.bos, np.int32)
            self.answer([prompt] * rows, [session] * rows, Stopwatch())

    def worth_reading(self, prefix: np.ndarray, session: Session) -> bool:
        """Never: the expert reads all hidden states anew."""
        del prefix, session
        return False

    def read_ahead(self, prefixes: Sequence[np.ndarray], sessions: Sequence[Session]) -> None:
        """There is nothing to read."""

    def _checked(self, actions: np.ndarray) -> DecodedActions:
        if not np.isfinite(actions).all():
            return invalid("the flow left the finite numbers", *self._chunk)
        return DecodedActions(np.clip(actions, -1, 1))


def head_of(trained: TrainedModel, chunk: tuple[int, int], **options: Any) -> ActionHead:
    """The head that a checkpoint was trained for.

    Args:
      trained: the model and its assets.
      chunk: T and A.
      **options: of ``TokenHead``.

    Raises:
      UserError: the layout needs an action expert and there is none.
    """
    if trained.layout.layout != "policy_flow":
        return TokenHead(trained, chunk, **options)
    if trained.expert is None:
        raise UserError(
            f"{trained.folder} is of the layout 'policy_flow', but has no action expert; take a "
            "checkpoint that has one"
        )
    if options.get("draft"):
        raise UserError("draft: guesses tokens, but the action expert writes none; leave it at 0")
    return FlowHead(trained, trained.expert, trained.expert_params, chunk)


@functools.partial(jax.jit, static_argnames="model")
def _hidden(model: Decoder, params: Any, tokens: jax.Array) -> jax.Array:
    """Hidden states [B, S, D]; what stands behind a row's end is not seen by the expert."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    params = restored(params, model.config.compute_dtype)
    return model.apply({"params": params}, tokens, positions)[0]


def _noise(seed: int, number: int, shape: tuple[int, int]) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(seed), number)
    return jax.random.normal(key, shape)
