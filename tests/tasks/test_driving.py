"""Driving sequences: the paper's form, DriveVLA-W0's form, and the driving world model."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.tasks.driving_runs import GRID, MOTIONS, VIEWS, assets, motions, run, task
from univla_jax.errors import UserError
from univla_jax.sequences.tokens import LABELS, Role

VOCABULARY = assets().vocabulary


def words(text):
    return assets().text.encode(text)


def ids_of(*moves):
    """FAST ids of motions in physical units."""
    codes = assets().action.encode(MOTIONS.normalize(np.stack(moves)))
    return VOCABULARY.action_ids(np.asarray(codes)).tolist()


def frame(codes):
    v = VOCABULARY
    head = [v.boi, *words("1*2*3"), v.img]
    return [*head, *v.visual_ids(np.full(6, codes)).tolist(), v.eof, v.eoi]


def drawn(name, seed=0, **settings):
    spec = task(name, **settings).sample(run(), "go", np.random.default_rng(seed))
    return spec, spec.fill(VOCABULARY).ids.tolist()


def test_the_papers_form():
    spec, ids = drawn("driving", views=("image",))
    (_, t) = spec.shown[0]
    moved, v = motions(), VOCABULARY
    state = run().state[t]
    status = assets().action.encode(np.clip(state[None, :4] / 8, -1, 1).astype(np.float32))
    assert ids == [
        v.bos,
        *words(run().texts["command"][t]),
        *frame(t),
        *v.action_ids(np.asarray(status)).tolist(),
        v.boa,
        *ids_of(*moved[t : t + 8]),
        v.eoa,
        v.eos,
    ]
    learned = np.isin(spec.tokens.roles, list(LABELS[task("driving").labels]))
    assert learned.sum() == 2 + len(ids_of(*moved[t : t + 8]))
    assert spec.tokens.roles[-1] == Role.TEXT  # eos is not learned


def test_the_form_of_drivevla_w0():
    spec, ids = drawn("driving_vava", views=VIEWS)
    (_, t), (_, same) = spec.shown
    assert t == same
    moved, v, phrases = motions(), VOCABULARY, run().texts["command"]
    known = run().state[t, 12:].reshape(5, 3)
    assert ids == [
        v.bos,
        *words(phrases[t - 2]),
        *frame(max(t - 2, 0)),
        *ids_of(*known[:3]),
        v.boa,
        *ids_of(*moved[t - 2 : t]),
        v.eoa,
        *words(phrases[t]),
        *frame(t),
        *ids_of(*known[2:]),
        v.boa,
        *ids_of(*moved[t : t + 8]),
        v.eoa,
    ]
    roles = spec.tokens.roles
    labels = LABELS[task("driving_vava").labels]
    assert labels == {Role.VISION, Role.ACTION}
    assert (roles == Role.VISION).sum() == 2 * GRID[0] * GRID[1]
    assert (roles == Role.STATE).sum() == len(ids_of(*known[:3])) + len(ids_of(*known[2:]))
    blocks = len(ids_of(*moved[t - 2 : t])) + len(ids_of(*moved[t : t + 8]))
    assert (roles == Role.ACTION).sum() == 4 + blocks


def test_moments_alone_are_drawn():
    for name in ("driving", "driving_vava", "driving_flow"):
        views = ("image",) if name == "driving" else VIEWS
        steps = {drawn(name, seed, views=views)[0].shown[-1][1] for seed in range(60)}
        assert steps == set(range(2, 9)), name


@pytest.mark.parametrize("name", ["driving", "driving_vava", "driving_flow"])
def test_a_policy_is_prompted_with_what_it_was_trained_on(name):
    views = ("image",) if name == "driving" else VIEWS
    made, episode = task(name, views=views), run()
    spec, ids = drawn(name, 3, views=views)
    t = spec.shown[0][1]
    (state,) = made.encode_states("road", episode.state[t : t + 1])
    command = episode.texts["command"][t]
    codes = [episode.codes[view][t : t + 1] for view in views]
    moment = made.moment_prompt(codes, state, instruction=command)
    prompt = np.concatenate([made.opening(command), moment]).tolist()
    assert prompt == ids[: len(prompt)] and prompt[-1] == VOCABULARY.boa
    empty = len(made.moment_prompt(codes)) + made.max_state_tokens(27)
    assert len(moment) <= empty


def test_a_null_prompt_names_no_command():
    spec = task("driving_vava", views=VIEWS).sample(run(), "", np.random.default_rng(0))
    assert (spec.tokens.roles == Role.TEXT).sum() == 1


def test_the_flow_policy_has_numbers_beside_its_prompt():
    spec, ids = drawn("driving_flow", views=VIEWS)
    t = spec.shown[0][1]
    assert ids[-1] == VOCABULARY.boa and spec.actions.shape == (8, 3)
    np.testing.assert_allclose(MOTIONS.unnormalize(spec.actions), motions()[t : t + 8], atol=1e-6)


def test_the_world_model_shows_motions_between_frames():
    spec, ids = drawn("driving_world_model", frames=3)
    steps = [t for _, t in spec.shown]
    assert np.diff(steps).tolist() == [2, 2] and steps[0] >= 2 and steps[-1] <= 12
    v, moved, episode = VOCABULARY, motions(), run()
    wanted = [v.bos]
    for t in steps:
        known = episode.state[t, 12:].reshape(5, 3)[2:]
        wanted += [*words(episode.texts["command"][t]), *frame(t), *ids_of(*known)]
        wanted += [v.boa, *ids_of(*moved[t : t + 2]), v.eoa]
    assert ids == wanted


def test_every_frame_of_the_world_model_has_motions():
    everywhere = dataclasses.replace(run(), texts={**run().texts, "image": ("x.jpg",) * 16})
    made = task("driving_world_model", frames=2)
    specs = [made.sample(everywhere, "go", np.random.default_rng(seed)) for seed in range(40)]
    assert {spec.shown[-1][1] for spec in specs} == set(range(4, 15))


def test_the_world_model_is_prompted_with_motions():
    made = task("driving_world_model", frames=2)
    moved = motions()
    context = np.full((2, *GRID), 7)
    prompt = made.prompt("go left", context, moved[:7], "road").tolist()
    v = VOCABULARY
    assert prompt == [
        v.bos,
        *words("go left"),
        *frame(7),
        *ids_of(*moved[:3]),
        v.boa,
        *ids_of(*moved[3:5]),
        v.eoa,
        *words("go left"),
        *frame(7),
        *ids_of(*moved[2:5]),
        v.boa,
        *ids_of(*moved[5:7]),
        v.eoa,
        *words("go left"),
        v.boi,
        *words("1*2*3"),
        v.img,
    ]
    with pytest.raises(UserError, match=r"shape \(6, 3\), expected \(7, 3\)"):
        made.prompt("go", context, moved[:6], "road")
    with pytest.raises(UserError, match="motions of shape none"):
        made.prompt("go", context)


def test_what_does_not_decode_drives_straight_on():
    fallback = task("driving", views=("image",)).fallback(run().state[3], 8)
    np.testing.assert_allclose(fallback[:, 0], 0.5 * 7.0)
    assert not fallback[:, 1:].any() and fallback.shape == (8, 3)


def test_other_episodes_are_refused():
    other = dataclasses.replace(run(), texts={})
    for name in ("driving", "driving_vava", "driving_world_model"):
        with pytest.raises(UserError, match="is no driving run"):
            task(name, views=VIEWS).sample(other, "go", np.random.default_rng(0))
    idle = dataclasses.replace(run(), texts={**run().texts, "token": ("",) * 16})
    with pytest.raises(UserError, match="no moment with 8 motions"):
        task("driving", views=("image",)).sample(idle, "go", np.random.default_rng(0))
    with pytest.raises(UserError, match="1 views; set"):
        task("driving_vava", views=("image",)).sample(run(), "go", np.random.default_rng(0))
