"""Time of one training step, beside the same step of transformers' Emu3 in PyTorch.

    python -m univla_jax.benchmarks.training_speed [--steps=3] [--json=FILE]
    python -m univla_jax.benchmarks.training_speed --length=64 --labeled=0.05 --steps=1    # quick
    python -m univla_jax.benchmarks.training_speed --nopeer                     # without PyTorch

Decoder: hidden 512, 8 layers, 8 heads (2 of keys), mlp 1,792, vocabulary 184,622; batch 2 x 512 in
float32 on the CPU. A step is forward, backward, clipping and AdamW on both sides, from the same
weights on the same batch, once with all tokens labeled and once with 5 %. The steps of both sides
alternate, so that other programs slow both equally; the times are medians.
The peer needs ``pip install 'univla_jax[parity]'``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags, logging

from univla_jax import cli
from univla_jax.benchmarks.harness import Elapsed, median, print_cases, save, timed
from univla_jax.benchmarks.transformers_peer import PEER, emu3_decoder, import_peer
from univla_jax.pipeline.batch import Batch
from univla_jax.pipeline.data_config import DataConfig
from univla_jax.sequences.tokens import Role
from univla_jax.tokenizers.vocabulary import Vocabulary
from univla_jax.training.model_setup import TrainSetup
from univla_jax.training.optimizer import OptimizerConfig
from univla_jax.training.sharding import MeshConfig, make_mesh, to_global
from univla_jax.training.train_config import LossConfig, ModelConfig, TrainConfig

PRESET = cli.string_flag("preset", "decoder", default="small")
LENGTH = flags.DEFINE_integer("length", 512, "Tokens of a sequence")
LABELED = flags.DEFINE_list("labeled", ["1", "0.05"], "Shares of the tokens that are labeled")
STEPS = flags.DEFINE_integer("steps", 3, "Timed steps of each side, after one that compiles")

BATCH_SIZE = 2
OPTIMIZER = OptimizerConfig(learning_rate=1e-4, min_learning_rate=1e-5, warmup_steps=0)
UNLABELED = -100  # label of a position without one, in transformers


def random_batch(labeled: float, length: int, *, batch_size: int = BATCH_SIZE) -> Batch:
    """Random tokens [B, S], a share of which are actions and therefore labeled."""
    rng = np.random.default_rng(0)
    shape = (batch_size, length)
    tokens = rng.integers(0, Vocabulary.emu3().pad, shape).astype(np.int32)
    roles = np.full(shape, Role.TEXT, np.uint8)
    for element in roles:
        positions = rng.choice(length - 1, round(labeled * (length - 1)), replace=False)
        element[1 + positions] = Role.ACTION
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
    return Batch(tokens, roles, np.zeros_like(roles), positions, np.ones_like(tokens))


def make_setup(labeled: float, length: int, preset: str) -> TrainSetup:
    """The train step as the train command builds it, on one device."""
    # What is fastest on a CPU: layers unrolled out of the scan and nothing recomputed, as the peer
    # does it too. With few labels the head runs on their positions only.
    overrides = {"dtype": "float32", "dropout": 0.0, "remat": "none", "scan_unroll": 8}
    config = TrainConfig(
        total_steps=1000,
        model=ModelConfig(preset, overrides),
        data=DataConfig(
            stores=(), task="policy_video", sequence_length=length, batch_size=BATCH_SIZE
        ),
        optimizer=OPTIMIZER,
        loss=LossConfig(max_labeled=0 if labeled == 1 else round(labeled * length) + 1),
        mesh=MeshConfig(fsdp=1),
    )
    return TrainSetup.build(config, Vocabulary.emu3(), make_mesh(config.mesh, jax.devices()[:1]))


def our_step(setup: TrainSetup, batch: Batch) -> tuple[Callable[[], float], Any]:
    """A function that runs one step and returns its loss, and the weights before the first."""
    state, step = setup.new_state(), setup.train_step()
    params = jax.device_get(state.params)
    arrays = to_global(batch, setup.batch_sharding)

    def run() -> float:
        nonlocal state
        state, metrics = step(state, arrays)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return run, params


def peer_step(setup: TrainSetup, params: Any, batch: Batch) -> Callable[[], float]:
    """The same step of transformers' ``Emu3ForCausalLM``."""
    torch, _ = import_peer()
    model = emu3_decoder(setup.model.config, params).train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=OPTIMIZER.learning_rate,
        betas=(OPTIMIZER.b1, OPTIMIZER.b2),
        eps=OPTIMIZER.eps,
        weight_decay=OPTIMIZER.weight_decay,
        fused=True,
    )
    tokens = torch.tensor(batch.tokens, dtype=torch.long)
    labels = torch.where(torch.tensor(batch.roles) == Role.ACTION, tokens, UNLABELED)

    def run() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm)
        optimizer.step()
        return loss.item()

    return run


def compare(
    labeled: float, steps: int, *, preset: str, length: int, peer: bool = True
) -> dict[str, Any]:
    """Seconds of a step on both sides, and their losses of the first one, with equal weights.

    Args:
      labeled: share of the tokens.
      steps: timed on each side.
      preset: of the decoder.
      length: tokens of a sequence.
      peer: whether transformers runs too.
    """
    setup, batch = make_setup(labeled, length, preset), random_batch(labeled, length)
    ours, params = our_step(setup, batch)
    # The same weights on both sides: ours are donated to the step, so the peer takes a copy first.
    sides = {"ours": ours, **({"torch": peer_step(setup, params, batch)} if peer else {})}
    del params
    losses = {name: step() for name, step in sides.items()}  # compiles as well
    times: dict[str, list[Elapsed]] = {name: [] for name in sides}
    for _ in range(steps):
        for name, step in sides.items():
            times[name].append(timed(step)[1])
    figures: dict[str, Any] = {"labeled": f"{labeled:.0%}"}
    for name in sides:
        spent = median(times[name])
        figures |= {
            f"{name} s": round(spent.wall, 3),
            f"{name} processor s": round(spent.processor, 3),
            f"{name} loss": round(losses[name], 5),
        }
    if peer:
        own, other = median(times["ours"]), median(times["torch"])
        figures["times faster"] = round(other.wall / own.wall, 2)
        figures["times less processor"] = round(other.processor / own.processor, 2)
    return figures


def main(argv: list[str]) -> None:
    """Runs the command."""
    del argv
    logging.set_verbosity(logging.ERROR)
    sizes = {"preset": PRESET.value, "length": LENGTH.value, "peer": PEER.value}
    cases = [compare(float(labeled), STEPS.value, **sizes) for labeled in LABELED.value]
    print_cases(cases)
    save(cases)


if __name__ == "__main__":
    cli.run(main)
