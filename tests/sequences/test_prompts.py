import numpy as np
import pytest
from univla_jax.sequences.history import History, closed

from tests.sequences import small
from tests.sequences.test_layouts import FRAME, chunk, code, spell
from univla_jax.errors import UserError
from univla_jax.sequences import layouts, prompts
from univla_jax.sequences.frames import FREE, frame_separator, image_grammar, video_grammar
from univla_jax.sequences.text_encoder import TextEncoder


@pytest.fixture
def text_encoder():
    given = small.assets()
    return TextEncoder(given.vocabulary, given.text)


def test_prompts_are_training_sequences_cut_short(text_encoder):
    ids, views = chunk(text_encoder, 1, 2), [code(1, 2), code(3, 4)]
    whole = layouts.policy_image(text_encoder, "go", views, ids).ids
    prompt = prompts.policy_prompt(text_encoder, "go", views)
    np.testing.assert_array_equal(np.concatenate([prompt, ids]), whole[:-1])
    thinking = layouts.chain_of_thought(text_encoder, "go", views, "x", ids).ids
    prompt = prompts.reasoning_prompt(text_encoder, "go", views)
    np.testing.assert_array_equal(prompt, thinking[: len(prompt)])
    asked = layouts.question(text_encoder, "go", views, "yes").ids
    prompt = prompts.ask_prompt(text_encoder, "go", views)
    np.testing.assert_array_equal(prompt, asked[:-4])
    drawn = layouts.text_to_image(text_encoder, "go", np.array([[1, 2]])).ids
    prompt = prompts.draw_prompt(text_encoder, "go", 1, 2)
    np.testing.assert_array_equal(prompt, drawn[: len(prompt)])


def test_imagining_writes_the_world_model_sequence(text_encoder):
    frames = np.concatenate([code(1, 2), code(3, 4), code(5, 6)])
    whole = layouts.world_model(text_encoder, "go", [frames]).ids
    sequence = [prompts.imagine_prompt(text_encoder, "go", frames[:1])]
    for frame in frames[1:]:
        sequence += [
            text_encoder.vocabulary.visual_ids(frame.ravel()),
            frame_separator(text_encoder, 1, 2),
        ]
    written = np.concatenate(sequence)
    end = len(frame_separator(text_encoder, 1, 2)) - 2
    np.testing.assert_array_equal(written[:-end], whole)


def test_grammars_describe_the_layouts(text_encoder):
    v = text_encoder.vocabulary
    assert (image_grammar(text_encoder, 2, 3) == v.eol).sum() == 2
    video = video_grammar(text_encoder, 1, 2, 2)
    assert video.tolist() == [FREE, FREE, v.eof, FREE, FREE, v.eof, v.eoi, v.eos]
    drawn = layouts.text_to_image(text_encoder, "", np.array([[1, 2, 3], [4, 5, 6]])).ids
    tail = drawn[np.flatnonzero(drawn == v.img)[0] + 1 :]
    grammar = image_grammar(text_encoder, 2, 3)
    np.testing.assert_array_equal(tail[grammar != FREE], grammar[grammar != FREE])


def test_history_of_a_video_policy_is_its_training_sequence(text_encoder):
    frames = [code(1, 2), code(3, 4), code(5, 6)]
    actions = [chunk(text_encoder, 1), chunk(text_encoder, 2)]
    end = [text_encoder.vocabulary.eoa]
    opening = prompts.opening(text_encoder, "go")
    history = History().observe(prompts.turn_prompt(text_encoder, frames[:1]))
    assert spell(text_encoder, history.prompt(opening)) == f"<bos> g o {FRAME.format(1, 2)} <boa>"
    history = history.act(np.concatenate([actions[0], end]))
    history = history.observe(prompts.turn_prompt(text_encoder, frames[1:2]))
    whole = layouts.policy_video(text_encoder, "go", [np.concatenate(frames[:2])], actions).ids
    np.testing.assert_array_equal(history.prompt(opening), whole[:-2])
    history = history.act(np.concatenate([actions[1], end]))
    history = history.observe(prompts.turn_prompt(text_encoder, frames[2:]))
    third = spell(text_encoder, history.prompt(opening))
    assert third.startswith(f"<bos> g o {FRAME.format(3, 4)} <boa> a2 <eoa>")
    assert len(history.turns) == 2 and len(history.actions) == 1


def test_history_of_one_observation_is_the_image_policy(text_encoder):
    history = History(window=1)
    for frame in (code(1, 2), code(3, 4)):
        history = history.observe(prompts.turn_prompt(text_encoder, [frame]))
        prompt = history.prompt(prompts.opening(text_encoder, "go"))
        np.testing.assert_array_equal(prompt, prompts.policy_prompt(text_encoder, "go", [frame]))
        history = history.act(chunk(text_encoder, 1))


def test_history_refuses_a_wrong_order(text_encoder):
    turn = prompts.turn_prompt(text_encoder, [code(1, 2)])
    waiting = History().observe(turn)
    cases = [
        lambda: History(window=0),
        lambda: History().prompt(np.zeros(1, np.int32)),
        lambda: History().act(turn),
        lambda: waiting.observe(turn),
    ]
    for call in cases:
        with pytest.raises(UserError, match="history"):
            call()


def test_closed_ends_with_exactly_one_eoa(text_encoder):
    v = text_encoder.vocabulary
    for generated in ([5, 6], [5, 6, v.eoa], [5, 6, v.eoa, 7, v.eoa]):
        assert closed(v, generated).tolist() == [5, 6, v.eoa]
