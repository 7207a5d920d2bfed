"""The table of a partial warm start: every parameter of both sides is in it, and what it does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from univla_jax.errors import UserError
from univla_jax.tokenizers.text import SentencePieceTextTokenizer
from univla_jax.training.warm_start import (
    RowMap,
    describe_transfers,
    plan_transfers,
    same_pieces,
    transfer_all,
)

ROWS = RowMap(np.array([0, 1, 4]), np.array([0, 1, 2]), "special, text, no action")
SAVED = {
    "embedding": (6, 2),
    "head": (6, 2),
    "norm/scale": (2,),
    "old/kernel": (3,),
    "stack/layers/mlp/up/kernel": (3, 2, 4),
    "stack/layers/attention/query/kernel": (3, 2, 2, 1),
}
WANTED = {
    "embedding": (4, 2),
    "head": (4, 2),
    "norm/scale": (2,),
    "expert/kernel": (5,),
    "stack/layers/mlp/up/kernel": (4, 2, 4),
    "stack/layers/attention/query/kernel": (4, 2, 1, 2),
}


def test_every_parameter_is_in_the_table():
    table = plan_transfers(SAVED, WANTED, ROWS)
    assert {line.name: line.kind for line in table} == {
        "embedding": "rows",
        "head": "rows",
        "norm/scale": "taken",
        "old/kernel": "dropped",
        "expert/kernel": "new",
        "stack/layers/mlp/up/kernel": "layers",
        "stack/layers/attention/query/kernel": "new",
    }
    text = describe_transfers(table)
    assert text.startswith("1 taken, 2 rows, 1 layers, 2 new, 1 dropped")
    assert "3 of 4 (special, text, no action); 1 new, 3 dropped" in text
    assert "the first 3 of 3; 1 new" in text
    assert "(4, 2, 1, 2); (3, 2, 2, 1) there is dropped" in text


def test_what_is_taken_lands_where_it_belongs():
    table = plan_transfers(SAVED, WANTED, ROWS)
    saved = {k: jnp.arange(1.0, 1 + np.prod(s)).reshape(s) for k, s in SAVED.items()}
    fresh = {"embedding": jnp.zeros((4, 2)), "expert": {"kernel": jnp.zeros(5)}}
    made = transfer_all(table, fresh, saved, ROWS, None)
    np.testing.assert_array_equal(made["embedding"][:3], np.asarray(saved["embedding"])[[0, 1, 4]])
    assert not np.asarray(made["embedding"][3]).any()
    assert not np.asarray(made["expert"]["kernel"]).any()


def test_equal_tables_are_taken_whole():
    same = RowMap(np.arange(6), np.arange(6), "all")
    kinds = {line.name: line.kind for line in plan_transfers(SAVED, SAVED, same)}
    assert set(kinds.values()) == {"taken"}


def test_text_ids_of_two_tokenizers_are_matched_by_what_they_stand_for():
    first = SentencePieceTextTokenizer.fit(["lift the red block"] * 3, 300)
    second = SentencePieceTextTokenizer.fit(
        ["where is the red block?"] * 3, 300, symbols=["[", "]"]
    )
    matched = same_pieces(first, second)
    for word in (" red", " block", "A"):
        (old,), (new,) = first.encode(word), second.encode(word)
        assert matched[new] == old
    assert second.encode("[")[0] not in matched
    assert all(first.pieces[old] == second.pieces[new] for new, old in matched.items())


def test_nothing_that_fits():
    with pytest.raises(UserError, match="nothing of the earlier stage fits"):
        plan_transfers({"a": (1,)}, {"b": (1,)}, ROWS)


@pytest.mark.slow
def test_a_run_of_more_layers_starts_from_what_fits(world, tmp_path):
    from tests.training import tiny_run
    from univla_jax.checkpoints import find_checkpoint, load_arrays, saved_arrays
    from univla_jax.training.train_loop import WARM_START_FILE, train

    train(tiny_run.config(world, total_steps=1), tmp_path / "base", progress=False)
    deeper = tiny_run.config(
        world,
        total_steps=1,
        init_from=str(tmp_path / "base"),
        model__overrides={"num_layers": 3},
        optimizer={"learning_rate": 1e-9, "min_learning_rate": 1e-9},
        warm_start="partial",
    )
    train(deeper, tmp_path / "deep", progress=False)
    table = (tmp_path / "deep" / WARM_START_FILE).read_text()
    assert table.startswith("3 taken, 9 layers\n")
    name = "params/stack/layers/mlp/up/kernel"
    found = []
    for folder in ("base", "deep"):
        checkpoint = find_checkpoint(tmp_path / folder)
        kernel = {"kernel": saved_arrays(checkpoint)[name]}
        tree = {"params": {"stack": {"layers": {"mlp": {"up": kernel}}}}}
        found.append(np.asarray(jax.tree.leaves(load_arrays(checkpoint, tree))[0]))
    np.testing.assert_allclose(found[1][:2], found[0], atol=1e-6)
    assert found[1][2].any()
