"""A plan as an HTML page: tables, and a bar chart of its GPU-hours beside published ones."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt

from tinyllama_jax import files
from tinyllama_jax.plan.memory import GIB
from tinyllama_jax.report import page


def write(plan: Mapping[str, Any], folder: pathlib.Path) -> pathlib.Path:
    """Writes FOLDER/plan.json, gpu_hours.png and index.html; returns the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    files.write_atomically(folder / 'plan.json', json.dumps(plan, indent=2) + '\n')
    hours = plan['gpu_hours_per_300b_tokens']
    names = list(hours)[::-1]
    colours = ['tab:blue' if name == 'this plan' else '0.7' for name in names]
    figure, axes = plt.subplots(figsize=(9, 0.6 * len(hours) + 1), layout='constrained')
    axes.bar_label(axes.barh(names, [hours[name] for name in names], color=colours), fmt='{:,.0f}', padding=3)
    axes.set_xlabel('GPU-hours (this plan: estimated; the others: published, on A100)')
    axes.margins(x=0.12)
    figure.savefig(folder / 'gpu_hours.png', dpi=110)
    plt.close(figure)
    exchanges = [('kind', 'mesh axes', 'type', 'times', 'GB')]
    for row in plan['collectives']:
        times, size = f'{row["count_per_step"]:,}', f'{row["bytes_per_step"] / 1e9:.3f}'
        exchanges.append((row['kind'], row['axis'], row['dtype'], times, size))
    parts = [
        page.heading(f'{plan["devices"]} x {plan["target"]}', 1),
        page.table(_facts(plan)),
        page.picture('GPU-hours per 300 B tokens', folder / 'gpu_hours.png'),
        page.heading('Memory of a GPU at the peak (GiB)'),
        page.table([(part, f'{size / GIB:.2f}') for part, size in plan['memory'].items() if size]),
        page.heading('Sent by a GPU in a step'),
        page.table(exchanges),
        page.heading('Time of a step (seconds, estimated)'),
        page.table([(kind, f'{seconds:.3f}') for kind, seconds in plan['seconds_per_step'].items()]),
    ]
    files.write_atomically(folder / 'index.html', page.page('plan', parts))
    return folder / 'index.html'


def _facts(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ('fits', 'yes' if plan['fits'] else 'NO'),
        ('memory a GPU', f'{plan["peak_bytes_per_gpu"] / GIB:.2f} of {plan["capacity_bytes"] / GIB:.2f} GiB'),
        ('mesh', ' x '.join(f'{axis} {size}' for axis, size in plan['mesh'].items())),
        ('parameters', f'{plan["parameters"]:,}'),
        ('tokens a step', f'{plan["tokens_per_step"]:,}'),
        ('sequences a GPU', f'{plan["accumulation_steps"]} x {plan["micro_batch_size"]}'),
        ('remat', plan['remat']),
        ('kernels', ', '.join(f'{op} {impl}' for op, impl in plan['kernels'].items())),
        ('GFLOP a token', ', '.join(f'{n / 1e9:.3f} ({name})' for name, n in plan['flops_per_token'].items())),
        ('tokens a second, estimated', f'{plan["estimated_tokens_per_second"]:,.0f}'),
        ('days, estimated', f'{plan["estimated_days"]:,.1f}'),
        ('GPU-hours, estimated', f'{plan["estimated_gpu_hours"]:,.0f}'),
    ]
