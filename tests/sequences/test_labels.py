import dataclasses

import numpy as np
import pytest
from univla_jax.sequences.labels import LABELS, label_mask, labeled_example, loss_weight

from tests.sequences import small
from tests.sequences.test_layouts import chunk, code
from univla_jax.errors import UserError
from univla_jax.pipeline.batch import Batch, Example
from univla_jax.sequences import layouts
from univla_jax.sequences.text_encoder import TextEncoder


@pytest.fixture
def tokens():
    given = small.assets()
    text_encoder = TextEncoder(given.vocabulary, given.text)
    ids = chunk(text_encoder, 1)
    return layouts.policy_image(text_encoder, "go", [code(1, 2)], ids, state=ids)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        # bos g o | boi 1 * 1 * 2 img | v v | eof eoi | state | boa a eoa
        ("action", "000 0000000 00 00 0 111"),
        ("vision", "000 0000000 vv 00 0 000"),
        ("both", "000 1111111 vv 11 0 111"),
        ("all", "011 1111111 vv 11 0 111"),
        ("thought_and_action", "000 0000000 00 00 0 111"),
        ("answer", "000 0000000 00 00 0 000"),
    ],
)
def test_weights_by_role(tokens, choice, expected):
    weight = loss_weight(tokens, LABELS[choice], vision_weight=0.5)
    wanted = {"0": 0.0, "1": 1.0, "v": 0.5}
    assert weight.dtype == np.float32
    assert weight.tolist() == [wanted[c] for c in expected.replace(" ", "")]


def test_first_token_is_labeled_but_never_learnt(tokens):
    assert label_mask(tokens, LABELS["all"])[0]
    assert loss_weight(tokens, LABELS["all"])[0] == 0


def test_labels_and_weights_agree_for_a_zero_vision_weight(tokens):
    assert label_mask(tokens, LABELS["vision"]).sum() == 2
    assert not loss_weight(tokens, LABELS["vision"], vision_weight=0.0).any()


def test_example_is_one_segment_and_pads_right(tokens):
    row = labeled_example(tokens, LABELS["action"]).pad_to(20, pad=9)
    used = len(tokens)
    assert row.tokens[used:].tolist() == [9] * (20 - used)
    assert row.segment_ids.tolist() == [1] * used + [0] * (20 - used)
    assert row.positions.tolist() == [*range(used), *[0] * (20 - used)]
    assert not row.loss_weight[used:].any()
    with pytest.raises(UserError, match="does not fit sequence_length=5"):
        row.pad_to(5, pad=9)


def test_batch_knows_its_valid_rows(tokens):
    row = labeled_example(tokens, LABELS["action"]).pad_to(20, pad=9)
    nothing = Example.single(np.zeros(0, np.int32), np.zeros(0, np.float32)).pad_to(20, pad=9)
    rows = [dataclasses.asdict(r) for r in (row, nothing)]
    batch = Batch(**{key: np.stack([r[key] for r in rows]) for key in rows[0]})
    assert batch.tokens.shape == (2, 20) and batch.valid.tolist() == [True, False]
    assert batch.useful_fraction == pytest.approx(len(tokens) / 40)
    assert isinstance(Example.single(tokens.ids, np.zeros(len(tokens), np.float32)), Example)
