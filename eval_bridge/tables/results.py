"""Makes the paper's Tables 2 and 3 and Figure 2 from results of `evaluate`, beside the published values.

Scores are in per cent. A difference is given in standard errors of the measured score; lm-eval computes them from the
sampling of the task's examples.
"""

import csv
import dataclasses
import io
import json
import math
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt

from eval_bridge.tables import published
from tinyllama_jax import files
from tinyllama_jax.report import page

# Task -> its metric, both by lm-eval's names (the paper's section 3). Table 3 has lm-eval's tasks and InstructEval's.
TABLES = {
    2: {
        'hellaswag': 'acc_norm', 'openbookqa': 'acc_norm', 'winogrande': 'acc', 'arc_challenge': 'acc_norm',
        'arc_easy': 'acc_norm', 'boolq': 'acc', 'piqa': 'acc_norm',
    },
    3: {
        'mmlu': 'acc', 'bbh_fewshot': 'exact_match', 'drop': 'f1', 'humaneval': 'pass@1',
        'instructeval_mmlu': 'acc', 'instructeval_bbh': 'acc', 'instructeval_drop': 'acc',
        'instructeval_humaneval': 'pass@1',
    },
}  # fmt: skip
AVERAGE = 'average'
_TITLES = {
    'hellaswag': 'HellaSwag', 'openbookqa': 'OpenBookQA', 'winogrande': 'WinoGrande', 'arc_challenge': 'ARC-Challenge',
    'arc_easy': 'ARC-Easy', 'boolq': 'BoolQ', 'piqa': 'PIQA', AVERAGE: 'Average',
}  # fmt: skip
_UNITS = ((1e9, ' (billions)'), (1e6, ' (millions)'), (1, ''))  # in which Figure 2 counts tokens


@dataclasses.dataclass(frozen=True)
class Score:
    """A measured score, its standard error (None where lm-eval has none) and the published score, if any."""

    value: float
    stderr: float | None
    published: float | None = None

    @property
    def difference(self) -> float | None:
        """The difference from the published value in standard errors; None if either is unknown."""
        if self.published is None or not self.stderr:
            return None
        return (self.value - self.published) / self.stderr

    def __str__(self) -> str:
        text = f'{self.value:.2f}' if self.stderr is None else f'{self.value:.2f} ± {self.stderr:.2f}'
        if self.published is None:
            return text
        away = '' if self.difference is None else f', {self.difference:+.1f} se'
        return f'{text} ({self.published:.2f}{away})'


def scores(table: int, result: Mapping[str, Any], model: str) -> dict[str, Score]:
    """Returns task -> score for the table's tasks that `result` has, and the average of Table 2 if it has them all.

    `model` is the name under which scores may have been published.
    """
    known = published.scores(table, model)
    measured = {}
    for task, metric in TABLES[table].items():
        if task in result['results']:
            values = result['results'][task]
            # lm-eval's names end with a comma and a filter.
            name = next(name for name in values if name.partition(',')[0] == metric)
            stderr = values.get(name.replace(metric, f'{metric}_stderr', 1))
            stderr = 100 * stderr if isinstance(stderr, float) else None
            measured[task] = Score(100 * values[name], stderr, known.get(task))
    if table == 2 and len(measured) == len(TABLES[2]):
        value = sum(score.value for score in measured.values()) / len(measured)
        # The standard error of a mean over independent tasks.
        stderr = math.sqrt(sum((score.stderr or 0.0) ** 2 for score in measured.values())) / len(measured)
        measured[AVERAGE] = Score(value, stderr, _published(model, AVERAGE) if known else None)
    return measured


def write_table(folder: pathlib.Path, table: int, rows: Mapping[str, Mapping[str, Score]]) -> str:
    """Writes model -> task -> score as tableN.md, .csv, .json and .html, and returns the Markdown."""
    tasks = _tasks(table, rows.values())
    cells = [('model', *tasks), *((model, *(str(row.get(task, '')) for task in tasks)) for model, row in rows.items())]
    text = _markdown(cells) + '\nIn brackets: published, and the difference in standard errors (se).\n'
    flat = [
        {'model': model, 'task': task, **dataclasses.asdict(score), 'difference_in_stderr': score.difference}
        for model, row in rows.items()
        for task, score in row.items()
    ]
    content = {
        'md': text,
        'csv': _csv(flat),
        'json': json.dumps(flat, indent=2) + '\n',
        'html': page.page(f'Table {table}', [page.heading(f'Table {table}', 1), page.table(cells), *_notes(rows)]),
    }
    for suffix, file_text in content.items():
        files.write_atomically(folder / f'table{table}.{suffix}', file_text)
    return text


def _notes(models: Collection[str]) -> list[str]:
    second = [name for name in published.SECOND_HAND if name.lower() in map(str.lower, models)]
    notes = ['Per cent ± standard error. In brackets: published (EVAL.md of the TinyLlama repository), difference.']
    return [page.note(text) for text in notes + [f'{name}: published values second-hand.' for name in second]]


def _markdown(cells: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    lines.insert(1, ' | '.join('-' * width for width in widths))
    return ''.join(f'| {line} |\n' for line in lines)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def write_figure(folder: pathlib.Path, points: Mapping[float, Mapping[str, Score]]) -> pathlib.Path:
    """Writes training tokens -> task -> score as figure2.csv, .png and .html, and returns the page's path.

    Beside the measured curves it shows Pythia-1.4B's and TinyLlama's published scores.
    """
    points, baseline = dict(sorted(points.items())), published.FIGURE_2_BASELINE
    rows = [
        {
            'tokens': tokens,
            'task': task,
            'score': score.value,
            'stderr': score.stderr,
            baseline: _published(baseline, task),
        }
        for tokens, scored in points.items()
        for task, score in scored.items()
    ]
    files.write_atomically(folder / 'figure2.csv', _csv(rows))
    picture = folder / 'figure2.png'
    _draw(points, picture)
    tasks = _tasks(2, points.values())
    cells = [('training tokens', *(_TITLES[task] for task in tasks))]
    cells += [(f'{tokens:,.0f}', *(str(scored.get(task, '')) for task in tasks)) for tokens, scored in points.items()]
    cells.append((f'{baseline}, published', *(f'{_published(baseline, task):.2f}' for task in tasks)))
    parts = [page.heading('Figure 2', 1), page.picture('Scores during training', picture)]
    html = folder / 'figure2.html'
    files.write_atomically(html, page.page('Figure 2', [*parts, page.table(cells), *_notes({baseline})]))
    return html


def _tasks(table: int, rows: Collection[Mapping[str, Score]]) -> list[str]:
    return [task for task in (*TABLES[table], AVERAGE) if any(task in row for row in rows)]


def _draw(points: Mapping[float, Mapping[str, Score]], path: pathlib.Path) -> None:
    tasks = _tasks(2, points.values())
    columns = min(len(tasks), 4)
    rows = math.ceil(len(tasks) / columns)
    size = (max(2.4 * columns, 4.5), 2.1 * rows + 0.4)
    with plt.rc_context({'font.size': 8, 'axes.titlesize': 9, 'axes.spines.top': False, 'axes.spines.right': False}):
        figure, grid = plt.subplots(rows, columns, figsize=size, layout='constrained', squeeze=False)
        unit, name = next((unit, name) for unit, name in _UNITS if max(points) >= unit or unit == 1)
        for axes, task in zip(grid.flat, tasks, strict=False):
            curve = [(tokens / unit, scored[task]) for tokens, scored in points.items() if task in scored]
            _draw_task(axes, task, curve, unit)
        for axes in grid.flat[len(tasks) :]:
            axes.set_axis_off()
        for axes in grid[-1]:
            axes.set_xlabel(f'training tokens{name}')
        for axes in grid[:, 0]:
            axes.set_ylabel('score (%)')
        handles, labels = grid[0, 0].get_legend_handles_labels()
        ncols = len(labels) if columns > 2 else 1
        figure.legend(handles, labels, loc='outside upper center', ncols=ncols, frameon=False)
        figure.savefig(path, dpi=200)
        plt.close(figure)


def _draw_task(axes, task: str, curve: Sequence[tuple[float, Score]], unit: float) -> None:
    """Draws measured points with standard errors, Pythia-1.4B's line and TinyLlama's points up to as many tokens."""
    tokens, values = zip(*curve, strict=True)
    baseline = published.FIGURE_2_BASELINE
    style = {'color': '0.45', 'linestyle': '--', 'linewidth': 1}
    axes.axhline(_published(baseline, task), label=f'{baseline} (published)', **style)
    theirs = [(at * 1e9 / unit, _published(name, task)) for name, at in published.TOKENS.items()]
    theirs = [point for point in theirs if point[0] <= 1.1 * max(tokens)]
    if theirs:
        style = {'color': 'tab:orange', 'marker': 'x', 'markersize': 4, 'linestyle': ':', 'linewidth': 1}
        axes.plot(*zip(*theirs, strict=True), label='TinyLlama (published)', **style)
    means, stderrs = [score.value for score in values], [score.stderr or 0.0 for score in values]
    style = {'color': 'tab:blue', 'marker': 'o', 'markersize': 3.5, 'linewidth': 1.2, 'capsize': 2}
    axes.errorbar(tokens, means, yerr=stderrs, label='measured (± standard error)', **style)
    axes.set_title(_TITLES[task])
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25, linewidth=0.5)


def _published(model: str, task: str) -> float:
    row = published.scores(2, model)
    return sum(row.values()) / len(row) if task == AVERAGE else row[task]
