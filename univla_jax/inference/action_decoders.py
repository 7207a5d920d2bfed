"""Action decoders: from prompts to normalized action chunks, by tokens or by flow matching.

Axes: B batch, S sequence, T steps of a chunk, A action dimensions, D model.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from univla_jax.episode import ActionChunk
from univla_jax.errors import UserError
from univla_jax.inference.loaded_model import LoadedModel
from univla_jax.inference.memory import device_bytes
from univla_jax.inference.prefix_cache import CachedPrefix, GenerationRules, PrefixCache
from univla_jax.inference.sampler import Sampler, Timer, length_bucket, pad_prompts
from univla_jax.inference.sampling import GREEDY, GrammarMask, Sampling
from univla_jax.models.action_expert import ActionExpert
from univla_jax.models.decoder import Decoder
from univla_jax.models.quantized_weights import dequantize_params
from univla_jax.tasks.base import Decoding
from univla_jax.tasks.chain_of_thought import ChainOfThought
from univla_jax.tasks.history import EpisodeLog, History
from univla_jax.tokenizers.constrained import DecodedActions
from univla_jax.tokenizers.continuations import Continuations


@dataclasses.dataclass(eq=False)
class Session:
    """State of one episode between calls; made by ``Policy.start``, changed by ``Policy.act``.

    Attributes:
      log: what was observed and executed.
      seed: of whatever is drawn for this episode.
      instruction: of the last call; another one empties the log.
      history: observations and actions of the last prompt, and its answer.
      chunks: number of chunks predicted.
      invalid: how many of them did not decode.
      last_action: float32 [A], the last one executed, or the last of the last chunk.
      last_ids: int32 [n], what the last chunk was decoded from.
      returned: float32 [N, A] actions that the last call answered; they count as executed unless
        ``executed`` says otherwise.
      executed: float32 [N, A] actions that were executed since the last call instead.
      cached_prefix: keys and values of the last prompt and chunk; only saves time.
    """

    log: EpisodeLog
    seed: int = 0
    instruction: str | None = None
    history: History = dataclasses.field(default_factory=History)
    chunks: int = 0
    invalid: int = 0
    last_action: np.ndarray | None = None
    last_ids: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    returned: np.ndarray | None = None
    executed: np.ndarray | None = None
    cached_prefix: CachedPrefix | None = None

    def key(self) -> jax.Array:
        """The random key of the next chunk, the same in any batch."""
        return jax.random.fold_in(jax.random.key(self.seed), self.chunks)

    def present_log(self, instruction: str | None = None) -> EpisodeLog:
        """The log with what was executed since the last call; empty for another instruction."""
        if None not in (instruction, self.instruction) and instruction != self.instruction:
            return EpisodeLog(self.log.window, self.log.chunk_size)
        executed = self.returned if self.executed is None else self.executed
        return self.log if executed is None else self.log.execute(executed)

    def update(
        self,
        instruction: str,
        log: EpisodeLog,
        history: History,
        chunk: ActionChunk,
        cached_prefix: CachedPrefix | None,
    ) -> None:
        """Keeps a call that succeeded; log and history hold its observation and ids."""
        self.log, self.history, self.instruction = log, history, instruction
        self.cached_prefix = cached_prefix
        self.last_ids = history.actions[-1]
        self.chunks += 1
        self.invalid += not chunk.valid
        self.set_returned(chunk.actions)

    def set_returned(self, actions: np.ndarray) -> None:
        """What the caller was told to execute, float32 [N, A]."""
        self.returned, self.executed = actions, None
        if len(actions):
            self.last_action = actions[-1]

    def set_executed(self, executed: int | np.ndarray) -> None:
        """What was executed since the last call, where it is not what that call answered.

        Args:
          executed: how many of the actions answered, or the actions themselves [N, A].

        Raises:
          UserError: more actions than were answered, or actions of another shape.
        """
        returned = np.zeros((0, 0), np.float32) if self.returned is None else self.returned
        if isinstance(executed, int):
            if not 0 <= executed <= len(returned):
                raise UserError(
                    f"{executed} actions executed since the last call, which answered "
                    f"{len(returned)}; give their number, or the actions themselves"
                )
            executed = returned[:executed]
        elif executed.ndim != 2 or (len(returned) and executed.shape[1] != returned.shape[1]):
            raise UserError(
                f"executed actions of shape {list(executed.shape)}, expected "
                f"[N, {returned.shape[1]}]"
            )
        self.executed = np.asarray(executed, np.float32)
        if len(self.executed):
            self.last_action = self.executed[-1]


@dataclasses.dataclass(frozen=True)
class ActionPrediction:
    """The chunk predicted for one prompt.

    Attributes:
      decoded: normalized actions float64 [T, A], valid or not.
      ids: int32 [n], what the history keeps as this chunk's action.
      cached_prefix: keys and values of prompt and ids, or None.
      num_overridden: ids that are not the likeliest, because those would make no whole chunk.
    """

    decoded: DecodedActions
    ids: np.ndarray
    cached_prefix: CachedPrefix | None = None
    num_overridden: int = 0


class ActionDecoder(Protocol):
    """What a policy needs of an action decoder.

    Attributes:
      max_action_tokens: the most ids that a chunk takes in the history.
    """

    max_action_tokens: int

    def memory(self, batch_size: int) -> tuple[int, int, int]:
        """Bytes per device of the weights, of one robot's cache, and of a call's caches."""
        ...

    def predict(
        self, prompts: Sequence[np.ndarray], sessions: Sequence[Session], timer: Timer
    ) -> list[ActionPrediction]:
        """One prediction per prompt, int32 [n] each, of the sessions in the same order."""
        ...

    def set_shapes(self, lengths: Sequence[int], batch_size: int | None) -> None:
        """Called once: new tokens of the usual calls, and the batch size where it is fixed."""
        ...

    def warmup(self, batch_size: int) -> None:
        """Compiles what a call with ``batch_size`` robots uses."""
        ...

    def should_prefill(self, prefix: np.ndarray, session: Session) -> bool:
        """Whether prefilling the beginning of a session's next prompt now would save time then."""
        ...

    def prefill_ahead(self, prefixes: Sequence[np.ndarray], sessions: Sequence[Session]) -> None:
        """Prefills the beginnings of the next prompts."""
        ...


class TokenActionDecoder:
    """Action ids up to eoa, parsed by the task with the checkpoint's action tokenizer.

    The grammar of FAST and of bins allows nothing but whole chunks; how often it had to override
    the model is counted. What does not decode to a whole chunk all the same is not valid.

    Attributes:
      rules: what may be generated.
      prefix_cache: completes prompts.
      max_action_tokens: see ``ActionDecoder``.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        shape: tuple[int, int],
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling = GREEDY,
        block: int | None = None,
        free_form: bool = False,
    ) -> None:
        """Takes the decoding rules of the checkpoint's task.

        Args:
          loaded: the model and its assets.
          shape: T and A of a chunk.
          max_new_tokens: the most ids of a chunk, its eoa included; by default what the longest
            legal chunk needs.
          sampling: how ids are chosen; draws depend on a session's seed and number of chunks.
          block: tokens decoded per step; by default as many as pay.
          free_form: any action ids in any order, as the reference has it.
        """
        self._task, self._shape = loaded.task, shape
        decoding = loaded.task.decoding(
            shape, free_form=free_form, max_new_tokens=max_new_tokens or 0
        )
        grammar = None
        if decoding.grammar is not None:
            codes = decoding.allowed[decoding.allowed != decoding.stop_id]
            grammar = GrammarMask.from_grammar(decoding.grammar, codes, decoding.stop_id)
        self.rules = GenerationRules(
            decoding.allowed,
            decoding.stop_id,
            decoding.max_new_tokens,
            sampling=sampling,
            grammar=grammar,
            block=block,
        )
        self.max_action_tokens = decoding.max_new_tokens
        self._sampler = Sampler(loaded.model, loaded.params, placement=loaded.placement)
        # Of the training set; else learned from what is chosen.
        self._continuations = loaded.assets.continuations or Continuations()

    def set_shapes(self, lengths: Sequence[int], batch_size: int | None) -> None:
        """Fixes the shapes; see ``PrefixCache``."""
        self.prefix_cache = PrefixCache(
            self._sampler,
            self.rules,
            usual_lengths=lengths,
            batch_size=batch_size,
            continuations=self._continuations,
        )

    def predict(
        self, prompts: Sequence[np.ndarray], sessions: Sequence[Session], timer: Timer
    ) -> list[ActionPrediction]:
        """See ``ActionDecoder``."""
        # The caches are donated to the call, which writes into them in place: a session must not
        # keep one that may be gone when the call fails half-way.
        cached_prefixes = [session.cached_prefix for session in sessions]
        for session in sessions:
            session.cached_prefix = None
        keys = None if self.rules.sampling.greedy else [session.key() for session in sessions]
        completions = self.prefix_cache.complete(prompts, cached_prefixes, keys=keys, timer=timer)
        return [
            ActionPrediction(
                self._task.parse(c.ids, self._shape), c.ids, c.cached_prefix, c.num_overridden
            )
            for c in completions
        ]

    def memory(self, batch_size: int) -> tuple[int, int, int]:
        """See ``ActionDecoder``."""
        # A call holds the caches of its robots twice: one by one, as they were kept, and stacked.
        stacked = self.prefix_cache.cache_bytes(batch_size)
        return self._sampler.num_bytes, self.prefix_cache.cache_bytes(), 2 * stacked

    def warmup(self, batch_size: int) -> None:
        """See ``ActionDecoder``."""
        self.prefix_cache.warmup(batch_size)

    def should_prefill(self, prefix: np.ndarray, session: Session) -> bool:
        """See ``ActionDecoder``."""
        return self.prefix_cache.should_prefill(prefix, session.cached_prefix)

    def prefill_ahead(self, prefixes: Sequence[np.ndarray], sessions: Sequence[Session]) -> None:
        """See ``ActionDecoder``."""
        for session, cached_prefix in zip(sessions, self.prefix_cache.prefill_ahead(prefixes)):
            session.cached_prefix = cached_prefix


class ThoughtActionDecoder(TokenActionDecoder):
    """A thought in words and coordinates, then the action ids behind it.

    The prompt ends with bot. A thought that does not end by itself is ended, and the chunk is
    predicted all the same.

    Attributes:
      thoughts: of the last call, one text per prompt.
    """

    def __init__(self, loaded: LoadedModel, shape: tuple[int, int], **options: Any) -> None:
        """As ``TokenActionDecoder``, without drafts.

        Raises:
          UserError: a block of drafts.
        """
        if (options.get("block") or 1) > 1:
            raise UserError("block: drafts no thoughts; leave it unset")
        super().__init__(loaded, shape, **options)
        self._thought: Decoding = loaded.task.thought_decoding
        self.thoughts: list[str] = []

    def set_shapes(self, lengths: Sequence[int], batch_size: int | None) -> None:
        """Fixes the shapes of prompts."""
        super().set_shapes(lengths, batch_size)
        self._usual_lengths, self._batch_size = lengths, batch_size

    def predict(
        self, prompts: Sequence[np.ndarray], sessions: Sequence[Session], timer: Timer
    ) -> list[ActionPrediction]:
        """See ``ActionDecoder``; no prefix is kept between calls."""
        vocabulary, rules, sampler = self._task.vocabulary, self.rules, self._sampler
        tokens, lengths = pad_prompts(prompts, vocabulary.pad, batch_size=self._batch_size)
        keys = None
        if not rules.sampling.greedy:
            drawn = [session.key() for session in sessions]
            keys = jnp.stack([*drawn, *drawn[:1] * (len(tokens) - len(drawn))])
        slots = tokens.shape[1] + self._thought.max_new_tokens + 2 + rules.max_new_tokens
        with timer.section("prefill") as results:
            state = sampler.prefill(tokens, lengths, slots=slots)
            results.append(state.batch)
        with timer.section("decode"):
            thought, state = sampler.generate(
                state,
                max_new_tokens=self._thought.max_new_tokens,
                allowed=self._thought.allowed,
                stop_id=self._thought.stop_id,
                sampling=rules.sampling,
                key=keys,
            )
            # Rows end their thoughts at different places. Behind one that ended with eot only boa
            # is fed; one that ran out of tokens gets eot and boa. Unequal lengths keep the rows of
            # a batch apart from here on, and each chunk begins where its own thought ended.
            ids, counts = np.asarray(thought.tokens), np.asarray(thought.lengths)
            ended = np.array([row[n - 1] == vocabulary.eot for row, n in zip(ids, counts)])
            begun = np.where(
                ended[:, None], [vocabulary.boa, vocabulary.pad], [vocabulary.eot, vocabulary.boa]
            )
            state = sampler.extend(state, begun.astype(np.int32), np.where(ended, 1, 2))
            chunk, state = sampler.generate(
                state,
                max_new_tokens=rules.max_new_tokens,
                allowed=rules.allowed,
                stop_id=rules.stop_id,
                sampling=rules.sampling,
                key=keys,
                grammar=rules.grammar,
            )
        decode = self._task.text_encoder.decode_places
        self.thoughts = [decode(row[: n - int(end)]) for row, n, end in zip(ids, counts, ended)][
            : len(prompts)
        ]
        rows = zip(
            np.asarray(chunk.tokens), np.asarray(chunk.lengths), np.asarray(chunk.num_overridden)
        )
        return [
            ActionPrediction(self._task.parse(row[:n], self._shape), row[:n], None, int(overridden))
            for row, n, overridden in list(rows)[: len(prompts)]
        ]

    def warmup(self, batch_size: int) -> None:
        """Compiles what a call with ``batch_size`` prompts of the usual lengths uses."""
        for length in sorted(set(self._usual_lengths[1:])):
            prompt = np.full(length, self._task.vocabulary.bos, np.int32)
            sessions = [Session(EpisodeLog(1, self._shape[0])) for _ in range(batch_size)]
            self.predict([prompt] * batch_size, sessions, Timer())

    def should_prefill(self, prefix: np.ndarray, session: Session) -> bool:
        """Never: no prefix is kept."""
        del prefix, session
        return False


class FlowActionDecoder:
    """Actions from noise through the action expert, which attends to the prompt's hidden states.

    The noise of a robot depends on its session's seed and number of chunks alone, so that a batch
    gives what each robot gets alone.

    Attributes:
      max_action_tokens: see ``ActionDecoder``; the eoa that closes a chunk in the history.
    """

    max_action_tokens = 1

    def __init__(self, loaded: LoadedModel, shape: tuple[int, int], *, steps: int = 20) -> None:
        """Takes an expert trained on top of a decoder.

        Args:
          loaded: decoder, expert and assets.
          shape: T and A of a chunk.
          steps: Euler steps from noise to actions.
        """
        self._loaded, self._shape, self._steps = loaded, shape, steps

    def set_shapes(self, lengths: Sequence[int], batch_size: int | None) -> None:
        """Fixes the batch size; prompts are padded to a bucket."""
        self._batch_size, self._usual_lengths = batch_size, lengths[1:]

    def predict(
        self, prompts: Sequence[np.ndarray], sessions: Sequence[Session], timer: Timer
    ) -> list[ActionPrediction]:
        """See ``ActionDecoder``; the history keeps an eoa, since there are no action ids."""
        with self._loaded.placement.scope():
            return self._predict(prompts, sessions, timer)

    def _predict(
        self, prompts: Sequence[np.ndarray], sessions: Sequence[Session], timer: Timer
    ) -> list[ActionPrediction]:
        loaded = self._loaded
        vocabulary = loaded.assets.vocabulary
        tokens, lengths = pad_prompts(prompts, vocabulary.pad, batch_size=self._batch_size)
        with timer.section("prefill") as results:
            hidden = _hidden_states(loaded.model, loaded.params, tokens)
            results.append(hidden)
        with timer.section("decode") as results:
            keys = [session.key() for session in sessions]
            keys += keys[:1] * (len(tokens) - len(keys))
            noise = jnp.stack([jax.random.normal(key, self._shape) for key in keys])
            actions = sample_actions(
                loaded.expert,
                loaded.expert_params,
                hidden,
                noise,
                steps=self._steps,
                lengths=lengths,
            )
            results.append(actions)
        closing = np.array([vocabulary.eoa], np.int32)
        chunks = np.asarray(actions, np.float64)[: len(prompts)]
        return [ActionPrediction(self._decoded(chunk), closing) for chunk in chunks]

    def warmup(self, batch_size: int) -> None:
        """Compiles the buckets of the usual prompts; a flow has no cache to fix shapes by."""
        session = Session(EpisodeLog(1, self._shape[0]))
        for length in sorted({length_bucket(length) for length in self._usual_lengths}):
            prompt = np.full(length, self._loaded.assets.vocabulary.bos, np.int32)
            self.predict([prompt] * batch_size, [session] * batch_size, Timer())

    def memory(self, batch_size: int) -> tuple[int, int, int]:
        """See ``ActionDecoder``; there are no caches."""
        del batch_size
        return device_bytes((self._loaded.params, self._loaded.expert_params)), 0, 0

    def should_prefill(self, prefix: np.ndarray, session: Session) -> bool:
        """Never: the expert attends to all hidden states anew."""
        del prefix, session
        return False

    def prefill_ahead(self, prefixes: Sequence[np.ndarray], sessions: Sequence[Session]) -> None:
        """Has nothing to prefill."""

    def _decoded(self, actions: np.ndarray) -> DecodedActions:
        if not np.isfinite(actions).all():
            return DecodedActions.invalid("the flow left the finite numbers", *self._shape)
        return DecodedActions(np.clip(actions, -1, 1))


def make_action_decoder(
    loaded: LoadedModel, shape: tuple[int, int], **options: Any
) -> ActionDecoder:
    """The action decoder that a checkpoint's task needs.

    Args:
      loaded: the model and its assets.
      shape: T and A of a chunk.
      **options: of ``TokenActionDecoder``.

    Raises:
      UserError: the task needs an action expert and there is none.
    """
    if isinstance(loaded.task, ChainOfThought):
        return ThoughtActionDecoder(loaded, shape, **options)
    if not loaded.task.needs.action_expert:
        return TokenActionDecoder(loaded, shape, **options)
    if loaded.expert is None:
        raise UserError(
            f"{loaded.folder} was trained on the task {loaded.record.task!r}, but has no action "
            "expert; take a checkpoint that has one"
        )
    if options.get("block"):
        raise UserError("block: drafts tokens, but the action expert makes none; leave it unset")
    if not options.get("sampling", GREEDY).greedy:
        raise UserError(
            "temperature: chooses among tokens, but the action expert predicts none; leave it at 0"
        )
    return FlowActionDecoder(loaded, shape)


@functools.partial(jax.jit, static_argnames="model")
def _hidden_states(model: Decoder, params: Any, tokens: jax.Array) -> jax.Array:
    """Hidden states [B, S, D]; the expert does not attend to padding behind a prompt's end."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    params = dequantize_params(params, model.config.compute_dtype)
    return model.apply({"params": params}, tokens, positions)[0]


def sample_actions(
    expert: ActionExpert,
    params: Any,
    hidden: jax.Array,
    noise: jax.Array,
    *,
    steps: int = 20,
    lengths: jax.Array | None = None,
) -> jax.Array:
    """Euler integration from noise to actions: ``z -= velocity(z, i / steps) / steps``.

    A causal expert prefills the hidden states once; each step then costs only its T action tokens.
    Source: ``generate_action``, UniVLA reference/Emu3/emu3/mllm/modeling_emu3.py:1710-1733, which
    works for a batch of one only.

    Args:
      expert: the expert.
      params: its parameters.
      hidden: [B, S, D] of the decoder, right-padded rows.
      noise: [B, T, A], standard normal.
      steps: Euler steps, 20 to 30 in the reference.
      lengths: int32 [B] real tokens per row; all S by default.

    Returns:
      normalized actions float32 [B, T, A].

    Raises:
      UserError: no steps, or batches that differ.
    """
    if steps < 1 or noise.shape[0] != hidden.shape[0]:
        raise UserError(
            f"sampling actions: {steps} steps, noise of {noise.shape[0]} rows for hidden states of "
            f"{hidden.shape[0]}; expected at least one step and equal rows"
        )
    if lengths is None:
        lengths = jnp.full(hidden.shape[0], hidden.shape[1], jnp.int32)
    return _integrate(expert, params, hidden, noise, jnp.asarray(lengths, jnp.int32), steps=steps)


@functools.partial(jax.jit, static_argnames=("expert", "steps"))
def _integrate(expert, params, hidden, noise, lengths, *, steps):
    variables = {"params": params}
    if expert.config.causal:
        cache = expert.apply(variables, hidden, method="prefill")

    def velocity(z_BTA, tau_B):
        if expert.config.causal:
            return expert.apply(variables, z_BTA, tau_B, cache, lengths, method="velocity")
        return expert.apply(variables, z_BTA, tau_B, hidden, lengths)[0]

    def step(z_BTA, i):
        tau_B = jnp.full(z_BTA.shape[0], i / steps, jnp.float32)
        return z_BTA - velocity(z_BTA, tau_B) / steps, None

    # Time runs from 1, pure noise, to 0, the actions; the step at ``i / steps`` goes down by one.
    order = jnp.arange(steps, 0, -1, dtype=jnp.float32)
    return jax.lax.scan(step, noise.astype(jnp.float32), order)[0]
