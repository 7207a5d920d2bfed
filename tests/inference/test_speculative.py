"""Blocks of drafts give the tokens of plain decoding, greedy and sampled, in fewer steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from tests.decoders import tiny_decoder
from tests.inference.exactness import ALLOWED, BATCH, COUNT, PROMPTS, RULES, STOP
from tests.inference.uncached import draw_prompts, greedy_tokens, stack, token_lists
from univla_jax.errors import UserError
from univla_jax.inference.sampler import Sampler
from univla_jax.inference.sampling import GREEDY, Sampling
from univla_jax.inference.speculative import Drafts, block_size
from univla_jax.tokenizers.continuations import Continuations


@pytest.fixture(scope="module")
def sampler():
    return Sampler(*tiny_decoder(vocab_size=100))


def test_drafted_tokens_are_the_plain_ones(sampler):
    """Drafts that are right, wrong, short, and beyond the stop; rows that end on their own."""
    prompts = draw_prompts(3, 9, 1, 6)
    plain = [greedy_tokens(sampler, prompt, 12, ALLOWED, STOP) for prompt in prompts]
    assert {row[-1] == STOP for row in plain} == {True, False}
    source = np.full((4, 12), -1)
    source[0, : len(plain[0])] = plain[0]
    source[1] = 33
    source[2, :4] = [*plain[2][:2], 50, 51][:4]
    state = sampler.prefill(*stack(prompts))
    rules = {"max_new_tokens": 12, "allowed": ALLOWED, "stop_id": STOP}
    generated, state = sampler.generate(state, drafts=Drafts(source, period=12), block=4, **rules)
    assert token_lists(generated) == plain and int(generated.steps) < 12
    assert np.asarray(generated.stopped).tolist() == [row[-1] == STOP for row in plain]
    more, _ = sampler.generate(state, max_new_tokens=2)
    continued = [greedy_tokens(sampler, p + row, 2) for p, row in zip(prompts, plain)]
    assert token_lists(more) == continued


@pytest.mark.parametrize(
    ("sampling", "guidance"),
    [
        (Sampling(0.8, top_k=9, top_p=0.9), 2.0),
        pytest.param(Sampling(1.0, seed=1), 1.0, marks=pytest.mark.slow),
    ],
)
def test_sampled_tokens_are_the_plain_draws(sampler, sampling, guidance):
    """The draw at a position depends on its key alone, whatever was drafted there."""
    prompts = draw_prompts(3, 9, 1, 6)
    forced_ids = np.where(np.arange(12) % 5 == 4, 70, -1)
    source = np.random.default_rng(0).choice(ALLOWED, (4, 5)).astype(np.int32)
    rules = {"max_new_tokens": 12, "allowed": ALLOWED, "forced_ids": forced_ids}
    rules |= {"sampling": sampling, "guidance": guidance}
    plain, _ = sampler.generate(sampler.prefill(*stack(prompts)), **rules)
    state = sampler.prefill(*stack(prompts))
    generated, _ = sampler.generate(state, drafts=Drafts(source, period=5), block=6, **rules)
    assert token_lists(generated) == token_lists(plain)
    assert int(generated.steps) <= int(plain.steps)


def test_a_right_draft_saves_steps(sampler):
    (prompt,) = draw_prompts(6, seed=3)
    plain = greedy_tokens(sampler, prompt, 12, ALLOWED)
    state = sampler.prefill(np.array([prompt]))
    drafts = Drafts(np.array([plain]), period=12)
    rules = {"max_new_tokens": 12, "allowed": ALLOWED, "block": 4}
    generated, _ = sampler.generate(state, drafts=drafts, **rules)
    assert token_lists(generated) == [plain] and int(generated.steps) == 3


@pytest.mark.parametrize(
    ("history", "counts", "drafts"),
    [
        ([5, 6, 7, 1, 2, -1, -1, -1], 2, [7, 1, 2]),  # one period before, then in the block itself
        ([5, 6, 7, 1, 2, 9, -1, -1], 2, [9, 1, 2]),  # a guess comes first,
        ([5, 6, 7, 1, 2, -1, 8, -1], 2, [7, 8, 2]),  # wherever it stands
        ([-1, -1, 7, 1, -1, -1, -1, -1], 1, [-1, 7, 1]),  # nothing to copy
    ],
)
def test_a_draft_is_a_guess_or_what_stood_one_period_before(history, counts, drafts):
    own = Drafts(jnp.zeros((1, 3), jnp.int32), period=3)
    assert own.propose(jnp.array([history]), jnp.array([counts]), 3).tolist() == [drafts]


def test_a_table_drafts_what_followed_before():
    """The longest known row of tokens decides, the newest of its kind; else the copy."""
    known = Continuations()
    for row in ([1, 2, 3, 4, 5, 9], [7, 3, 6], [8, 8, 3, 4, 2]):
        known.learn(np.array(row))
    own = Drafts(jnp.full((1, 2), 40), known.table, period=2)
    for chosen, wanted in (
        ([1, 2, 3, 4], [5, 9]),  # four tokens
        ([6, 2, 3, 4], [5, 9]),  # three, and not what stands behind the last two
        ([6, 6, 3, 4], [2, 3]),  # two, then one
        ([], [8, 8]),  # how the last one began
    ):
        history = jnp.array([[40, 40, *chosen, *[-1] * 4]])
        assert own.propose(history, jnp.array([len(chosen)]), 2).tolist() == [wanted]


def test_a_policys_table_saves_steps_and_changes_nothing(sampler):
    (prompt,) = draw_prompts(6, seed=3)
    plain = greedy_tokens(sampler, prompt, 12, ALLOWED)
    known, steps = Continuations(), []
    for _ in range(2):
        drafts = Drafts.none(1, known.table)
        state = sampler.prefill(np.array([prompt]))
        generated, _ = sampler.generate(
            state, max_new_tokens=12, allowed=ALLOWED, drafts=drafts, block=4
        )
        assert token_lists(generated) == [plain]
        known.learn(np.array(plain))
        steps.append(int(generated.steps))
    assert steps[1] == 3 < steps[0]


@pytest.mark.parametrize(("block", "rows"), [(0, 1), (4, 2)])
def test_a_block_or_drafts_that_do_not_fit_are_refused(sampler, block, rows):
    state = sampler.prefill(np.array([[1, 2]]))
    with pytest.raises(UserError, match="expected at least 1 and 1"):
        sampler.generate(state, max_new_tokens=2, drafts=Drafts.none(rows), block=block)


@pytest.mark.parametrize(
    ("kind", "batch_size", "hidden_size", "platform", "block"),
    [
        ("frames", 1, 128, "cpu", 16),
        ("frames", 2, 128, "cpu", 1),
        ("actions", 1, 128, "cpu", 1),
        ("actions", 1, 512, "cpu", 8),
        ("actions", 2, 512, "cpu", 1),
        ("frames", 1, 128, "tpu", 40),
        ("actions", 16, 4096, "gpu", 4),
        ("actions", 1, 4096, "tpu", 16),
    ],
)
def test_blocks_are_as_long_as_pays(kind, batch_size, hidden_size, platform, block):
    options = {"hidden_size": hidden_size, "platform": platform}
    assert block_size(kind, batch_size, longest=40, **options) == block


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0)], ids=["greedy", "sampled"])
def test_a_thousand_prompts_with_drafts_right_and_wrong(expected, sampling):
    """Drafts of the chunk itself, of another one, and mixtures of both."""
    rng, steps = np.random.default_rng(1), 0
    for part in expected.batches():
        indices = range(part.start, part.stop)
        plain, _ = expected.sampler.generate(expected.prefill(part), sampling=sampling, **RULES)
        right, wrong = np.asarray(plain.tokens), np.roll(np.asarray(plain.tokens), 7, axis=0)
        drafts = Drafts(np.where(rng.random(right.shape) < 0.8, right, wrong), period=COUNT)
        generated, _ = expected.sampler.generate(
            expected.prefill(part), sampling=sampling, drafts=drafts, block=4, **RULES
        )
        assert token_lists(generated) == token_lists(plain)
        if sampling.greedy:
            assert token_lists(generated) == [expected.plain[i] for i in indices]
        steps += int(generated.steps)
    assert steps < COUNT * PROMPTS / BATCH


@pytest.mark.slow
def test_draws_have_the_probabilities_of_the_model():
    """100,000 sequences of three tokens among four ids, sampled with drafts, against the product of
    the model's conditional probabilities."""
    sampler, ids = Sampler(*tiny_decoder(vocab_size=100)), np.arange(30, 34)
    prompt, draws, size = np.array([[7, 8, 9]]), 100_000, 5_000
    drafts = Drafts(np.full((size, 3), 31, np.int32), period=3)
    counts = np.zeros((4, 4, 4))
    for seed in range(draws // size):
        state = sampler.prefill(np.repeat(prompt, size, axis=0))
        generated, _ = sampler.generate(
            state,
            max_new_tokens=3,
            allowed=ids,
            sampling=Sampling(1.0, seed=seed),
            drafts=drafts,
            block=3,
        )
        np.add.at(counts, tuple((np.asarray(generated.tokens) - 30).T), 1)
    words = np.stack(np.meshgrid(ids, ids, ids, indexing="ij"), axis=-1).reshape(-1, 3)
    sequences = np.concatenate([np.repeat(prompt, len(words), axis=0), words], axis=1)
    positions = jnp.broadcast_to(jnp.arange(sequences.shape[1]), sequences.shape)
    variables = {"params": sampler.params}
    hidden, _ = sampler.model.apply(variables, sequences, positions)
    logits = sampler.model.apply(variables, hidden[:, 2:5], method="unembed")[..., ids]
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), words[..., None] - 30, axis=-1)
    wanted = draws * np.exp(np.asarray(jnp.sum(chosen, axis=(1, 2)), np.float64))
    result = stats.chisquare(counts.ravel(), wanted * draws / wanted.sum())
    assert result.pvalue > 0.001
