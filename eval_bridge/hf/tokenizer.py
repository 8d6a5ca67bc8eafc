"""The tokenizer of a Hugging Face folder: written so that transformers gives its ids, and kept by an import."""

import pathlib
import shutil
import sys

from eval_bridge.hf import weights
from tinyllama_jax import errors
from tinyllama_jax.tokenizer import convert as tokenizer_convert
from tinyllama_jax.tokenizer import json_file, loading, spm
from tinyllama_jax.tokenizer.base import BaseTokenizer

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
    if source.is_dir() or source.suffix == '.json':
        json_file.copy(source, folder, leave_out=_MODELS_OWN)
        path = folder / 'tokenizer_config.json'
        config = weights.read_json(path) if path.exists() else {}
        if not (folder / json_file.FILE).exists() and 'Llama' not in str(config.get('tokenizer_class')):
            # Without it, transformers 5 would put no space before a text.
            weights.write_json(path, config | {'tokenizer_class': 'LlamaTokenizer'})
        return
    model = pathlib.Path(shutil.copyfile(source, folder / json_file.MODEL))
    content = tokenizer_convert.build(model, add_bos=add_bos)
    different = tokenizer_convert.first_difference(model, content, tokenizer_convert.vocabulary_texts(model))
    if different is not None:
        raise errors.UsageError(
            f'{source}: transformers would give other ids than SentencePiece, for example for {different[:40]!r} '
            '(pieces of equal scores, as in merged vocabularies); give the model another tokenizer.'
        )
    weights.write_json(folder / json_file.FILE, content)
    special = {token['id']: token['content'] for token in content['added_tokens']}
    tokenizer = spm.SentencePieceTokenizer(source)
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


def find(folder: pathlib.Path) -> BaseTokenizer | None:
    """Returns the tokenizer of a folder, None if it has none. Raises UsageError if it cannot be read."""
    has = any((folder / name).exists() for name in (json_file.FILE, json_file.MODEL))
    return loading.load(folder) if has else None


def keep_model(source: pathlib.Path, workdir: pathlib.Path, tokenizer: BaseTokenizer) -> None:
    """Copies the tokenizer.model of `source` into the workdir, so that data can be prepared with it.

    Only if its ids are those of `tokenizer`, the folder's; otherwise says on stderr that it is left.
    """
    path = source / json_file.MODEL
    try:
        model = spm.SentencePieceTokenizer(path)
    except errors.UsageError:
        return  # none, or Llama 3's in tiktoken's form
    for text in tokenizer_convert.vocabulary_texts(path):
        text = text.lstrip(' ')  # transformers' class for Llama reads spaces at the beginning in its own way
        if model.encode(text) != tokenizer.encode(text):
            print(
                f'import: transformers gives other ids for the folder than SentencePiece for {path}, for example for '
                f'{text[:40]!r}; {workdir / loading.FOLDER} gives those of transformers.',
                file=sys.stderr,
            )
            return
    loading.keep(path, workdir)
