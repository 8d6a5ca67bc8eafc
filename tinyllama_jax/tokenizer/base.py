"""What a SentencePiece model and a tokenizer.json have in common: ids of texts and documents, and back."""

import abc
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from tinyllama_jax import errors


class BaseTokenizer(abc.ABC):
    """Text to ids and back.

    Attributes:
      path: the file or folder that it was read from.
      sha256: of what decides its ids.
      vocab_size: its largest id plus one.
      bos_id, eos_id: -1 if it has none.
      stop_ids: the ids that end a text.
      dtype: uint16, or uint32 above 65,536 ids.
    """

    path: Path
    sha256: str
    vocab_size: int
    bos_id: int
    eos_id: int
    stop_ids: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        """The smallest dtype that holds every id."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    @abc.abstractmethod
    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Returns the ids of `text`, with those that the tokenizer adds to a text if `special`."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids` without special tokens; ids that it does not know give nothing."""

    @abc.abstractmethod
    def begins_with(self, text: str, index: int) -> bool:
        """Returns whether `encode` reads the special token `index` at the beginning of `text`."""

    def encode_document(self, text: str, *, bos: bool, eos_per_document: int) -> np.ndarray:
        """Returns [BOS] + ids + EOS * eos_per_document, of `dtype`. Raises UsageError if BOS or EOS is missing."""
        head, tail = [self.bos_id] * bos, [self.eos_id] * eos_per_document
        if -1 in head + tail:
            raise errors.UsageError(
                f'{self.path} has no {"BOS" if -1 in head else "EOS"} piece; set config.data.bos=false and '
                'config.data.eos_per_document=0, or use another tokenizer.'
            )
        return np.concatenate([np.asarray(head, self.dtype), self._encode(text), np.asarray(tail, self.dtype)])

    @abc.abstractmethod
    def _encode(self, text: str) -> np.ndarray:
        """Returns the ids of `text` without special tokens, of `dtype`."""


def without_surrogates(text: str) -> str:
    """Returns `text` with surrogate pairs joined and lone surrogates replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
    return text
