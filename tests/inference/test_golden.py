"""Four calls in a row of the reference's policy wrappers (golden group 10b), through ``Policy``."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from tests.inference.scripted import ScriptedSampler, ScriptedVision
from univla_jax.data.actions import ActionStatistics
from univla_jax.episode import Observation
from univla_jax.inference.policy import Policy
from univla_jax.inference.trained import CorpusLayout, Layout, TrainedModel
from univla_jax.tokenizers.action import FastTokenizer
from univla_jax.tokenizers.assets import Assets
from univla_jax.tokenizers.image import ImageSpec
from univla_jax.tokenizers.text_tiktoken import TiktokenText
from univla_jax.tokenizers.vocabulary import Vocabulary

# q01 and q99 of the released policies (UniVLA configs/normalizer_*/norm_stats.json).
QUANTILES = {
    "libero": (
        "-0.7046250000751599 -0.80100000008544 -0.9375000001 -0.11467779149968735"
        " -0.16395000004372 -0.2240490058320433 -1.0000000001",
        "0.93712500009996 0.86775000009256 0.93712500009996 0.13175314309916836"
        " 0.19275000005139997 0.3353504997073735 0.9996000000999599",
    ),
    "calvin": (
        "-0.69960000006996 -0.57760000005776 -0.4336000000433601 -0.42320000004232006"
        " -0.46520000004652007 -1.0000000001 -1.0000000001",
        "0.67640000006764 0.5560000000555998 0.5944000000594398 0.42640000004264"
        " 0.41200000004119985 0.9996000000999599 0.9996000000999599",
    ),
    "simpler": (
        "-0.02887803485105428 -0.04178320091122349 -0.026113155505000457 -0.08117201867235568"
        " -0.09309056401752747 -0.20778717060421048 -1e-10",
        "0.02819482065335177 0.04079562563528227 0.04015785568112329 0.08070396399877966"
        " 0.07745134926258301 0.2016542930635028 0.99980000009996",
    ),
}
TAGS = ("libero_video", "libero_image", "calvin_video", "simpler_video")


def _statistics(wrapper):
    low, high = (tuple(map(float, row.split())) for row in QUANTILES[wrapper])
    zeros = (0.0,) * len(low)
    return ActionStatistics(zeros, zeros, low, high)


@pytest.fixture(scope="module")
def text(shared_dir):
    return TiktokenText.load(shared_dir / "text_vocabulary")


@pytest.fixture(scope="module")
def arrays(golden_dir):
    with np.load(golden_dir / "prompts.npz") as found:
        return {k: v for k, v in found.items() if k.startswith("step|")}


def _policy(case, steps, text, shared_dir):
    """The released policy's assets around a scripted decoder and vision tokenizer."""
    action = FastTokenizer.load(shared_dir / "fast_tokenizers" / case["fast"])
    views = {v: "image_codes" if v == "image" else "gripper_codes" for v in ("image", "wrist")}
    views = {v: key for v, key in views.items() if key in steps[0]}
    spec = ImageSpec(size=(40, 40), min_pixels=64)
    assets = Assets(
        Vocabulary.emu3(action.vocabulary_size),
        text,
        ScriptedVision([step[key] for step in steps for key in views.values()]),
        action,
        {view: spec for view in views},
        {"robot": _statistics(case["wrapper"])},
    )
    layout = Layout(
        layout="policy_video" if case["video_mode"] else "policy_image",
        frames=case["window_size"],
        action_frames=case["time_horizon"],
        frame_spacing=0,
        sequence_length=3200,
        views=tuple(views),
        corpora={"robot": CorpusLayout(5.0, 5, {v: (5, 5) for v in views})},
    )
    policy = Policy(TrainedModel(pathlib.Path("released"), assets, layout, None, None))
    policy._sampler = ScriptedSampler([step["generated"] for step in steps])
    return policy


@pytest.mark.parametrize("tag", TAGS)
def test_step(tag, golden_dir, shared_dir, text, arrays):
    case = next(c for c in json.loads((golden_dir / "step.json").read_text()) if c["tag"] == tag)
    steps = [
        {k.split("|")[-1]: v for k, v in arrays.items() if k.startswith(f"step|{tag}|{n}|")}
        for n in range(case["n_steps"])
    ]
    policy = _policy(case, steps, text, shared_dir)
    session = policy.start()
    frames = {view: np.zeros((40, 40, 3), np.uint8) for view in policy.views}
    eoa = policy.trained.assets.vocabulary.eoa
    for number, step in enumerate(steps):
        (chunk,) = policy.act([Observation(case["goal"], frames)], [session])
        prompt = policy._sampler.prompts[number][0].tolist()
        expected = step["prompt_ids"][0].tolist()
        if case["video_mode"] and number == case["no_eoa_in_call"] + 1:
            boa = policy.trained.assets.vocabulary.boa
            cut = expected.index(boa) + 1 + len(steps[number - 1]["generated"][0])
            expected.insert(cut, eoa)  # the reference goes on without it
        assert prompt == expected
        if number == case["no_eoa_in_call"]:
            assert not chunk.valid and "no end of action" in chunk.reason
            continue
        actions = chunk.actions.astype(np.float64)
        if case["wrapper"] != "simpler":  # the simulator's rule, not the policy's
            actions[:, -1] = np.where(actions[:, -1] > 0, 1, -1)
        tolerance = 1e-5 if case["wrapper"] == "calvin" else 1e-6
        np.testing.assert_allclose(actions, step["action"], rtol=0, atol=tolerance)
