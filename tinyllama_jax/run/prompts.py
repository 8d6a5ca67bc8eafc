"""The command `generate`: prints prompts with their continuations by a run's checkpoint."""

import pathlib
from collections.abc import Iterator, Sequence

from tinyllama_jax import errors, generate
from tinyllama_jax.config import Config
from tinyllama_jax.process import cores
from tinyllama_jax.run import workdir
from tinyllama_jax.tokenizer.base import BaseTokenizer

_MOST_PROMPTS = 32  # continued at once


def generate_run(
    config: Config | None,
    folder: pathlib.Path,
    *,
    prompt: Sequence[str],
    prompts: str | None = None,
    step: int | None = None,
    **options,
) -> None:
    """Prints prompts with their continuations by a workdir's checkpoint; `options` are those of `Generator.batch`.

    Prompts are continued together but printed one after the other; the one being printed shows its tokens as they come.

    Args:
      prompt: prompts.
      prompts: a file with one more prompt on each line.

    Raises UsageError for a file that cannot be read and a prompt that cannot be continued.
    """
    texts = list(prompt)
    if prompts:
        try:
            texts += pathlib.Path(prompts).read_text(encoding='utf-8-sig').removesuffix('\n').split('\n')
        except (OSError, UnicodeDecodeError) as error:
            raise errors.UsageError(f'--prompts={prompts} cannot be read ({error}); give a text in UTF-8.') from None
    if not texts:
        raise errors.UsageError('--prompt=TEXT is missing; it may be given several times, or --prompts=FILE.')
    loaded = workdir.load(folder, config, step)
    tokenizer = workdir.load_tokenizer(folder, loaded.config, loaded.tokenizer_path)
    ids = [tokenizer.encode(text, special=True) for text in texts]
    if not all(ids):
        number, flags = ids.index([]) + 1, len(prompt)
        where = f'--prompt number {number}' if number <= flags else f'line {number - flags} of --prompts={prompts}'
        raise errors.UsageError(f'{where} is empty: without BOS (data.bos) there is nothing to continue.')
    generator = generate.Generator(loaded.params, loaded.config.model)
    with cores.awake_cores():
        for start in range(0, len(ids), _MOST_PROMPTS):
            together = ids[start : start + _MOST_PROMPTS]
            _print_texts(together, generator.batch(together, eos_id=tokenizer.stop_ids, **options), tokenizer)


def _print_texts(
    prompts: Sequence[list[int]], blocks: Iterator[generate.Continuations], tokenizer: BaseTokenizer
) -> None:
    """Prints each prompt with its continuation on lines of its own, in order."""
    current, shown = 0, ''
    for batch in blocks:
        while current < len(prompts):
            text = tokenizer.decode(prompts[current] + batch.tokens[current])
            if batch.ended[current] or not text.endswith('\ufffd'):  # half a character: wait for its other bytes
                print(text[len(shown) :], end='', flush=True)
                shown = text
            if not batch.ended[current]:
                break
            print()
            current, shown = current + 1, ''
