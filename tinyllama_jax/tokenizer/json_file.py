"""Reads a tokenizer.json and the files beside it as transformers' AutoTokenizer (5.23) does for a Llama.

Several files describe one tokenizer, and transformers takes a part of each:

tokenizer.json          the vocabulary, and what is put around a text (post_processor, whatever add_bos_token says);
                        of a class in `_REBUILT` nothing else; never its truncation and padding
tokenizer.model         the vocabulary, if there is no tokenizer.json; then add_bos_token and add_eos_token count
tokenizer_config.json   class, special tokens, added_tokens_decoder
special_tokens_map.json, added_tokens.json
                        special and added tokens, if there is no added_tokens_decoder
config.json             BOS and EOS, if the files above have neither
generation_config.json, else config.json
                        the ids that end a text
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from tinyllama_jax import errors
from tinyllama_jax.tokenizer import base, convert

FILE, MODEL = 'tokenizer.json', 'tokenizer.model'
_CONFIG = 'tokenizer_config.json'
_COPIED = (
    FILE, MODEL, _CONFIG, 'special_tokens_map.json', 'added_tokens.json', 'vocab.json', 'merges.txt',
    'chat_template.jinja', 'config.json', 'generation_config.json',
)  # fmt: skip
_TEMPLATES = 'additional_chat_templates'
_NAMED = ('bos_token', 'eos_token', 'unk_token', 'sep_token', 'pad_token', 'cls_token', 'mask_token')
_CLEANS = 'clean_up_tokenization_spaces'
_CLEANS_BPE = f'{_CLEANS}_for_bpe_even_though_it_will_corrupt_output'
_DECIDE = ('tokenizer_class', 'add_prefix_space', 'legacy', _CLEANS, _CLEANS_BPE)  # and *_token, *_tokens
_CLEANED = ((' .', '.'), (' ?', '?'), (' !', '!'), (' ,', ','), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
            (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))  # fmt: skip


class JsonTokenizer(base.BaseTokenizer):
    """The tokenizer of a tokenizer.json or of a folder with one.

    A folder may have a tokenizer.model instead. Raises UsageError naming the file, and the
    field if it is one, that cannot be used.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.folder = self.path if self.path.is_dir() else self.path.parent
        config, added = settings(self.folder)
        file = self.path / FILE if self.path.is_dir() else self.path
        if not file.exists() and (self.folder / MODEL).exists() and self.path.is_dir():
            file = self.folder / MODEL
            if 'CodeLlama' not in str(config['tokenizer_class']):
                config['tokenizer_class'] = 'LlamaTokenizer'
            text = json.dumps(convert.of_transformers(file))
        else:
            text = _read(file)
        try:
            content = json.loads(text)
            inside = {token['id']: token for token in content.get('added_tokens', [])}
            if file.name != MODEL:
                added |= {} if 'added_tokens_decoder' in config else inside
            elif isinstance(config.get('extra_special_tokens', {}), dict):  # a list replaces the model's own
                added = inside | added
            name = str(config.get('tokenizer_class') or '').removesuffix('Fast')
            self._tokenizer, named = _backend(text, content, name, config, self.folder)
            named |= _add_tokens(self._tokenizer, named, config, added, every=name == 'Qwen2Tokenizer')
            if file.name == MODEL:
                self._tokenizer.post_processor = _around(self._tokenizer, named, config)
            self._tokenizer.encode_special_tokens = bool(config.get('split_special_tokens'))
            vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        except errors.UsageError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise errors.UsageError(f'{file} is not a valid tokenizer.json ({errors.first_line(error)}).') from None
        bpe = isinstance(self._tokenizer.model, tokenizers.models.BPE)
        self._cleans = bool(config.get(_CLEANS)) and (not bpe or bool(config.get(_CLEANS_BPE)))
        decides = {key: value for key, value in config.items() if key in _DECIDE or key.endswith(('_token', '_tokens'))}
        identity = json.dumps([text, decides, sorted(added.items())], sort_keys=True)
        self.sha256 = hashlib.sha256(identity.encode()).hexdigest()
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        texts = (named.get(key) for key in ('bos_token', 'eos_token'))
        self.bos_id, self.eos_id = (vocabulary[text] if text else -1 for text in texts)
        if self.eos_id < 0:
            bos, eos = (_ids(self.folder / 'config.json', key) for key in ('bos_token_id', 'eos_token_id'))
            self.bos_id = self.bos_id if self.bos_id >= 0 or not bos else bos[0]
            self.eos_id = eos[0] if eos else -1
        self.stop_ids = stop_ids(self.folder, self.eos_id)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Returns the ids of `text`, with those that the tokenizer adds to a text if `special`."""
        return self._tokenizer.encode(base.without_surrogates(text), add_special_tokens=special).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids` without special tokens; ids that it does not know give nothing."""
        text = self._tokenizer.decode([int(index) for index in ids])
        for old, new in _CLEANED if self._cleans else ():
            text = text.replace(old, new)
        return text

    def begins_with(self, text: str, index: int) -> bool:
        """Returns whether `text` begins with the name of the token `index`."""
        return text.startswith(self._tokenizer.decode([index], skip_special_tokens=False))

    def _encode(self, text: str) -> np.ndarray:
        return np.asarray(self.encode(text), self.dtype)


def settings(folder: Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """Returns tokenizer_config.json, completed by older folders' files, and the added tokens by id.

    Raises UsageError for a file that cannot be read.
    """
    config = _object(folder / _CONFIG)
    config['tokenizer_class'] = config.get('tokenizer_class') or _object(folder / 'config.json').get('tokenizer_class')
    if 'additional_special_tokens' in config and not config.get('extra_special_tokens'):  # its older name
        config['extra_special_tokens'] = config.pop('additional_special_tokens')
    try:
        if 'added_tokens_decoder' in config:
            return config, {int(index): token for index, token in config['added_tokens_decoder'].items()}
        config |= _object(folder / 'special_tokens_map.json')
        special = {_text(config[key]) for key in _NAMED if config.get(key)} | set(map(_text, _extra(config)))
        added = _object(folder / 'added_tokens.json')
        return config, {
            int(index): {'content': name, 'special': name in special, 'normalized': name not in special}
            for name, index in added.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise errors.UsageError(f'{folder}: the special or added tokens cannot be read ({error!r}).') from None


def stop_ids(folder: Path, eos_id: int) -> tuple[int, ...]:
    """Returns the ids that end a text: those of generation_config.json, else of config.json, and `eos_id`."""
    found = (_ids(folder / name, 'eos_token_id') for name in ('generation_config.json', 'config.json'))
    return tuple(dict.fromkeys([*next(filter(None, found), []), *[eos_id] * (eos_id >= 0)]))


def copy(source: Path, folder: Path, *, leave_out: Container[str] = ()) -> None:
    """Copies the files of the tokenizer at `source`, a tokenizer.json or a folder, into `folder`.

    config.json and generation_config.json, which say where a text ends, are among them. Raises OSError.
    """
    parent = source if source.is_dir() else source.parent
    templates = [str(path.relative_to(parent)) for path in parent.glob(f'{_TEMPLATES}/*')]
    (folder / _TEMPLATES if templates else folder).mkdir(parents=True, exist_ok=True)
    for name in [*_COPIED, *templates]:
        if name not in leave_out and (parent / name).is_file():
            shutil.copyfile(parent / name, folder / name)
    if not source.is_dir():
        shutil.copyfile(source, folder / FILE)


def _backend(
    text: str, content: dict[str, Any], name: str, config: dict[str, Any], folder: Path
) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Returns the library's tokenizer, as the class `name` makes it of the file, and that class's special tokens."""
    named, model = {}, content['model']
    # A Llama class over byte-level BPE, as in some folders of Llama 3's kind, is not rebuilt.
    if name in _REBUILT and not (name == 'LlamaTokenizer' and '"ByteLevel"' in text):
        if model.get('type', 'BPE') != 'BPE':
            raise errors.UsageError(f'{folder / _CONFIG}: tokenizer_class is {name}, but {FILE} holds no BPE model.')
        make, named = _REBUILT[name]
        parts = make(config)
        kept = {'version': '1.0', 'post_processor': content.get('post_processor'), 'added_tokens': []}
        model = {**parts.pop('model'), 'type': 'BPE', 'vocab': model['vocab'], 'merges': model['merges']}
        text = json.dumps({**kept, **parts, 'model': model})
    elif name not in _AS_WRITTEN and name != 'LlamaTokenizer':
        raise errors.UsageError(
            f'{folder / _CONFIG}: tokenizer_class is {name}, of which transformers makes a tokenizer of its own; with '
            'PreTrainedTokenizerFast there, tokenizer.json is taken as it is, with LlamaTokenizer tokenizer.model.'
        )
    if model.get('dropout'):
        raise errors.UsageError(f'{folder / FILE}: dropout is {model["dropout"]}, so ids are random; set it to null.')
    tokenizer = tokenizers.Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, dict(named)


def _add_tokens(
    tokenizer: tokenizers.Tokenizer,
    defaults: dict[str, str],
    config: dict[str, Any],
    added: dict[int, dict[str, Any]],
    *,
    every: bool,
) -> dict[str, str | None]:
    """Adds `added` and the special tokens that are missing, and returns the named ones' texts. `every`: all special."""
    found = defaults | config
    named = {key: found[key] for key in _NAMED if key in found}
    named |= {
        key: value
        for key, value in config.items()
        if key.endswith('_token')
        and key not in _NAMED
        and (isinstance(value, str) or (isinstance(value, dict) and '__type' in value))
    }
    extra = config.get('extra_special_tokens')
    named |= extra if isinstance(extra, dict) else {}
    special = [token for token in [*named.values(), *_extra(config)] if token]
    specials = {_text(token) for token in named.values() if token}
    tokens = [_token(token, special=_text(token) in specials) for _, token in sorted(added.items())]
    known = {token.content for token in [*tokenizer.get_added_tokens_decoder().values(), *tokens]}
    for token in special:
        if _text(token) not in known:
            tokens.append(_token(token, special=isinstance(token, str) or _text(token) in specials))
            known.add(_text(token))
    tokenizer.add_tokens(tokens)
    if every:
        tokenizer.add_tokens([tokenizers.AddedToken(_text(token), special=True) for token in special])
    return {key: _text(token) if token else None for key, token in named.items()}


def _around(
    tokenizer: tokenizers.Tokenizer, named: dict[str, str | None], config: dict[str, Any]
) -> tokenizers.processors.TemplateProcessing:
    """Returns what puts BOS and EOS around a text, as add_bos_token and add_eos_token say."""
    bos, eos = ((named.get(f'{kind}_token') if config.get(f'add_{kind}_token') else None) for kind in ('bos', 'eos'))
    template = ' '.join(filter(None, (bos, '$A', eos)))
    special = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(filter(None, (bos, eos)))]
    return tokenizers.processors.TemplateProcessing(single=template, special_tokens=special)


def _token(token: str | dict[str, Any], *, special: bool) -> tokenizers.AddedToken:
    """Returns an added token; one in a dict says itself whether it is special, unless `special`."""
    fields = {'content': token} if isinstance(token, str) else token
    flags = {key: fields[key] for key in ('single_word', 'lstrip', 'rstrip', 'normalized') if key in fields}
    return tokenizers.AddedToken(fields['content'], special=special or bool(fields.get('special')), **flags)


def _text(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else token['content']


def _extra(config: dict[str, Any]) -> list[Any]:
    """Returns the special tokens without a name; `additional_special_tokens` is then special_tokens_map.json's."""
    extra = config.get('extra_special_tokens', {})
    if isinstance(extra, dict):
        return [*extra.values(), *(config.get('additional_special_tokens') or [])]
    return extra or []


def _ids(path: Path, name: str) -> list[int]:
    """Returns the ids, none if negative, in a field of the JSON file `path`, which may be missing."""
    value = _object(path).get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(index) is int and index < 1 << 31 for index in ids):
        raise errors.UsageError(f'{path}: {name} is {value!r}, neither an id nor a list of ids; mend the file.')
    return [index for index in ids if index >= 0]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding='utf-8')
    except OSError as error:
        raise errors.UsageError(f'the tokenizer {path} cannot be read ({error.strerror}).') from None
    except ValueError:
        raise errors.UsageError(f'{path} is not valid JSON.') from None


def _object(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file, an empty one if there is no such file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(_read(path))
    except ValueError:
        raise errors.UsageError(f'{path} is not valid JSON.') from None
    if not isinstance(value, dict):
        raise errors.UsageError(f'{path} holds no JSON object.')
    return value


# Classes that take the file as it is written; in older folders their names end with Fast.
_AS_WRITTEN = ('', 'PreTrainedTokenizer', 'TokenizersBackend', 'PythonBackend', 'BloomTokenizer')
_BYTE_LEVEL = {'type': 'ByteLevel', 'add_prefix_space': True, 'trim_offsets': True, 'use_regex': True}
_PLAIN_BPE = {'continuing_subword_prefix': '', 'end_of_word_suffix': '', 'fuse_unk': False}
_SPACES = {'type': 'Replace', 'pattern': {'String': '\u2581'}, 'content': ' '}
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _llama(config: dict[str, Any]) -> dict[str, Any]:
    prefix = config.get('add_prefix_space') in (None, True)
    scheme = ('always' if config.get('legacy') else 'first') if prefix else 'never'
    strip = [{'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0}] * prefix
    return {
        'pre_tokenizer': {'type': 'Metaspace', 'replacement': '\u2581', 'prepend_scheme': scheme, 'split': False},
        'decoder': {'type': 'Sequence', 'decoders': [_SPACES, {'type': 'ByteFallback'}, {'type': 'Fuse'}, *strip]},
        'model': {'fuse_unk': True, 'byte_fallback': True},
    }


def _gpt2(config: dict[str, Any]) -> dict[str, Any]:
    pre_tokenizer = _BYTE_LEVEL | {'add_prefix_space': bool(config.get('add_prefix_space'))}
    return {'pre_tokenizer': pre_tokenizer, 'decoder': _BYTE_LEVEL, 'model': _PLAIN_BPE}


def _gpt_neox(config: dict[str, Any]) -> dict[str, Any]:
    return {**_gpt2(config), 'normalizer': {'type': 'NFC'}, 'post_processor': None}


def _qwen2(config: dict[str, Any]) -> dict[str, Any]:
    parts = _gpt2(config)
    split = {'type': 'Split', 'pattern': {'Regex': _QWEN2}, 'behavior': 'Isolated', 'invert': False}
    both = [split, parts['pre_tokenizer'] | {'use_regex': False}]
    return {**parts, 'normalizer': {'type': 'NFC'}, 'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': both}}


def _gemma(config: dict[str, Any]) -> dict[str, Any]:
    split = {'type': 'Split', 'pattern': {'String': ' '}, 'behavior': 'MergedWithPrevious', 'invert': False}
    return {
        'normalizer': {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '\u2581'},
        'pre_tokenizer': split,
        'decoder': {'type': 'Sequence', 'decoders': [_SPACES, {'type': 'ByteFallback'}, {'type': 'Fuse'}]},
        'model': {'fuse_unk': True, 'byte_fallback': True, 'unk_token': _text(config.get('unk_token') or '<unk>')},
    }


_END = '<|endoftext|>'
# Classes that take only vocabulary, merges and post_processor of the file: their pipeline, and their special tokens.
_REBUILT: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], dict[str, str]]] = {
    'LlamaTokenizer': (_llama, {'bos_token': '<s>', 'eos_token': '</s>', 'unk_token': '<unk>'}),
    'GPT2Tokenizer': (_gpt2, {'bos_token': _END, 'eos_token': _END, 'unk_token': _END}),
    'GPTNeoXTokenizer': (
        _gpt_neox,
        {'bos_token': _END, 'eos_token': _END, 'unk_token': _END, 'pad_token': '<|padding|>'},
    ),
    'Qwen2Tokenizer': (_qwen2, {'eos_token': _END, 'unk_token': _END, 'pad_token': _END}),
    'GemmaTokenizer': (
        _gemma,
        {
            'bos_token': '<bos>',
            'eos_token': '<eos>',
            'unk_token': '<unk>',
            'pad_token': '<pad>',
            'mask_token': '<mask>',
        },
    ),
}
