"""Inference parts of ``benchmarks.accelerator``: decoding and frames, beside transformers."""

from __future__ import annotations

import dataclasses
import functools
import gc
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from univla_jax.benchmarks.accelerator_device import (
    Emit,
    Sizes,
    copied_bytes_per_second,
    describe_error,
    draw_params,
    fastest_seconds,
    peak_memory,
)
from univla_jax.benchmarks.decode_speed import DecodeProblem, bytes_per_token
from univla_jax.benchmarks.harness import timed
from univla_jax.benchmarks.transformers_peer import import_peer, native_decoder
from univla_jax.benchmarks.vision_speed import peer_encoder
from univla_jax.inference.sampler import Sampler
from univla_jax.models.decoder import Decoder
from univla_jax.models.decoder_config import preset
from univla_jax.models.quantized_weights import num_bytes
from univla_jax.tokenizers.vision import ENCODER_DTYPES, VisionTokenizer
from univla_jax.tokenizers.vision_vq import PRESETS as VISION_PRESETS
from univla_jax.tokenizers.vision_vq import init_variables
from univla_jax.training import hardware

# ----------------------------------------------------------------------------
# Decoding.


def measure_decoding(sizes: Sizes, emit: Emit, kind: str = "") -> None:
    """Prompts and their action tokens with bfloat16 or quantized weights, by batch size."""
    model = Decoder(preset(sizes.preset, param_dtype="bfloat16", remat="none", dropout=0.0))
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens, tokens))["params"]
    params = draw_params(shapes, kind)
    copied = copied_bytes_per_second(sizes)
    for batch in sizes.batches:
        names = {"weights": kind or "bfloat16", "batch": batch}
        try:
            problem = DecodeProblem.around(Sampler(model, params), sizes.prompt, sizes.count, batch)
            emit(names | _decode_figures(sizes, problem, copied))
        except Exception as error:  # a card never seen: the other sizes are still worth measuring
            emit(names | {"error": describe_error(error)})
            gc.collect()


def _decode_figures(sizes: Sizes, problem: DecodeProblem, copied: float) -> dict[str, Any]:
    batch, prompt = problem.prompt.shape
    best: dict[str, float] = {}

    def turn() -> dict[str, float]:
        state, prefill = timed(problem.prefill)
        generated, decode = timed(lambda: problem.decode(state))
        np.asarray(generated.tokens)
        return {"prefill": prefill.wall, "decode": decode.wall, "call": prefill.wall + decode.wall}

    turn()  # compiles
    for _ in sizes.turns():
        best = {name: min(seconds, best.get(name, seconds)) for name, seconds in turn().items()}
    config, chip = problem.sampler.model.config, hardware.find_chip(jax.devices()[0])
    # The cache of every prompt is read, the weights once for all.
    step_bytes = bytes_per_token(problem)
    token = best["decode"] / problem.count
    figures = {
        "prefill_ms": 1e3 * best["prefill"],
        "ms_per_token": 1e3 * token,
        "call_ms": 1e3 * best["call"],
        "bytes_per_token": step_bytes,
        "over_copied_bound": token * copied / step_bytes,
        "parameter_bytes": num_bytes(problem.sampler.params),
        "peak_bytes": peak_memory(),
    }
    if chip is not None:
        flops = batch * prompt * hardware.token_flops(config, prompt, 0.0)
        figures |= {
            "bound_ms_per_token": step_bytes / chip.gigabytes_per_second / 1e6,
            "over_bound": token * chip.gigabytes_per_second * 1e9 / step_bytes,
            "prefill_mfu": flops / best["prefill"] / chip.teraflops / 1e12,
        }
    return figures


# ----------------------------------------------------------------------------
# Frames.


def measure_vision(sizes: Sizes, emit: Emit) -> None:
    """Frames per second of the vision tokenizer's encoder."""
    config = VISION_PRESETS[sizes.vision]
    tokenizer = VisionTokenizer(config, init_variables(config, seed=0))
    frames = _frames(sizes)
    for dtype in ENCODER_DTYPES:
        seconds = fastest_seconds(sizes, lambda: tokenizer.encode_frames(frames, dtype=dtype))  # noqa: B023
        emit({"dtype": dtype, "side": sizes.side, "frames_per_second": len(frames) / seconds})


def _frames(sizes: Sizes) -> np.ndarray:
    shape = (sizes.frames, sizes.side, sizes.side, 3)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


# ----------------------------------------------------------------------------
# transformers on the same device.


def _torch_device(emit: Emit) -> str | None:
    """``"cuda"``, or None, emitting why, where PyTorch has no GPU."""
    torch, transformers = import_peer()
    if not torch.cuda.is_available():
        emit({"skipped": f"torch {torch.__version__} finds no CUDA device"})
        return None
    emit({"torch": torch.__version__, "transformers": transformers.__version__})
    return "cuda"


def measure_peer_decoding(sizes: Sizes, emit: Emit, device: str | None = None) -> None:
    """``generate`` of transformers' Emu3 in bfloat16 with the same prompts."""
    device = device or _torch_device(emit)
    if device is None:
        return
    torch, _ = import_peer()
    model = native_decoder(preset(sizes.preset), device)
    for batch in sizes.batches:
        tokens = torch.ones((batch, sizes.prompt), dtype=torch.long, device=device)

        def generate(count: int, tokens: Any = tokens) -> None:
            with torch.inference_mode():
                out = model.generate(
                    tokens,
                    attention_mask=torch.ones_like(tokens),
                    min_new_tokens=count,
                    max_new_tokens=count,
                    do_sample=False,
                    use_cache=True,
                )
            out.cpu()  # waits

        try:
            generate(sizes.count)
            # The first token comes with the prefill.
            spent = [
                [timed(functools.partial(generate, n))[1].wall for n in (1, sizes.count)]
                for _ in sizes.turns()
            ]
            first, call = (min(times) for times in zip(*spent))
            token_ms = 1e3 * (call - first) / (sizes.count - 1)
            emit({"batch": batch, "ms_per_token": token_ms, "call_ms": 1e3 * call})
        except Exception as error:  # a card never seen
            emit({"batch": batch, "error": describe_error(error)})


def measure_peer_vision(sizes: Sizes, emit: Emit, device: str | None = None) -> None:
    """Frames per second of transformers' ``Emu3VQVAE`` in float32."""
    device = device or _torch_device(emit)
    if device is None:
        return
    # Its activations at 64 frames do not fit every card.
    for frames in (sizes.frames, max(1, sizes.frames // 8)):
        own = dataclasses.replace(sizes, frames=frames)
        try:
            encode = peer_encoder(VISION_PRESETS[sizes.vision], _frames(own), device=device)
            seconds = fastest_seconds(own, encode)
            emit({"frames": frames, "frames_per_second": frames / seconds})
            return
        except Exception as error:  # a card never seen
            emit({"frames": frames, "error": describe_error(error)})
