"""Groups 6, 7, 8, 11 and 15: action tokenizers, statistics and gripper conventions."""

from __future__ import annotations

import json
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tests.parity_groups import lenient_fast
from tests.parity_groups.checks import Check, Golden, close, equal
from univla_jax.data import action_conventions
from univla_jax.interop.hf_assets import norm_stats
from univla_jax.normalization import ActionStatistics, RunningStatistics
from univla_jax.tokenizers.action import UniformBinTokenizer
from univla_jax.tokenizers.fast import FastTokenizer
from univla_jax.tokenizers.vocabulary import Vocabulary

DECODED = 1e-12
MOMENTS, QUANTILES, NORMALIZED = 1e-10, 1e-9, 1e-6
FLOAT32_MOMENTS, FLOAT32_QUANTILES = 1e-5, 1e-6
REWRITTEN = 1e-6  # bridge and invert; the other gripper conventions are exact


def fast(golden: Golden) -> Iterator[Check]:
    """Ids of chunks, and what the reference makes of ids, good and bad."""
    arrays, last = golden.arrays("fast"), Vocabulary.emu3().action_last
    for case in golden.json("fast_encode"):
        key, tokenizer = case["key"], golden.fast(case["tokenizer"])
        action = arrays[f"action|{key}"]
        ids = case["ids"] if action.ndim == 3 else [case["ids"]]
        chunks = action.reshape(-1, *action.shape[-2:])
        if f"coeff|{key}" in arrays:
            expected = arrays[f"coeff|{key}"]
            ours = tokenizer.coefficients(chunks).reshape(expected.shape)
            yield equal(key, "coefficients", ours, expected)
        ours = lenient_fast.encode(tokenizer, chunks)
        yield equal(key, "ids", ours, ids)
        token_ids = [[last - i for i in row] for row in ours]
        theirs = case["llm_ids"] if action.ndim == 3 else [case["llm_ids"]]
        yield equal(key, "token ids", token_ids, theirs)
        if f"roundtrip|{key}" in arrays:
            back = np.stack([lenient_fast.decode(tokenizer, i, *action.shape[-2:]) for i in ours])
            expected = arrays[f"roundtrip|{key}"]
            yield close(key, "decoded", back.reshape(expected.shape), expected, DECODED)
    for case in golden.json("fast_decode"):
        if f"decoded|{case['key']}" in arrays:
            tokenizer = golden.fast(case["tokenizer"])
            shape = case["time_horizon"], case["action_dim"]
            back = lenient_fast.decode(tokenizer, case["ids"], *shape)
            expected = arrays[f"decoded|{case['key']}"]
            yield close(case["key"], "decoded", back.reshape(expected.shape), expected, DECODED)


def fast_fit(golden: Golden) -> Iterator[Check]:
    """Fitting as the reference does, and its own fitted tokenizer in use."""
    wanted, arrays = golden.json("fast_fit"), golden.arrays("fast_fit")
    fitted = lenient_fast.fit(arrays["train"], wanted["scale"], wanted["vocab_size"])
    yield equal("fit", "min_token", fitted.min_token, wanted["min_token"])
    yield equal("fit", "vocabulary", _model(fitted)["vocab"], _vocab_of(wanted)["vocab"])
    yield equal("fit", "merges", _model(fitted)["merges"], _vocab_of(wanted)["merges"])
    loaded = FastTokenizer(_files(wanted))
    for case, tokenizer in (("fit", fitted), ("reference tokenizer", loaded)):
        ids = lenient_fast.encode(tokenizer, arrays["test"])
        yield equal(case, "ids", ids, wanted["test_ids"])
        shape = arrays["decoded"].shape[1:]
        back = np.stack([lenient_fast.decode(tokenizer, i, *shape) for i in wanted["test_ids"]])
        yield close(case, "decoded", back, arrays["decoded"], DECODED)


def _files(wanted: Mapping[str, Any]) -> dict[str, bytes]:
    values = {key: wanted[key] for key in ("scale", "min_token", "vocab_size")}
    return {
        "processor_config.json": json.dumps(values).encode(),
        "tokenizer.json": json.dumps(wanted["tokenizer_json"]).encode(),
    }


def _model(tokenizer: FastTokenizer) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        path = pathlib.Path(folder, "tokenizer.json")
        return _vocab_of({"tokenizer_json": json.loads(path.read_text(encoding="utf-8"))})


def _vocab_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Vocabulary and merges; older files write a merge as one string."""
    model = values["tokenizer_json"]["model"]
    merges = [m.split(" ") if isinstance(m, str) else list(m) for m in model["merges"]]
    return {"vocab": model["vocab"], "merges": merges}


def bins(golden: Golden) -> Iterator[Check]:
    """Both of the reference's encoders, and decoding."""
    values, arrays = golden.json("action_bins"), golden.arrays("action_bins")
    last, tokenizer = values["last_vocab_idx"], UniformBinTokenizer(values["n_bins"])
    for key in (k for k in arrays if k.split("_")[0] == "actions"):
        suffix = key.removeprefix("actions")
        ours = last - tokenizer.codes(arrays[key])
        yield equal(key, "ids of __call__", ours, arrays[f"call_ids{suffix}"])
        codes = np.clip(tokenizer.codes(arrays[key]) - 1, 0, values["n_bins"] - 2)
        ours = last - codes
        yield equal(key, "ids of encode_actions_to_ids", ours, arrays[f"encode_ids{suffix}"])
    for case, ids, expected in (
        ("decode", "decode_ids", "decode_actions"),
        ("roundtrip call", "call_ids", "roundtrip_call"),
        ("roundtrip encode", "encode_ids", "roundtrip_encode"),
    ):
        ours = tokenizer.centers(last - arrays[ids])
        yield close(case, "decoded", ours, arrays[expected], DECODED)


def normalize(golden: Golden) -> Iterator[Check]:
    """Running statistics after each batch, and normalization with the reference's statistics."""
    arrays = golden.arrays("normalize")
    for record in golden.json("normalize"):
        case = record["case"]
        if "batches" in record:
            yield from _running(case, record, arrays)
            yield from _serialized(case, record, arrays)
            if f"{case}|norm_in" in arrays:
                yield from _normalized(case, record, arrays)
    for key in (k for k in arrays if k.endswith("_wrapper|in")):
        case = key.removesuffix("_wrapper|in")
        statistics = reference_statistics(arrays, f"config_{case}")
        ours = statistics.unnormalize(arrays[key])
        theirs = arrays[f"{case}_wrapper|unnormalised"]
        yield close(f"{case}_wrapper", "unnormalized", ours, theirs, NORMALIZED)
        if f"{case}_wrapper|after_gripper" in arrays:
            theirs = arrays[f"{case}_wrapper|after_gripper"]
            ours = action_conventions.sign_gripper(ours)
            yield close(f"{case}_wrapper", "gripper rule", ours, theirs, NORMALIZED)


def reference_statistics(arrays: Mapping[str, np.ndarray], prefix: str) -> ActionStatistics:
    """The reference's statistics stored as ``<prefix>|mean`` and so on."""
    names = ("mean", "std", "q01", "q99")
    return ActionStatistics(*(tuple(map(float, arrays[f"{prefix}|{name}"])) for name in names))


def _running(case: str, record: Mapping[str, Any], arrays: Mapping) -> Iterator[Check]:
    single = record["dtype"] == "float32"
    moments = FLOAT32_MOMENTS if single else MOMENTS
    quantiles = FLOAT32_QUANTILES if single else QUANTILES
    words = " of float32" if single else ""
    running = _ReferenceStatistics()
    for k in range(record["batches"]):
        running.update(arrays[f"{case}|batch{k}"])
        if f"{case}|after{k}|mean" not in arrays:
            continue
        ours = running.statistics()
        for name in ("mean", "std", "q01", "q99"):
            is_moment = name in ("mean", "std")
            what = ("mean, std" if is_moment else "q01, q99") + words
            theirs = arrays[f"{case}|after{k}|{name}"]
            tolerance = moments if is_moment else quantiles
            yield close(f"{case}|after{k}", what, getattr(ours, name), theirs, tolerance)


class _ReferenceStatistics(RunningStatistics):
    """``RunningStats`` of the reference, whose range grows with the batches (:84-93)."""

    def __init__(self) -> None:
        self._count = 0

    def update(self, batch: np.ndarray) -> None:
        steps = np.asarray(batch, np.float64)
        steps = steps[:, None] if steps.ndim == 1 else steps
        low, high = steps.min(0), steps.max(0)
        if not self._count:
            super().__init__(low, high)
        elif np.any(low < self._low) or np.any(high > self._high):
            self._low, self._high = np.minimum(low, self._low), np.maximum(high, self._high)
            for i, (a, b) in enumerate(zip(self._low, self._high)):
                edges, old = np.linspace(a, b, len(self._edges[i])), self._edges[i][:-1]
                self._counts[i] = np.histogram(old, bins=edges, weights=self._counts[i])[0]
                self._edges[i] = edges
        super().update(steps)


def _serialized(case: str, record: Mapping[str, Any], arrays: Mapping) -> Iterator[Check]:
    """The reference's ``norm_stats.json``, as a conversion reads it."""
    ours = ActionStatistics.from_dict(norm_stats(record["json"].encode(), case))
    for name in ("mean", "std", "q01", "q99"):
        theirs = arrays[f"{case}|after{record['batches'] - 1}|{name}"]
        yield close(case, "norm_stats.json", getattr(ours, name), theirs, MOMENTS)


def _normalized(case: str, record: Mapping[str, Any], arrays: Mapping) -> Iterator[Check]:
    statistics = reference_statistics(arrays, f"{case}|after{record['batches'] - 1}")
    raw, clipped = arrays[f"{case}|norm_in"], arrays[f"{case}|norm_clipped"]
    yield close(case, "normalized", statistics.normalize(raw), clipped, NORMALIZED)
    free, theirs = statistics.normalize(raw, clip=False), arrays[f"{case}|norm_unclipped"]
    yield close(case, "normalized", free, np.float32(theirs), NORMALIZED)
    back, theirs = statistics.unnormalize(clipped), arrays[f"{case}|unnorm_of_clipped"]
    yield close(case, "unnormalized", back, np.float32(theirs), NORMALIZED)


def gripper(golden: Golden) -> Iterator[Check]:
    """Gripper and movement conventions."""
    arrays = golden.arrays("gripper")
    for key in (k for k in arrays if k.endswith("|in")):
        kind, case = key.removesuffix("|in"), key.removesuffix("|in").partition("|")[2]
        raw, expected = arrays[key], arrays[f"{kind}|out"]
        function = _CONVENTIONS[kind.partition("|")[0]]
        yield equal(kind, "exact conventions", function(raw), expected)
        if f"invert|{case}|out" in arrays and kind.startswith("binarize|"):
            inverted = action_conventions.invert_gripper(raw)
            yield close(
                f"invert|{case}", "rewritten", inverted, arrays[f"invert|{case}|out"], REWRITTEN
            )
    for key in (k for k in arrays if k.endswith("|out_action")):
        case = key.removesuffix("|out_action")
        ours = action_conventions.relabel_bridge(arrays[f"{case}|state"], arrays[f"{case}|action"])
        for what, array in zip(("action", "state"), ours):
            yield close(case, "rewritten", array, arrays[f"{case}|out_{what}"], REWRITTEN)


def _binarized(actions: np.ndarray) -> np.ndarray:
    """Actions [T, 7] with the gripper binarized, as the reference has DROID's."""
    converted = np.array(actions, np.float32)
    converted[:, 6] = action_conventions.binarize_gripper(converted[:, 6])
    return converted


def _rt1_actions(actions: np.ndarray) -> np.ndarray:
    """RT-1 actions [T, 7]: the relative gripper becomes absolute, the rest stays."""
    converted = np.array(actions, np.float32)
    converted[:, 6] = action_conventions.relative_to_absolute_gripper(converted[:, 6])
    return converted


_CONVENTIONS = {
    "binarize": action_conventions.binarize_gripper,
    "rel2abs": action_conventions.relative_to_absolute_gripper,
    "rt1": _rt1_actions,
    "droid": _binarized,
}
