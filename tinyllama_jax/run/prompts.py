"""The command `generate`: continues prompts by a run's checkpoint."""

import pathlib
from collections.abc import Iterator, Sequence

from tinyllama_jax import errors, generate, tokenizer
from tinyllama_jax.config import Config
from tinyllama_jax.process import cores
from tinyllama_jax.run import workdir

_MOST_ROWS = 32  # prompts that are continued at once


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

    They are continued together and printed one after another, the first one that has not ended as its tokens come.

    Args:
      prompt: texts.
      prompts: a file with a further text on each line.

    Raises UsageError for what cannot be read or continued.
    """
    texts = [*prompt, *_lines(prompts)]
    if not texts:
        raise errors.UsageError('--prompt=TEXT is missing; it may be given several times, or --prompts=FILE.')
    loaded = workdir.load(folder, config, step)
    pieces, shape = tokenizer.Tokenizer(loaded.tokenizer_path), loaded.config.model
    bos = [pieces.bos_id] if loaded.config.data.bos else []
    ids = [bos + pieces.encode(text) for text in texts]
    if not all(ids):
        number, given = ids.index([]) + 1, len(prompt)
        where = f'--prompt number {number}' if number <= given else f'line {number - given} of --prompts={prompts}'
        raise errors.UsageError(f'{where} is empty: without BOS (data.bos) there is nothing to continue.')
    generator = generate.Generator(loaded.params, shape)
    with cores.awake_cores():
        for start in range(0, len(ids), _MOST_ROWS):
            some = ids[start : start + _MOST_ROWS]
            _print(some, generator.batch(some, eos_id=pieces.eos_id, **options), pieces)


def _lines(path: str | None) -> list[str]:
    try:
        return pathlib.Path(path).read_text(encoding='utf-8').removesuffix('\n').split('\n') if path else []
    except (OSError, UnicodeDecodeError) as error:
        raise errors.UsageError(f'--prompts={path} cannot be read: {error}.') from None


def _print(prompts: Sequence[list[int]], blocks: Iterator[generate.Rows], pieces: tokenizer.Tokenizer) -> None:
    row, shown = 0, ''
    for rows in blocks:
        while row < len(prompts):
            text = pieces.decode(prompts[row] + rows.tokens[row])
            if rows.ended[row] or not text.endswith('\ufffd'):  # half a character: wait for its other bytes
                print(text[len(shown) :], end='', flush=True)
                shown = text
            if not rows.ended[row]:
                break
            print()
            row, shown = row + 1, ''
