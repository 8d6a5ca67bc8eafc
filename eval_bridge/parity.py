"""Compares the answers of two implementations of one model, before a number of either is believed.

Meant for our model and lm-eval's `hf` model on its export: the same weights, tasks and requests.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tinyllama_jax import errors

BOUND = 1e-3  # nats; the largest difference of a float32 log-likelihood that passes


@dataclasses.dataclass(frozen=True)
class Difference:
    """A question for which the two implementations choose different answers.

    `gap` is the lead of our choice over theirs in our log-likelihoods (nats, normalised as the metric is).
    """

    task: str
    doc_id: int
    ours: int
    theirs: int
    gap: float


def compare(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parity report of two results of `evaluate` with samples, as plain values for JSON.

    Raises RunError if the two were not asked the same requests.
    """
    largest, at, loglikelihoods, texts, differing_texts = 0.0, None, 0, 0, 0
    choices: list[Difference] = []
    for task, sample, other in _pairs(ours, theirs):
        a, b = _answers(sample), _answers(other)
        if isinstance(a[0], str):
            texts += len(a)
            differing_texts += sum(one != another for one, another in zip(a, b, strict=True))
            continue
        loglikelihoods += len(a)
        differences = np.nan_to_num(np.abs(np.subtract(a, b)), nan=np.inf)
        if at is None or differences.max() > largest:
            largest, at = float(differences.max()), [task, sample['doc_id'], int(differences.argmax())]
        if len(a) > 1:
            choices += _differing_choices(task, sample, a, b)
    return {
        'max_loglikelihood_difference': largest,
        'at': at,
        'bound': BOUND,
        'holds': largest <= BOUND,
        'loglikelihoods': loglikelihoods,
        'differing_choices': [dataclasses.asdict(choice) for choice in choices],
        'texts': texts,
        'differing_texts': differing_texts,
    }


def _pairs(ours, theirs):
    """Yields (task, our sample, their sample of the same document and filter)."""
    for task, samples in ours['samples'].items():
        others = {(sample['doc_id'], sample['filter']): sample for sample in theirs['samples'].get(task, ())}
        for sample in samples:
            other = others.get((sample['doc_id'], sample['filter']))
            # Arguments are tuples, or lists once they went through JSON.
            if other is None or [*map(list, other['arguments'])] != [*map(list, sample['arguments'])]:
                raise errors.RunError(f'parity: {task}, document {sample["doc_id"]}: the requests differ.')
            yield task, sample, other


def _answers(sample: Mapping[str, Any]) -> list:
    """Returns the log-likelihoods, or the texts, with which a sample was answered."""
    first = [responses[0] for responses in sample['resps']]
    return [answer[0] if isinstance(answer, list | tuple) else answer for answer in first]


def _differing_choices(task: str, sample: Mapping[str, Any], ours: Sequence[float], theirs: Sequence[float]):
    """Yields how the choices by likelihood, and by likelihood per character, differ in one multiple-choice question."""
    lengths = np.array([max(len(arguments[1]), 1) for arguments in sample['arguments']])
    for scale in (np.ones(len(ours)), lengths):
        a, b = np.array(ours) / scale, np.array(theirs) / scale
        if a.argmax() != b.argmax():
            gap = float(a[a.argmax()] - a[b.argmax()])
            yield Difference(task, sample['doc_id'], int(a.argmax()), int(b.argmax()), gap)


def require(report: Mapping[str, Any]) -> None:
    """Raises RunError if the bound does not hold."""
    if not report['holds']:
        raise errors.RunError(
            f'parity: log-likelihoods differ by up to {report["max_loglikelihood_difference"]:.1e} nats, at '
            f'{report["at"]} (task, document, choice), more than {report["bound"]:.0e}; believe neither number.'
        )


def describe(report: Mapping[str, Any]) -> str:
    """Returns the report as lines of text."""
    lines = [
        f'parity: {report["loglikelihoods"]:,} log-likelihoods, largest difference '
        f'{report["max_loglikelihood_difference"]:.1e} nats (bound {report["bound"]:.0e}); '
        f'{len(report["differing_choices"])} choices differ'
    ]
    lines += [
        f'  {each["task"]}, document {each["doc_id"]}: {each["ours"]} and {each["theirs"]}, apart by {each["gap"]:.1e}'
        for each in report['differing_choices']
    ]
    if report['texts']:
        lines.append(f'parity: {report["texts"]:,} texts, {report["differing_texts"]} differ')
    return '\n'.join(lines)
