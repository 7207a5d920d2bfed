import dataclasses
import pickle

import numpy as np
import pytest
from univla_jax.sequences.samples import SampleBuilder

from tests.sequences import small
from univla_jax.data.action_conventions import ChunkDeltas
from univla_jax.data.datasets import DATASETS
from univla_jax.errors import UserError


def build(episode, **changes):
    return SampleBuilder(small.config(**changes), small.assets())(episode, np.random.default_rng(0))


def visual(row):
    v = small.assets().vocabulary
    ids = row["tokens"]
    return v.visual_codes(ids[(ids >= v.bov) & (ids <= v.eov)]).reshape(-1, 4)[:, 0].tolist()


def test_video_policy_shows_every_view_at_each_chunk():
    # 6 steps are exactly two chunks: frames 0 and 3, view 1 one code further.
    row = build(small.episode(0, 6))
    assert visual(row) == [0, 1, 3, 4]
    assert row["tokens"].dtype == np.int32 and row["loss_weight"].dtype == np.float32


def test_views_are_taken_in_the_configured_order():
    assert visual(build(small.episode(0, 6), views=("view1", "view0"))) == [1, 0, 4, 3]
    assert visual(build(small.episode(0, 6), views=("view1",))) == [1, 4]


def test_all_views_come_in_the_order_of_the_corpus():
    codes = small.episode(0, 6).codes
    renamed = {"wrist_image": codes["view1"], "image": codes["view0"]}
    assert visual(build(dataclasses.replace(small.episode(0, 6), codes=renamed))) == [0, 1, 3, 4]


def test_actions_are_normalized_and_encoded_chunk_by_chunk():
    episode, given = small.episode(0, 6), small.assets()
    ids = build(episode)["tokens"]
    starts = np.flatnonzero(ids == given.vocabulary.boa)
    ends = np.flatnonzero(ids == given.vocabulary.eoa)
    for chunk, (start, end) in enumerate(zip(starts, ends)):
        codes = given.vocabulary.action_codes(ids[start + 1 : end])
        raw = episode.actions[3 * chunk : 3 * chunk + 3]
        normal = given.statistics["tabletop"].normalize(raw)
        assert codes.tolist() == given.action.encode(normal)


def test_short_episodes_give_fewer_chunks():
    assert len(visual(build(small.episode(0, 5)))) == 2


def test_image_policy_sees_the_first_frame_of_its_chunk():
    row = build(small.episode(0, 3), layout="policy_image", frames=1)
    assert visual(row) == [0, 1]


def test_world_model_spaces_its_frames():
    row = build(small.episode(0, 6), layout="world_model", frames=3, frame_spacing=2)
    assert visual(row) == [0, 2, 4]
    assert (row["loss_weight"] > 0).sum() == 3 * 4
    # the corpus' own spacing, five steps
    assert visual(build(small.episode(0, 10), layout="world_model", frames=2)) == [0, 5]


def test_world_model_draws_one_of_the_named_cameras():
    builder = SampleBuilder(
        small.config(layout="world_model", frame_spacing=3, views=("view0", "view1")),
        small.assets(),
    )
    rng = np.random.default_rng(0)
    firsts = {visual(builder(small.episode(0, 6), rng))[0] for _ in range(20)}
    assert firsts == {0, 1}
    one = dataclasses.replace(
        small.episode(0, 6), codes={"view1": small.episode(0, 6).codes["view1"]}
    )
    assert {visual(builder(one, rng))[0] for _ in range(20)} == {1}
    with pytest.raises(UserError, match="none of the views"):
        builder(dataclasses.replace(one, codes={"front": one.codes["view1"]}), rng)


def test_world_model_needs_no_action_tokenizer():
    given = dataclasses.replace(small.assets(), action=None, statistics={})
    builder = SampleBuilder(small.config(layout="world_model"), given)
    builder(small.episode(0, 10), np.random.default_rng(0))


def test_states_stand_before_their_chunk():
    given = small.assets()
    statistics = given.statistics["tabletop"]
    both = {"tabletop": statistics, "tabletop/state": statistics}
    given = dataclasses.replace(given, statistics=both)
    state = np.linspace(-1, 1, 12, dtype=np.float32).reshape(6, 2)
    episode = dataclasses.replace(small.episode(0, 6), state=state)
    ids = SampleBuilder(small.config(state=True), given)(episode, np.random.default_rng(0))
    ids = ids["tokens"]
    starts = np.flatnonzero(ids == given.vocabulary.boa)
    for moment, start in enumerate(starts):
        codes = given.vocabulary.action_codes(ids[start - 2 : start])
        assert codes.tolist() == given.action.encode(state[3 * moment : 3 * moment + 1])
    with pytest.raises(UserError, match="it has no state"):
        build(small.episode(0, 6), state=True)


def test_chunks_of_deltas_start_at_nothing(monkeypatch):
    deltas = ChunkDeltas(absolute=(1,), angles=())
    row = dataclasses.replace(DATASETS["tabletop"], chunk_deltas=deltas)
    monkeypatch.setitem(DATASETS, "tabletop", row)
    settings = {"layout": "policy_flow", "frames": 1, "packing": False}
    actions = build(small.episode(0, 3), **settings)["actions"]
    raw = small.episode(0, 3).actions
    moved = np.clip(raw[:, 0] - raw[0, 0], -1, 1)
    np.testing.assert_allclose(actions[:, 0], moved, atol=1e-6)
    np.testing.assert_allclose(actions[:, 1], raw[:, 1], atol=1e-6)


def test_texts_of_a_step_are_written_and_missing_ones_named():
    episode = dataclasses.replace(
        small.episode(0, 3),
        texts={"reasoning": ("up",), "question": ("what",), "answer": ("x", "y", "z")},
    )

    def words(**changes):
        ids = build(episode, frames=1, **changes)["tokens"]
        return "".join(chr(i) for i in ids if i < 128)

    assert words(layout="chain_of_thought").endswith("up")
    assert words(layout="question").split("ASSISTANT:")[1] in "xyz"
    assert "what. ASSISTANT:" in words(layout="question")
    assert words(layout="caption").startswith("a") and words(layout="text_to_image")[:4] == "a2*2"
    with pytest.raises(UserError, match="it has no 'answer' text"):
        build(small.episode(0, 3), layout="question", frames=1)


def test_both_labels_weigh_vision():
    row = build(small.episode(0, 6), loss_on="both", vision_weight=0.25)
    assert set(row["loss_weight"].tolist()) == {0.0, 0.25, 1.0}
    assert (row["loss_weight"] == 0.25).sum() == 16


def test_null_prompts_have_their_share():
    builder = SampleBuilder(small.config(null_prompt_prob=0.3), small.assets())
    rng = np.random.default_rng(0)
    lengths = [len(builder(small.episode(0, 6), rng)["tokens"]) for _ in range(300)]
    assert np.mean(np.array(lengths) == min(lengths)) == pytest.approx(0.3, abs=0.07)


def test_errors_name_the_episode():
    short, other = small.episode(4, 2), dataclasses.replace(small.episode(0, 9), corpus="mars")
    cases = [
        (short, {}, "episode tabletop/a4: 2 steps are fewer than one chunk of 3"),
        (small.episode(0, 9), {"sequence_length": 20}, r"a0: its sample has \d+ tokens"),
        (small.episode(0, 9), {"views": ("front",)}, "a0: no view 'front'"),
        (other, {}, "mars/a0: no statistics of 'mars'"),
        (other, {"layout": "world_model"}, "unknown corpus 'mars'"),
    ]
    for episode, changes, message in cases:
        with pytest.raises(UserError, match=message):
            build(episode, **changes)


def test_builder_pickles_for_workers():
    builder = SampleBuilder(small.config(), small.assets())
    copy = pickle.loads(pickle.dumps(builder))
    episode = small.episode(0, 9)
    for a, b in zip(
        builder(episode, np.random.default_rng(3)).values(),
        copy(episode, np.random.default_rng(3)).values(),
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "policy_vdeo"}, "data.layout: 'policy_vdeo' is not one of"),
        ({"loss_on": "actions"}, "data.loss_on"),
        ({"batch_size": 0}, "data.batch_size: 0, expected at least 1"),
        ({"weights": (1.0, 2.0)}, "2 weights for 1 stores"),
        ({"weights": (0.0,)}, "weights are positive"),
        ({"null_prompt_prob": 1.5}, "data.null_prompt_prob"),
        ({"held_out_every": 1}, "data.held_out_every"),
        ({"layout": "policy_image"}, "shows one moment"),
        ({"layout": "world_model", "state": True}, "has no place for it"),
        ({"layout": "policy_flow", "frames": 1}, "set packing=False"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(UserError, match=message):
        small.config(**changes)
