"""Runs lm-eval's tasks on a model and stamps the protocol into the result.

Uses the network only if HF_HUB_OFFLINE=0 is set.
"""

import importlib.metadata
import json
import logging
import os
import pathlib
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

os.environ.setdefault('HF_HUB_OFFLINE', '1')  # read when the libraries below are imported
os.environ.setdefault('DISABLE_MULTIPROC', '1')  # lm-eval's bootstrap would fork, which a JAX process may not

import datasets
import jinja2
import lm_eval
import lm_eval.api.group
import lm_eval.evaluator
import lm_eval.tasks
from lm_eval.utils import handle_non_serializable

from eval_bridge import protocols
from eval_bridge.harness import listing, local_data, patches, truncation
from eval_bridge.jail import gate, programs, sandbox
from tinyllama_jax import errors, files
from tinyllama_jax.report import baselines


def evaluate(
    model,
    tasks: Sequence[str],
    *,
    protocol: protocols.Protocol = protocols.PAPER,
    identity: Mapping[str, Any] | None = None,
    include_path: pathlib.Path | str | None = None,
    task_data: pathlib.Path | str | None = None,
    confirm_run_unsafe_code: bool = False,
    limit: int | None = None,
    log_samples: bool = False,
    output: pathlib.Path | str | None = None,
    manager: lm_eval.tasks.TaskManager | None = None,
) -> dict[str, Any]:
    """Runs `tasks` on `model` with lm-eval's simple_evaluate and returns its result with an entry `protocol`.

    Multiple-choice tasks also get `gold_bits_per_byte`, which improves while accuracy is still at chance.

    Args:
      model: an lm-eval model, such as lm.JaxLM, opened as the protocol says.
      tasks: names of tasks, groups or tags.
      protocol: decides the number of shots of each task.
      identity: what identifies the model; added to `protocol`.
      include_path: a folder with the user's own task files.
      task_data: a folder with the tasks' data (local_data.py); None: the hub's cache, or the hub.
      confirm_run_unsafe_code: run the programs that the model writes, in jails (sandbox.py).
      limit: take only the first `limit` examples of each task.
      log_samples: keep every example with its log-likelihoods under `samples`.
      output: a JSON file to write (`write`).
      manager: the result of `listing.task_manager(tasks, include_path)`, if the caller has it.

    Raises UsageError for unknown tasks, for data that is missing, malformed or unreadable, and as `check_tasks` does.
    """
    manager = manager or listing.task_manager(tasks, include_path)
    declared = check_tasks(tasks, manager, task_data=task_data, confirm_run_unsafe_code=confirm_run_unsafe_code)
    without_training_split = _shots_from_validation(tasks, manager, protocol, task_data)
    data_files: dict[str, Any] = {}
    options = {'task_manager': manager, 'limit': limit, 'confirm_run_unsafe_code': confirm_run_unsafe_code}
    with (
        local_data.loading(declared, include_path, task_data, data_files),
        patches.replaced(lm_eval.evaluator, 'evaluate', _contained(lm_eval.evaluator.evaluate, declared)),
    ):
        result = _run_tasks(model, tasks, protocol, **options)
    truncated = truncation.count(model, result['samples'])
    if cut := ', '.join(f'{count:,} of {task}' for task, count in (truncated or {}).items() if count):
        cause = f'requests were longer than the model reads ({model.max_length} tokens) and were cut on the left'
        print(f'evaluate: {cause}: {cut}.', file=sys.stderr)
    if not log_samples:
        del result['samples']
    result['protocol'] = {
        'name': protocol.name,
        'num_fewshot': result['n-shot'],
        'task_versions': result['versions'],
        'harness_version': importlib.metadata.version('lm_eval'),
        'limit': limit,
        'truncated_requests': truncated,
        **({'task_data': data_files, 'shots_from_validation': without_training_split} if task_data else {}),
        **(identity or {}),
    }
    if output is not None:
        write(pathlib.Path(output), result)
    return result


def _run_tasks(model, tasks: Sequence[str], protocol: protocols.Protocol, **options) -> dict[str, Any]:
    """Returns the merged results of one simple_evaluate for each number of shots."""
    logging.getLogger('lm_eval').setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    by_shots = defaultdict(list)
    for task in dict.fromkeys(tasks):
        by_shots[protocol.num_fewshot(task)].append(task)
    result: dict[str, Any] = {}
    for shots, names in by_shots.items():
        try:
            with (
                patches.replaced(lm_eval.evaluator, 'add_env_info', lambda result: None),  # a page that takes seconds
                patches.refusing(),
                patches.scoring_gold(),
                patches.saturating(),
                patches.fitting(model),
            ):
                part = lm_eval.evaluator.simple_evaluate(
                    model=model, tasks=names, num_fewshot=shots, log_samples=True, **options
                )
        except ImportError as error:  # of a package that a task needs only now
            raise errors.UsageError(
                f'one of the tasks {", ".join(names)} needs the package {error.name}, which cannot be imported '
                f'({errors.first_line(error)}); install it, or leave the task out.'
            ) from error
        except jinja2.UndefinedError as error:
            raise errors.UsageError(
                f"an example in the data of {', '.join(names)} does not fit its task's template: {error}."
            ) from error
        except UnicodeDecodeError as error:  # in the middle of a file, which is decoded only as it is read
            raise errors.UsageError(f'the data of {", ".join(names)} is not valid UTF-8: {error}.') from error
        for key, value in part.items():
            if isinstance(value, dict):
                result.setdefault(key, {}).update(value)
            else:
                result.setdefault(key, value)
    for task, samples in result['samples'].items():  # lm-eval has no standard error for a ratio of sums
        scored = [sample[patches.GOLD] for sample in samples if patches.GOLD in sample]
        if scored:
            result['results'][task][f'{patches.GOLD}_stderr,none'] = baselines.bits_per_byte(scored)[1]
    return result


def write(path: pathlib.Path, result: dict[str, Any]) -> None:
    """Writes a result as JSON; the file appears only when it is complete. Raises RunError if it can't be written."""
    text = json.dumps(result, indent=2, default=handle_non_serializable, ensure_ascii=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, text + '\n')
    except OSError as error:
        raise errors.RunError(f'{path} could not be written: {error.strerror}.') from error


def check_tasks(
    tasks: Sequence[str],
    manager: lm_eval.tasks.TaskManager,
    *,
    task_data: pathlib.Path | str | None = None,
    confirm_run_unsafe_code: bool = False,
) -> list[listing.Declared]:
    """Checks, before a model is opened, that `tasks` can run and are allowed to; returns what lm-eval makes of them.

    Raises UsageError for a task whose functions cannot be imported or whose metrics nobody has, for data that
    `task_data` lacks, and for a task that runs programs if the user did not confirm it, if no jail can be made, or if
    it might run them without one.
    """
    with gate.owning_threads():
        declared = listing.declared(tasks, manager, resolve=True)
    for task in declared:
        if fault := programs.fault(task.config):
            raise errors.UsageError(
                f'the task {task.name} runs programs of the model outside our jail, or may: {fault}; leave it out.'
            )
    unsafe = programs.running(declared)
    if unsafe and not confirm_run_unsafe_code:
        raise errors.UsageError(
            f'{", ".join(unsafe)}: these tasks run programs that the model wrote; give --confirm_run_unsafe_code to '
            'have them run in a jail, or leave these tasks out.'
        )
    for task in declared:
        if part := listing.unknown(task.config):
            raise errors.UsageError(
                f'the task {task.name}: there is no {part} here; correct its file, leave the task out, or set '
                'HF_HUB_OFFLINE=0 to download what the hub has.'
            )
    if unsafe:
        sandbox.require()
    if task_data:
        local_data.require_files(task_data, {task.name: task.config for task in declared})
    return declared


def _contained(original: Callable, declared: Sequence[listing.Declared]) -> Callable:
    """Returns lm-eval's `evaluate` in such a way that programs of the model run in our jail or not at all."""
    jailed = programs.running(declared)

    def evaluate(lm, task_dict, **options):
        for name, task in task_dict['tasks'].items():
            if getattr(task, 'UNSAFE_CODE', False) and name not in jailed:  # its constructor said so
                raise errors.UsageError(f'the task {name} runs programs of the model outside our jail; leave it out.')
        with gate.watching(lm, ', '.join(task_dict['tasks'])) as asked:
            return original(lm=asked, task_dict=task_dict, **options)

    return evaluate


def _shots_from_validation(tasks, manager, protocol: protocols.Protocol, task_data) -> list[str]:
    """Returns and prints the tasks whose few-shot examples are from validation: their training split is missing."""
    if not task_data:
        return []
    affected = []
    for name in tasks:
        for task in listing.declared([name], manager):
            own, shots = task.config.get('num_fewshot'), protocol.num_fewshot(name)
            # lm-eval leaves a task alone whose file says 0.
            shots = own if shots is None or own == 0 else shots
            if shots and local_data.from_validation(task.config, task_data):
                affected.append(task.name)
    if affected:
        missing = f'no training split of {", ".join(affected)} in {task_data}'
        print(f'evaluate: {missing}: few-shot examples are from validation.', file=sys.stderr)
    return affected
