"""Groups 1 and 2: the VQ vision tokenizer and the pixels it sees."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
from PIL import Image

from tests.interop.state_dicts import import_state
from tests.parity_groups.checks import Check, Golden, close, equal
from univla_jax.errors import UserError
from univla_jax.interop.hf_folder import vision_config_from_reference
from univla_jax.interop.hf_weights import export_state, vision_rules
from univla_jax.tokenizers.image import ImageSpec, smart_resize, to_pixels
from univla_jax.tokenizers.vision_vq import VisionVQ

LATENTS = 1e-4
CLEAR_MARGIN = 1e-4  # a nearer second code is a tie that the order of summation may flip
PIXELS = 1e-6
ON_AN_INTEGER = 1e-4  # gray levels this near to an integer may be cut either way


def _latents_and_codes(model: VisionVQ, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
    latents = model.latents(pixels)
    return latents, model.quantize(latents)


def vq(golden: Golden, name: str) -> Iterator[Check]:
    """Latents, codes and reconstructions of ``vq_<letter>``, and its weights there and back."""
    config = vision_config_from_reference(golden.json(f"{name}_config"))
    weights = golden.state(name)
    rules = vision_rules(config)
    variables = import_state(rules, weights)
    model = VisionVQ(config)
    run = jax.jit(lambda v, x, method: model.apply(v, x, method=method), static_argnums=2)
    arrays = golden.arrays(name)
    for key in arrays:
        case = key.removesuffix("_pixels").removesuffix("_recon_codes")
        if key == f"{case}_pixels":
            pixels = np.moveaxis(arrays[key], -3, -1)
            latents, codes = run(variables, pixels, _latents_and_codes)
            yield close(
                case, "latents", latents, np.moveaxis(arrays[f"{case}_latents"], 2, -1), LATENTS
            )
            yield _codes(case, np.asarray(codes), arrays)
        elif key == f"{case}_recon_codes":
            pixels = run(variables, arrays[key], "decode")
            expected = np.moveaxis(arrays[f"{case}_recon"], -3, -1)
            yield close(case, "reconstruction", pixels, expected, LATENTS)
    back = export_state(rules, variables)
    for key, value in weights.items():
        yield equal("weights", "weights there and back", back[key], value)


def _codes(case: str, codes: np.ndarray, arrays: dict[str, np.ndarray]) -> Check:
    clear = arrays[f"{case}_margin"].reshape(codes.shape) > CLEAR_MARGIN
    theirs = arrays[f"{case}_codes"].reshape(codes.shape)
    flipped = np.count_nonzero(codes[~clear] != theirs[~clear])
    note = f"{flipped} of {np.count_nonzero(~clear)} near ties differ" if flipped else ""
    return equal(case, "codes", codes[clear], theirs[clear], note=note)


def image(golden: Golden) -> Iterator[Check]:
    """Smart resize, preprocessing and postprocessing."""
    for case in golden.json("smart_resize"):
        yield _smart_resize(case)
    arrays = golden.arrays("image_processing")
    for case in golden.json("image_processing"):
        name = f"pre{case['i']}"
        pixels = _preprocess(case, arrays[f"{name}_image"])
        yield close(
            name, "pixel values", pixels, _channels_last(arrays[f"{name}_pixel_values"]), PIXELS
        )
    yield _postprocess(arrays)
    yield from _round_trips(arrays)


def _smart_resize(case: dict) -> Check:
    arguments = [case[k] for k in ("height", "width", "factor", "min_pixels", "max_pixels")]
    try:
        result = list(smart_resize(*arguments))
    except UserError as error:
        result = {"ValueError": str(error)}
    return equal(f"resize {arguments}", "smart resize", result, case["result"])


def _preprocess(case: dict, picture: np.ndarray) -> np.ndarray:
    options = dict(case["kwargs"])
    if not options.pop("do_resize", True):
        _refuse(options)
        return to_pixels(_to_rgb(picture))[None]
    _refuse(options)
    spec = ImageSpec(min_pixels=case["min_pixels"], max_pixels=case["max_pixels"])
    pictures = picture if picture.ndim == 4 else picture[None]
    return to_pixels(spec.resize(np.stack([_to_rgb(each) for each in pictures])))


def _to_rgb(image: np.ndarray) -> np.ndarray:
    """uint8 gray [H, W] or [H, W, 1], RGB or RGBA [H, W, 3 or 4] to RGB uint8 [H, W, 3]."""
    if image.ndim == 3 and image.shape[-1] == 1:
        image = image[..., 0]
    return np.asarray(Image.fromarray(image).convert("RGB"))


def _truncated_levels(pixels: np.ndarray) -> np.ndarray:
    """The reference's ``postprocess``; the package rounds instead."""
    levels = ((np.asarray(pixels, np.float32) + 1) / 2) * np.float32(255)
    return np.clip(levels, 0, 255).astype(np.uint8)


def _refuse(options: dict) -> None:
    if options:
        raise ValueError(f"image processor options {sorted(options)} are not known here")


def _channels_last(pixels: np.ndarray) -> np.ndarray:
    return np.moveaxis(pixels, -3, -1)


def _postprocess(arrays: dict[str, np.ndarray]) -> Check:
    """The reference's truncation; a level that sits on an integer may differ by one."""
    pixels = _channels_last(arrays["post_input"])
    ours, theirs = _truncated_levels(pixels), arrays["post_output"]
    if ours.shape != theirs.shape:
        return equal("post", "levels", ours, theirs)
    exact = (pixels.astype(np.float64) + 1) / 2 * 255
    edge = np.abs(exact - np.rint(exact)) < ON_AN_INTEGER
    apart = np.abs(ours.astype(int) - theirs.astype(int))
    note = f"{np.mean(edge & (apart == 1)):.2%} on an integer differ by one"
    wrong = (apart > 1) | ((apart == 1) & ~edge)
    return equal("post", "levels", wrong, np.zeros_like(wrong), note=note if apart.any() else "")


def _round_trips(arrays: dict[str, np.ndarray]) -> Iterator[Check]:
    back = _truncated_levels(to_pixels(arrays["roundtrip_image"]))
    yield equal("roundtrip", "levels", back, arrays["roundtrip_output"])
    rows, columns, channels = arrays["levels_roundtrip"].shape
    levels = np.arange(rows * columns, dtype=np.uint8).reshape(rows, columns, 1)
    pixels = to_pixels(np.repeat(levels, channels, axis=-1))
    expected = _channels_last(arrays["levels_pixel_values"])[0]
    yield close("levels", "pixel values", pixels, expected, PIXELS)
    yield equal("levels", "levels", _truncated_levels(pixels), arrays["levels_roundtrip"])
