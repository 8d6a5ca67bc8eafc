"""Whether two models that should be the same one answer alike, before a number of either is believed.

Made for our model and lm-eval's `hf` model on its export: the same weights, tasks and requests.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tinyllama_jax import errors

BOUND = 1e-3  # nats, of a log-likelihood in float32


@dataclasses.dataclass(frozen=True)
class Difference:
    """A question that the two answer differently; `gap` (nats, normalised as the metric is) decided it."""

    task: str
    doc_id: int
    ours: int
    theirs: int
    gap: float


def compare(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The parity report of two results of `evaluate` with samples, as plain values for JSON.

    Raises RunError where the two were not asked the same.
    """
    largest, where, requests, texts, different_texts = 0.0, None, 0, 0, 0
    choices: list[Difference] = []
    for task, sample, other in _pairs(ours, theirs):
        mine, others = (_answers(each) for each in (sample, other))
        if isinstance(mine[0], str):
            texts += len(mine)
            different_texts += sum(a != b for a, b in zip(mine, others, strict=True))
            continue
        requests += len(mine)
        differences = np.nan_to_num(np.abs(np.subtract(mine, others)), nan=np.inf)
        if where is None or differences.max() > largest:
            largest, where = float(differences.max()), [task, sample['doc_id'], int(differences.argmax())]
        if len(mine) > 1:
            choices += _differing(task, sample, mine, others)
    return {
        'max_loglikelihood_difference': largest, 'at': where, 'bound': BOUND, 'holds': largest <= BOUND,
        'loglikelihoods': requests, 'differing_choices': [dataclasses.asdict(each) for each in choices],
        'texts': texts, 'differing_texts': different_texts,
    }  # fmt: skip


def _pairs(ours, theirs):
    for task, samples in ours['samples'].items():
        others = {(sample['doc_id'], sample['filter']): sample for sample in theirs['samples'].get(task, ())}
        for sample in samples:
            other = others.get((sample['doc_id'], sample['filter']))
            if other is None or _asked(other) != _asked(sample):
                raise errors.RunError(f'parity: {task}, document {sample["doc_id"]}: the two were not asked the same.')
            yield task, sample, other


def _asked(sample: Mapping[str, Any]) -> list:
    return [list(arguments) for arguments in sample['arguments']]


def _answers(sample: Mapping[str, Any]) -> list:
    """The log-likelihoods, or the texts, that a sample got."""
    first = [responses[0] for responses in sample['resps']]
    return [answer[0] if isinstance(answer, list | tuple) else answer for answer in first]


def _differing(task: str, sample: Mapping[str, Any], mine: Sequence[float], others: Sequence[float]):
    """The differing choice by likelihood, and by likelihood a character, of one multiple-choice question."""
    lengths = np.array([max(len(arguments[1]), 1) for arguments in sample['arguments']])
    for scale in (np.ones(len(mine)), lengths):
        a, b = np.array(mine) / scale, np.array(others) / scale
        if a.argmax() != b.argmax():
            gap = float(a[a.argmax()] - a[b.argmax()])
            yield Difference(task, sample['doc_id'], int(a.argmax()), int(b.argmax()), gap)


def require(report: Mapping[str, Any]) -> None:
    """Raises RunError where the bound does not hold."""
    if not report['holds']:
        raise errors.RunError(
            f'parity: log-likelihoods differ by up to {report["max_loglikelihood_difference"]:.1e} nats, at '
            f'{report["at"]} (task, document, choice), more than {report["bound"]:.0e}; believe neither number.'
        )


def describe(report: Mapping[str, Any]) -> str:
    """The report in words."""
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
