"""Converts Hugging Face checkpoints into ours, and back.

    python -m univla_jax.convert --from_hf=FOLDER --to=DIR \\
        [--config=configs/official.py:libero_video --config.text=DIR --config.vision=DIR ...]
    python -m univla_jax.convert --from=DIR --to_hf=FOLDER [--dtype=bfloat16]

``--from_hf`` is a model folder as the Hugging Face hub stores it: Emu3 base models, the Emu3 vision
tokenizer, UniVLA world models and policies, and the Emu3 models of ``transformers``. A decoder
becomes a checkpoint to train from (``--config.init_from=DIR``) or, with a config that says what the
folder does not, to act with; a vision tokenizer becomes a tokenizer folder. Tensors are streamed,
so memory stays near 1 GB. ``--to_hf`` gives the same files back, byte for byte; a checkpoint
trained here gets the reference's names. The result appears whole or not at all.
Exit status: 0 done, 2 an error with its remedy.
"""

from __future__ import annotations

import resource
import sys
import time

from absl import flags, logging

from univla_jax import cli
from univla_jax.config import build_config
from univla_jax.errors import UserError
from univla_jax.interop.hf_assets import ConvertConfig
from univla_jax.interop.hf_conversion import from_hf, to_hf
from univla_jax.interop.hf_folder import HfFolder, unknown_keys

CONFIG = cli.config_flag(required=False)
FROM_HF = cli.string_flag("from_hf", "model folder as the hub stores it", required=False)
TO = cli.string_flag("to", "folder for the checkpoint or tokenizer", required=False)
FROM = cli.string_flag("from", "checkpoint or tokenizer folder", required=False)
TO_HF = cli.string_flag("to_hf", "folder for the model as the hub stores it", required=False)
DTYPE = cli.string_flag("dtype", "type of the weights written by --to_hf", default="")
WEIGHTS_ONLY = flags.DEFINE_bool(
    "weights_only", False, "Leave out the assets: nothing but converting back needs none"
)


def main(argv: list[str]) -> None:
    """Runs the command."""
    del argv
    logging.set_verbosity(logging.FATAL)  # libraries repeat the error that is printed at the end
    start = time.monotonic()
    if FROM_HF.value and TO.value and not FROM.value and not TO_HF.value:
        values = CONFIG.value.to_dict() if CONFIG.value is not None else {}
        config = build_config(ConvertConfig, values)
        hub = from_hf(FROM_HF.value, TO.value, config, weights_only=WEIGHTS_ONLY.value)
        print(f"{TO.value}: {_size(hub)}, {_cost(start)}")
        unknown = unknown_keys(hub.config)
        if unknown:
            print(f"config.json: keys that are not read: {', '.join(unknown)}", file=sys.stderr)
        if hub.left_out:
            print(f"not converted: {', '.join(hub.left_out)}", file=sys.stderr)
    elif FROM.value and TO_HF.value and not FROM_HF.value and not TO.value:
        to_hf(FROM.value, TO_HF.value, dtype=DTYPE.value)
        print(f"{TO_HF.value}: {_size(HfFolder.open(TO_HF.value))}, {_cost(start)}")
    else:
        raise UserError("give --from_hf=FOLDER and --to=DIR, or --from=DIR and --to_hf=FOLDER")


def _size(hub: HfFolder) -> str:
    sizes = [tensor.nbytes for tensor in hub.tensors.values()]
    return f"{len(sizes)} tensors, {sum(sizes) / 1e9:.2f} GB, the largest {max(sizes) / 1e9:.2f} GB"


def _cost(start: float) -> str:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    return f"{time.monotonic() - start:.0f} s, peak memory {peak / 1e9:.2f} GB"


if __name__ == "__main__":
    cli.run(main)
