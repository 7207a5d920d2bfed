"""The fused cross-entropy equals its formula, in any number of chunks and without whole logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from univla_jax.models.decoder import HeadAdapter
from univla_jax.training.cross_entropy import cross_entropy, default_chunks

VOCAB, PADDED = 11, 16


def _inputs(batch=2, length=7, width=5):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(batch, length, width)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(PADDED, width)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, VOCAB, (batch, length)), jnp.int32)
    weights = jnp.asarray(rng.choice([0, 0.5, 1], (batch, length)), jnp.float32)
    return hidden, head, targets, weights


def _plain(hidden, head, targets, weights):
    logits = jnp.einsum("bpd,vd->bpv", hidden, head)[..., :VOCAB]
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    return jnp.sum(weights * -picked), (-picked, jnp.argmax(logits, -1) == targets)


@pytest.mark.parametrize("chunks", [None, 1, 3, 7, 50])
def test_equals_the_formula_in_any_number_of_chunks(chunks):
    *differentiable, targets, weights = _inputs()

    def gradient(fn):
        loss = lambda *a: (lambda total, aux: (3 * total, (total, aux)))(  # noqa: E731
            *fn(*a, targets, weights)
        )
        return jax.grad(loss, argnums=(0, 1), has_aux=True)(*differentiable)

    ours = gradient(lambda *a: cross_entropy(*a, vocab_size=VOCAB, chunks=chunks))
    plain = gradient(_plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, plain)


def test_without_a_gradient():
    inputs = _inputs()
    total, (nll, correct) = cross_entropy(*inputs, vocab_size=VOCAB, chunks=2)
    plain, (plain_nll, plain_correct) = _plain(*inputs)
    np.testing.assert_allclose(total, plain, rtol=1e-5)
    np.testing.assert_allclose(nll, plain_nll, rtol=1e-5)
    np.testing.assert_array_equal(correct, plain_correct)


def test_padding_rows_take_no_probability():
    hidden, head, targets, weights = _inputs()
    loud = head.at[VOCAB:].set(100.0)
    quiet = cross_entropy(hidden, head, targets, weights, vocab_size=VOCAB)[0]
    assert float(cross_entropy(hidden, loud, targets, weights, vocab_size=VOCAB)[0]) == float(quiet)
    grad = jax.grad(lambda h: cross_entropy(hidden, h, targets, weights, vocab_size=VOCAB)[0])(loud)
    assert not np.asarray(grad[VOCAB:]).any()


def test_whole_logits_are_never_held():
    """No array of the compiled program has as many elements as [B, P, V]."""
    batch, length, vocab = 2, 64, 4096
    shapes = [(batch, length, 8), (vocab, 8)]
    abstract = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    weights = jax.ShapeDtypeStruct((batch, length), jnp.float32)

    def loss(hidden, head, targets, weights):
        return cross_entropy(hidden, head, targets, weights, vocab_size=vocab, chunks=8)[0]

    step = jax.jit(jax.grad(loss, argnums=(0, 1)))
    memory = step.lower(*abstract, ids, weights).compile().memory_analysis()
    assert memory.temp_size_in_bytes < batch * length * vocab * 4


@pytest.mark.parametrize(
    ("shape", "chunks"),
    [((32, 256, 1536), 1), ((2, 512, 184_832), 2), ((192, 6400, 184_832), 25), ((1, 9000, 512), 2)],
)
def test_default_chunks(shape, chunks):
    assert default_chunks(*shape) == chunks


@pytest.mark.parametrize("chunks", [1, 3])
def test_an_adapter_equals_its_head_merged(chunks):
    """Value and gradients, of the adapter and of the hidden states; the head itself gets none."""
    hidden, head, targets, weights = _inputs()
    rng = np.random.default_rng(1)
    a, b, rows = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((5, 2), (PADDED, 2), (3, 5))
    )

    def ours(hidden, a, b, rows):
        adapter = HeadAdapter(hidden @ a, b, rows, first_row=4)
        options = {"vocab_size": VOCAB, "chunks": chunks, "adapter": adapter}
        return cross_entropy(hidden, head, targets, weights, **options)

    def merged(hidden, a, b, rows):
        return _plain(hidden, (head + b @ a.T).at[4:7].add(rows), targets, weights)

    arguments, by = (hidden, a, b, rows), {"argnums": (0, 1, 2, 3), "has_aux": True}
    found, expected = (jax.grad(fn, **by)(*arguments) for fn in (ours, merged))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), found, expected
    )
    with_head = lambda head: cross_entropy(  # noqa: E731
        hidden,
        head,
        targets,
        weights,
        vocab_size=VOCAB,
        adapter=HeadAdapter(hidden @ a, b, None, first_row=0),
    )[0]
    assert not np.asarray(jax.grad(with_head)(head)).any()
