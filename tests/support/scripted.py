"""An lm-eval model with scripted answers, and a plain task, to test what tasks ask and how they score."""

from collections.abc import Callable

from lm_eval.api.model import LM

# A task file without its name: the rows of data.jsonl beside it, with a question q and an answer a.
PLAIN = {
    'dataset_path': 'json', 'dataset_kwargs': {'data_files': {'test': 'data.jsonl'}}, 'test_split': 'test',
    'output_type': 'generate_until', 'doc_to_text': 'q', 'doc_to_target': 'a',
    'metric_list': [{'metric': 'exact_match', 'aggregation': 'mean', 'higher_is_better': True}],
}  # fmt: skip


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
