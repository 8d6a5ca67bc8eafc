"""One page about a run, from its workdir's files: pictures, tables and a summary for programs.

    WORKDIR/report/index.html     self-contained: it embeds the pictures
    WORKDIR/report/*.png          the same pictures
    WORKDIR/report/summary.json   step, tokens, parameters, heldout_loss, unigram_loss, tasks, ...

The page also shows WORKDIR/eval/figure2.png, which `evaluate --figure=2` makes.

Losses are in nats per token. Where the workdir has no files for a part, the page has a note instead.
"""

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use('Agg')
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tinyllama_jax import errors, files, flops
from tinyllama_jax.config import Config
from tinyllama_jax.report import baselines, page
from tinyllama_jax.run import records, workdir
from tinyllama_jax.tokenizer import loading


@dataclasses.dataclass(frozen=True)
class _Run:
    """The content of a workdir's files."""

    folder: pathlib.Path
    start: Mapping[str, Any]  # of config.json: command, commit, versions, devices
    config: Config
    training: Sequence[Mapping[str, Any]]  # entries of metrics.jsonl
    validation: Sequence[Mapping[str, Any]]  # entries of validation.jsonl
    evaluations: Sequence[Mapping[str, Any]]  # results of `evaluate`, the newest step last
    in_training: Sequence[Mapping[str, Any]]  # entries of evaluation.jsonl
    unigram: baselines.Unigram | None
    notes: Sequence[str]  # what is missing, and why

    @property
    def step(self) -> int:
        return self.training[-1]['step']

    @property
    def tokens_per_step(self) -> int:
        return self.config.train.global_batch_size * self.config.model.seq_len


def report_run(config: Config | None, folder: pathlib.Path) -> None:
    """Runs `main.py report`: writes a workdir's report and prints the path of its page."""
    print(report(folder, config))


def report(folder: pathlib.Path | str, config: Config | None = None) -> pathlib.Path:
    """Writes FOLDER/report/ and returns the path of its index.html.

    Raises UsageError if the folder has no run, or if `config` is given and is not the run's.
    """
    if config is not None:
        workdir.refuse_contradiction(pathlib.Path(folder), config)
    run = _read(pathlib.Path(folder))
    output = run.folder / 'report'
    output.mkdir(exist_ok=True)
    summary = _summary(run)
    files.write_atomically(output / 'summary.json', json.dumps(summary, indent=2) + '\n')
    pictures = {}
    for name, (title, draw) in _PICTURES.items():
        if figure := draw(run):
            figure.savefig(output / f'{name}.png', dpi=110)
            plt.close(figure)
            pictures[title] = output / f'{name}.png'
    files.write_atomically(output / 'index.html', _page(run, summary, pictures))
    return output / 'index.html'


def _read(folder: pathlib.Path) -> _Run:
    training = records.read_entries(folder / 'metrics.jsonl', loss=float, learning_rate=float, tokens_per_second=float)
    if not training:
        raise errors.UsageError(
            f'--workdir={folder}: it has no metrics.jsonl with a logged step; '
            f'run main.py train --config=FILE --workdir={folder} first.'
        )
    config, notes = workdir.read_config(folder), []
    try:
        unigram = baselines.unigram(config, config.data.store_path(folder), loading.kept(folder))
    except errors.Failure as error:
        unigram = None
        notes.append(f'The unigram baseline is left out: {error}')
    validation = records.read_entries(folder / 'validation.jsonl', loss=dict)
    evaluations = []
    for path in sorted((folder / 'eval').glob('*.json')):
        try:
            result = json.loads(path.read_text(encoding='utf-8'))
        except ValueError as error:
            notes.append(f'{path} is left out, for it is not valid JSON: {error}')
            continue
        # Tables are lists, and results without a step are of other models than this run's.
        if isinstance(result, dict) and 'step' in result.get('protocol', {}):
            evaluations.append(result)
    evaluations.sort(key=_step_of)
    in_training = records.read_entries(folder / 'evaluation.jsonl', tasks=dict)
    if not validation:
        notes.append('There is no validation loss yet; it is measured every config.train.eval_every_steps.')
    if not evaluations:
        notes.append(f'Nothing was evaluated yet; run main.py evaluate --workdir={folder} --tasks=NAMES.')
    start = workdir.read_config_file(folder) or {}
    return _Run(folder, start, config, training, validation, evaluations, in_training, unigram, notes)


def _step_of(evaluation: Mapping[str, Any]) -> int:
    return evaluation['protocol']['step']


def _summary(run: _Run) -> dict[str, Any]:
    """Returns the content of summary.json."""
    summary = {
        'step': run.step,
        'tokens': run.step * run.tokens_per_step,
        'parameters': sum(flops.parameter_counts(run.config.model).values()),
        'training_loss': run.training[-1]['loss'],
        'tokens_per_second': statistics.median(entry['tokens_per_second'] for entry in run.training),
        'heldout_loss': run.validation[-1]['loss'] if run.validation else {},
        'unigram_loss': run.unigram.losses if run.unigram else {},
        'tasks': {},
    }
    for evaluation in run.evaluations:  # the newest last
        for task in evaluation['results']:
            scores: dict[str, Any] = {'step': _step_of(evaluation), **_task_scores(run, evaluation, task)}
            if measured := _measured(evaluation, task):
                scores['measured'] = measured
            summary['tasks'][_label(evaluation, task)] = scores
    return summary


def _label(evaluation: Mapping[str, Any], task: str) -> str:
    """Returns the task's name; with what sets its score apart from that of all examples by the paper's protocol."""
    stamp = evaluation['protocol']
    apart = [f'first {stamp["limit"]} examples'] if stamp.get('limit') else []
    usual = {'name': 'paper', 'backend': 'jax'}
    apart += [stamp[field] for field in usual if stamp.get(field, usual[field]) != usual[field]]
    return f'{task} ({", ".join(apart)})' if apart else task


def _measured(evaluation: Mapping[str, Any], task: str) -> str:
    """Returns how a score was measured, as its result says: protocol, backend, examples, requests that were cut."""
    stamp = evaluation['protocol']
    said = [str(stamp[field]) for field in ('name', 'backend') if stamp.get(field)]
    if 'limit' in stamp:
        said.append(f'first {stamp["limit"]} examples' if stamp['limit'] else 'all examples')
    if cut := (stamp.get('truncated_requests') or {}).get(task):
        said.append(f'{cut:,} requests cut')
    return ', '.join(said)


def _task_scores(run: _Run, evaluation: Mapping[str, Any], task: str) -> dict[str, float]:
    """Returns {metric: value, metric_stderr: standard error}, with baselines computed from the logged samples."""
    scores = {
        name.removesuffix(',none'): value
        for name, value in evaluation['results'][task].items()
        if isinstance(value, float) and ',' in name
    }
    samples = baselines.choices(evaluation.get('samples', {}).get(task, ()))
    if samples:
        scores['chance_acc'] = statistics.mean(1 / len(sample.texts) for sample in samples)
        if run.unigram:
            scores['unigram_bits_per_byte'] = run.unigram.bits_per_byte(samples)
    return scores


def _draw_training(run: _Run) -> Figure:
    figure, (top, bottom) = plt.subplots(2, sharex=True, figsize=(9, 6), height_ratios=(3, 1), layout='constrained')
    steps = [entry['step'] for entry in run.training]
    top.plot(steps, [entry['loss'] for entry in run.training], color='0.45', linewidth=1, label='training batch')
    _plot_validation(run, top)
    top.set_ylabel('loss (nats per token)')
    top.legend()
    bottom.plot(steps, [entry['learning_rate'] for entry in run.training], color='tab:green')
    bottom.set_ylabel('learning rate')
    bottom.set_ylim(bottom=0)
    bottom.ticklabel_format(axis='y', style='sci', scilimits=(0, 0))
    _step_axis(run, bottom)
    top.grid(alpha=0.3)
    scale = run.tokens_per_step / 1e6
    above = top.secondary_xaxis('top', functions=(lambda x: np.multiply(x, scale), lambda x: np.divide(x, scale)))
    above.set_xlabel('training tokens (millions)')
    return figure


def _draw_throughput(run: _Run) -> Figure:
    figure, axes = plt.subplots(figsize=(9, 3.2), layout='constrained')
    speeds = [entry['tokens_per_second'] for entry in run.training]
    axes.plot([entry['step'] for entry in run.training], speeds, color='tab:purple', linewidth=1)
    median = statistics.median(speeds)
    axes.axhline(median, color='0.6', linestyle=':', label=f'median {median:,.0f}')
    axes.set_ylabel('tokens per second')
    axes.set_ylim(bottom=0)
    axes.legend()
    _step_axis(run, axes)
    return figure


def _draw_validation(run: _Run) -> Figure | None:
    if not run.validation:
        return None
    figure, axes = plt.subplots(figsize=(9, 4), layout='constrained')
    _plot_validation(run, axes)
    for i, (source, loss) in enumerate(run.unigram.losses.items() if run.unigram else ()):
        axes.axhline(loss, color=f'C{i}', linestyle='--', linewidth=1, label=f'{source}, unigram baseline')
    axes.set_ylabel('held-out loss (nats per token)')
    axes.legend()
    _step_axis(run, axes)
    return figure


def _plot_validation(run: _Run, axes: Axes) -> None:
    for i, source in enumerate(run.validation[-1]['loss'] if run.validation else ()):
        points = [(entry['step'], entry['loss'][source]) for entry in run.validation if source in entry['loss']]
        axes.plot(*zip(*points, strict=True), color=f'C{i}', marker='o', markersize=4, label=f'{source}, held out')


def _draw_evaluations(run: _Run) -> Figure | None:
    if not run.evaluations:
        return None
    figure, axes = plt.subplots(figsize=(9, 4), layout='constrained')
    measured = [(_label(each, task), task, each) for each in run.evaluations for task in each['results']]
    for i, label in enumerate(sorted({label for label, _, _ in measured})):
        points = {}  # by step: of two results that were measured alike, the last counts
        for _, task, evaluation in (each for each in measured if each[0] == label):
            scores = _task_scores(run, evaluation, task)
            name = 'acc_norm' if 'acc_norm' in scores else 'acc'  # normalised by length if the task reports that
            if name in scores:
                stderr, chance = scores.get(f'{name}_stderr', 0.0), scores.get('chance_acc')
                points[_step_of(evaluation)] = _step_of(evaluation), scores[name], stderr, chance
        if not points:
            continue
        steps, values, stderrs, chances = zip(*points.values(), strict=True)
        axes.errorbar(steps, values, yerr=stderrs, color=f'C{i}', marker='o', capsize=3, label=label)
        if chances[-1]:
            axes.axhline(chances[-1], color=f'C{i}', linestyle=':', linewidth=1, label=f'{label}, chance')
    axes.set_ylabel('accuracy (± standard error)')
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    _step_axis(run, axes)
    return figure


def _draw_in_training(run: _Run) -> Figure | None:
    if not run.in_training:
        return None
    figure, axes = plt.subplots(figsize=(9, 4), layout='constrained')
    for i, (task, newest) in enumerate(run.in_training[-1]['tasks'].items()):
        name = next((metric for metric in ('acc_norm', 'acc') if metric in newest), next(iter(newest)))
        metric, separator, extraction = name.partition('/')  # such as exact_match/strict
        stderr_name = f'{metric}_stderr{separator}{extraction}'
        scored = [(entry['step'], entry['tasks'].get(task, {})) for entry in run.in_training]
        points = [(step, scores[name], scores.get(stderr_name, 0.0)) for step, scores in scored if name in scores]
        steps, values, stderrs = zip(*points, strict=True)
        axes.errorbar(steps, values, yerr=stderrs, color=f'C{i}', marker='o', capsize=3, label=f'{task}, {name}')
    axes.set_ylabel('score (± standard error)')
    axes.legend()
    _step_axis(run, axes)
    return figure


def _step_axis(run: _Run, axes: Axes) -> None:
    axes.set_xlim(0, run.step * 1.02)
    axes.set_xlabel('optimizer step')
    axes.grid(alpha=0.3)


_PICTURES: dict[str, tuple[str, Callable[[_Run], Figure | None]]] = {
    'training': ('Loss and learning rate', _draw_training),
    'validation': ('Held-out loss of each source', _draw_validation),
    'evaluation': ('Tasks', _draw_evaluations),
    'in_training': ('Tasks during training, on their first examples', _draw_in_training),
    'throughput': ('Throughput', _draw_throughput),
}


def _page(run: _Run, summary: Mapping[str, Any], pictures: Mapping[str, pathlib.Path]) -> str:
    """Returns the page's HTML."""
    parts = [page.heading(run.folder.resolve().name, 1), page.table(_facts(run, summary))]
    parts += map(page.note, run.notes)
    if run.validation:
        rows = [('source', 'model', 'unigram baseline')]
        for source, loss in summary['heldout_loss'].items():
            baseline = summary['unigram_loss'].get(source)
            rows.append((source, f'{loss:.4f}', 'left out' if baseline is None else f'{baseline:.4f}'))
        parts += [page.heading('Held-out loss (nats per token)'), page.table(rows)]
    if summary['tasks']:
        parts += [page.heading('Evaluation'), page.table(_task_rows(summary['tasks']))]
    parts += [page.picture(title, path) for title, path in pictures.items()]
    if (figure2 := run.folder / 'eval' / 'figure2.png').exists():
        parts.append(page.picture("The paper's Figure 2, of this run's checkpoints", figure2))
    return page.page(str(run.folder), parts)


def _facts(run: _Run, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ('parameters', f'{summary["parameters"]:,}'),
        ('trained', f'{summary["step"]:,} of {run.config.train.num_steps:,} steps, {summary["tokens"]:,} tokens'),
        ('training loss', f'{summary["training_loss"]:.4f} nats per token'),
        ('speed', f'{summary["tokens_per_second"]:,.0f} tokens per second (median)'),
        ('devices', str(run.start.get('devices'))),
        ('command', str(run.start.get('command'))),
        ('commit', str(run.start.get('commit'))),
        ('versions', ', '.join(f'{name} {version}' for name, version in run.start.get('versions', {}).items())),
    ]


def _task_rows(tasks: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [('task', 'step', 'metric', 'value', 'chance or unigram', 'measured')]
    beside = {'acc': 'chance_acc', 'acc_norm': 'chance_acc', 'gold_bits_per_byte': 'unigram_bits_per_byte'}
    for task, scores in tasks.items():
        for name, value in scores.items():
            if name in ('step', 'measured') or name in beside.values() or name.endswith('_stderr'):
                continue
            stderr, chance = scores.get(f'{name}_stderr'), scores.get(beside.get(name, ''))
            shown = f'{value:.4f}' if stderr is None else f'{value:.4f} ± {stderr:.4f}'
            beside_it = '' if chance is None else f'{chance:.4f}'
            rows.append((task, str(scores['step']), name, shown, beside_it, scores.get('measured', '')))
    return rows
