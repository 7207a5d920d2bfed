"""Group 10b: calls of the reference's policy wrappers in a row."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tests.inference.scripted import ScriptedPrefixCache, ScriptedVision
from tests.parity_groups import lenient_fast
from tests.parity_groups.actions import reference_statistics
from tests.parity_groups.checks import Check, Golden, close, equal
from tests.parity_groups.sequences import lexicon_of
from univla_jax.assets import Assets
from univla_jax.data import action_conventions
from univla_jax.episode import Observation
from univla_jax.inference.loaded_model import LoadedModel
from univla_jax.inference.policy import Policy
from univla_jax.normalization import ActionStatistics
from univla_jax.tasks import CorpusRecord, TaskRecord
from univla_jax.tasks.base import TaskSettings
from univla_jax.tasks.history import History
from univla_jax.tasks.policy_video import PolicyVideo
from univla_jax.tokenizers.image import ImageSpec
from univla_jax.tokenizers.vocabulary import Vocabulary

ACTIONS = {"calvin": 1e-5}  # its wrapper computes in float32
OTHERWISE = 1e-6
NORMALIZERS = {"simpler": "config_bridge"}  # the others are named as their wrapper
VIEWS = {"image": "image_codes", "wrist": "gripper_codes"}


def step(golden: Golden) -> Iterator[Check]:
    """Prompts, actions and allowed ids of every call of every wrapper.

    Twice: piece by piece with the reference's own treatment of a generation without eoa, and
    through ``Policy``, which calls such a chunk invalid and closes it in its history.
    """
    arrays, statistics = golden.arrays("prompts"), golden.arrays("normalize")
    for case in golden.json("step"):
        prefix = f"step|{case['tag']}|"
        calls: list[dict[str, np.ndarray]] = [{} for _ in range(case["n_steps"])]
        for key in (k for k in arrays if k.startswith(prefix)):
            number, name = key.removeprefix(prefix).split("|")
            calls[int(number)][name] = arrays[key]
        name = NORMALIZERS.get(case["wrapper"], f"config_{case['wrapper']}")
        normalizer = reference_statistics(statistics, name)
        yield from _pieces(golden, case, calls, normalizer)
        yield from _policy_calls(golden, case, calls, normalizer)


def _pieces(
    golden: Golden, case: Mapping[str, Any], calls: Sequence[Mapping], normalizer: ActionStatistics
) -> Iterator[Check]:
    """History and lenient decoding; the last generated id is cut whatever it is."""
    text_encoder, tokenizer = lexicon_of(golden), golden.fast(case["fast"])
    history = History(case["window_size"] if case["video_mode"] else 1)
    vocabulary, task = text_encoder.vocabulary, PolicyVideo(TaskSettings(), text_encoder)
    for number, call in enumerate(calls):
        name, generated = f"{case['tag']}|{number}", call["generated"].ravel()
        views = [call[key] for key in VIEWS.values() if key in call]
        history = history.observe(task.moment_prompt(views))
        prompt = history.prompt(task.opening(case["goal"]))
        yield equal(name, "prompt ids", prompt, call["prompt_ids"].ravel())
        history = history.act(generated)
        codes = (vocabulary.action_last - generated[:-1]).tolist()
        shape = case["time_horizon"], case["action_dim"]
        decoded = lenient_fast.decode(tokenizer, codes, *shape)
        yield from _actions(name, "actions", case, normalizer.unnormalize(decoded), call)


def _actions(
    name: str, what: str, case: Mapping[str, Any], ours: np.ndarray, call: Mapping
) -> Iterator[Check]:
    tolerance = ACTIONS.get(case["wrapper"], OTHERWISE)
    if case["wrapper"] != "simpler":
        ours = action_conventions.sign_gripper(ours)
    yield close(
        name, f"{what} ({tolerance:.0e})", ours, call["action"].reshape(ours.shape), tolerance
    )
    if "env_action" in call:
        commands = action_conventions.widowx_commands(ours)
        theirs = call["env_action"].reshape(commands.shape)
        yield close(name, f"{what}, as commands", commands, theirs, OTHERWISE)


def _policy_calls(
    golden: Golden, case: Mapping[str, Any], calls: Sequence[Mapping], normalizer: ActionStatistics
) -> Iterator[Check]:
    policy = scripted_policy(golden, case, calls, normalizer)
    vocabulary = policy.loaded.assets.vocabulary
    yield _allowed(case, policy)
    session = policy.start()
    acted: list[np.ndarray] = []
    for number, call in enumerate(calls):
        name, generated = f"{case['tag']}|{number}", call["generated"].ravel()
        (chunk,) = policy.act([_observation(case, policy, calls)], [session])
        expected = _with_eoa(call["prompt_ids"].ravel(), acted, vocabulary)
        prompt = policy.action_decoder.prefix_cache.prompts[number][0]
        yield equal(name, "prompt ids of Policy", prompt, expected)
        finished = generated[-1] == vocabulary.eoa
        if not finished:
            yield equal(name, "unfinished chunks invalid", chunk.valid, False)
        elif chunk.valid:
            yield from _actions(name, "actions of Policy", case, chunk.actions, call)
        acted.append(generated)


def _with_eoa(
    prompt: np.ndarray, acted: Sequence[np.ndarray], vocabulary: Vocabulary
) -> np.ndarray:
    """The reference's prompt, each earlier action closed where the reference leaves it open."""
    behind = np.flatnonzero(prompt == vocabulary.boa)[:-1] + 1
    shown = zip(behind, acted[len(acted) - len(behind) :])
    open_ends = [start + len(ids) for start, ids in shown if ids[-1] != vocabulary.eoa]
    return np.insert(prompt, open_ends, vocabulary.eoa)


def _allowed(case: Mapping[str, Any], policy: Policy) -> Check:
    """The ids that may be generated; the reference allows one more, which decodes to nothing."""
    lowest, highest, eoa, count = case["allowed_first_last_eoa_count"]
    ids = np.sort(policy.action_decoder.rules.allowed)
    ours = [int(ids[0]), int(ids[-2]), int(ids[-1]), len(ids)]
    return equal(case["tag"], "allowed ids", ours, [lowest + 1, highest, eoa, count - 1])


def _grids(calls: Sequence[Mapping]) -> dict[str, tuple[int, int]]:
    """Rows and columns of the codes of each view."""
    first = calls[0]
    return {view: first[key].shape[-2:] for view, key in VIEWS.items() if key in first}


def _observation(case: Mapping, policy: Policy, calls: Sequence[Mapping]) -> Observation:
    grids = _grids(calls)
    frames = {v: np.zeros((8 * grids[v][0], 8 * grids[v][1], 3), np.uint8) for v in policy.views}
    return Observation(case["goal"], frames)


def scripted_policy(
    golden: Golden, case: Mapping[str, Any], calls: Sequence[Mapping], normalizer: ActionStatistics
) -> Policy:
    """The released policy's assets around a scripted decoder and vision tokenizer."""
    action, grids = golden.fast(case["fast"]), _grids(calls)
    assets = Assets(
        Vocabulary.emu3(action.vocabulary_size),
        golden.text(),
        ScriptedVision([call[VIEWS[view]] for call in calls for view in grids]),
        action,
        {v: ImageSpec(size=(8 * h, 8 * w), min_pixels=64) for v, (h, w) in grids.items()},
        {"robot": normalizer},
    )
    record = TaskRecord(
        task="policy_video" if case["video_mode"] else "policy_image",
        frames=case["window_size"],
        chunk_size=case["time_horizon"],
        frame_spacing=0,
        sequence_length=max(call["prompt_ids"].size for call in calls) + 1024,
        views=tuple(grids),
        corpora={"robot": CorpusRecord(5.0, 5, grids)},
    )
    policy = Policy(LoadedModel(pathlib.Path("released"), assets, record, None, None), block=1)
    answers = [call["generated"].reshape(1, -1) for call in calls]
    policy.action_decoder.prefix_cache = ScriptedPrefixCache(
        answers, policy.action_decoder.rules.allowed
    )
    return policy
