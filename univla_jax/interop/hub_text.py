"""The text tokenizer and the vocabulary of a model folder of the Emu3 family."""

from __future__ import annotations

import base64
import pathlib
from collections.abc import Mapping
from typing import Any

from univla_jax.errors import UserError
from univla_jax.tokenizers.files import parse_json
from univla_jax.tokenizers.text_tiktoken import RANK_FILE, TiktokenText
from univla_jax.tokenizers.vocabulary import Vocabulary

TOKENIZER = "tokenizer.json"
_PLAIN_SPECIALS = 208  # three of the chat format and 205 extras, before the vision tokens
_FIRST_CODE = "<|visual token 000000|>"
_CODE = "<|visual token "
_NAMES = {
    "pad": "<|endoftext|>",
    "bot": "<|extra_196|>",
    "eot": "<|extra_197|>",
    "boa": "<|extra_198|>",
    "eoa": "<|extra_199|>",
    "eol": "<|extra_200|>",
    "eof": "<|extra_201|>",
    "bos": "<|extra_203|>",
    "eos": "<|extra_204|>",
    "img": "<|image token|>",
    "boi": "<|image start|>",
    "eoi": "<|image end|>",
}
_ACTIONS = 2048  # of the universal FAST, where the folder's own action tokenizer is not known
# Ids that a config.json may repeat -> attribute of the vocabulary.
_REPEATED = {f"{name}_token_id": name for name in (*_NAMES, "bov", "eov")}


def load_hub_text(folder: pathlib.Path) -> TiktokenText | None:
    """The text tokenizer of a folder: Emu3's own two files, else ``tokenizer.json``, else None.

    Raises:
      UserError: files that are there but broken.
    """
    if (folder / RANK_FILE).is_file():
        return TiktokenText.load(folder)
    if (folder / TOKENIZER).is_file():
        return TiktokenText(*_from_tokenizers(folder / TOKENIZER))
    return None


def _from_tokenizers(path: pathlib.Path) -> tuple[bytes, bytes]:
    """Rank file and vision tokens out of the byte-level BPE that ``transformers`` made of them.

    Ids are ranks there too, so nothing is lost; the pattern that splits words is Emu3's own, which
    the file does not have.
    """
    values = parse_json(path.read_bytes(), where=str(path))
    try:
        special = {token["id"]: token["content"] for token in values["added_tokens"]}
        vocabulary = values["model"]["vocab"]
        first = min(special)
        ranked = sorted((rank, token) for token, rank in vocabulary.items() if rank < first)
        lines = [f"{_base64(token)} {rank}\n" for rank, token in ranked]
        vision = [special[i] for i in sorted(special) if i >= first + _PLAIN_SPECIALS]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: not the tokenizer of an Emu3 model ({type(error).__name__}: {error}); give a "
            f"folder with {RANK_FILE} as --config.text"
        ) from error
    return "".join(lines).encode(), ("\n".join(vision) + "\n").encode()


def _base64(token: str) -> str:
    """A token in the characters that stand for bytes (GPT-2's table) as base64 of its bytes."""
    return base64.b64encode(bytes(_BYTES[character] for character in token)).decode()


def _byte_characters() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others for the ids from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_characters()


def vocabulary_of(text: TiktokenText, action_size: int | None = None) -> Vocabulary:
    """The vocabulary that a text tokenizer of the Emu3 family lays out.

    Args:
      text: for the published files the result is ``Vocabulary.emu3(action_size)``.
      action_size: codes of the action tokenizer; None leaves room for the universal FAST.

    Raises:
      UserError: the tokenizer lacks a special token.
    """
    ids = text.special_tokens
    lacking = [name for name in (*_NAMES.values(), _FIRST_CODE) if name not in ids]
    if lacking:
        raise UserError(
            f"the text tokenizer lacks {', '.join(lacking)}; is it that of an Emu3 model?"
        )
    return Vocabulary(
        size=text.total_size,
        text_size=text.vocabulary_size,
        visual_start=ids[_FIRST_CODE],
        visual_size=sum(name.startswith(_CODE) for name in ids),
        action_size=action_size or min(_ACTIONS, text.vocabulary_size),
        action_last=text.vocabulary_size - 1,
        **{name: ids[token] for name, token in _NAMES.items()},
    )


def check_vocabulary(vocabulary: Vocabulary, config: Mapping[str, Any], where: str) -> None:
    """Compares a tokenizer's vocabulary with the config.json of the weights.

    Raises:
      UserError: another number of ids, or a special token of another id.
    """
    values = config.get("text_config", config)
    size = values.get("vocab_size", vocabulary.size)
    if size != vocabulary.size:
        raise UserError(
            f"the text tokenizer in {where} has {vocabulary.size} ids, config.json says vocab_size "
            f"{size}; give the tokenizer of this model as --config.text"
        )
    for name, ours in _REPEATED.items():
        if isinstance(values.get(name), int) and values[name] != getattr(vocabulary, ours):
            raise UserError(
                f"config.json says {name} {values[name]}, the text tokenizer in {where} has "
                f"{getattr(vocabulary, ours)}; give the tokenizer of this model as --config.text"
            )
