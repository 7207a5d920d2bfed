"""The SentencePiece text tokenizer of models trained from scratch."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

import sentencepiece

from univla_jax.errors import UserError
from univla_jax.tokenizers.files import (
    PathLike,
    dump_json,
    fingerprint,
    read_files,
    write_files,
)
from univla_jax.tokenizers.text_rules import checked, clean

KIND_FILE = "text_tokenizer.json"
KIND = "sentencepiece"
_MODEL_FILE = "sentencepiece.model"
_SPACE = "\u2581"


class SentencePieceText:
    """A SentencePiece BPE model fitted to the instructions of one's own corpus.

    Every text encodes (unknown characters fall back to bytes) and decodes to its NFC form; only
    U+2581, SentencePiece's own sign for a space, comes back as a space.
    """

    def __init__(self, model: bytes) -> None:
        """Reads a serialised model.

        Raises:
          UserError: the bytes are no SentencePiece model.
        """
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(
                f"{_MODEL_FILE}: not a SentencePiece model; restore the file, or fit it again"
            ) from error
        kind = dump_json({"kind": KIND})
        self._files = {KIND_FILE: kind, _MODEL_FILE: model}

    @classmethod
    def fit(
        cls, texts: Iterable[str], vocabulary_size: int, *, symbols: Sequence[str] = ()
    ) -> SentencePieceText:
        """Trains a model; the same texts in the same order give the same bytes.

        Args:
          texts: instructions, as often as they occur.
          vocabulary_size: upper limit; a small corpus gives fewer ids. 257 of them are the bytes
            and "unknown", so it must be a little above the number of characters plus that.
          symbols: strings that get one id each, such as the frame sizes ``"1*8*8"`` that stand in
            every sequence.

        Raises:
          UserError: no texts, or a vocabulary too small for the characters and symbols.
        """
        lines = [clean(text) for text in texts]
        symbols = list(dict.fromkeys(clean(symbol) for symbol in symbols))
        if not any(line.strip() for line in lines):
            raise UserError("text tokenizer: no text to fit to; give at least one instruction")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocabulary_size,
                hard_vocab_limit=False,
                byte_fallback=True,
                character_coverage=1.0,
                required_chars=_SPACE,
                user_defined_symbols=symbols,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                max_sentence_length=max(4192, *(4 * len(line) for line in lines)),
                unk_id=0,
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            needed = 257 + len(symbols) + len({_SPACE, *"".join(lines).replace(" ", "")})
            raise UserError(
                f"text tokenizer: cannot fit {vocabulary_size} ids to {len(lines)} texts: about "
                f"{needed} or more are needed for bytes, characters and symbols ({error})"
            ) from error
        return cls(model.getvalue())

    @classmethod
    def load(cls, folder: PathLike) -> SentencePieceText:
        """Reads what ``save`` wrote.

        Raises:
          UserError: a file is missing or broken.
        """
        files = read_files(folder, [KIND_FILE, _MODEL_FILE], what="SentencePiece text tokenizer")
        return cls(files[_MODEL_FILE])

    @property
    def vocabulary_size(self) -> int:
        """Number of ids."""
        return self._processor.vocab_size()

    @property
    def fingerprint(self) -> str:
        """sha256 of the files it is saved as."""
        return fingerprint(self._files)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of the NFC form of ``text``.

        Args:
          text: any string; lone surrogates become U+FFFD.
          allow_special: without effect: the special tokens of such a model have no written form.
        """
        return self._processor.encode(clean(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; invalid UTF-8 becomes U+FFFD.

        Raises:
          UserError: an id outside the vocabulary.
        """
        return self._processor.decode(checked(ids, self.vocabulary_size))

    def save(self, folder: PathLike) -> None:
        """Writes the model and its kind into ``folder``."""
        write_files(folder, self._files)
