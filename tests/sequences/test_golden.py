"""The reference's dataset samples and prompts (golden groups 9 and 10), id by id."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.sequences import reference_samples
from univla_jax.errors import UserError
from univla_jax.sequences import prompts
from univla_jax.sequences.frames import frame_head, next_frame
from univla_jax.sequences.history import History
from univla_jax.sequences.lexicon import Lexicon
from univla_jax.tokenizers.bins import UniformBins
from univla_jax.tokenizers.fast import FastTokenizer
from univla_jax.tokenizers.text_tiktoken import TiktokenText
from univla_jax.tokenizers.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def lexicon(shared_dir):
    text = TiktokenText.load(shared_dir / "text_vocabulary")
    return Lexicon(Vocabulary.emu3(), text, special_text=True)


@pytest.fixture(scope="module")
def encoders(shared_dir):
    found = {}

    def encoder(record):
        if record["args"]["actions_format"] == "openvla":
            return lambda a: np.array(UniformBins().encode(a))
        name = record["args"]["action_tokenizer_path"]
        if name not in found:
            found[name] = FastTokenizer.load(shared_dir / "fast_tokenizers" / name)
        return lambda a: np.array(found[name].encode(a, strict=False))

    return encoder


def _group(golden_dir, name):
    with np.load(golden_dir / f"{name}.npz") as arrays:
        return json.loads((golden_dir / f"{name}.json").read_text()), dict(arrays)


def test_dataset_samples(golden_dir, lexicon, encoders):
    records, arrays = _group(golden_dir, "dataset")
    for record in records:
        encode = encoders(record)
        if record["error"]:
            with pytest.raises(UserError):
                reference_samples.dataset_sample(lexicon, record, arrays, encode)
            continue
        sample = reference_samples.dataset_sample(lexicon, record, arrays, encode)
        for key, ours in sample.items():
            theirs = arrays[f"out|{record['id']}|{key}"]
            np.testing.assert_array_equal(ours, theirs, err_msg=f"{record['id']} {key}")


def test_prompts(golden_dir, lexicon):
    records, arrays = _group(golden_dir, "prompts")
    for record in records:
        rows = reference_samples.prompt_rows(lexicon, record, arrays)
        ids = arrays[f"{record['name']}|input_ids"]
        mask = arrays[f"{record['name']}|attention_mask"]
        assert len(rows) == len(ids)
        for row, theirs, seen in zip(rows, ids, mask):
            np.testing.assert_array_equal(row, theirs[seen == 1], err_msg=record["name"])
            assert (theirs[seen == 0] == lexicon.vocabulary.pad).all()


def test_prompt_parts(golden_dir, lexicon):
    _, arrays = _group(golden_dir, "prompts")
    np.testing.assert_array_equal(next_frame(lexicon, 5, 5), arrays["prefix_template|1"])
    np.testing.assert_array_equal(frame_head(lexicon, 5, 5, 5), arrays["null_prompt|5"])
    video = arrays["constrained_video_h2w3f2"]
    picture = arrays["constrained_image_h2w3"]
    grammar = reference_samples.grammar_rows
    np.testing.assert_array_equal(grammar(lexicon, "video", 2, 3, 2, len(video)), video)
    np.testing.assert_array_equal(grammar(lexicon, "picture", 2, 3, 1, len(picture)), picture)


def test_history(golden_dir, lexicon):
    _, arrays = _group(golden_dir, "prompts")
    for case in json.loads((golden_dir / "step.json").read_text()):
        history = History(case["window_size"] if case["video_mode"] else 1)
        for step in range(case["n_steps"]):
            part = {
                key.rsplit("|", 1)[1]: value
                for key, value in arrays.items()
                if key.startswith(f"step|{case['tag']}|{step}|")
            }
            views = [part[k] for k in ("image_codes", "gripper_codes") if k in part]
            history = history.observe(prompts.turn_prompt(lexicon, views))
            prompt = history.prompt(prompts.opening(lexicon, case["goal"]))
            np.testing.assert_array_equal(prompt, part["prompt_ids"][0], err_msg=case["tag"])
            history = history.act(part["generated"][0])
