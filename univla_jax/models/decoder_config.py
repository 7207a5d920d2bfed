"""Decoder configuration: logical axis names, remat presets, and the named sizes.

Axes: D model, N query heads, K key/value heads, C head dim, F mlp.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from univla_jax.errors import UserError
from univla_jax.models.lora import LoraConfig

# ----------------------------------------------------------------------------
# Logical axis names: all that models and sharding rules share.
#
# Parameters are created with these names and activations are constrained by them; the table that
# maps each name to mesh axes is in ``training/sharding.py``. Without rules in scope every name is a
# no-op.


BATCH = "batch"
LENGTH = "length"
LAYERS = "layers"
EMBED = "embed"
NORM = "norm"
HEADS = "heads"
KV_HEADS = "kv_heads"
HEAD_DIM = "head_dim"
MLP = "mlp"
VOCAB = "vocab"
ACTIVATION_EMBED = "activation_embed"
ACTIVATION_HEADS = "activation_heads"
ACTIVATION_KV_HEADS = "activation_kv_heads"
ACTIVATION_MLP = "activation_mlp"
ACTIVATION_VOCAB = "activation_vocab"
CACHE_LENGTH = "cache_length"
LOOKUP_BATCH = "lookup_batch"
LOOKUP_LENGTH = "lookup_length"
LOOKUP_EMBED = "lookup_embed"


# ----------------------------------------------------------------------------
# Rematerialization: which intermediates of a layer the backward pass keeps.
#
# Each layer names its large intermediates with ``jax.ad_checkpoint.checkpoint_name``. A preset
# lists those that stay in memory; everything else of the layer is computed again in the backward
# pass. The layer's input is always kept: it is the carry of the scan over layers.


QUERY = "query"
KEY = "key"
VALUE = "value"
ATTENTION_OUT = "attention_out"
ATTENTION_NORMALIZER = "attention_normalizer"
OUTPUT = "attention_projection"
GATE = "mlp_gate"
UP = "mlp_up"
DOWN = "mlp_down"

REMAT_NAMES = (QUERY, KEY, VALUE, ATTENTION_OUT, ATTENTION_NORMALIZER, OUTPUT, GATE, UP, DOWN)

# From least memory (and most recomputation) to most memory. "none" keeps everything. "offload"
# keeps its intermediates in the memory of the host until the backward pass needs them.
REMAT_PRESETS: dict[str, tuple[str, ...]] = {
    "full": (),
    "offload": (QUERY, KEY, VALUE, OUTPUT),
    "attention": (ATTENTION_OUT, ATTENTION_NORMALIZER),
    "qkv_attention": (QUERY, KEY, VALUE, ATTENTION_OUT, ATTENTION_NORMALIZER),
    "attention_block": (QUERY, KEY, VALUE, ATTENTION_OUT, ATTENTION_NORMALIZER, OUTPUT),
    "attention_block_up": (QUERY, KEY, VALUE, ATTENTION_OUT, ATTENTION_NORMALIZER, OUTPUT, UP),
    "projections": (QUERY, KEY, VALUE, ATTENTION_OUT, ATTENTION_NORMALIZER, OUTPUT, GATE, UP),
    "none": REMAT_NAMES,
}
OFFLOADED = frozenset({"offload"})  # presets whose intermediates wait in the host's memory


# ----------------------------------------------------------------------------
# Sizes.


DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("int8", "fp8")
ATTENTION_IMPLEMENTATIONS = ("auto", "plain", "blocked", "splash", "cudnn")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything that shapes the decoder (UniVLA reference/Emu3/emu3/mllm/configuration_emu3.py).

    Attributes:
      vocab_size: number of real token ids; ids beyond it exist only as padding.
      hidden_size: D, width of the residual stream.
      num_layers: number of decoder layers.
      num_heads: N, query heads.
      num_kv_heads: K, key and value heads; divides ``num_heads``.
      head_dim: C, even (rotary pairs).
      mlp_size: F, width of the gated feed-forward layer.
      vocab_pad_multiple: embedding and head have a multiple of so many ids.
      rope_theta: base of the rotary frequencies.
      rms_eps: epsilon of every RMSNorm.
      dropout: in training, on embeddings, attention probabilities and both residual branches
        (the reference's ``attention_dropout``); 0 costs nothing.
      attention_dropout: the rate on attention probabilities where it differs; fused kernels never
        form them, so only 0 lets ``"auto"`` choose one.
      qkv_bias: biases on the query, key and value projections.
      dtype: compute type of activations; norms, softmax, rotations and logits stay float32.
      param_dtype: type the parameters are stored in.
      gradient_dtype: type in which gradients of the layers' matrices and of the head are summed
        over tokens and devices; ``dtype`` where None. ``"float32"`` moves twice the bytes.
      quantization: one of ``QUANTIZATIONS``: the layers' products of training in eight bits, or
        None; parameters, optimizer and everything else stay as they are.
      remat: name in ``REMAT_PRESETS``; what the backward pass keeps of each layer. A run that sets
        none gets what fits its chip (``training/mesh_choice.py``).
      scan_unroll: layers per iteration of the scan; ``num_layers`` unrolls it (fast on CPU).
      attention: implementation by name; ``"auto"`` chooses by platform and shape.
      pad_id: id whose embedding starts at zero and never gets a gradient, or None (torch's
        ``padding_idx``).
      initializer_range: standard deviation of every matrix at initialization.
      lora: adapters beside frozen matrices while they are trained; None for a plain decoder.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    vocab_pad_multiple: int = 256
    rope_theta: float = 1e6
    rms_eps: float = 1e-5
    dropout: float = 0.1
    attention_dropout: float | None = None
    qkv_bias: bool = False
    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    gradient_dtype: str | None = None
    quantization: str | None = None
    remat: str = "full"
    scan_unroll: int = 1
    attention: str = "auto"
    pad_id: int | None = None
    initializer_range: float = 0.02
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        """Raises UserError for a value out of range; names the field."""
        positive = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads")
        positive += ("head_dim", "mlp_size", "vocab_pad_multiple", "scan_unroll")
        for field in positive:
            self._require(getattr(self, field) > 0, field, "a positive number")
        groups = self.num_heads % self.num_kv_heads == 0
        self._require(groups, "num_kv_heads", f"a divisor of num_heads={self.num_heads}")
        self._require(self.head_dim % 2 == 0, "head_dim", "an even number (rotary pairs)")
        self._require(0 <= self.dropout < 1, "dropout", "a rate in [0, 1)")
        rate = self.attention_dropout
        in_range = rate is None or 0 <= rate < 1
        self._require(in_range, "attention_dropout", "a rate in [0, 1), or None")
        self._require(self.dtype in DTYPES, "dtype", f"one of {DTYPES}")
        self._require(self.param_dtype in DTYPES, "param_dtype", f"one of {DTYPES}")
        known = self.gradient_dtype is None or self.gradient_dtype in DTYPES
        self._require(known, "gradient_dtype", f"one of {DTYPES}, or None")
        known = self.quantization is None or self.quantization in QUANTIZATIONS
        self._require(known, "quantization", f"one of {QUANTIZATIONS}, or None")
        known = self.attention in ATTENTION_IMPLEMENTATIONS
        self._require(known, "attention", f"one of {ATTENTION_IMPLEMENTATIONS}")
        is_id = self.pad_id is None or 0 <= self.pad_id < self.vocab_size
        self._require(is_id, "pad_id", f"an id below vocab_size={self.vocab_size}, or None")
        if self.remat not in REMAT_PRESETS:
            known = ", ".join(REMAT_PRESETS)
            raise UserError(f"remat: unknown preset {self.remat!r}; known: {known}")

    def _require(self, condition: bool, field: str, expected: str) -> None:
        if not condition:
            raise UserError(f"model.{field}: {getattr(self, field)!r} is not {expected}")

    @property
    def padded_vocab_size(self) -> int:
        """Ids of the embedding and of the head: ``vocab_size`` rounded up."""
        return -(-self.vocab_size // self.vocab_pad_multiple) * self.vocab_pad_multiple

    @property
    def attention_rate(self) -> float:
        """Dropout rate on attention probabilities."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout

    @property
    def compute_dtype(self) -> jnp.dtype:
        """``dtype`` as a JAX type."""
        return jnp.dtype(self.dtype)

    @property
    def reduction_dtype(self) -> jnp.dtype:
        """``gradient_dtype`` as a JAX type."""
        return jnp.dtype(self.gradient_dtype or self.dtype)

    @property
    def storage_dtype(self) -> jnp.dtype:
        """``param_dtype`` as a JAX type."""
        return jnp.dtype(self.param_dtype)


PRESETS: dict[str, DecoderConfig] = {
    # Unit tests: everything present, nothing large.
    "tiny": DecoderConfig(
        vocab_size=512,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_size=64,
        vocab_pad_multiple=64,
        dropout=0.0,
        dtype="float32",
        remat="none",
    ),
    # The embedded tabletop on two CPU cores: about one million parameters.
    "quickstart": DecoderConfig(
        vocab_size=1152,
        hidden_size=128,
        num_layers=4,
        num_heads=8,
        num_kv_heads=8,
        head_dim=16,
        mlp_size=384,
        vocab_pad_multiple=64,
        dropout=0.0,
        dtype="float32",
        remat="none",
        scan_unroll=4,
        rope_theta=1e3,  # its sequences are about a hundred tokens long
        initializer_range=0.08,  # about 1 / sqrt(hidden_size): 0.02 suits a width of thousands
    ),
    # One accelerator: 27 M parameters in the layers.
    "small": DecoderConfig(
        vocab_size=184_622,
        hidden_size=512,
        num_layers=8,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        mlp_size=1792,
        pad_id=151_643,
    ),
    # One host of accelerators: 0.5 B parameters in the layers.
    "base": DecoderConfig(
        vocab_size=184_622,
        hidden_size=1536,
        num_layers=20,
        num_heads=12,
        num_kv_heads=4,
        head_dim=128,
        mlp_size=4352,
        pad_id=151_643,
        attention_dropout=0.0,
    ),
    # Emu3 and every released UniVLA checkpoint: 8,492,011,520 parameters.
    "emu3_8b": DecoderConfig(
        vocab_size=184_622,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        mlp_size=14_336,
        pad_id=151_643,
        attention_dropout=0.0,
    ),
}


def preset(name: str, **changes: Any) -> DecoderConfig:
    """The preset ``name`` with some fields changed.

    Raises:
      UserError: unknown preset or unknown field.
    """
    if name not in PRESETS:
        raise UserError(f"model preset {name!r} is unknown; known: {', '.join(PRESETS)}")
    known = {f.name for f in dataclasses.fields(DecoderConfig)}
    unknown = sorted(set(changes) - known)
    if unknown:
        raise UserError(f"model.{unknown[0]}: unknown key; known keys: {', '.join(sorted(known))}")
    return dataclasses.replace(PRESETS[name], **changes)
