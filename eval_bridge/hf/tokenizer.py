"""The tokenizer of a Hugging Face folder: written so that transformers gives its ids, and kept by an import."""

import pathlib
import shutil
import sys
from typing import Any

from eval_bridge.hf import weights
from tinyllama_jax import errors, tokenizer_convert, tokenizer_json
from tinyllama_jax import tokenizer as tokenizer_lib
from tinyllama_jax.tokenizer_base import BaseTokenizer

_MODELS_OWN = ('config.json', 'generation_config.json')  # these the export writes for the model


def write(folder: pathlib.Path, source: pathlib.Path, *, add_bos: bool, max_length: int) -> None:
    """Writes the tokenizer at `source` into the existing `folder`.

    Args:
      source: a SentencePiece model, for which a tokenizer.json is made; or a tokenizer.json or a folder with a
        tokenizer, which are copied whole, with chat template and special tokens.
      add_bos: whether the tokenizer of a SentencePiece model puts BOS first; others say so themselves.
      max_length: the most tokens that the model reads; of a SentencePiece model's tokenizer.

    Raises UsageError for a SentencePiece model whose ids no tokenizer.json gives.
    """
    tokenizer = tokenizer_lib.load(source, adds_bos=add_bos)
    config: dict[str, Any] = {}
    if source.is_dir() or source.suffix == '.json':
        tokenizer_json.copy(source, folder / 'whole')
        for path in (folder / 'whole').iterdir():
            if path.name not in _MODELS_OWN:
                path.rename(folder / path.name)
        shutil.rmtree(folder / 'whole')
        if (folder / tokenizer_json.FILE).exists():
            return
        config, _ = tokenizer_json.settings(source)
    else:
        shutil.copyfile(source, folder / tokenizer_json.MODEL)
    model = folder / tokenizer_json.MODEL
    content = tokenizer_convert.build(model, add_bos=bool(tokenizer.encode('', special=True)))
    different = tokenizer_convert.first_difference(model, content, tokenizer_convert.vocabulary_texts(model))
    if different is not None:
        raise errors.UsageError(
            f'{source}: transformers would give other ids than SentencePiece, for example for {different[:40]!r} '
            '(pieces of equal scores, as in merged vocabularies); give the model another tokenizer.'
        )
    weights.write_json(folder / tokenizer_json.FILE, content)
    special = {token['id']: token['content'] for token in content['added_tokens']}
    written = {
        # A tokenizer with added tokens is read as transformers reads a Llama's, and must be exported as one.
        'tokenizer_class': 'PreTrainedTokenizerFast'
        if isinstance(tokenizer, tokenizer_lib.Tokenizer)
        else 'LlamaTokenizer',
        'add_bos_token': bool(tokenizer.encode('', special=True)),
        'add_eos_token': False,
        'bos_token': special.get(tokenizer.bos_id),
        'eos_token': special.get(tokenizer.eos_id),
        'unk_token': content['model']['unk_token'],
        'clean_up_tokenization_spaces': False,
        'model_input_names': ['input_ids', 'attention_mask'],
        'model_max_length': max_length,
    }
    weights.write_json(
        folder / 'tokenizer_config.json', written | {**config, 'tokenizer_class': written['tokenizer_class']}
    )


def find(folder: pathlib.Path) -> BaseTokenizer | None:
    """Returns the tokenizer of a folder, None if it has none. Raises UsageError if it cannot be read."""
    has = any((folder / name).exists() for name in (tokenizer_json.FILE, tokenizer_json.MODEL))
    return tokenizer_lib.load(folder) if has else None


def keep_model(source: pathlib.Path, workdir: pathlib.Path, tokenizer: BaseTokenizer) -> None:
    """Copies the tokenizer.model of `source` into the workdir, so that data can be prepared with it.

    Only if its ids are those of `tokenizer`, the folder's; otherwise says on stderr that it is left.
    """
    path = source / tokenizer_json.MODEL
    try:
        model = tokenizer_lib.Tokenizer(path)
    except errors.UsageError:
        return  # none, or Llama 3's in tiktoken's form
    for text in tokenizer_convert.vocabulary_texts(path):
        text = text.lstrip(' ')  # transformers' class for Llama reads spaces at the beginning in its own way
        if model.encode(text) != tokenizer.encode(text):
            print(
                f'import: {path} gives other ids than tokenizer.json beside it, for example for {text[:40]!r}; only '
                'tokenizer.json is kept, which transformers reads.',
                file=sys.stderr,
            )
            return
    tokenizer_lib.keep(path, workdir)
