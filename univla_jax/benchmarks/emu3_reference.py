"""The same decoder in transformers: ``Emu3ForCausalLM.generate`` with a mask on the logits."""

from __future__ import annotations

from typing import Any

import numpy as np

from univla_jax.errors import UserError
from univla_jax.interop.hf_weights import decoder_rules, export_state
from univla_jax.models.decoder_config import DecoderConfig


class Emu3Reference:
    """Greedy generation over some ids, with key/value cache and sdpa attention."""

    def __init__(self, config: DecoderConfig, params: Any, allowed: np.ndarray) -> None:
        """Takes over the weights.

        Args:
          config: of our decoder.
          params: its parameters.
          allowed: ids that may be chosen; all others are masked.

        Raises:
          UserError: transformers or torch are not installed.
        """
        try:
            import torch
            import transformers
        except ModuleNotFoundError as error:
            raise UserError(
                f"the comparison needs {error.name}: pip install .[parity]; or --noreference"
            ) from error
        self._torch = torch
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
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=None,
            attn_implementation="sdpa",
        )
        with torch.device("meta"):
            model = transformers.Emu3ForCausalLM(values)
        self._model = model.to_empty(device="cpu").eval()
        self._model.model.rotary_emb = type(model.model.rotary_emb)(config=values)
        state = export_state(decoder_rules(config), params)
        tensors = {key: torch.from_numpy(np.array(value)) for key, value in state.items()}
        self._model.load_state_dict(tensors, strict=True, assign=True)
        mask = torch.full((config.vocab_size,), float("-inf"))
        mask[torch.from_numpy(np.asarray(allowed, np.int64))] = 0
        self._processors = transformers.LogitsProcessorList([lambda ids, scores: scores + mask])

    def generate(self, prompt: np.ndarray, count: int) -> np.ndarray:
        """The next ``count`` ids int [B, count] after prompts int [B, S]."""
        torch = self._torch
        tokens = torch.from_numpy(np.asarray(prompt, np.int64))
        with torch.inference_mode():
            out = self._model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=count,
                do_sample=False,
                use_cache=True,
                logits_processor=self._processors,
            )
        return out[:, tokens.shape[1] :].numpy()
