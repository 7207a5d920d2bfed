"""Memory of a training step by count, without a compiler."""

from __future__ import annotations

import dataclasses
import math

import jax

from univla_jax.models.decoder_config import OFFLOADED, REMAT_PRESETS
from univla_jax.training import hardware
from univla_jax.training.cross_entropy import LOGITS_PER_CHUNK, MIN_POSITIONS
from univla_jax.training.mesh_choice import kept_widths
from univla_jax.training.model_setup import TrainSetup
from univla_jax.training.sharding import BATCH_AXES, shard_bytes, split_memory
from univla_jax.training.train_step import trained_part


@dataclasses.dataclass(frozen=True)
class MemoryCount:
    """Bytes per device at the end of the backward pass, the worst moment of a step.

    Attributes:
      parameters: as they are stored.
      optimizer: its state on the device.
      gradients: of what is trained.
      kept: inputs of all layers, and what the remat preset keeps of them.
      layer: one layer computed again and differentiated, its weights in the compute type.
      loss: logits of one chunk, the head whole, and its gradient.
      host: what waits in the host's memory.
    """

    parameters: int
    optimizer: int
    gradients: int
    kept: int
    layer: int
    loss: int
    host: int

    @property
    def total(self) -> int:
        """Bytes on the device."""
        # The loss is over before the backward pass of the layers begins.
        parts = (self.parameters, self.optimizer, self.gradients, self.kept)
        return sum(parts) + max(self.layer, self.loss)


def count_memory(setup: TrainSetup) -> MemoryCount:
    """What a train step takes on each device of its mesh, by the shapes of its arrays."""
    config, decoder, mesh = setup.config, setup.model.config, dict(setup.mesh.shape)
    item, width = decoder.compute_dtype.itemsize, decoder.hidden_size
    batch = config.data.batch_size // config.accumulation
    parts = math.prod(mesh[axis] for axis in BATCH_AXES) * mesh["context"]
    tokens = -(-batch * config.data.sequence_length // parts)

    trained = trained_part(setup.abstract.params, setup.is_trained)
    gradients = shard_bytes(trained)
    if config.accumulation > 1:  # sums in float32, and the gradient of one micro-batch
        gradients += sum(
            4 * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(trained)
        )
    moments, waiting = split_memory(setup.abstract.opt_state)
    tensor, layers = mesh["tensor"], tokens * decoder.num_layers * item
    widths = kept_widths(decoder, tensor)
    named = sum(widths.get(name, 0) for name in REMAT_PRESETS[decoder.remat])
    if decoder.remat == "none":  # norms and the gated product too
        named += 2 * width + decoder.mlp_size / tensor
    offloaded = int(layers * named) if decoder.remat in OFFLOADED else 0

    # Values and their gradients of one layer; its matrices whole along the axes that are gathered,
    # and their gradients where they have any.
    alive = sum(widths.values()) + decoder.mlp_size / tensor + 3 * width
    matrices = hardware.layer_parameters(decoder) / tensor * item
    layer = 2 * tokens * alive * item + matrices * (1 if decoder.lora is not None else 2)

    labeled = min(
        config.loss.max_labeled or config.data.sequence_length, config.data.sequence_length
    )
    labeled = -(-batch * labeled // math.prod(mesh[axis] for axis in BATCH_AXES))
    rows = decoder.padded_vocab_size // tensor
    positions = min(labeled, max(MIN_POSITIONS, LOGITS_PER_CHUNK // rows))
    loss = 4 * positions * rows * 3 + rows * width * item
    if decoder.lora is None:
        loss += rows * width * 4
    return MemoryCount(
        parameters=shard_bytes(setup.abstract.params),
        optimizer=shard_bytes(moments),
        gradients=gradients,
        kept=int(layers * (width + named)) - offloaded,
        layer=int(layer),
        loss=loss,
        host=shard_bytes(waiting) + offloaded,
    )
