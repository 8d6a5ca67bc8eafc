"""Writes and reads the tokenizer of a Hugging Face folder.

Hugging Face's BPE merges by rank where SentencePiece merges by score. So the merges are ranked by
the score of the merged piece, not by its id: in Llama's model the runs of spaces have low ids and
the lowest scores.
"""

import hashlib
import pathlib
import shutil
from collections.abc import Iterable
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2

from eval_bridge.hf import weights
from tinyllama_jax import errors
from tinyllama_jax import tokenizer as tokenizer_lib

_SPACE = '\u2581'  # sentencepiece writes a space as this character
_KINDS = sentencepiece_model_pb2.ModelProto.SentencePiece


def write(folder: pathlib.Path, tokenizer: tokenizer_lib.Tokenizer, *, add_bos: bool, max_length: int) -> None:
    """Writes tokenizer.model, tokenizer.json and tokenizer_config.json, which transformers reads."""
    shutil.copyfile(tokenizer.path, folder / 'tokenizer.model')
    content = build(tokenizer.path, add_bos=add_bos)
    weights.write_json(folder / 'tokenizer.json', content)
    special = {token['id']: token['content'] for token in content['added_tokens']}
    weights.write_json(
        folder / 'tokenizer_config.json',
        {
            'tokenizer_class': 'PreTrainedTokenizerFast',
            'add_bos_token': add_bos,
            'add_eos_token': False,
            'bos_token': special.get(tokenizer.bos_id),
            'eos_token': special.get(tokenizer.eos_id),
            'unk_token': content['model']['unk_token'],
            'clean_up_tokenization_spaces': False,
            'model_input_names': ['input_ids', 'attention_mask'],
            'model_max_length': max_length,
        },
    )


def build(model_path: pathlib.Path, *, add_bos: bool) -> dict[str, Any]:
    """Returns the content of a tokenizer.json with the ids of the SentencePiece model at `model_path`.

    `add_bos` puts BOS before a text that is encoded with special tokens. Raises UsageError for a
    model that is not of Llama's kind (BPE, byte fallback, no normalisation).
    """
    model = sentencepiece_model_pb2.ModelProto.FromString(model_path.read_bytes())
    _check_kind(model, model_path)
    prefixed = model.normalizer_spec.add_dummy_prefix
    special = [index for index, piece in enumerate(model.pieces) if piece.type in (_KINDS.UNKNOWN, _KINDS.CONTROL)]
    return {
        'version': '1.0',
        'truncation': None,
        'padding': None,
        'added_tokens': [{'id': index, 'content': model.pieces[index].piece, **_SPECIAL} for index in special],
        'normalizer': {'type': 'Sequence', 'normalizers': ([_PREPEND] if prefixed else []) + [_ESCAPE]},
        'pre_tokenizer': None,
        'post_processor': _bos_first(model) if add_bos else None,
        'decoder': {'type': 'Sequence', 'decoders': _DECODERS + ([_STRIP] if prefixed else [])},
        'model': {
            'type': 'BPE',
            'dropout': None,
            'unk_token': model.trainer_spec.unk_piece,
            'continuing_subword_prefix': None,
            'end_of_word_suffix': None,
            'fuse_unk': True,
            'byte_fallback': True,
            'vocab': {piece.piece: index for index, piece in enumerate(model.pieces)},
            'merges': _merges(model),
        },
    }


_SPECIAL = {**dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False), 'special': True}
_PREPEND = {'type': 'Prepend', 'prepend': _SPACE}
_ESCAPE = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': _SPACE}
_DECODERS = [
    {'type': 'Replace', 'pattern': {'String': _SPACE}, 'content': ' '},
    {'type': 'ByteFallback'},
    {'type': 'Fuse'},
]
_STRIP = {'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0}


def _check_kind(model, path: pathlib.Path) -> None:
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    problems = {
        'is not BPE': trainer.model_type != trainer.BPE,
        'has no byte fallback': not trainer.byte_fallback,
        'normalises text': bool(normalizer.precompiled_charsmap or normalizer.normalization_rule_tsv),
        'removes spaces': normalizer.remove_extra_whitespaces,
        'keeps spaces as they are': not normalizer.escape_whitespaces,
        'puts spaces after words': trainer.treat_whitespace_as_suffix,
        'has user-defined pieces': any(piece.type == _KINDS.USER_DEFINED for piece in model.pieces),
    }
    for problem, present in problems.items():
        if present:
            raise errors.UsageError(
                f"{path}: the tokenizer {problem}; only models of Llama 2's kind can be written as tokenizer.json."
            )


def _merges(model) -> list[str]:
    """Returns every way to join two pieces into a third, by the score of the third, best first."""
    normal = {piece.piece for piece in model.pieces if piece.type == _KINDS.NORMAL}
    scored = [
        (piece.score, f'{piece.piece[:cut]} {piece.piece[cut:]}')
        for piece in model.pieces
        if piece.type == _KINDS.NORMAL
        for cut in range(1, len(piece.piece))
        if piece.piece[:cut] in normal and piece.piece[cut:] in normal
    ]
    return [merge for _, merge in sorted(scored, key=lambda entry: -entry[0])]


def _bos_first(model) -> dict[str, Any]:
    bos, index = model.trainer_spec.bos_piece, model.trainer_spec.bos_id
    first = [{'SpecialToken': {'id': bos, 'type_id': 0}}, {'Sequence': {'id': 'A', 'type_id': 0}}]
    second = [{'SpecialToken': {'id': bos, 'type_id': 1}}, {'Sequence': {'id': 'B', 'type_id': 1}}]
    return {
        'type': 'TemplateProcessing',
        'single': first,
        'pair': first + second,
        'special_tokens': {bos: {'id': bos, 'ids': [index], 'tokens': [bos]}},
    }


class JsonTokenizer:
    """A tokenizer.json with those methods of tinyllama_jax.tokenizer.Tokenizer that evaluation needs.

    Attributes: path, sha256 (of the file), vocab_size, bos_id and eos_id (-1 for none).
    Raises UsageError if the file cannot be used.
    """

    def __init__(self, path: pathlib.Path, *, bos: str | None, eos: str | None):
        self.path = path
        try:
            text = path.read_text(encoding='utf-8')
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise errors.UsageError(f'{path} is not a valid tokenizer.json ({error}).') from None
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        self.vocab_size = self._tokenizer.get_vocab_size()
        ids = (None if token is None else self._tokenizer.token_to_id(token) for token in (bos, eos))
        self.bos_id, self.eos_id = (-1 if index is None else index for index in ids)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`, without special tokens."""
        return self._tokenizer.decode([int(index) for index in ids])


def load(folder: pathlib.Path) -> tokenizer_lib.Tokenizer | JsonTokenizer:
    """Returns the tokenizer of a Hugging Face folder: tokenizer.model if it has one, else tokenizer.json.

    Raises UsageError if there is neither, or it cannot be read.
    """
    folder = pathlib.Path(folder)
    if (folder / 'tokenizer.model').exists():
        return tokenizer_lib.Tokenizer(folder / 'tokenizer.model')
    if not (folder / 'tokenizer.json').exists():
        raise errors.UsageError(f'{folder} holds neither tokenizer.model nor tokenizer.json.')
    values = weights.read_json(folder / 'tokenizer_config.json')
    tokens = (values.get('bos_token'), values.get('eos_token'))
    bos, eos = (token['content'] if isinstance(token, dict) else token for token in tokens)
    return JsonTokenizer(folder / 'tokenizer.json', bos=bos, eos=eos)


def adds_bos(folder: pathlib.Path) -> bool:
    """Returns whether the tokenizer of a Hugging Face folder puts BOS before a text by default."""
    path = pathlib.Path(folder) / 'tokenizer_config.json'
    values = weights.read_json(path) if path.exists() else {}
    # Among transformers' tokenizer classes, those of Llama add BOS unless told otherwise.
    return bool(values.get('add_bos_token', str(values.get('tokenizer_class', '')).startswith('Llama')))
