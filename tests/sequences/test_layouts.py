import numpy as np
import pytest

from tests.sequences import small
from univla_jax.errors import UserError
from univla_jax.sequences import layouts
from univla_jax.sequences.text_encoder import TextEncoder
from univla_jax.sequences.tokens import Role

T, M, V, S, H, A, R = (
    Role.TEXT,
    Role.MARKUP,
    Role.VISION,
    Role.STATE,
    Role.THOUGHT,
    Role.ACTION,
    Role.ANSWER,
)


SPECIALS = ("bos", "eos", "bot", "eot", "boa", "eoa", "eol", "eof", "img", "boi", "eoi")


@pytest.fixture
def text_encoder():
    given = small.assets()
    return TextEncoder(given.vocabulary, given.text)


def code(*values):
    """One frame 1 x n of the given codes."""
    return np.array(values, np.uint16).reshape(1, 1, -1)


def chunk(text_encoder, *values):
    return text_encoder.vocabulary.action_ids(np.array(values))


def spell(text_encoder, tokens):
    """Readable form: letters, <special>, v<code>, a<code>."""
    v = text_encoder.vocabulary
    names = {getattr(v, n): f"<{n}>" for n in SPECIALS}
    words = []
    for i in np.asarray(getattr(tokens, "ids", tokens)).tolist():
        if i in names:
            words.append(names[i])
        elif v.bov <= i <= v.eov:
            words.append(f"v{i - v.bov}")
        elif v.action_first <= i <= v.action_last:
            words.append(f"a{v.action_last - i}")
        else:
            words.append(chr(i))
    return " ".join(words)


FRAME = "<boi> 1 * 1 * 2 <img> v{} v{} <eof> <eoi>"


def test_policy_video_interleaves_frames_and_chunks(text_encoder):
    first = np.concatenate([code(1, 2), code(3, 4)])
    second = np.concatenate([code(5, 6), code(7, 8)])
    chunks = [chunk(text_encoder, 1, 2), chunk(text_encoder, 3)]
    tokens = layouts.policy_video(text_encoder, "go", [first, second], chunks)
    expected = [
        "<bos> g o",
        FRAME.format(1, 2),
        FRAME.format(5, 6),
        "<boa> a1 a2 <eoa>",
        FRAME.format(3, 4),
        FRAME.format(7, 8),
        "<boa> a3 <eoa>",
    ]
    assert spell(text_encoder, tokens) == " ".join(expected)
    frame = [M] * 7 + [V] * 2 + [M] * 2
    assert tokens.roles.tolist() == [T] * 3 + frame * 2 + [A] * 4 + frame * 2 + [A] * 3
    assert tokens.ids.dtype == np.int32


def test_policy_image_with_and_without_state(text_encoder):
    ids = chunk(text_encoder, 4)
    plain = layouts.policy_image(text_encoder, "a", [code(1, 2)], ids)
    assert spell(text_encoder, plain) == f"<bos> a {FRAME.format(1, 2)} <boa> a4 <eoa>"
    state = layouts.policy_image(text_encoder, "a", [code(1, 2)], ids, chunk(text_encoder, 0, 1))
    assert spell(text_encoder, state) == f"<bos> a {FRAME.format(1, 2)} a0 a1 <boa> a4 <eoa>"
    assert state.roles.tolist()[-5:] == [S, S, A, A, A]


def test_policy_video_writes_states_before_their_chunk(text_encoder):
    two = np.concatenate([code(1, 2), code(3, 4)])
    ids = [chunk(text_encoder, 1), chunk(text_encoder, 2)]
    tokens = layouts.policy_video(text_encoder, "", [two], ids, state=ids)
    text = spell(text_encoder, tokens)
    assert f"{FRAME.format(1, 2)} a1 <boa> a1 <eoa>" in text
    assert f"{FRAME.format(3, 4)} a2 <boa> a2 <eoa>" in text


def test_policy_flow_ends_with_boa(text_encoder):
    tokens = layouts.policy_flow(text_encoder, "a", [code(1, 2)])
    assert spell(text_encoder, tokens).endswith("<eoi> <boa>") and tokens.roles[-1] == A


def test_world_model_gives_each_frame_its_own_block(text_encoder):
    two = np.concatenate([code(1, 2), code(3, 4)])
    tokens = layouts.world_model(text_encoder, "", [two])
    assert spell(text_encoder, tokens) == f"<bos> {FRAME.format(1, 2)} {FRAME.format(3, 4)}"


def test_frames_of_one_block_are_joined_by_eof(text_encoder):
    two = np.concatenate([code(1, 2), code(3, 4)])
    tokens = layouts.policy_image(text_encoder, "", [two], chunk(text_encoder, 1))
    joined = "<bos> <boi> 2 * 1 * 2 <img> v1 v2 <eof> v3 v4 <eof> <eoi> <boa>"
    assert spell(text_encoder, tokens).startswith(joined)


def test_chain_of_thought_thinks_before_it_acts(text_encoder):
    tokens = layouts.chain_of_thought(text_encoder, "a", [code(1, 2)], "hm", chunk(text_encoder, 1))
    assert spell(text_encoder, tokens).endswith("<eoi> <bot> h m <eot> <boa> a1 <eoa>")
    assert tokens.roles.tolist()[-7:] == [H, H, H, H, A, A, A]


def test_chat_caption_and_drawing(text_encoder):
    asked = layouts.question(text_encoder, "q", [code(1, 2)], "yes")
    text = spell(text_encoder, asked).replace(" ", "")
    frame = FRAME.format(1, 2).replace(" ", "")
    assert text == f"<bos>Youareahelpfulassistant.USER:{frame}q.ASSISTANT:yes<eos>"
    assert asked.roles.tolist()[-4:] == [R] * 4
    described = layouts.caption(text_encoder, "c", [code(1, 2)])
    assert spell(text_encoder, described) == f"<bos> c {FRAME.format(1, 2)} <eos>"
    grid = np.array([[1, 2], [3, 4]])
    drawn = spell(text_encoder, layouts.text_to_image(text_encoder, "d", grid))
    rows = "v1 v2 <eol> v3 v4 <eol> <eof> <eoi>"
    assert drawn == f"<bos> d <boi> 2 * 2 <img> {rows} <eos>"


def test_unfit_input_is_refused(text_encoder):
    two = np.concatenate([code(1, 2), code(3, 4)])
    ids = chunk(text_encoder, 1)
    cases = {
        "same number": lambda: layouts.world_model(text_encoder, "", [two, code(1)]),
        "1 action chunks for 2": lambda: layouts.policy_video(text_encoder, "", [two], [ids]),
        r"\[T, h, w\]": lambda: layouts.policy_image(text_encoder, "", [two[0]], ids),
        "visual code 12": lambda: layouts.world_model(text_encoder, "", [code(12)]),
        r"\[h, w\]": lambda: layouts.text_to_image(text_encoder, "", two),
    }
    for message, call in cases.items():
        with pytest.raises(UserError, match=message):
            call()


def test_words_are_encoded_once_and_checked(text_encoder):
    assert text_encoder.encode("ab") is text_encoder.encode("ab")
    assert not text_encoder.encode("ab").flags.writeable
    with pytest.raises(UserError, match="text ids end at 128"):
        text_encoder.encode("é")
