"""Planning with a world model: sample chunks, imagine what each does, judge it, execute the best.

    bos text │ frames boa ─ prefill ─┬─ greedy  → a a eoa   │ frames │ bot → value
                                     ├─ sampled → a a a eoa │ frames │ bot → value    N candidates
                                     └─ …            │          ▲
    bos      │ frames boa ─ prefill ─── copies ──────▼── imagined frames

All candidates of all robots are one batch over copies of one prefilled cache. What they do is
imagined over copies of another one, in the sequence of the task that follows actions, which may
leave out the instruction; the first then goes on through the imagined frames to the value. Cosmos
Policy (arXiv 2601.16163) plans so with a diffusion model. Two baselines imagine nothing: one
candidate at random, and the one that the instruction makes likelier than it would be without (the
divergence from a prompt-masked self).

Axes: B robots, N candidates, T steps of a chunk, A action dimensions, S sequence, K values.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from univla_jax.errors import UserError
from univla_jax.inference.action_decoders import ActionPrediction, Session, TokenActionDecoder
from univla_jax.inference.decode_step import DecodeBatch, DecodeState
from univla_jax.inference.frame_decoding import extend_rows, imagine_moments
from univla_jax.inference.policy import Policy
from univla_jax.inference.sampler import Timer, batch_bucket, length_bucket, pad_prompts
from univla_jax.inference.sampling import GREEDY, Sampling
from univla_jax.inference.speculative import Drafts, block_size
from univla_jax.models import quantized_weights
from univla_jax.models.decoder import Decoder, compute_logits
from univla_jax.sequences.frames import frame_header
from univla_jax.sequences.tokens import Role
from univla_jax.tasks.policy_video import PolicyVideo
from univla_jax.tasks.value import Judgement, Value

CHOICES = ("value", "random", "divergence")


@dataclasses.dataclass(frozen=True)
class PlanningConfig:
    """How chunks are chosen.

    Attributes:
      candidates: N, chunks compared; the first is the greedy one.
      choose: "value" imagines and judges; "random" takes any; "divergence" takes what the
        instruction makes likelier than it would be without, which needs a policy that was trained
        with some empty instructions (``null_prompt_prob``).
      temperature: of the sampled candidates.
    """

    candidates: int
    choose: str = "value"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Raises UserError for a value out of range."""
        if self.candidates < 2:
            raise UserError(f"plan: {self.candidates} candidates, expected at least 2")
        if self.choose not in CHOICES:
            raise UserError(f"plan: {self.choose!r} is not one of {', '.join(CHOICES)}")
        if self.temperature <= 0:
            raise UserError(f"plan: temperature {self.temperature}, expected above 0")


class PlanningDecoder(TokenActionDecoder):
    """An action decoder that answers each prompt with the best of several chunks.

    Attributes:
      judgements: of the last call, per robot those of its candidates; empty for the baselines.
    """

    def __init__(self, policy: Policy, config: PlanningConfig) -> None:
        """Takes a policy whose checkpoint also imagines and judges.

        Raises:
          UserError: the checkpoint was not trained to imagine what actions do or to judge, sees
            states, or was shown too few moments for one more than the policy's history; or its
            actions are no tokens.
        """
        loaded = policy.loaded
        if not loaded.task.needs.action_tokens:
            raise UserError("plan: samples action tokens, but the action expert makes none")
        shape = policy.chunk_size, policy.statistics.action_dim
        super().__init__(loaded, shape)
        self._config, self._window = config, loaded.task.history_window
        self._grids = [loaded.record.corpora[policy.corpus].grids[v] for v in policy.views]
        self.judgements: list[list[Judgement]] = []
        if config.choose == "value":
            self._video, self._value = _judging_tasks(policy)

    def predict(
        self, prompts: Sequence[np.ndarray], sessions: Sequence[Session], timer: Timer
    ) -> list[ActionPrediction]:
        """See ``ActionDecoder``; no prefix is kept between calls."""
        for session in sessions:
            session.cached_prefix = None
        # Copies of the first robot fill the batch up, so that few shapes are compiled.
        count, real = self._config.candidates, len(prompts)
        size = max(real, self._batch_size or batch_bucket(real))
        prompts = [*prompts, *[prompts[0]] * (size - real)]
        sessions = [*sessions, *[sessions[0]] * (size - real)]
        with timer.section("prefill") as results:
            state = self._prefill(prompts)
            results.append(state.batch)
        with timer.section("decode"):
            chosen, state = self._candidates(state, [session.key() for session in sessions])
        if self._config.choose == "value":
            with timer.section("imagine"):
                self.judgements = self._judge(state, prompts, chosen)
            scores = np.array([[j.score for j in own] for own in self.judgements])
        elif self._config.choose == "divergence":
            with timer.section("imagine"):
                scores = self._divergence(prompts, chosen)
        else:
            draws = [np.random.default_rng([s.seed, s.chunks]).random(count) for s in sessions]
            scores = np.stack(draws)
        self.judgements = self.judgements[:real]
        best = [self._best(scores[i], [chosen[n][i] for n in range(count)]) for i in range(real)]
        return [
            ActionPrediction(self._task.parse(chosen[n][i], self._shape), chosen[n][i])
            for i, n in enumerate(best)
        ]

    def should_prefill(self, prefix: np.ndarray, session: Session) -> bool:
        """Never: no prefix is kept."""
        del prefix, session
        return False

    def warmup(self, batch_size: int) -> None:
        """Compiles what a call with ``batch_size`` prompts of the usual lengths uses."""
        for length in sorted(set(self._usual_lengths[1:])):
            prompt = np.full(length, self._task.vocabulary.bos, np.int32)
            sessions = [Session(history=None) for _ in range(batch_size)]
            self.predict([prompt] * batch_size, sessions, Timer())

    def set_shapes(self, lengths: Sequence[int], batch_size: int | None) -> None:
        """Fixes the shapes of prompts."""
        super().set_shapes(lengths, batch_size)
        self._usual_lengths, self._batch_size = lengths, batch_size

    def _prefill(self, prompts: Sequence[np.ndarray]) -> DecodeState:
        vocabulary = self._task.vocabulary
        tokens, lengths = pad_prompts(prompts, vocabulary.pad, batch_size=len(prompts))
        # Slots for the chunk, the imagined moment and its value: the cache is grown only here.
        headers = [len(frame_header(self._task.text_encoder, *grid)) for grid in self._grids]
        moment = sum(h * w + n + 4 for (h, w), n in zip(self._grids, headers))
        slots = tokens.shape[1] + self.rules.max_new_tokens + moment + 64
        return self._sampler.prefill(tokens, lengths, slots=slots)

    def _candidates(
        self, state: DecodeState, keys: Sequence[jax.Array]
    ) -> tuple[list[list[np.ndarray]], DecodeState]:
        """Ids of each candidate of each robot, [N][B], and the state behind them, [N * B]."""
        count, size = self._config.candidates, state.batch_size
        copies = _repeat(state.batch, count)
        first, rest = _cut(copies, size)
        options = {
            "max_new_tokens": self.rules.max_new_tokens,
            "allowed": self.rules.allowed,
            "stop_id": self.rules.stop_id,
            "grammar": self.rules.grammar,
            # One block for both: their caches are joined afterwards.
            "block": block_size(
                "actions",
                len(copies.lengths),
                self.rules.max_new_tokens,
                hidden_size=self._sampler.model.config.hidden_size,
            ),
        }
        table = self._continuations.table
        # The first candidate is what the policy would do without a plan, so that a judge which
        # finds none better leaves everything as it is.
        greedy, greedy_state = self._sampler.generate(
            DecodeState(first, state.max_length),
            sampling=GREEDY,
            drafts=Drafts.none(size, table),
            **options,
        )
        # Each robot's candidates draw from its own key, so that a batch gives what each gets alone.
        drawn = [jax.random.fold_in(key, n) for n in range(1, count) for key in keys]
        sampled, sampled_state = self._sampler.generate(
            DecodeState(rest, state.max_length),
            sampling=Sampling(temperature=self._config.temperature),
            key=jnp.stack(drawn),
            drafts=Drafts.none(len(drawn), table),
            **options,
        )
        tokens = np.concatenate([np.asarray(greedy.tokens), np.asarray(sampled.tokens)])
        lengths = np.concatenate([np.asarray(greedy.lengths), np.asarray(sampled.lengths)])
        rows = [ids[:n] for ids, n in zip(tokens, lengths)]
        for ids in rows:
            self._continuations.learn(ids)
        chosen = [rows[n * size : (n + 1) * size] for n in range(count)]
        batch = _join(greedy_state.batch, sampled_state.batch)
        length = max(greedy_state.max_length, sampled_state.max_length)
        return chosen, DecodeState(batch, length, has_pending=True)

    def _judge(
        self,
        state: DecodeState,
        prompts: Sequence[np.ndarray],
        chosen: Sequence[Sequence[np.ndarray]],
    ) -> list[list[Judgement]]:
        """Judgements [B][N] of what the candidates [N][B], at whose ends the state is, lead to."""
        imagined = self._imagine(prompts, chosen)
        questions = [self._value.question(views) for views in zip(*imagined)]
        state = extend_rows(self._sampler, state, questions)
        judged = self._value.parse(np.exp(self._sampler.next_log_probs(state, self._value.ids)))
        return [judged[i :: len(prompts)] for i in range(len(prompts))]

    def _imagine(
        self, prompts: Sequence[np.ndarray], chosen: Sequence[Sequence[np.ndarray]]
    ) -> list[np.ndarray]:
        """Per camera codes [N * B, 1, h, w] of the moment behind each candidate [N][B]."""
        video = self._video
        # The candidates' cache begins with the words. The task that follows actions may never have
        # seen any, and imagines poorly behind them: it gets a prompt and a cache of its own, which
        # costs one more prefill per decision.
        if video.settings.wordless:
            prompts = [np.append(video.opening(""), self._seen(prompt)) for prompt in prompts]
        state = self._prefill(prompts)
        state = DecodeState(_repeat(state.batch, len(chosen)), state.max_length)
        rows = [ids[ids != video.vocabulary.eoa] for of_robots in chosen for ids in of_robots]
        fed = [video.outcome(ids, self._grids[0]) for ids in rows]
        seen = [self._newest_codes(prompt) for prompt in prompts] * len(chosen)
        codes, _ = imagine_moments(
            self._sampler,
            extend_rows(self._sampler, state, fed),
            video,
            self._grids,
            previous=[np.stack(view) for view in zip(*seen)],
        )
        return codes

    def _seen(self, prompt: np.ndarray) -> np.ndarray:
        """What stands behind the words of a prompt: they end where the first frame begins."""
        return prompt[int(np.argmax(prompt == self._task.vocabulary.boi)) :]

    def _newest_codes(self, prompt: np.ndarray) -> list[np.ndarray]:
        """Codes [h, w] of every camera that a prompt ends with."""
        vocabulary, cells = self._task.vocabulary, [h * w for h, w in self._grids]
        visual = prompt[(prompt >= vocabulary.bov) & (prompt <= vocabulary.eov)]
        codes = np.split(vocabulary.visual_codes(visual[-sum(cells) :]), np.cumsum(cells)[:-1])
        return [own.reshape(grid) for own, grid in zip(codes, self._grids)]

    def _divergence(
        self,
        prompts: Sequence[np.ndarray],
        chosen: Sequence[Sequence[np.ndarray]],
    ) -> np.ndarray:
        """Log-probability of each candidate with its instruction minus without, [B, N]."""
        vocabulary, pairs = self._task.vocabulary, []
        for ids_of in chosen:
            for prompt, ids in zip(prompts, ids_of):
                masked = np.append(np.int32(vocabulary.bos), self._seen(prompt))
                pairs += [(prompt, ids), (masked, ids)]
        scores = self._log_likelihood(pairs)
        difference = scores[0::2] - scores[1::2]
        return difference.reshape(len(chosen), len(prompts)).T

    def _log_likelihood(self, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """Log-probability of each continuation after its prompt, among the allowed ids."""
        longest = length_bucket(max(len(prompt) + len(ids) for prompt, ids in pairs))
        tokens = np.full((len(pairs), longest), self._task.vocabulary.pad, np.int32)
        scored = np.zeros((len(pairs), longest), bool)
        for row, mask, (prompt, ids) in zip(tokens, scored, pairs):
            row[: len(prompt)], row[len(prompt) : len(prompt) + len(ids)] = prompt, ids
            mask[len(prompt) : len(prompt) + len(ids)] = True
        allowed = np.unique(self.rules.allowed)
        sampler = self._sampler
        return np.asarray(
            _sequence_log_probs(sampler.model, sampler.params, tokens, scored, allowed)
        )

    def _best(self, scores: np.ndarray, candidates: Sequence[np.ndarray]) -> int:
        """The first of the best candidates that decode; the greedy one where none does."""
        valid = [self._task.parse(ids, self._shape).valid for ids in candidates]
        return int(np.argmax(np.where(valid, scores, -np.inf)))


def plan(
    policy: Policy, config: PlanningConfig, *, batch_size: int | None = None, seed: int = 0
) -> Policy:
    """The same policy, but it plans each chunk.

    Args:
      policy: of a checkpoint that also imagines and judges.
      config: how.
      batch_size: of every call, as in ``Policy.load``.
      seed: of the candidates.

    Raises:
      UserError: as ``PlanningDecoder``.
    """
    return Policy(
        policy.loaded,
        corpus=policy.corpus,
        batch_size=batch_size,
        sampling=Sampling(seed=seed),
        action_decoder=PlanningDecoder(policy, config),
    )


def _judging_tasks(policy: Policy) -> tuple[PolicyVideo, Value]:
    """The tasks that imagine and judge one moment more than the policy's history."""
    loaded, moments = policy.loaded, policy.loaded.task.history_window + 1
    if loaded.record.state:
        raise UserError("plan: the policy sees states, which imagined moments do not have")
    if loaded.record.advantage:
        raise UserError("plan: the policy acts by the advantage, which its judge was not shown")
    tasks = []
    for kind, role, purpose in (
        (PolicyVideo, Role.VISION, "imagining what its actions do"),
        (Value, Role.VALUE, "judging moments"),
    ):
        purpose = f"{purpose} in sequences of {moments} moments, which planning needs"
        tasks.append(loaded.select(kind, role, purpose, moments=moments).task)
    return tasks[0], tasks[1]


# ----------------------------------------------------------------------------
# Batches copied, cut and joined; the batch is the first axis of every array but the cache's.


@functools.partial(jax.jit, static_argnames="count")
def _repeat(batch: DecodeBatch, count: int) -> DecodeBatch:
    """All sequences ``count`` times, one copy of the batch after another."""
    return _on_batch_axis(lambda x, axis: jnp.concatenate([x] * count, axis), batch)


@functools.partial(jax.jit, static_argnames="size")
def _cut(batch: DecodeBatch, size: int) -> tuple[DecodeBatch, DecodeBatch]:
    """The first ``size`` sequences, and the others."""
    slice_ = jax.lax.slice_in_dim
    return (
        _on_batch_axis(lambda x, axis: slice_(x, 0, size, axis=axis), batch),
        _on_batch_axis(lambda x, axis: slice_(x, size, None, axis=axis), batch),
    )


@jax.jit
def _join(first: DecodeBatch, second: DecodeBatch) -> DecodeBatch:
    """The sequences of both."""
    cache = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), first.cache, second.cache)
    pairs = [(first.lengths, second.lengths), (first.last_hidden, second.last_hidden)]
    pairs.append((first.pending, second.pending))
    return DecodeBatch(cache, *map(jnp.concatenate, pairs))


def _on_batch_axis(function: Any, batch: DecodeBatch) -> DecodeBatch:
    cache = jax.tree.map(lambda x: function(x, 1), batch.cache)
    rest = [function(x, 0) for x in (batch.lengths, batch.last_hidden, batch.pending)]
    return DecodeBatch(cache, *rest)


@functools.partial(jax.jit, static_argnames="model")
def _sequence_log_probs(
    model: Decoder, params: Any, tokens_BS: jax.Array, scored_BS: jax.Array, ids_R: jax.Array
) -> jax.Array:
    """Sum of the log-probabilities of the scored tokens among ``ids_R``, float32 [B]."""
    positions = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]), tokens_BS.shape)
    dtype = model.config.compute_dtype
    hidden_BSD, _ = model.apply(
        {"params": quantized_weights.dequantize_params(params, dtype)}, tokens_BS, positions
    )
    head_RD = quantized_weights.dequantized_rows(params["head"], ids_R, dtype)
    logits_BSR = compute_logits(hidden_BSD[:, :-1], head_RD)
    log_probs = jax.nn.log_softmax(logits_BSR.astype(jnp.float32))
    column_BS = jnp.searchsorted(ids_R, tokens_BS[:, 1:])
    column_BS = jnp.minimum(column_BS, len(ids_R) - 1)
    chosen = jnp.take_along_axis(log_probs, column_BS[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(scored_BS[:, 1:], chosen, 0), axis=1)
