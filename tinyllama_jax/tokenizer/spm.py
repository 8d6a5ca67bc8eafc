"""SentencePiece models: encodes and decodes text, trains a small model.

`SentencePieceTokenizer.encode` gives exactly sentencepiece's ids, several times faster if the
model allows it: no BPE merge crosses a point that no piece spans, so a text is cut
at such points and the ids of each cut are cached (`_can_be_cut` checks the condition).
"""

import hashlib
import io
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from tinyllama_jax import errors, files
from tinyllama_jax.tokenizer import base

_SPACE = '\u2581'  # sentencepiece writes a space as this character
# Before each run of spaces, and around newlines and tabs.
_CUT = re.compile(f'\\n|\\t|[ {_SPACE}]*[^ {_SPACE}\\n\\t]+|[ {_SPACE}]+')
_MEMO_ENTRIES = 1 << 18  # about 50 MB
_MEMO_CHARACTERS = 48  # longer cuts seldom recur
_BPE = sentencepiece_model_pb2.TrainerSpec.BPE
_TIKTOKEN = re.compile(rb'[A-Za-z0-9+/]+=* \d+\r?\n')


class SentencePieceTokenizer(base.BaseTokenizer):
    """A SentencePiece model from the file `path`; `is_bpe` tells its kind.

    `adds_bos`: whether `encode` puts BOS first if asked for special tokens. Raises UsageError when the file is missing
    or not a SentencePiece model.
    """

    def __init__(self, path: str | Path, *, adds_bos: bool = False):
        self.path = Path(path)
        try:
            model = self.path.read_bytes()
        except OSError as error:
            raise errors.UsageError(
                f'the tokenizer {path} cannot be read ({error.strerror}); give a SentencePiece .model file, a '
                'tokenizer.json, or a folder that has one.'
            ) from None
        try:
            if not model:
                raise ValueError('an empty file')  # sentencepiece would treat it as no model
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError):
            kind = "in tiktoken's form (Llama 3's)" if _TIKTOKEN.match(model) else 'not a SentencePiece model'
            raise errors.UsageError(
                f'{path} is {kind}; give a SentencePiece .model file, or a tokenizer.json (its name ends with .json).'
            ) from None
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size = self._processor.get_piece_size()
        self.bos_id = self._processor.bos_id()
        self.eos_id = self._processor.eos_id()
        self.stop_ids = tuple({self.eos_id} - {-1})
        self._adds_bos = adds_bos and self.bos_id >= 0
        proto = sentencepiece_model_pb2.ModelProto.FromString(model)
        self.is_bpe = proto.trainer_spec.model_type == _BPE
        self._memo = _Memo(proto, self.dtype) if _can_be_cut(proto) else None

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Returns the ids of `text`, after BOS if `special` and the tokenizer adds it."""
        return [self.bos_id] * (special and self._adds_bos) + self._encode(text).tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids` without special tokens; ids that are no pieces give nothing."""
        return self._processor.decode([int(token) for token in ids if token < self.vocab_size])

    def begins_with(self, text: str, index: int) -> bool:
        """Returns False: to SentencePiece a special token's name is plain text."""
        return False

    def _encode(self, text: str) -> np.ndarray:
        if not text.isascii():
            text = base.without_surrogates(text)
        if self._memo is None:
            return np.asarray(self._processor.encode(text), self.dtype)
        return self._memo.encode(text)


class _Memo(dict):
    """Caches the ids of each cut, as bytes; `encode` joins them. Clears itself when full."""

    def __init__(self, proto: sentencepiece_model_pb2.ModelProto, dtype: np.dtype):
        super().__init__()
        self._dtype = dtype
        self._prefix = ' ' if proto.normalizer_spec.add_dummy_prefix else ''
        bare = sentencepiece_model_pb2.ModelProto()
        bare.CopyFrom(proto)
        bare.normalizer_spec.add_dummy_prefix = False
        self._encode_cut = sentencepiece.SentencePieceProcessor(model_proto=bare.SerializeToString()).encode

    def encode(self, text: str) -> np.ndarray:
        cuts = _CUT.findall(self._prefix + text) if text else []
        return np.frombuffer(b''.join(map(self.__getitem__, cuts)), self._dtype)

    def __missing__(self, cut: str) -> bytes:
        ids = np.asarray(self._encode_cut(cut), self._dtype).tobytes()
        if len(cut) <= _MEMO_CHARACTERS:
            if len(self) >= _MEMO_ENTRIES:
                self.clear()
            self[cut] = ids
        return ids


def _can_be_cut(proto: sentencepiece_model_pb2.ModelProto) -> bool:
    """Returns whether cutting a text as `_CUT` does leaves every id as it is.

    True for a BPE model that leaves text unchanged (no normalisation rules, no
    whitespace removed), has byte pieces instead of merging unknown characters, has
    no user-defined pieces (they are matched before BPE), and has no piece that joins
    a space to the character before it, or a newline or tab to anything.
    """
    trainer, normalizer, kinds = proto.trainer_spec, proto.normalizer_spec, proto.SentencePiece
    identity = not normalizer.precompiled_charsmap and not normalizer.normalization_rule_tsv
    kept = normalizer.escape_whitespaces and not normalizer.remove_extra_whitespaces
    plain = trainer.model_type == _BPE and trainer.byte_fallback and not trainer.treat_whitespace_as_suffix
    if not (identity and kept and plain) or any(piece.type == kinds.USER_DEFINED for piece in proto.pieces):
        return False
    texts = (piece.piece for piece in proto.pieces if piece.type in (kinds.NORMAL, kinds.UNUSED))
    return not any(len(text) > 1 and re.search(f'[^{_SPACE}]{_SPACE}|[ \n\t]', text) for text in texts)


def train(texts: Iterable[str], path: str | Path, pieces: int) -> None:
    """Trains a model of `pieces` pieces on `texts` and writes it to the file `path`, atomically.

    The settings are Llama's: BPE with byte fallback, digits split, no normalisation,
    a dummy prefix, unk 0, bos 1, eos 2, no pad. The same texts give the same file.
    Raises UsageError when `pieces` is too many or too few for the texts.
    """
    lines = (base.without_surrogates(line).replace('\0', ' ') for text in texts for line in text.split('\n') if line)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type='bpe',
            vocab_size=pieces,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name='identity',
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            allow_whitespace_only_pieces=True,
            character_coverage=0.9999,
            max_sentence_length=1 << 16,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        raise errors.UsageError(
            f'config.data.tokenizer_pieces={pieces}: a tokenizer of so many pieces cannot be trained on the sources '
            f'({str(error).strip()}); give another --config.data.tokenizer_pieces, or more text.'
        ) from None
    files.write_atomically(path, model.getvalue())
