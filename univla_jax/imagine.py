"""Continues held-out episodes with a world model, and compares them with the real frames.

    python -m univla_jax.imagine --config=configs/quickstart.py:imagine \\
        --checkpoint=WORKDIR --source=RLDS_FOLDER --out=FOLDER

    python -m univla_jax.imagine --config=configs/quickstart.py:imagine \\
        --checkpoint=WORKDIR --image=PICTURE --instruction="push the red block" --out=FOLDER

    python -m univla_jax.imagine --config=configs/quickstart.py:imagine --checkpoint=WORKDIR \\
        --source=RLDS_FOLDER --actions=recorded --out=FOLDER

    python -m univla_jax.imagine --config=configs/road.py:imagine --checkpoint=WORKDIR --out=FOLDER

    python -m univla_jax.imagine --config=configs/quickstart.py:counterfactuals \\
        --checkpoint=WORKDIR --out=FOLDER

The first form writes ``imagined.png`` (real frames above imagined ones), ``imagined.gif`` and
``imagine.json``: PSNR, SSIM and visual-token accuracy of the imagined frames and of repeating the
last frame given. Started again on finished results, the command says so. The second continues a
picture of your own. The third lets the frames follow given actions: those that were recorded, or
``--actions=FILE.npy``, float [steps, A] for every episode or [episodes, steps, A], in physical
units, a whole number of the model's action chunks; it writes ``obeyed.png`` (real above imagined)
and ``obey.json``. ``--config.mp4=True`` writes a video too; ``--config.view`` names the camera;
``--temperature`` with ``--top_k``, ``--top_p`` and ``--seed`` samples frames instead of taking the
likeliest. The fourth imagines scenes of the embedded road under the true and a changed steering,
which the true renderer judges: ``steering.png``, ``steering.json``. The fifth imagines held-out
scenes of the tabletop under true and other instructions and after true and other actions, which its
simulator judges: ``counterfactuals.png``, ``counterfactuals.json``.
``--mesh.tensor`` and ``--mesh.fsdp`` split the model over chips.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from absl import logging

from univla_jax import cli
from univla_jax.cli import format_table
from univla_jax.config import build_config
from univla_jax.errors import UserError
from univla_jax.evaluation import (
    counterfactuals,
    imagined_episodes,
    obeyed_episodes,
    steered_imagination,
)
from univla_jax.evaluation.counterfactuals import CounterfactualConfig
from univla_jax.evaluation.imagined_episodes import ImagineConfig
from univla_jax.evaluation.steered_imagination import SteeringConfig
from univla_jax.inference.sampling import sampling_flags
from univla_jax.training.model_setup import mesh_flags

CONFIG = cli.config_flag()
CHECKPOINT = cli.string_flag("checkpoint", "world-model checkpoint, or its training's workdir")
SOURCE = cli.string_flag("source", "RLDS dataset folder with the held-out split", required=False)
IMAGE = cli.string_flag("image", "picture to continue instead", required=False)
INSTRUCTION = cli.string_flag("instruction", "task for that picture", default="")
ACTIONS = cli.string_flag(
    "actions", "'recorded' or a .npy file: imagine what these actions do", required=False
)
OUT = cli.string_flag("out", "folder for the results")
SAMPLING = sampling_flags()
MESH = mesh_flags()

_SHOWN = {
    "imagined": "imagined",
    "repeat_context": "repeated frame",
    "repeat_reconstruction": "repeated, tokenized",
    "real_reconstruction": "real, tokenized",
}


def table(report: dict[str, Any]) -> str:
    """The scores over all frames, for a terminal."""
    rows = [["frames", "PSNR dB", "SSIM", "tokens right %"]]
    for name, label in _SHOWN.items():
        means = report["overall"][name]
        accuracy = f"{100 * means['token_accuracy']:.1f}"
        rows.append([label, f"{means['psnr']:.2f}", f"{means['ssim']:.3f}", accuracy])
    return format_table(rows)


def main(argv: list[str]) -> None:
    """Runs the command."""
    del argv
    logging.set_verbosity(logging.WARNING)
    values = CONFIG.value.to_dict()
    if "turn" in values:  # of a SteeringConfig
        _imagine_steering(build_config(SteeringConfig, values))
        return
    if "counterfactuals" in values:  # of a CounterfactualConfig
        _imagine_counterfactuals(build_config(CounterfactualConfig, values))
        return
    config = build_config(ImagineConfig, values)
    if (SOURCE.value is None) == (IMAGE.value is None):
        raise UserError("give either --source (real episodes) or --image (a picture)")
    if ACTIONS.value is not None:
        if SOURCE.value is None:
            raise UserError("--actions: give --source, whose episodes the actions are done in")
        obeyed_episodes.obey(
            config,
            CHECKPOINT.value,
            SOURCE.value,
            ACTIONS.value,
            OUT.value,
            sampling=SAMPLING(),
            place=MESH(),
        )
        print(obeyed_episodes.table(OUT.value))
        _print_paths([obeyed_episodes.STRIPS, obeyed_episodes.REPORT])
        return
    if IMAGE.value is not None:
        imagined_episodes.imagine_picture(
            config,
            CHECKPOINT.value,
            IMAGE.value,
            INSTRUCTION.value,
            OUT.value,
            sampling=SAMPLING(),
            place=MESH(),
        )
        _print_paths(imagined_episodes.picture_files(config))
        return
    was_finished = imagined_episodes.finished(OUT.value)
    report = imagined_episodes.imagine(
        config, CHECKPOINT.value, SOURCE.value, OUT.value, sampling=SAMPLING(), place=MESH()
    )
    if was_finished:
        print(f"{OUT.value} holds these results already")
    print(f"{report['episodes']} held-out episodes, {report['frames']} frames")
    print(table(report))
    for name, value in report.get("true_state", {}).items():
        print(f"{name.replace('_', ' ')}: {100 * value:.1f} %")
    _print_paths([*imagined_episodes.picture_files(config), imagined_episodes.REPORT])


def _imagine_steering(config: SteeringConfig) -> None:
    report = steered_imagination.imagine_steering(
        config, CHECKPOINT.value, OUT.value, sampling=SAMPLING(), place=MESH()
    )
    right = report["right"]
    ends = f"{100 * right['low']:.1f} - {100 * right['high']:.1f}"
    print(
        f"{right['successes']} of {right['episodes']} frames imagined under a changed steering "
        f"differ in its direction: {100 * right['rate']:.1f} % (95 %: {ends})"
    )
    _print_paths([steered_imagination.STRIPS, steered_imagination.REPORT])


def _imagine_counterfactuals(config: CounterfactualConfig) -> None:
    report = counterfactuals.imagine_counterfactuals(
        config, CHECKPOINT.value, OUT.value, sampling=SAMPLING(), place=MESH()
    )
    print(counterfactuals.table(report))
    _print_paths([counterfactuals.STRIPS, counterfactuals.REPORT])


def _print_paths(names: Sequence[str]) -> None:
    for name in names:
        print(f"{OUT.value}/{name}")


if __name__ == "__main__":
    cli.run(main)
