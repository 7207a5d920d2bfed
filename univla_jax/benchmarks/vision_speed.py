"""Frames per second of the vision tokenizer's encoder, beside that of transformers.

    python -m univla_jax.benchmarks.vision_speed [--presets=quickstart,emu3] [--size=200]
        [--batch=64,4] [--repeats=3] [--json=FILE]
    python -m univla_jax.benchmarks.vision_speed --nopeer                       # without PyTorch

Both encode the same random frames with random weights of the same widths on the same cores, in
turns: 64 frames per call, as ``tokenize_dataset`` does, and 4 of the large preset, of which the
peer computes every frame four times. Compilation is not counted; every figure is the best of
``--repeats``. The peer needs ``pip install 'univla_jax[parity]'``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from absl import flags

from univla_jax import cli
from univla_jax.benchmarks.harness import Elapsed, fastest, print_cases, save, timed
from univla_jax.benchmarks.transformers_peer import PEER, import_peer
from univla_jax.errors import UserError
from univla_jax.tokenizers.vision import VisionTokenizer
from univla_jax.tokenizers.vision_vq import PRESETS, VisionConfig, init_variables

PRESET_NAMES = flags.DEFINE_list("presets", ["quickstart", "emu3"], "Presets to measure")
SIZE = flags.DEFINE_integer("size", 200, "Height and width of the frames in pixels")
BATCH = flags.DEFINE_list("batch", ["64", "4"], "Frames per call, one number for each preset")
REPEATS = flags.DEFINE_integer(
    "repeats", 3, "Calls of each; the fastest counts", allow_override=True
)


def main(argv: list[str]) -> None:
    """Runs the command."""
    del argv
    unknown = sorted(set(PRESET_NAMES.value) - set(PRESETS))
    if unknown:
        raise UserError(f"--presets: {unknown[0]!r} is not one of {', '.join(PRESETS)}")
    batches = [int(text) for text in BATCH.value]
    if len(batches) != len(PRESET_NAMES.value):
        raise UserError(f"--batch: {len(batches)} numbers for {len(PRESET_NAMES.value)} presets")
    pairs = zip(PRESET_NAMES.value, batches)
    sizes = {"size": SIZE.value, "repeats": REPEATS.value, "peer": PEER.value}
    cases = [compare(preset, batch=batch, **sizes) for preset, batch in pairs]
    print_cases(cases)
    save(cases)


def compare(
    preset: str, *, size: int, batch: int, repeats: int, peer: bool = True
) -> dict[str, Any]:
    """Frames per second of both encoders at one preset.

    Args:
      preset: of the tokenizer.
      size: height and width of the frames in pixels.
      batch: frames per call.
      repeats: calls of each.
      peer: whether transformers runs too.
    """
    config = PRESETS[preset]
    frames = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), np.uint8)
    tokenizer = VisionTokenizer(config, init_variables(config, seed=0))
    calls = {"univla_jax frames/s": lambda: tokenizer.encode_frames(frames)}
    if peer:
        calls["transformers frames/s"] = peer_encoder(config, frames)
    shapes = {name: np.shape(call()) for name, call in calls.items()}  # compiles and warms up
    if len({int(np.prod(shape)) for shape in shapes.values()}) > 1:
        raise UserError(f"the encoders disagree on the number of codes: {shapes}")
    times: dict[str, list[Elapsed]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(timed(call)[1])
    figures = {"preset": preset, "frames per call": batch}
    figures |= {name: round(batch / fastest(own).wall, 3) for name, own in times.items()}
    if peer:
        ours, theirs = (fastest(own) for own in times.values())
        figures["times faster"] = round(theirs.wall / ours.wall, 2)
        figures["times less processor"] = round(theirs.processor / ours.processor, 2)
    return figures


def peer_encoder(
    config: VisionConfig, frames: np.ndarray, *, device: str = "cpu"
) -> Callable[[], np.ndarray]:
    """A call that encodes ``frames`` with transformers' ``Emu3VQVAE`` of the same widths.

    Raises:
      UserError: transformers or torch are not installed.
    """
    torch, transformers = import_peer()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    settings = transformers.Emu3VQVAEConfig(
        codebook_size=config.codebook_size,
        embed_dim=config.embed_dim,
        latent_channels=config.z_channels,
        temporal_downsample_factor=config.temporal_downsample_factor,
        base_channels=config.ch,
        channel_multiplier=list(config.ch_mult),
        num_res_blocks=config.num_res_blocks,
        attn_resolutions=list(config.attn_resolutions),
        hidden_size=config.ch * config.ch_mult[-1],
    )
    with _group_norms(torch, config.num_groups):
        model = transformers.Emu3VQVAE(settings).eval().to(device)
    # Pixels from -1 to 1, channels first, as the image processor of transformers makes them.
    pixels = torch.from_numpy(frames).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    sizes = torch.tensor([frames.shape[1:3]] * len(frames), device=device)

    def encode() -> np.ndarray:
        with torch.inference_mode():
            codes = model.encode(pixels, sizes)
        found = getattr(codes, "image_tokens", codes)
        return np.stack([np.asarray(one.cpu()) for one in found])

    return encode


@contextlib.contextmanager
def _group_norms(torch: Any, num_groups: int) -> Iterator[None]:
    """Gives every group norm made inside ``num_groups`` groups.

    ``Emu3VQVAE`` has 32 groups written into its layers, more than the channels of our small preset.
    """
    real = torch.nn.GroupNorm

    class Norm(real):
        def __init__(self, **options: Any) -> None:
            super().__init__(**{**options, "num_groups": num_groups})

    torch.nn.GroupNorm = Norm
    try:
        yield
    finally:
        torch.nn.GroupNorm = real


if __name__ == "__main__":
    cli.run(main)
