"""Action decoders: from prompts to normalized action chunks, by tokens or by flow matching."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from univla_jax.episode import ActionChunk
from univla_jax.errors import UserError
from univla_jax.inference.int8 import dequantize_params
from univla_jax.inference.loaded_model import LoadedModel
from univla_jax.inference.prefix_cache import CachedPrefix, GenerationRules, PrefixCache
from univla_jax.inference.sampler import Sampler, Timer, length_bucket, pad_prompts
from univla_jax.inference.sampling import GREEDY, GrammarMask, Sampling
from univla_jax.models.action_expert import ActionExpert
from univla_jax.models.decoder import Decoder
from univla_jax.sequences.history import History
from univla_jax.tokenizers.constrained import DecodedActions

# ----------------------------------------------------------------------------
# What a policy remembers of one episode, and of how many it keeps the caches.


@dataclasses.dataclass(eq=False)
class Session:
    """Made by ``Policy.start``, changed by ``Policy.act``.

    Attributes:
      history: observations and actions still in the window.
      seed: of whatever is drawn for this episode.
      instruction: the task so far; another one empties the history.
      chunks: chunks given out.
      invalid: how many of them did not decode.
      last_action: float32 [A], the end of the last chunk given out.
      last_ids: int32 [n], what the last chunk was decoded from.
      cached_prefix: keys and values of what was read for the last chunk; only saves time.
    """

    history: History
    seed: int = 0
    instruction: str | None = None
    chunks: int = 0
    invalid: int = 0
    last_action: np.ndarray | None = None
    last_ids: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    cached_prefix: CachedPrefix | None = None

    def key(self) -> jax.Array:
        """The random key of the next chunk, the same in any batch."""
        return jax.random.fold_in(jax.random.key(self.seed), self.chunks)

    def seeing(self, instruction: str, turn: np.ndarray) -> History:
        """The history with a new observation; the session itself stays as it is."""
        same = self.instruction in (None, instruction)
        history = self.history if same else History(window=self.history.window)
        return history.observe(turn)

    def keep(
        self,
        instruction: str,
        history: History,
        chunk: ActionChunk,
        cached_prefix: CachedPrefix | None,
    ) -> None:
        """Remembers a call that succeeded; the history holds its observation and ids."""
        self.history, self.instruction, self.cached_prefix = history, instruction, cached_prefix
        self.last_ids = history.actions[-1]
        self.chunks += 1
        self.invalid += not chunk.valid
        self.last_action = chunk.actions[-1]


class SessionLru:
    """Sessions that hold a memory, weakly, in the order of their last calls.

    A memory is as large as the cache of a whole prompt, so only so many are kept: the sessions
    called longest ago lose theirs first and read their next prompt anew.
    """

    def __init__(self, most: int) -> None:
        """Keeps the cached prefixes of ``most`` sessions, at least 1."""
        self._most = most
        self._waiting: weakref.WeakKeyDictionary[Session, bool] = weakref.WeakKeyDictionary()

    def called(self, sessions: Sequence[Session]) -> None:
        """These sessions were just answered; their next prompts may be begun."""
        for session in sessions:
            self._waiting.pop(session, None)
            self._waiting[session] = True
        for session in list(self._waiting)[: -self._most]:
            session.cached_prefix = None
            del self._waiting[session]

    def take(self, count: int) -> list[Session]:
        """Up to ``count`` sessions whose next prompts were not begun yet; each is given once."""
        taken = [session for session, waits in list(self._waiting.items()) if waits][:count]
        for session in taken:
            self._waiting[session] = False
        return taken


# ----------------------------------------------------------------------------
# Action chunks from the action expert: Euler integration from noise to data.
#
# Source: reference ``modeling_emu3.py:1710-1733`` (``generate_action``), here for any batch; the
# reference's works for one row only (golden fact 15).
#
# Axes: B batch, S sequence, T steps of the chunk, A action dimensions, D model.


def sample_actions(
    expert: ActionExpert,
    params: Any,
    hidden: jax.Array,
    noise: jax.Array,
    *,
    steps: int = 20,
    lengths: jax.Array | None = None,
) -> jax.Array:
    """Follows the velocity from tau = 1 to 0: ``z -= velocity(z, i / steps) / steps``.

    A causal expert reads the hidden states once; each step then costs only its T action tokens.

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

    order = jnp.arange(steps, 0, -1, dtype=jnp.float32)
    return jax.lax.scan(step, noise.astype(jnp.float32), order)[0]


# ----------------------------------------------------------------------------
# How a policy turns prompts into normalized actions: by choosing tokens, or by following a flow.
#
# Axes: B robots, S prompt tokens, T steps of a chunk, A action dimensions, D model.


@dataclasses.dataclass(frozen=True)
class ActionPrediction:
    """What a head says about one robot.

    Attributes:
      decoded: normalized actions float64 [T, A], valid or not.
      ids: int32 [n], what the history keeps as this chunk's action.
      cached_prefix: what the cache holds now, or None.
      num_overridden: how many ids are not the likeliest, because those would make no whole chunk.
    """

    decoded: DecodedActions
    ids: np.ndarray
    cached_prefix: CachedPrefix | None = None
    num_overridden: int = 0


class ActionDecoder(Protocol):
    """What a policy needs of a head."""

    def answer(
        self, prompts: Sequence[np.ndarray], sessions: Sequence[Session], timer: Timer
    ) -> list[ActionPrediction]:
        """One answer per prompt, int32 [n] each, of the sessions in the same order."""
        ...

    def prepare(self, lengths: Sequence[int], batch_size: int | None) -> None:
        """Told once: new tokens of the usual calls, and the rows of every batch if fixed."""
        ...

    def warmup(self, batch_size: int) -> None:
        """Compiles what a call with ``batch_size`` robots uses."""
        ...

    def should_prefill(self, prefix: np.ndarray, session: Session) -> bool:
        """Whether reading the beginning of a session's next prompt now would save time then."""
        ...

    def prefill_ahead(self, prefixes: Sequence[np.ndarray], sessions: Sequence[Session]) -> None:
        """Reads the beginnings of the next prompts."""
        ...


class TokenActionDecoder:
    """Greedy action ids up to eoa, decoded by the checkpoint's action tokenizer.

    The grammar of FAST and of bins leaves nothing but whole chunks; how often it had to overrule
    the model is counted. What does not decode to a whole chunk all the same is not valid.

    Attributes:
      rules: what may be generated.
      prefix_cache: completes prompts.
    """

    def __init__(
        self,
        trained: LoadedModel,
        chunk: tuple[int, int],
        *,
        max_new_tokens: int | None = None,
        speculative_block: int = 0,
        sampling: Sampling = GREEDY,
        free_form: bool = False,
    ) -> None:
        """Takes the tokenizer of a checkpoint.

        Args:
          trained: the model and its assets.
          chunk: T and A.
          max_new_tokens: the most ids of a chunk, its eoa included; by default what the longest
            legal chunk needs.
          speculative_block: tokens verified per speculative decode step; 0 decodes one by one.
          sampling: how ids are chosen; draws depend on a session's seed and number of chunks.
          free_form: any action ids in any order, as the reference has it.
        """
        vocabulary, tokenizer = trained.assets.vocabulary, trained.assets.require("action")
        self._vocabulary, self._tokenizer, self._chunk = vocabulary, tokenizer, chunk
        longest = tokenizer.max_tokens(*chunk) + 1
        codes = vocabulary.action_ids(np.arange(tokenizer.vocabulary_size))
        grammar = None if free_form else tokenizer.grammar(*chunk)
        mask = None if grammar is None else GrammarMask.from_grammar(grammar, codes, vocabulary.eoa)
        allowed = np.append(codes, vocabulary.eoa)
        count = max_new_tokens or longest
        self.rules = GenerationRules(
            allowed, vocabulary.eoa, count, sampling, mask, speculative_block
        )
        self._sampler = Sampler(trained.model, trained.params)

    def prepare(self, lengths: Sequence[int], batch_size: int | None) -> None:
        """Fixes the shapes; see ``PrefixCache``."""
        self.prefix_cache = PrefixCache(
            self._sampler, self.rules, usual_lengths=lengths, batch_size=batch_size
        )

    def answer(
        self, prompts: Sequence[np.ndarray], sessions: Sequence[Session], timer: Timer
    ) -> list[ActionPrediction]:
        """See ``ActionDecoder``."""
        cached_prefixes = [session.cached_prefix for session in sessions]
        for session in sessions:
            session.cached_prefix = None  # the call consumes it
        before = [session.last_ids for session in sessions]
        keys = None if self.rules.sampling.greedy else [s.key() for s in sessions]
        answers = self.prefix_cache.complete(
            prompts, cached_prefixes, draft_sources=before, keys=keys, timer=timer
        )
        return [
            ActionPrediction(self.decode(a.ids), a.ids, a.cached_prefix, a.num_overridden)
            for a in answers
        ]

    def decode(self, ids: np.ndarray) -> DecodedActions:
        """The chunk that generated ids [n] mean, their eoa included."""
        if not len(ids) or ids[-1] != self._vocabulary.eoa:
            return DecodedActions.invalid(
                f"no end of action within {len(ids)} tokens", *self._chunk
            )
        codes = self._vocabulary.action_codes(ids[:-1]).tolist()
        return self._tokenizer.decode(codes, *self._chunk)

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


class FlowActionDecoder:
    """Actions from noise through the action expert, which reads the prompt's hidden states.

    The noise of a robot depends on its session's seed and number of chunks alone, so that a batch
    gives what each robot gets alone.
    """

    def __init__(
        self,
        trained: LoadedModel,
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

    def prepare(self, lengths: Sequence[int], batch_size: int | None) -> None:
        """Fixes the rows of every batch; prompts are padded to a bucket."""
        self._batch_size, self._usual = batch_size, lengths[1:]

    def answer(
        self, prompts: Sequence[np.ndarray], sessions: Sequence[Session], timer: Timer
    ) -> list[ActionPrediction]:
        """See ``ActionDecoder``; the history keeps an eoa, since there are no action ids."""
        trained = self._trained
        tokens, lengths = pad_prompts(
            prompts, trained.assets.vocabulary.pad, batch_size=self._batch_size
        )
        with timer.section("prefill") as results:
            hidden = _hidden(trained.model, trained.params, tokens)
            results.append(hidden)
        with timer.section("decode") as results:
            keys = [session.key() for session in sessions]
            keys += keys[:1] * (len(tokens) - len(keys))
            noise = jnp.stack([jax.random.normal(key, self._chunk) for key in keys])
            actions = sample_actions(
                self._expert, self._params, hidden, noise, steps=self._steps, lengths=lengths
            )
            results.append(actions)
        closing = np.array([trained.assets.vocabulary.eoa], np.int32)
        rows = np.asarray(actions, np.float64)[: len(prompts)]
        return [ActionPrediction(self._checked(row), closing) for row in rows]

    def warmup(self, batch_size: int) -> None:
        """Compiles the buckets of the usual prompts; the flow has no cache to fix shapes by."""
        session = Session(history=None)
        for length in sorted({length_bucket(length) for length in self._usual}):
            prompt = np.full(length, self._trained.assets.vocabulary.bos, np.int32)
            self.answer([prompt] * batch_size, [session] * batch_size, Timer())

    def should_prefill(self, prefix: np.ndarray, session: Session) -> bool:
        """Never: the expert reads all hidden states anew."""
        del prefix, session
        return False

    def prefill_ahead(self, prefixes: Sequence[np.ndarray], sessions: Sequence[Session]) -> None:
        """There is nothing to read."""

    def _checked(self, actions: np.ndarray) -> DecodedActions:
        if not np.isfinite(actions).all():
            return DecodedActions.invalid("the flow left the finite numbers", *self._chunk)
        return DecodedActions(np.clip(actions, -1, 1))


def make_action_decoder(
    trained: LoadedModel, chunk: tuple[int, int], **options: Any
) -> ActionDecoder:
    """The head that a checkpoint was trained for.

    Args:
      trained: the model and its assets.
      chunk: T and A.
      **options: of ``TokenActionDecoder``.

    Raises:
      UserError: the layout needs an action expert and there is none.
    """
    if trained.layout.layout != "policy_flow":
        return TokenActionDecoder(trained, chunk, **options)
    if trained.expert is None:
        raise UserError(
            f"{trained.folder} is of the layout 'policy_flow', but has no action expert; take a "
            "checkpoint that has one"
        )
    if options.get("speculative_block"):
        raise UserError(
            "speculative_block: guesses tokens, but the action expert writes none; leave it at 0"
        )
    if not options.get("sampling", GREEDY).greedy:
        raise UserError(
            "temperature: chooses among tokens, but the action expert predicts none; leave it at 0"
        )
    return FlowActionDecoder(trained, trained.expert, trained.expert_params, chunk)


@functools.partial(jax.jit, static_argnames="model")
def _hidden(model: Decoder, params: Any, tokens: jax.Array) -> jax.Array:
    """Hidden states [B, S, D]; what stands behind a row's end is not seen by the expert."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    params = dequantize_params(params, model.config.compute_dtype)
    return model.apply({"params": params}, tokens, positions)[0]
