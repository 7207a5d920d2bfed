# ruff: noqa: E402  (what follows needs torch, and is skipped without it)
"""A second witness: the Emu3 of ``transformers``, random and tiny, in PyTorch on the CPU.

Its folders go through the converter, so that names, layouts and configs are those which
``save_pretrained`` writes.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

REASON = "needs the extra [parity]: pip install 'univla_jax[parity]'"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

from safetensors.torch import save_file

from tests.decoders import abstract_params
from tests.inference import tiny_checkpoint
from tests.interop import hf_folders
from univla_jax.checkpoints import load_params
from univla_jax.inference.sampler import Sampler
from univla_jax.interop.hf_assets import ConvertConfig
from univla_jax.interop.hf_conversion import from_hf, to_hf
from univla_jax.interop.hf_folder import HfFolder
from univla_jax.interop.hf_weights import HfModel
from univla_jax.models.decoder import Decoder
from univla_jax.tokenizers.vision import VisionTokenizer
from univla_jax.tokenizers.vision_vq import VisionVQ

pytestmark = [pytest.mark.parity, pytest.mark.slow]
TOLERANCE = 1e-4

VISION = {
    "codebook_size": 24,
    "base_channels": 32,
    "channel_multiplier": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [1],
    "hidden_size": 64,
    "temporal_downsample_factor": 4,
}
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_theta": 5e4, "rope_type": "default"},
    "rms_norm_eps": 1e-4,
    "eos_token_id": None,
}


def randomize(model: Any, seed: int) -> Any:
    """Weights, norms and stored statistics all away from their initial values."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("running_var"):
            value.copy_(0.5 + noise.abs())
        elif value.ndim == 1:
            value.copy_((1.0 if "norm" in name and name.endswith("weight") else 0) + 0.2 * noise)
        else:
            fan_in = value[0].numel() if "embed" not in name else 1
            value.copy_(noise * fan_in**-0.5)
    return model.eval()


def converted(folder: pathlib.Path, **options: Any) -> tuple[Decoder, Any]:
    """The decoder of a model folder, through the converter, in float32."""
    from_hf(folder, folder.parent / "ours", ConvertConfig(), progress=False, **options)
    hub = HfFolder.open(folder)
    config = HfModel.from_config(hub.config, hub.tensors).decoder
    model = Decoder(dataclasses.replace(config, dtype="float32", remat="none", dropout=0.0))
    return model, load_params(folder.parent / "ours", abstract_params(model))


def assert_same_logits(theirs: Any, ours: tuple[Decoder, Any], size: int) -> None:
    model, params = ours
    ids = np.random.default_rng(3).integers(0, size, (2, 19))
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(ids)).logits.numpy()
    positions = np.broadcast_to(np.arange(19), ids.shape)

    @jax.jit
    def run(params: Any) -> jax.Array:
        hidden = model.apply({"params": params}, ids, positions)[0]
        return model.apply({"params": params}, hidden, method="unembed")

    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(run(params)[..., :size], expected, atol=TOLERANCE)


OTHER_VISION = {
    **VISION,
    "channel_multiplier": [1, 1, 2],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "temporal_downsample_factor": 2,
    "embed_dim": 8,
    "latent_channels": 8,
}
OTHER_TEXT = {**TEXT, "num_hidden_layers": 3, "num_attention_heads": 2, "rope_parameters": {}}


@pytest.fixture(scope="module", params=[TEXT, OTHER_TEXT], ids=["grouped heads", "full heads"])
def text_model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "source"
    config = transformers.Emu3TextConfig(
        vocab_size=300, pad_token_id=1, bos_token_id=2, **request.param
    )
    model = randomize(transformers.Emu3ForCausalLM(config), 0)
    model.save_pretrained(folder)
    return model, converted(folder, weights_only=True)


def test_logits_of_the_text_model(text_model):
    assert_same_logits(*text_model, 300)


def test_greedy_tokens_of_the_text_model(text_model):
    theirs, (model, params) = text_model
    prompts = np.random.default_rng(4).integers(3, 300, (3, 11))
    with torch.no_grad():
        expected = theirs.generate(torch.tensor(prompts), max_new_tokens=16, do_sample=False)
    sampler = Sampler(model, params)
    generated, _ = sampler.generate(
        sampler.prefill(prompts.astype(np.int32), np.full(3, 11)),
        max_new_tokens=16,
        allowed=np.arange(300),
        stop_id=None,
    )
    np.testing.assert_array_equal(np.asarray(generated.tokens), expected[:, 11:].numpy())


@pytest.fixture(scope="module", params=[VISION, OTHER_VISION], ids=["attention", "two frames"])
def vision_model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    model = randomize(transformers.Emu3VQVAE(transformers.Emu3VQVAEConfig(**request.param)), 1)
    spread_codebook(model)
    model.save_pretrained(folder / "source")
    from_hf(folder / "source", folder / "ours", ConvertConfig(), progress=False)
    to_hf(folder / "ours", folder / "back", progress=False)
    assert hf_folders.contents(folder / "back") == hf_folders.contents(folder / "source")
    return model, VisionTokenizer.load(folder / "ours")


def spread_codebook(theirs: Any) -> None:
    """Makes the codebook of latents that occur, so that every code may be the nearest."""
    found = []
    hook = theirs.quantize.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    codes_of(theirs, np.random.default_rng(7).uniform(-1, 1, (2, 3, 24, 24)).astype(np.float32))
    hook.remove()
    latents = found[0].movedim(2, -1).reshape(-1, found[0].shape[2])
    table = theirs.quantize.embedding.weight.data
    table.copy_(latents[:: len(latents) // len(table)][: len(table)] + 0.01 * table)


def codes_of(theirs: Any, pixels: np.ndarray) -> np.ndarray:
    """Codes of pixels [B, (T,) 3, H, W]; sizes above every side keep all of them."""
    sizes = torch.full((len(pixels), 2), 10_000)
    with torch.no_grad():
        found = theirs.encode(torch.tensor(pixels), sizes).image_tokens
    return torch.stack(list(found)).numpy()


@pytest.mark.parametrize("shape", [(2, 3, 8, 12), (1, 4, 3, 8, 12)])
def test_codes_and_reconstructions(vision_model, shape):
    theirs, ours = vision_model
    pixels = np.random.default_rng(5).uniform(-1, 1, shape).astype(np.float32)
    model = VisionVQ(ours.config)
    run = jax.jit(lambda v, x, method: model.apply(v, x, method=method), static_argnums=2)
    codes = run(ours.variables, np.moveaxis(pixels, -3, -1), "encode")
    expected = codes_of(theirs, pixels)
    assert len(np.unique(expected)) > 3
    np.testing.assert_array_equal(codes, expected)
    with torch.no_grad():
        picture = theirs.decode(torch.tensor(expected)).numpy()
    decoded = run(ours.variables, codes, "decode")
    np.testing.assert_allclose(np.moveaxis(decoded, -1, -3), picture, atol=TOLERANCE)


@pytest.mark.parametrize("layout", ["as saved", "as in memory"])
def test_a_folder_with_both(layout, tmp_path):
    """``save_pretrained`` writes the names of version 4; version 5 has others in memory."""
    size = hf_folders.decoder_config()["vocab_size"]
    config = transformers.Emu3Config(
        vq_config={**VISION, "codebook_size": hf_folders.CODES},
        text_config={"vocab_size": size, "pad_token_id": 266, "bos_token_id": 472, **TEXT},
        vocabulary_map={"<image>": 474},
    )
    model = randomize(transformers.Emu3ForConditionalGeneration(config), 2)
    spread_codebook(model.model.vqmodel)
    folder = tmp_path / "source"
    model.save_pretrained(folder)
    state = model.state_dict()
    if layout == "as in memory":
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    for name, content in hf_folders.text_files().items():
        (folder / name).write_bytes(content)
    in_memory = "lm_head.weight" in HfFolder.open(folder).tensors
    assert in_memory == (layout == "as in memory")
    assert_same_logits(model, converted(folder), size)
    vision = VisionTokenizer.load(tmp_path / "ours" / "assets" / "vision")
    frames = np.random.default_rng(6).integers(0, 256, (2, 8, 12, 3), np.uint8)
    pixels = np.moveaxis(frames / np.float32(127.5) - 1, -1, 1).astype(np.float32)
    np.testing.assert_array_equal(
        vision.encode_frames(frames), codes_of(model.model.vqmodel, pixels)
    )


def test_what_was_trained_here_runs_there(tmp_path):
    assets = tiny_checkpoint.make_assets(bins=True)
    to_hf(tiny_checkpoint.save(tmp_path / "run", assets, scale=10), tmp_path / "source")
    values = json.loads((tmp_path / "source" / "config.json").read_text())
    known = (*TEXT, "vocab_size", "pad_token_id", "bos_token_id")
    config = transformers.Emu3TextConfig(
        **{k: values[k] for k in known if k in values},
        rope_parameters={"rope_theta": values["rope_theta"], "rope_type": "default"},
    )
    theirs = transformers.Emu3ForCausalLM.from_pretrained(tmp_path / "source", config=config)
    ours = converted(tmp_path / "source", weights_only=True)
    assert_same_logits(theirs.eval(), ours, values["vocab_size"])
