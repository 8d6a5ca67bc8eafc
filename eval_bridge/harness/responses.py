"""Keeps a model's answers in a file, so that an interrupted evaluation resumes where it stopped.

Each checkpoint, tokenizer and protocol has a file of JSON lines, [hash of a request, answer]. The hash covers the
text of the request, so a task that changed is asked again.
"""

import hashlib
import json
import pathlib
from typing import Any

from lm_eval.api.model import LM
from lm_eval.models import utils

from tinyllama_jax import errors


def path(folder: pathlib.Path, identity: dict[str, Any]) -> pathlib.Path:
    """Returns the file in `folder` for the answers of the model and protocol that `identity` describes."""
    return folder / f'{_hash(identity)[:16]}.jsonl'


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Remembering(LM):
    """An lm-eval model that asks `model` only for answers that the file at `path` does not hold yet.

    An answer is kept as soon as the model passes it to lm-eval's cache hook, at the latest when all requests of
    its kind are answered. Sampled texts are asked for each time. Raises RunError if the file cannot be read or
    written.
    """

    def __init__(self, model: LM, path: pathlib.Path):
        super().__init__()
        self.model, self.path = model, path
        self.remembered = 0  # requests answered from the file
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._known = _read(path)
            self._file = path.open('a', encoding='utf-8')
        except OSError as error:
            raise errors.RunError(f'{path}, the kept answers, cannot be used: {error.strerror}.') from None
        model.set_cache_hook(self)  # pyrefly: ignore  # lm-eval calls only its add_partial

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def loglikelihood(self, requests, **options) -> list[tuple[float, bool]]:
        """Returns (log-likelihood, whether greedy) of each request, from the file or the model."""
        return [tuple(answer) for answer in self._answers('loglikelihood', requests, options)]

    def loglikelihood_rolling(self, requests, **options) -> list[float]:
        """Returns the log-likelihood of each request's text, from the file or the model."""
        return self._answers('loglikelihood_rolling', requests, options)

    def generate_until(self, requests, **options) -> list[str]:
        """Returns the text that answers each request, from the file or the model."""
        return self._answers('generate_until', requests, options)

    def _answers(self, kind: str, requests, options) -> list:
        keys = [_key(kind, request.args) for request in requests]
        new = [number for number, key in enumerate(keys) if key not in self._known]
        self.remembered += len(requests) - len(new)
        asked = [requests[number] for number in new]
        answers = dict(zip(new, getattr(self.model, kind)(asked, **options) if asked else (), strict=True))
        for number, answer in answers.items():
            self.add_partial(kind, requests[number].args, answer)
        return [answers[number] if number in answers else self._known[str(key)] for number, key in enumerate(keys)]

    def add_partial(self, kind: str, arguments, answer) -> None:
        """Keeps an answer; lm-eval's models call this as soon as they have it."""
        key = _key(kind, arguments)
        if key is None or key in self._known:
            return
        self._known[key] = answer
        try:
            self._file.write(json.dumps([key, answer]) + '\n')
            self._file.flush()
        except OSError as error:
            raise errors.RunError(f'{self.path}, the kept answers, cannot be written: {error.strerror}.') from None


def _key(kind: str, arguments) -> str | None:
    """Returns what identifies a request; None for one whose answer is sampled."""
    if kind == 'generate_until' and utils.normalize_gen_kwargs(arguments[1]).get('do_sample'):
        return None
    return _hash([kind, *arguments])


def _read(path: pathlib.Path) -> dict[str, Any]:
    """Returns the answers in a file, and removes an incomplete last line from it."""
    known, complete = {}, 0
    if not path.exists():
        return known
    with path.open('rb') as file:
        for line in file:
            try:
                key, answer = json.loads(line)
            except (TypeError, ValueError):  # not a pair, or not JSON
                break
            if not line.endswith(b'\n'):
                break
            known[key] = answer
            complete += len(line)
    if complete < path.stat().st_size:
        with path.open('r+b') as file:
            file.truncate(complete)
    return known
