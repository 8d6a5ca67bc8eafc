"""Opens a tokenizer of either kind, and keeps one with a run or a store."""

import shutil
from pathlib import Path

from tinyllama_jax import errors, files
from tinyllama_jax.tokenizer import base, json_file, spm

FOLDER = 'tokenizer'  # in a run's folder or a store: the files of a tokenizer.json


def load(path: str | Path, *, adds_bos: bool = False) -> base.BaseTokenizer:
    """Returns the tokenizer at `path`: a SentencePiece .model file, a tokenizer.json, or a folder with one of them.

    A folder is read as transformers reads a Llama's, with the files that name its special and added tokens. Its
    tokenizer.json counts before its tokenizer.model. A folder's tokenizer.model that is not BPE, of which transformers
    makes nothing sensible, gives SentencePiece's ids. `adds_bos` is for a .model file.

    Raises UsageError for what cannot be read.
    """
    path = Path(path)
    if path.suffix == '.json' or (path / json_file.FILE).exists():
        return json_file.JsonTokenizer(path)
    if not path.is_dir():
        return spm.SentencePieceTokenizer(path, adds_bos=adds_bos)
    model = path / json_file.MODEL
    if not model.exists():
        raise errors.UsageError(f'{path} holds neither tokenizer.model nor tokenizer.json.')
    config, added = json_file.settings(path)
    tokenizer = spm.SentencePieceTokenizer(model, adds_bos=bool(config.get('add_bos_token')))
    if tokenizer.is_bpe:
        return json_file.JsonTokenizer(path)
    if above := [token['content'] for index, token in added.items() if index >= tokenizer.vocab_size]:
        raise errors.UsageError(f'{model} is not BPE, so {above[0]!r} cannot be added to it; give a tokenizer.json.')
    tokenizer.stop_ids = json_file.stop_ids(path, tokenizer.eos_id)
    return tokenizer


def kept(folder: Path) -> Path:
    """Returns the path of the tokenizer that a run's folder or a store keeps, whether it exists or not."""
    return folder / FOLDER if (folder / FOLDER).exists() else folder / json_file.MODEL


def keep(source: str | Path, folder: Path) -> None:
    """Copies the tokenizer at `source` to where `kept` finds it in `folder`. Raises OSError."""
    source, kept_folder = Path(source), folder / FOLDER
    if not source.is_dir() and source.suffix != '.json':
        files.write_atomically(folder / json_file.MODEL, source.read_bytes())
        return
    temporary = folder / f'{FOLDER}.tmp'
    shutil.rmtree(temporary, ignore_errors=True)
    json_file.copy(source, temporary)
    shutil.rmtree(kept_folder, ignore_errors=True)
    temporary.rename(kept_folder)
