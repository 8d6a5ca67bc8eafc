"""Runs every command of the program in turn on configs/demo.py, as `make demo` does.

    python -m demo.run [WORKDIR [--config.x.y=value ...]]

Skips a step whose result exists, so the same command resumes after an interruption.
Ends with the exit status of the first step that fails.
"""

import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

from demo import cloze
from tinyllama_jax.process import signals

CONFIG = 'configs/demo.py'
SOURCE = 'slimpajama'  # its held-out documents become the cloze task
PROMPTS = ('Return a list of', 'The statement is used to', 'def __init__(self, name):')
SAMPLING = ('--max_new_tokens=60', '--temperature=0.7', '--top_k=40')


class StepFailed(Exception):
    """A command ended with a status other than 0."""

    def __init__(self, command: str, status: int):
        super().__init__(f'`{command}` ended with status {status}')
        self.status = status


def main(workdir: str = 'runs/demo', *overrides: str) -> int:
    """Runs every step in `workdir` with `overrides` (--config.x=y), prints the results, returns the exit status."""
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # the demo is made for a CPU; a CUDA plugin may be installed too
    begin = time.monotonic()
    try:
        texts = _steps(pathlib.Path(workdir), overrides)
    except StepFailed as failure:
        print(f'\ndemo: {failure}; its output above says why. `make demo` resumes from here.', file=sys.stderr)
        return failure.status
    _results(pathlib.Path(workdir), texts, time.monotonic() - begin)
    return 0


def _steps(folder: pathlib.Path, overrides: tuple[str, ...]) -> str:
    """Runs every step up to the report; returns the output of `generate`."""
    experiment, workdir = (f'--config={CONFIG}', *overrides), f'--workdir={folder}'
    command('prepare', *experiment, workdir)
    command('train', *experiment, workdir)
    step = max(int(path.name) for path in (folder / 'checkpoints').iterdir() if path.name.isdigit())
    checkpoint = folder / 'checkpoints' / str(step)
    if not _newer(folder / 'export', checkpoint):
        shutil.rmtree(folder / 'export', ignore_errors=True)
        command('export', workdir, f'--output={folder / "export"}')
    items = cloze.build(folder / 'corpus' / SOURCE, folder / cloze.TASK)
    result = folder / 'eval' / f'{cloze.TASK}-{step}.json'
    if not _newer(result, checkpoint):
        print(f'\n{cloze.TASK}: {items} items from held-out documents, in {folder / cloze.TASK}')
        tasks = (f'--tasks={cloze.TASK}', f'--include_path={folder / cloze.TASK}', '--log_samples')
        command('evaluate', workdir, *tasks, f'--output={result}')
    texts = command('generate', workdir, *(f'--prompt={prompt}' for prompt in PROMPTS), *SAMPLING, capture=True)
    command('report', workdir, capture=True)
    return texts


def _newer(path: pathlib.Path, than: pathlib.Path) -> bool:
    return path.exists() and path.stat().st_mtime > than.stat().st_mtime


def command(name: str, *arguments: str, capture: bool = False) -> str:
    """Runs `main.py NAME ARGUMENTS`; returns its stdout if `capture`. Raises StepFailed unless its status is 0."""
    shown = shlex.join(['python', 'main.py', name, *arguments])
    print(f'\n$ {shown}', flush=True)
    begin = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, 'main.py', name, *arguments], stdout=subprocess.PIPE if capture else None, text=True
    )
    # Ctrl-C reaches the command too, and it saves and ends; SIGTERM is passed on. The demo only waits.
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
    }
    output, _ = process.communicate()
    for number, handler in before.items():
        signal.signal(number, handler)
    if process.returncode:
        status = process.returncode if process.returncode > 0 else 128 - process.returncode
        raise StepFailed(shown, status)
    print(f'({name}: {time.monotonic() - begin:.0f} s)', flush=True)
    return output or ''


def _results(folder: pathlib.Path, texts: str, seconds: float) -> None:
    summary = json.loads((folder / 'report' / 'summary.json').read_text())
    figures = summary['tasks'][cloze.TASK]
    print(f'\n{"=" * 78}')
    print(f'{summary["parameters"]:,} parameters, {summary["tokens"]:,} tokens; {seconds:.0f} s in all\n')
    print(f'{"held-out loss (nats per token)":34}{"model":>16}{"unigram baseline":>20}')
    for source, loss in summary['heldout_loss'].items():
        print(f'  {source:32}{loss:16.3f}{summary["unigram_loss"][source]:20.3f}')
    print(f'\n{"cloze (1 of 4 continuations)":34}{"model":>16}{"chance":>20}')
    _print_figure(figures, 'acc', 'accuracy', f'{figures["chance_acc"]:.3f}')
    _print_figure(figures, 'gold_bits_per_byte', 'bits per byte', f'{figures["unigram_bits_per_byte"]:.3f} (unigram)')
    for text in _continuations(texts):
        print(f'\n{"-" * 30} generated {"-" * 37}\n{text}')
    print(f'{"-" * 78}\n\nreport: {folder / "report" / "index.html"}\n\nTo try next:')
    python = pathlib.Path(sys.executable)
    if python.is_relative_to(pathlib.Path.cwd()):
        python = python.relative_to(pathlib.Path.cwd())
    tasks = f'--tasks={cloze.TASK} --include_path={folder / cloze.TASK}'
    for purpose, line in {
        'write another text': f"generate --workdir={folder} --prompt='import os' --temperature=0.8 --seed=1",
        'train twice as long': (
            f'train --config={CONFIG} --workdir={folder} --config.train.num_steps={2 * summary["step"]}'
        ),
        'evaluate the exported Hugging Face folder': f'evaluate --model={folder / "export"} {tasks}',
    }.items():
        print(f'  # {purpose}\n  {python} main.py {line}')


def _continuations(texts: str) -> list[str]:
    """Cuts the output of `generate` before each prompt; a continuation may have many lines."""
    continuations = []
    for prompt in reversed(PROMPTS):
        texts, _, continuation = texts.rpartition(prompt)
        continuations.insert(0, prompt + continuation.rstrip())
    return continuations


def _print_figure(figures: dict[str, float], name: str, title: str, chance: str) -> None:
    value = f'{figures[name]:.3f} ± {figures[f"{name}_stderr"]:.3f}'
    print(f'  {title:32}{value:>16}{chance:>20}')


if __name__ == '__main__':
    signals.end_on_ctrl_c('demo: stopped by Ctrl-C; `make demo` resumes from here.')
    sys.exit(main(*sys.argv[1:]))
