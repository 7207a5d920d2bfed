"""The peer of the comparisons: the Emu3 models of transformers, in PyTorch, with our weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags

from univla_jax.errors import UserError
from univla_jax.interop.hf_weights import decoder_rules, export_state
from univla_jax.models.decoder_config import DecoderConfig

PEER = flags.DEFINE_bool("peer", True, "Whether transformers runs too")


def import_peer() -> tuple[Any, Any]:
    """The modules ``torch`` and ``transformers``.

    Raises:
      UserError: one of them is not installed.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(
            f"the comparison needs {error.name}: pip install 'univla_jax[parity]', or --nopeer"
        ) from error
    return torch, transformers


def emu3_decoder(config: DecoderConfig, params: Any) -> Any:
    """``Emu3ForCausalLM`` with a copy of our weights: float32, sdpa attention, on the CPU.

    Raises:
      UserError: transformers or torch are not installed.
    """
    torch, _ = import_peer()
    model = _unfilled_decoder(config, "cpu")
    state = export_state(decoder_rules(config), params)
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in state.items()}
    model.load_state_dict(tensors, strict=True, assign=True)
    return model


def native_decoder(config: DecoderConfig, device: str) -> Any:
    """``Emu3ForCausalLM`` with random bfloat16 weights on a device, ready to decode.

    Raises:
      UserError: transformers or torch are not installed.
    """
    torch, _ = import_peer()
    model = _unfilled_decoder(config, device, torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(1)
    return model.eval()


def _unfilled_decoder(config: DecoderConfig, device: str, dtype: Any = None) -> Any:
    """The model with memory for its weights, and nothing in it."""
    torch, transformers = import_peer()
    values = transformers.Emu3TextConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.mlp_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        rms_norm_eps=config.rms_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        attention_dropout=0.0,
        pad_token_id=config.pad_id or 0,
        bos_token_id=0,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    # Built without memory and then filled: drawing random weights first would take longer than the
    # comparison. The rotary frequencies are no weights, so their module is made again.
    with torch.device("meta"):
        model = transformers.Emu3ForCausalLM(values)
    model = model.to(dtype) if dtype is not None else model
    model = model.to_empty(device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=values).to(device)
    return model


def greedy_generator(
    config: DecoderConfig, params: Any, allowed: np.ndarray
) -> Callable[[np.ndarray, int], np.ndarray]:
    """Greedy ``generate`` with a key-value cache, over some ids only.

    Args:
      config: of our decoder.
      params: its parameters.
      allowed: int [R] ids that may be chosen; all others are masked.

    Returns:
      prompts int [B, S] and N -> the next ids int [B, N].
    """
    torch, transformers = import_peer()
    model = emu3_decoder(config, params).eval()
    mask = torch.full((config.vocab_size,), float("-inf"))
    mask[torch.from_numpy(np.asarray(allowed, np.int64))] = 0
    processors = transformers.LogitsProcessorList([lambda ids, scores: scores + mask])

    def generate(prompt: np.ndarray, count: int) -> np.ndarray:
        tokens = torch.from_numpy(np.asarray(prompt, np.int64))
        with torch.inference_mode():
            out = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=count,
                do_sample=False,
                use_cache=True,
                logits_processor=processors,
            )
        return out[:, tokens.shape[1] :].numpy()

    return generate
