"""Model folders into checkpoints and back, all kinds of them."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib

import flax.linen as nn
import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.inference import tiny_checkpoint
from tests.interop import hf_folders
from tests.interop.state_dicts import import_state
from tests.training import tiny_run
from univla_jax.assets import Assets
from univla_jax.checkpoints import find_checkpoint, load_params
from univla_jax.config import build_config
from univla_jax.episode import Observation
from univla_jax.errors import UserError
from univla_jax.inference.imagination import WorldModel
from univla_jax.inference.policy import Policy
from univla_jax.interop import hf_conversion as from_hf_module
from univla_jax.interop.hf_assets import ConvertConfig
from univla_jax.interop.hf_conversion import from_hf, to_hf
from univla_jax.interop.hf_weights import HfModel, joint_rules
from univla_jax.interop.tensor_io import StoredTensor
from univla_jax.models.decoder import Decoder
from univla_jax.models.decoder_config import DecoderConfig
from univla_jax.tokenizers.action import UniformBinTokenizer
from univla_jax.tokenizers.vision import VisionTokenizer
from univla_jax.training.model_setup import params_init

EXPERT = {
    "action_experts": True,
    "action_dim": 3,
    "action_config": {
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
    },
}


def saved_by_others(folder: pathlib.Path, theta: float = 1e6) -> pathlib.Path:
    """Norms in float32, frequencies beside the weights, and the names of a wrapped model."""
    hf_folders.decoder_folder(folder, shards=1)
    state = load_file(folder / "model.safetensors")
    for key in [key for key in state if "norm" in key]:
        state[key] = state[key].astype(np.float32)
    frequencies = (theta ** -(np.arange(0, 8, 2) / 8)).astype(np.float32)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = frequencies
    state = {f"module.{key}": value for key, value in state.items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


STATISTICS = {"mean": 0, "std": 1, "q01": -1, "q99": 1}
MAKERS = {
    "one file": lambda folder: hf_folders.decoder_folder(folder, shards=1),
    "shards": hf_folders.decoder_folder,
    "float16 base": lambda folder: hf_folders.decoder_folder(
        folder, dtype=np.float16, architectures=["Emu3ForCausalLM"]
    ),
    "saved by others": saved_by_others,
    "qkv bias": lambda folder: hf_folders.decoder_folder(folder, qkv_bias=True),
    "action expert": lambda folder: hf_folders.decoder_folder(folder, **EXPERT),
    "vision tokenizer": hf_folders.vision_folder,
    "transformers": lambda folder: hf_folders.both_folder(folder, "transformers"),
    "transformers 4": lambda folder: hf_folders.both_folder(folder, "transformers_v4"),
}


def convert(source, to, **config):
    return from_hf(source, to, ConvertConfig(**config), progress=False)


@pytest.mark.parametrize("kind", MAKERS)
def test_there_and_back_gives_the_same_files(kind, tmp_path):
    source = MAKERS[kind](tmp_path / "source")
    convert(source, tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "back", progress=False)
    assert hf_folders.contents(tmp_path / "back") == hf_folders.contents(source)
    assert {p.name for p in tmp_path.iterdir()} == {"source", "ours", "back"}


def test_frequencies_of_another_config_are_refused(tmp_path):
    source = saved_by_others(tmp_path / "source", theta=250_000)
    with pytest.raises(UserError, match=r"inv_freq .*rope_theta=250000, config.json says 1000000"):
        convert(source, tmp_path / "ours")


def shapes_of(model: Decoder):
    return nn.unbox(jax.eval_shape(params_init(model), jax.random.key(0)))


def state_of(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


def test_parameters_are_those_of_the_folder(tmp_path):
    source = hf_folders.decoder_folder(tmp_path / "source")
    convert(source, tmp_path / "ours")
    model = HfModel.from_config(json.loads((source / "config.json").read_text()), ())
    expected = import_state(model.state_rules, state_of(source))
    decoder = Decoder(dataclasses.replace(model.decoder, param_dtype="bfloat16"))
    params = load_params(tmp_path / "ours", shapes_of(decoder))
    for path, value in flax.traverse_util.flatten_dict(params).items():
        theirs = flax.traverse_util.flatten_dict(expected)[path]
        assert value.dtype == theirs.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(np.asarray(value), theirs)
    assert params["embedding"].shape == (512, 32) and not params["embedding"][493:].any()


def test_assets_of_a_base_model(tmp_path):
    convert(hf_folders.decoder_folder(tmp_path / "source"), tmp_path / "ours")
    assets = Assets.load(tmp_path / "ours" / "assets")
    assert assets.vision is None and assets.action is None and not assets.task
    assert assets.text.encode("the red block") == [258, 261, 32, 262, 111, 264]
    assert assets.vocabulary.size == 493 and assets.vocabulary.visual_size == hf_folders.CODES
    config = build_config(DecoderConfig, assets.model)
    assert (config.vocab_size, config.dtype, config.num_layers) == (493, "bfloat16", 2)


def test_a_joint_checkpoint_holds_decoder_and_expert(tmp_path):
    source = hf_folders.decoder_folder(tmp_path / "source", **EXPERT)
    convert(source, tmp_path / "ours")
    model = HfModel.from_config(json.loads((source / "config.json").read_text()), ())
    expected = import_state(joint_rules(model.expert, model.decoder), state_of(source))
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), expected)
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path / "ours", template), expected)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A converted vision tokenizer and an action tokenizer, and a model folder beside them."""
    folder = tmp_path_factory.mktemp("parts")
    convert(hf_folders.vision_folder(folder / "vision_source"), folder / "vision")
    UniformBinTokenizer(16).save(folder / "action")
    hf_folders.decoder_folder(folder / "source", dtype=np.float32)
    return folder


def settings(parts: pathlib.Path, **changes):
    values = {
        "vision": str(parts / "vision"),
        "action": str(parts / "action"),
        "task": "policy_video",
        "frames": 2,
        "chunk_size": 3,
        "sequence_length": 400,
        "corpus": "robot",
        "views": {"image": {"size": (4, 6), "min_pixels": 16}},
        "statistics": {name: (value, 2 * value) for name, value in STATISTICS.items()},
    }
    return {**values, **changes}


def test_a_converted_policy_acts(parts, tmp_path):
    convert(parts / "source", tmp_path / "policy", **settings(parts))
    policy = Policy.load(tmp_path / "policy")
    session = policy.start()
    frame = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    for _ in range(2):
        (chunk,) = policy.act([Observation("the red block", {"image": frame})], [session])
        assert chunk.actions.shape == (3, 2) and np.isfinite(chunk.actions).all()
    assert len(policy.loaded.task.text_encoder.text.encode("the")) == 1


def test_a_converted_policy_acts_with_the_state_it_was_trained_with(parts, tmp_path):
    states = {name: (value,) * 3 for name, value in STATISTICS.items()}
    convert(parts / "source", tmp_path / "policy", **settings(parts, state_statistics=states))
    policy = Policy.load(tmp_path / "policy")
    session, frames = policy.start(), {"image": np.zeros((20, 30, 3), np.uint8)}
    policy.act([Observation("the red block", frames, np.zeros(3))], [session])
    turn = session.history.moments[0].tolist()
    vocabulary = policy.loaded.assets.vocabulary
    state = turn[turn.index(vocabulary.eoi) + 1 : turn.index(vocabulary.boa)]
    assert len(state) == 3 and len(vocabulary.action_codes(np.array(state))) == 3
    with pytest.raises(UserError, match="it has no state"):
        policy.act([Observation("the red block", frames)], [session])


@pytest.fixture(scope="module")
def flow_policy(parts):
    """A converted checkpoint whose action expert acts, without any action tokenizer."""
    source = hf_folders.decoder_folder(parts / "flow_source", dtype=np.float32, **EXPERT)
    three = {name: (value,) * 3 for name, value in STATISTICS.items()}
    config = settings(parts, task="policy_flow", frames=1, action="", statistics=three)
    convert(source, parts / "flow", **config)
    return parts / "flow"


def test_a_converted_action_expert_acts(flow_policy):
    policy = Policy.load(flow_policy)
    frames = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), np.uint8)
    seen = [Observation("the red block"[: 7 + 3 * i], {"image": f}) for i, f in enumerate(frames)]
    chunks = policy.act(seen, [policy.start(seed) for seed in range(3)])
    for number, (chunk, observation) in enumerate(zip(chunks, seen)):
        assert chunk.valid and chunk.actions.shape == (3, 3)
        (alone,) = policy.act([observation], [policy.start(number)])
        np.testing.assert_allclose(chunk.actions, alone.actions, atol=1e-5)
    assert not np.array_equal(chunks[0].actions, chunks[1].actions)


def test_its_actions_are_those_of_twenty_euler_steps(flow_policy):
    """The reference's ``generate_action`` on the prompt, written out."""
    policy = Policy.load(flow_policy)
    trained, session = policy.loaded, policy.start(5)
    frame = np.random.default_rng(1).integers(0, 256, (20, 30, 3), np.uint8)
    (chunk,) = policy.act([Observation("the block", {"image": frame})], [session])
    resized = trained.assets.image_specs["image"].resize(frame[None])
    codes = trained.assets.vision.encode_frames(resized)
    prompt = trained.task.build("the block", [codes]).ids
    positions = np.arange(len(prompt))[None]
    hidden, _ = jax.jit(trained.model.apply)({"params": trained.params}, prompt[None], positions)
    velocity = jax.jit(functools.partial(trained.expert.apply, {"params": trained.expert_params}))
    z = jax.random.normal(jax.random.fold_in(jax.random.key(5), 0), (1, 3, 3))
    for i in range(20, 0, -1):
        z -= velocity(z, np.full(1, i / 20, np.float32), hidden)[0] / 20
    expected = np.clip(np.asarray(z[0]), -1, 1)
    np.testing.assert_allclose(chunk.actions, policy.statistics.unnormalize(expected), atol=1e-5)


def test_an_expert_that_is_not_there_or_of_another_size(parts, tmp_path):
    flow = settings(parts, task="policy_flow", frames=1, action="")
    with pytest.raises(UserError, match=r"'policy_flow', but .*source has no action expert"):
        convert(parts / "source", tmp_path / "ours", **flow)
    source = hf_folders.decoder_folder(tmp_path / "source", **EXPERT)
    with pytest.raises(UserError, match=r"expert makes 3 dimensions.*corpus 'robot' have 2"):
        convert(source, tmp_path / "ours", **flow)
    assert not (tmp_path / "ours").exists()


def test_statistics_from_the_references_file(parts, tmp_path):
    values = {"mean": [0.5], "std": [1.0], "q01": [-3.0], "q99": [4.0]}
    file = tmp_path / "norm_stats.json"
    file.write_text(json.dumps({"norm_stats": {"libero": values}}))
    convert(parts / "source", tmp_path / "ours", **settings(parts, statistics_file=str(file)))
    (statistics,) = Assets.load(tmp_path / "ours" / "assets").statistics.values()
    assert (statistics.q01, statistics.q99) == ((-3.0,), (4.0,))


@pytest.mark.slow
def test_a_converted_world_model_imagines(parts, tmp_path):
    config = settings(parts, task="world_model", action="", statistics={})
    convert(parts / "source", tmp_path / "ours", **config)
    world = WorldModel.load(tmp_path / "ours")
    frames = np.zeros((1, 1, 4, 6, 3), np.uint8)
    codes = world.imagine(["the block"], world.encode(frames), 1)
    assert world.decode(codes).shape == (1, 1, 4, 6, 3)


def test_a_converted_vision_tokenizer_encodes(parts):
    tokenizer = VisionTokenizer.load(parts / "vision")
    state = state_of(parts / "vision_source")
    np.testing.assert_array_equal(tokenizer.codebook, state["quantize.embedding.weight"])
    codes = tokenizer.encode_frames(np.zeros((1, 4, 6, 3), np.uint8))
    assert codes.shape == (1, 2, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision": ""}, "config.vision is empty, but a checkpoint of the task 'policy_video'"),
        ({"action": ""}, "config.action is empty.*FAST tokenizer it was trained with"),
        ({"statistics": {}}, "config.statistics is empty"),
        (
            {"task": "world_model", "state_statistics": STATISTICS},
            "config.state_statistics: 'world_model' has no place for a state",
        ),
        ({"task": "policy"}, "config.task: 'policy'; expected one of policy_video"),
        ({"views": {"image": {}}}, "config.views.image: no size"),
        ({"views": {"image": {"sizes": 1}}}, "image spec.sizes: unknown key"),
        ({"vision": "vision_source"}, "is as the hub stores it; convert it first"),
        ({"text": "vision_source"}, "no text tokenizer"),
    ],
)
def test_settings_that_do_not_do(parts, tmp_path, changes, message):
    paths = {k: str(parts / v) if v == "vision_source" else v for k, v in changes.items()}
    with pytest.raises(UserError, match=message):
        convert(parts / "source", tmp_path / "ours", **settings(parts, **paths))
    assert not list(tmp_path.iterdir())


class Interrupted(BaseException):
    """As if the process were stopped."""


@pytest.mark.parametrize(
    ("kind", "after"),
    [("shards", 0), ("shards", 20), ("vision tokenizer", 5), ("transformers", 90)],
)
def test_an_interrupted_conversion_leaves_nothing_that_looks_complete(
    kind, after, tmp_path, monkeypatch
):
    source, reads = MAKERS[kind](tmp_path / "source"), []

    def read(*arguments):
        reads.append(arguments)
        if len(reads) > after:
            raise Interrupted
        return original(*arguments)

    original = StoredTensor.read
    monkeypatch.setattr(StoredTensor, "read", read)
    with pytest.raises(Interrupted):
        convert(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    with pytest.raises(UserError, match="no complete checkpoint"):
        find_checkpoint(tmp_path)
    monkeypatch.setattr(StoredTensor, "read", original)
    convert(source, tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "back", progress=False)
    assert hf_folders.contents(tmp_path / "back") == hf_folders.contents(source)


def test_what_a_killed_conversion_left_is_cleared_away(tmp_path):
    source = hf_folders.decoder_folder(tmp_path / "source")
    for left in (".ours.partial", "ours.orbax-checkpoint-tmp"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "rest").write_text("half")
    convert(source, tmp_path / "ours")
    assert {p.name for p in tmp_path.iterdir()} == {"source", "ours"}


def test_an_existing_folder_is_not_touched(tmp_path):
    source = hf_folders.decoder_folder(tmp_path / "source")
    with pytest.raises(UserError, match="exists already; choose another --to"):
        convert(source, source)
    convert(source, tmp_path / "ours")
    with pytest.raises(UserError, match="exists already; choose another --to_hf"):
        to_hf(tmp_path / "ours", source, progress=False)


@pytest.mark.parametrize("error", [OSError, ValueError])
def test_a_full_disk_is_one_message(error, tmp_path, monkeypatch):
    source = hf_folders.decoder_folder(tmp_path / "source")

    def full(*_):
        raise error("No space left on device")

    monkeypatch.setattr(from_hf_module, "save_source", full)
    with pytest.raises(UserError, match=r"cannot write .*ours: .*No space left"):
        convert(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_weights_only_go_back_too(tmp_path):
    source = hf_folders.decoder_folder(tmp_path / "source")
    (source / "emu3.tiktoken").unlink()
    from_hf(source, tmp_path / "ours", ConvertConfig(), weights_only=True, progress=False)
    assert not (tmp_path / "ours" / "assets").exists()
    to_hf(tmp_path / "ours", tmp_path / "back", progress=False)
    assert hf_folders.contents(tmp_path / "back") == hf_folders.contents(source)


# ----------------------------------------------------------------------------
# What was trained or fitted here, as model folders of the reference.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return tiny_checkpoint.save(folder / "run", tiny_checkpoint.make_assets(bins=True))


def test_a_model_trained_here_gets_the_references_names(trained, tmp_path):
    to_hf(trained, tmp_path / "hub", progress=False)
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    state = load_file(tmp_path / "hub" / "model.safetensors")
    model = HfModel.from_config(config, state)
    params = import_state(model.state_rules, state)
    step = find_checkpoint(trained)
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    tables = {name: np.zeros((384, 32)) for name in ("embedding", "head")}  # padded to 128
    template |= {k: jax.ShapeDtypeStruct(v.shape, np.float32) for k, v in tables.items()}
    for path, ours in flax.traverse_util.flatten_dict(load_params(step, template)).items():
        rows = config["vocab_size"] if path[-1] in tables else None
        theirs = flax.traverse_util.flatten_dict(params)[path]
        np.testing.assert_array_equal(ours[:rows], theirs[:rows])
    vocabulary = Assets.load(step / "assets").vocabulary
    assert config["bov_token_id"] == vocabulary.bov and config["vocab_size"] == vocabulary.size
    assert {p.name for p in (tmp_path / "hub").iterdir()} > {"sentencepiece.model"}


def test_another_dtype_on_the_way_out(trained, tmp_path):
    to_hf(trained, tmp_path / "hub", dtype="bfloat16", progress=False)
    to_hf(trained, tmp_path / "full", progress=False)
    for key, value in load_file(tmp_path / "hub" / "model.safetensors").items():
        whole = load_file(tmp_path / "full" / "model.safetensors")[key]
        np.testing.assert_array_equal(value, whole.astype(value.dtype))
        assert value.dtype.name == "bfloat16"


def test_a_vision_tokenizer_fitted_here_goes_out_and_comes_back(tmp_path):
    tiny_run.make_tokenizers(tmp_path / "fitted")
    to_hf(tmp_path / "fitted" / "vision", tmp_path / "hub", progress=False)
    from_hf(tmp_path / "hub", tmp_path / "ours", ConvertConfig(), progress=False)
    prints = {VisionTokenizer.load(tmp_path / p).fingerprint for p in ("ours", "fitted/vision")}
    assert len(prints) == 1
