"""Folders with a tokenizer.json of the kinds that people have, trained on given texts."""

import json
import pathlib
from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r'|\s+(?!\S)|\s+'
)
# Kind: the special tokens, of which the first is BOS or none, and what tokenizer_config.json has.
KINDS = {
    'llama3': (['<|begin_of_text|>', '<|end_of_text|>', '<|eot_id|>'], {'tokenizer_class': 'PreTrainedTokenizerFast'}),
    'qwen2': ([None, '<|endoftext|>', '<|im_end|>'], {'tokenizer_class': 'Qwen2Tokenizer', 'add_bos_token': False}),
    'smollm': (['<|endoftext|>', '<|endoftext|>', '<|im_end|>'], {'tokenizer_class': 'GPT2Tokenizer'}),
    'unigram': (['<s>', '</s>', '<pad>'], {'tokenizer_class': 'PreTrainedTokenizerFast'}),
    'wordpiece': (
        ['[CLS]', '[SEP]', '[PAD]'],
        {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': True},
    ),
}


def write(folder: pathlib.Path, kind: str, texts: Iterable[str], *, pieces: int = 700, **settings) -> pathlib.Path:
    """Writes tokenizer.json and tokenizer_config.json (with `settings`) of a kind into the new `folder`, a path."""
    special, config = KINDS[kind]
    names = list(dict.fromkeys(filter(None, special)))
    tokenizer = tokenizers.Tokenizer({'unigram': models.Unigram, 'wordpiece': _wordpiece}.get(kind, models.BPE)())
    options = {'special_tokens': names, 'vocab_size': pieces, 'show_progress': False}
    if kind == 'unigram':
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(**options | {'special_tokens': [*names, '<unk>'], 'unk_token': '<unk>'})
    elif kind == 'wordpiece':
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(**options | {'special_tokens': [*names, '[UNK]']})
    else:
        trainer = trainers.BpeTrainer(**options, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        if kind == 'qwen2':
            tokenizer.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(tokenizers.Regex(_LLAMA3), 'isolated')
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        digits = pre_tokenizers.Digits(individual_digits=True)
        whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
        parts = [digits, whole] if kind == 'smollm' else [split, bytes_only]
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence(parts), decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainer)
    bos = special[0]
    if bos and kind != 'smollm':
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f'{bos} $A', pair=f'{bos} $A $B', special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / 'tokenizer.json'))
    named = {'bos_token': bos, 'eos_token': special[1], 'chat_template': '{{ messages }}', **config, **settings}
    (folder / 'tokenizer_config.json').write_text(json.dumps(named))
    return folder


def _wordpiece() -> models.WordPiece:
    return models.WordPiece(unk_token='[UNK]')


def widen(folder: pathlib.Path, *, first: int, count: int) -> None:
    """Gives the tokenizer in `folder` `count` more pieces, which no text has, with ids from `first`."""
    content = json.loads((folder / 'tokenizer.json').read_text())
    content['model']['vocab'] |= {f'far{index}': first + index for index in range(count)}
    (folder / 'tokenizer.json').write_text(json.dumps(content))


def edit(path: pathlib.Path, **fields) -> None:
    """Sets fields of the object in a JSON file; makes the file if it is not there."""
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | fields))
