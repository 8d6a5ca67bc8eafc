"""An lm-eval model with scripted answers, to test what tasks ask and how they score."""

from collections.abc import Callable

from lm_eval.api.model import LM


class Scripted(LM):
    """Generates `answer(prompt)` and prefers shorter continuations; `asked` has all requests. A byte is a token."""

    def __init__(self, answer: Callable[[str], str] = lambda prompt: '', max_length: int = 10_000):
        super().__init__()
        self.answer, self.max_length, self.asked = answer, max_length, []

    def tok_encode(self, text: str) -> list[int]:
        return list(text.encode())

    def loglikelihood(self, requests, **_):
        self.asked += [request.args for request in requests]
        return [(-float(len(request.args[1])), False) for request in requests]

    def loglikelihood_rolling(self, requests, **_):
        raise NotImplementedError

    def generate_until(self, requests, **_):
        self.asked += [request.args for request in requests]
        return [self.answer(request.args[0]) for request in requests]
