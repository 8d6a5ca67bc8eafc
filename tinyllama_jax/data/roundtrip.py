"""What a tokenizer loses of a corpus, and whether an export can take it: said before a store is made."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from tinyllama_jax import errors
from tinyllama_jax.tokenizer import convert, loading
from tinyllama_jax.tokenizer.base import without_surrogates

_NAMES = {'\n': 'newlines', '\r': 'carriage returns', '\t': 'tabs', ' ': 'spaces'}
_LISTED = 8  # kinds of lost characters


def report(path: Path, texts: Iterable[str], *, bos: bool) -> Iterator[str]:
    """Yields lines for the user about `texts` encoded and decoded, and about the export to come.

    `path` is the tokenizer's; `bos`: whether documents get BOS.
    """
    tokenizer = loading.load(path)
    sample = [without_surrogates(text) for text in texts]
    lost, changed = Counter(), 0
    for text in sample:
        back = tokenizer.decode(tokenizer.encode(text))
        if back != text:
            changed += 1
            lost += Counter(text) - Counter(back)
    if changed:
        counts = (f'{_NAMES.get(character, repr(character))} ({n:,})' for character, n in lost.most_common(_LISTED))
        yield (
            f'the tokenizer changes {changed} of {len(sample)} sampled documents, of which a model will never see '
            f'{", ".join(counts) or "the characters in their order"}.'
        )
    else:
        yield f'the tokenizer gives back all {len(sample)} sampled documents as they were.'
    if path.is_file() and path.suffix != '.json':
        refusal = _export_refusal(path, sample)
        yield f'export will refuse this tokenizer: {refusal}' if refusal else 'export will give it the same ids.'
        return
    yield 'export will copy its files.'
    if (tokenizer.encode('', special=True)[:1] == [tokenizer.bos_id]) != bos:
        yield (
            f'the tokenizer puts {"no BOS" if bos else "BOS"} before a text, and so will an export, but '
            f'config.data.bos is {bos}; --config.data.bos={not bos} trains the model as it will be used.'
        )


def _export_refusal(path: Path, sample: list[str]) -> str | None:
    """Returns why no tokenizer.json can be made of a SentencePiece model, or None."""
    try:
        content = convert.build(path, add_bos=False)
    except errors.UsageError as error:
        return str(error)
    texts = [*sample, *convert.vocabulary_texts(path)]
    different = convert.first_difference(path, content, texts)
    if different is None:
        return None
    return (
        f'transformers would give other ids for {different[:40]!r} (pieces of equal scores, as in merged vocabularies).'
    )
