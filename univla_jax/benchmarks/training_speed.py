"""One training step beside that of transformers' Emu3 in PyTorch: same weights and batch, one run.

    python -m univla_jax.benchmarks.training_speed [--steps=3] [--json=FILE]

Decoder: hidden 512, 8 layers, 8 heads (2 of keys), mlp 1,792, vocabulary 184,622; batch 2 x 512 in
float32 on the CPU. A step is forward, backward, clipping and AdamW on both sides; the steps take
turns, so that what else the machine does hits both alike. Once every token is labeled, once 5 %.
Needs ``pip install 'univla_jax[parity]'``. The times are medians; the processor time of all threads
is given beside the clock because it does not depend on other programs.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags, logging

from univla_jax import cli
from univla_jax.benchmarks.measure import save
from univla_jax.cli import format_table
from univla_jax.interop.hf_weights import decoder_rules, export_state
from univla_jax.pipeline.batch import Batch
from univla_jax.pipeline.data_config import DataConfig
from univla_jax.sequences.tokens import Role
from univla_jax.tokenizers.vocabulary import Vocabulary
from univla_jax.training.model_setup import TrainSetup
from univla_jax.training.optimizer import OptimizerConfig
from univla_jax.training.sharding import MeshConfig, make_mesh, to_global
from univla_jax.training.train_config import LossConfig, ModelConfig, TrainConfig

STEPS = flags.DEFINE_integer("steps", 3, "Timed steps of each side, after one that compiles")

ROWS, LENGTH, SPARSE = 2, 512, 0.05
OPTIMIZER = OptimizerConfig(learning_rate=1e-4, min_learning_rate=1e-5, warmup_steps=0)
IGNORED = -100  # label of a position without one, in transformers


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one step.

    Attributes:
      clock: by the clock.
      processor: of all threads.
      loss: of the step.
    """

    clock: float
    processor: float
    loss: float


def batch(share: float, seed: int = 0) -> Batch:
    """Random tokens, ``share`` of which are labeled."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, Vocabulary.emu3().pad, (ROWS, LENGTH)).astype(np.int32)
    roles = np.full((ROWS, LENGTH), Role.TEXT, np.uint8)
    count = round(share * (LENGTH - 1))
    for element in roles:
        element[1 + rng.choice(LENGTH - 1, count, replace=False)] = Role.ACTION
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    return Batch(tokens, roles, np.zeros_like(roles), positions, np.ones_like(tokens))


def our_run(share: float) -> TrainSetup:
    """The train step as the train command builds it."""
    overrides = {"dtype": "float32", "dropout": 0.0, "remat": "none", "scan_unroll": 8}
    labeled = 0 if share == 1 else round(share * LENGTH) + 1
    config = TrainConfig(
        total_steps=1000,
        model=ModelConfig("small", overrides),
        data=DataConfig(stores=(), task="policy_video", sequence_length=LENGTH, batch_size=ROWS),
        optimizer=OPTIMIZER,
        loss=LossConfig(max_labeled=labeled),
        mesh=MeshConfig(fsdp=1),
    )
    return TrainSetup.build(config, Vocabulary.emu3(), make_mesh(config.mesh, jax.devices()[:1]))


def our_step(run: TrainSetup, data: Batch) -> tuple[Callable[[], float], dict[str, np.ndarray]]:
    """A function that runs one step and returns its loss; and the weights before the first."""
    state, step = run.new_state(), run.train_step()
    weights = export_state(decoder_rules(run.model.config), jax.device_get(state.params))
    arrays = to_global(data, run.batch_sharding)

    def once() -> float:
        nonlocal state
        state, metrics = step(state, arrays)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return once, weights


def their_step(run: TrainSetup, weights: dict[str, np.ndarray], data: Batch) -> Callable[[], float]:
    """The same step of transformers' ``Emu3ForCausalLM``."""
    import torch
    import transformers

    decoder = run.model.config
    model = transformers.Emu3ForCausalLM(
        transformers.Emu3TextConfig(
            vocab_size=decoder.vocab_size,
            hidden_size=decoder.hidden_size,
            intermediate_size=decoder.mlp_size,
            num_hidden_layers=decoder.num_layers,
            num_attention_heads=decoder.num_heads,
            num_key_value_heads=decoder.num_kv_heads,
            rope_parameters={"rope_theta": decoder.rope_theta, "rope_type": "default"},
            rms_norm_eps=decoder.rms_eps,
            pad_token_id=decoder.pad_id,
            attention_dropout=0.0,
            use_cache=False,
        )
    )
    model.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=OPTIMIZER.learning_rate,
        betas=(OPTIMIZER.b1, OPTIMIZER.b2),
        eps=OPTIMIZER.eps,
        weight_decay=OPTIMIZER.weight_decay,
        fused=True,
    )
    tokens = torch.tensor(data.tokens, dtype=torch.long)
    labels = torch.where(torch.tensor(data.roles) == Role.ACTION, tokens, IGNORED)

    def once() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm)
        optimizer.step()
        return loss.item()

    return once


def timed(step: Callable[[], float]) -> Timing:
    """Runs one step."""
    clock, processor = time.perf_counter(), time.process_time()
    loss = step()
    return Timing(time.perf_counter() - clock, time.process_time() - processor, loss)


def compare(share: float, steps: int) -> dict[str, Any]:
    """Medians of both sides, and their losses of the first step, where the weights are equal."""
    run, data = our_run(share), batch(share)
    ours, weights = our_step(run, data)
    theirs = their_step(run, weights, data)
    del weights
    first = timed(ours).loss, timed(theirs).loss
    pairs = [(timed(ours), timed(theirs)) for _ in range(steps)]
    median = lambda side, what: statistics.median(getattr(p[side], what) for p in pairs)  # noqa: E731
    result = {"labeled": share, "loss": first[0], "their_loss": first[1]}
    for what in ("clock", "processor"):
        result[f"{what}_seconds"] = median(0, what)
        result[f"their_{what}_seconds"] = median(1, what)
        result[f"{what}_ratio"] = median(1, what) / median(0, what)
    return result


def table(results: list[dict[str, Any]]) -> str:
    """The figures in a few lines."""
    heads = ["labeled", "ours s", "torch s", "faster", "ours cpu s", "torch cpu s", "faster"]
    rows = [[*heads, "loss", "torch loss"]]
    for r in results:
        cells = [f"{r['labeled']:.0%}"]
        for what in ("clock", "processor"):
            cells += [f"{r[f'{what}_seconds']:.2f}", f"{r[f'their_{what}_seconds']:.2f}"]
            cells.append(f"{r[f'{what}_ratio']:.2f} x")
        rows.append([*cells, f"{r['loss']:.5f}", f"{r['their_loss']:.5f}"])
    return format_table(rows)


def main(argv: list[str]) -> None:
    """Runs the command."""
    del argv
    logging.set_verbosity(logging.ERROR)
    results = [compare(share, STEPS.value) for share in (1.0, SPARSE)]
    print(table(results))
    save(results)


if __name__ == "__main__":
    cli.run(main)
