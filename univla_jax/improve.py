"""Improves a policy by its own roll-outs: judges them, and fine-tunes on good and bad chunks.

    python -m univla_jax.improve --config=configs/quickstart.py:improve \\
        --checkpoint=W/unified --stores=W/tokens/train --held_out=W/tokens/val --out=W/improved
    python -m univla_jax.evaluate --config=configs/quickstart.py:evaluate \\
        --checkpoint=W/improved/policy --conditions=policy --out=W/after

The checkpoint acts and judges (a mixture with the task "value"). Its attempts take scenes that no
evaluation uses; ``W/improved/policy`` is the new one. No demonstration is added: ``--stores`` are
those it was trained on. Killed at any moment and started again, the command goes on.
"""

from __future__ import annotations

from absl import flags, logging

from univla_jax import cli
from univla_jax.config import build_config
from univla_jax.evaluation.improvement import REPORT, ImproveConfig, improve

CONFIG = cli.config_flag()
CHECKPOINT = cli.string_flag("checkpoint", "that acts and judges, or its training's workdir")
STORES = flags.DEFINE_list("stores", None, "token stores of demonstrations", required=True)
HELD_OUT = flags.DEFINE_list("held_out", None, "token stores for the held-out loss", required=True)
OUT = cli.string_flag("out", "folder for the results")


def main(argv: list[str]) -> None:
    """Runs the command."""
    del argv
    logging.set_verbosity(logging.WARNING)
    config = build_config(ImproveConfig, CONFIG.value.to_dict())
    report = improve(config, CHECKPOINT.value, STORES.value, HELD_OUT.value, OUT.value)
    success, advantages = report["attempts"], report["advantages"]
    print(
        f"{success['successes']} of {success['episodes']} attempts succeeded; good chunks in "
        f"{advantages['steps']} steps from an advantage of {advantages['good_from']:.3f}"
    )
    for name in ("good_in_successes", "good_in_failures"):
        if name in advantages:
            print(f"{name.replace('_', ' ')}: {100 * advantages[name]:.1f} %")
    print(f"{OUT.value}/{REPORT}\n{report['policy']}")


if __name__ == "__main__":
    cli.run(main)
