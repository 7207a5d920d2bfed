"""Calibration on published steps: the share of a chip's peak that their arithmetic reached.

Estimates of the compiler know nothing of what a chip does with them. Somebody else's measured steps
do: Llama 3.1 8B, whose layers are those of ``emu3_8b``, on v6e slices of 8 to 256 chips. One number
is fitted on the first of them; it predicts the others, and the steps of our recipes.
"""

from __future__ import annotations

import dataclasses
import functools

from univla_jax.models.decoder_config import preset
from univla_jax.training import hardware
from univla_jax.training.hardware import CHIPS

_LENGTH = 8192  # tokens of a sequence, the loss on all of them
_VOCABULARY_SIZE = 128_256
# Keeps of each layer its input and four projections of attention in the memory of the host, and
# computes the MLP's first two products and attention again, as ``remat="offload"`` does here.
_REMAT = "offload"


@dataclasses.dataclass(frozen=True)
class PublishedStep:
    """One measured training step of Llama 3.1 8B in bfloat16, parameters split over all chips.

    Attributes:
      chips: of type v6e.
      sequences: per chip.
      seconds: of the step.
      tokens_per_second: per chip, as published.
    """

    chips: int
    sequences: int
    seconds: float
    tokens_per_second: int

    @property
    def arithmetic_seconds(self) -> float:
        """Time of all operations, the recomputed ones included, at the chips' bf16 peak."""
        config = preset("emu3_8b", vocab_size=_VOCABULARY_SIZE, pad_id=None, remat=_REMAT)
        per_token = hardware.training_flops(config, _LENGTH)
        per_token += hardware.recomputed_flops(config, _LENGTH)
        return self.sequences * _LENGTH * per_token / (CHIPS["v6e"].teraflops * 1e12)

    @property
    def predicted_seconds(self) -> float:
        """Time of the step at ``published_efficiency``."""
        return self.arithmetic_seconds / published_efficiency()


# MaxText's "tiering" page and the recipes it links, github.com/AI-Hypercomputer/tpu-recipes,
# training/trillium/Llama3.1-8B-MaxText.
PUBLISHED = (
    PublishedStep(8, 3, 3.443, 7139),
    PublishedStep(16, 3, 3.393, 7243),
    PublishedStep(32, 3, 3.495, 7032),
    PublishedStep(256, 4, 4.546, 7207),
)


@functools.cache
def published_efficiency() -> float:
    """Share of the bf16 peak that all operations of the first published step reached."""
    fitted = PUBLISHED[0]
    return fitted.arithmetic_seconds / fitted.seconds
