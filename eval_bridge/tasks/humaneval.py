"""Scores HumanEval: runs each program with its tests in a jail (eval_bridge/jail/).

humaneval.yaml and instructeval_humaneval.yaml name these functions, whose signatures are lm-eval's.
"""

from collections.abc import Sequence
from typing import Any

from eval_bridge.jail import sandbox


def judge(responses: Sequence[Sequence[str]], docs: Sequence[dict[str, Any]]) -> list[list[dict[str, str]]]:
    """Returns for each document its completions' programs with their outcomes (passed, failed, timed out)."""
    programs = [
        [f'{doc["prompt"]}{text}\n{doc["test"]}\ncheck({doc["entry_point"]})' for text in texts]
        for texts, doc in zip(responses, docs, strict=True)
    ]
    outcomes = iter(sandbox.run([program for group in programs for program in group]))
    return [[{'program': program, 'outcome': next(outcomes)} for program in group] for group in programs]


def judge_first_block(responses: Sequence[Sequence[str]], docs: Sequence[dict[str, Any]]) -> list[list[dict[str, str]]]:
    """Returns what `judge` does for the first block of each completion alone, as InstructEval does."""
    return judge([[first_block(text) for text in texts] for texts in responses], docs)


def first_block(completion: str) -> str:
    """Returns the lines before the first blank one, with odd indents made even by a space, as InstructEval does."""
    lines = [' ' * ((len(line) - len(line.lstrip(' '))) % 2) + line for line in completion.split('\n')]
    return '\n'.join(lines).lstrip('\n').split('\n\n')[0]


def pass_at_1(doc: dict[str, Any], results: Sequence[Sequence[dict[str, str]]]) -> dict[str, float]:
    """Returns pass@1 from `judge`'s outcomes: 1 if the first completion passed, else 0."""
    return {'pass@1': float(results[0][0]['outcome'] == sandbox.PASSED)}
