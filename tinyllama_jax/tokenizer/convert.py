"""Makes a tokenizer.json of a SentencePiece model of Llama 2's kind.

Hugging Face's BPE merges by rank where SentencePiece merges by score. So the merges are ranked by
the score of the merged piece, not by its id: in Llama's model the runs of spaces have low ids and
the lowest scores. Where scores are equal, as in merged vocabularies, the two may still differ:
`first_difference` finds a text that shows it.
"""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from tinyllama_jax import errors
from tinyllama_jax.tokenizer import base

_SPACE = '\u2581'  # sentencepiece writes a space as this character
_KINDS = sentencepiece_model_pb2.ModelProto.SentencePiece
_SAMPLE_PIECES = 40  # joined to a text of `vocabulary_texts`


def build(model_path: pathlib.Path, *, add_bos: bool) -> dict[str, Any]:
    """Returns the content of a tokenizer.json with the ids of the SentencePiece model at `model_path`.

    `add_bos` puts BOS before a text that is encoded with special tokens. Raises UsageError for a
    model that is not of Llama's kind (BPE, byte fallback, no normalisation).
    """
    model = sentencepiece_model_pb2.ModelProto.FromString(model_path.read_bytes())
    if problem := _problem(model):
        raise errors.UsageError(
            f"{model_path}: the tokenizer {problem}; only models of Llama 2's kind can be written as tokenizer.json."
        )
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


def of_transformers(model_path: pathlib.Path) -> dict[str, Any]:
    """Returns what transformers 5 takes of the SentencePiece model at `model_path`: pieces, merges and added tokens.

    It ranks merges by the id of the merged piece, whatever the scores, so its ids differ from SentencePiece's where
    the two orders do (Llama's runs of spaces), and it normalises nothing.
    """
    pieces = sentencepiece_model_pb2.ModelProto.FromString(model_path.read_bytes()).pieces
    vocab = {piece.piece: index for index, piece in enumerate(pieces)}
    cuts = ((text[:cut], text[cut:], index) for text, index in vocab.items() for cut in range(1, len(text)))
    merges = [(index, len(left), [left, right]) for left, right, index in cuts if left in vocab and right in vocab]
    return {
        'added_tokens': [
            {'id': vocab[piece.piece], 'content': piece.piece, **_SPECIAL, 'special': piece.type == _KINDS.CONTROL}
            for piece in pieces
            if piece.type in (_KINDS.CONTROL, _KINDS.USER_DEFINED)
        ],
        'model': {'type': 'BPE', 'vocab': vocab, 'merges': [merge for _, _, merge in sorted(merges)]},
    }


def _problem(model) -> str | None:
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
    return next((problem for problem, present in problems.items() if present), None)


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


def vocabulary_texts(model_path: pathlib.Path) -> list[str]:
    """Returns texts of the model's own pieces: each by itself, and neighbours in the vocabulary joined."""
    model = sentencepiece_model_pb2.ModelProto.FromString(model_path.read_bytes())
    words = [piece.piece.replace(_SPACE, ' ') for piece in model.pieces if piece.type == _KINDS.NORMAL]
    return words + [''.join(words[start : start + _SAMPLE_PIECES]) for start in range(0, len(words), _SAMPLE_PIECES)]


def first_difference(model_path: pathlib.Path, content: dict[str, Any], texts: Iterable[str]) -> str | None:
    """Returns the first text whose ids by `content`, a tokenizer.json, are not the SentencePiece model's, or None.

    Texts that hold a special token's name are passed over: SentencePiece takes it for plain text.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=model_path.read_bytes())
    other = tokenizers.Tokenizer.from_str(json.dumps(content))
    names = [token['content'] for token in content['added_tokens']]
    for text in map(base.without_surrogates, texts):
        if any(name in text for name in names):
            continue
        if processor.encode(text) != other.encode(text, add_special_tokens=False).ids:
            return text
    return None
