"""Kept answers: what is asked again, how an incomplete file is read, what is never kept."""

import contextlib
import types

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from eval_bridge.harness import responses
from tinyllama_jax import errors


class _Counting(LM):
    """Answers with a request's length, passes each answer to the hook at once, and can be interrupted."""

    max_length = 77

    def __init__(self, stop_after=None):
        super().__init__()
        self.asked, self.stop_after = [], stop_after

    def _each(self, kind, requests, answer):
        for request in requests:
            if len(self.asked) == self.stop_after:
                raise KeyboardInterrupt
            self.asked.append(request.args)
            self.cache_hook.add_partial(kind, request.args, answer(request.args))
        return [answer(request.args) for request in requests]

    def loglikelihood(self, requests, **_):
        return self._each('loglikelihood', requests, lambda args: (-float(len(args[1])), False))

    def loglikelihood_rolling(self, requests, **_):
        return self._each('loglikelihood_rolling', requests, lambda args: -float(len(args[0])))

    def generate_until(self, requests, **_):
        return self._each('generate_until', requests, lambda args: args[0].upper())


def _requests(kind, *arguments):
    return [Instance(kind, {}, pair, number) for number, pair in enumerate(arguments)]


@pytest.fixture
def remembering():
    """Returns a function that makes a Remembering, whose file is closed at the end of the test."""
    with contextlib.ExitStack() as stack:
        yield lambda model, path: stack.enter_context(contextlib.closing(responses.Remembering(model, path)))


PAIRS = _requests('loglikelihood', ('a', 'b'), ('a', 'cc'), ('d', 'b'), ('a', 'b'))


def test_an_interrupted_evaluation_resumes(remembering, tmp_path):
    path = tmp_path / 'responses' / 'x.jsonl'
    broken = remembering(_Counting(stop_after=2), path)
    with pytest.raises(KeyboardInterrupt):
        broken.loglikelihood(PAIRS)
    broken.close()
    model = _Counting()
    again = remembering(model, path)
    assert again.loglikelihood(PAIRS) == [(-1.0, False), (-2.0, False), (-1.0, False), (-1.0, False)]
    assert model.asked == [('d', 'b')] and again.remembered == 3
    assert again.max_length == 77


def test_an_incomplete_line_is_asked_again(remembering, tmp_path):
    path = tmp_path / 'x.jsonl'
    complete = remembering(_Counting(), path)
    assert complete.loglikelihood_rolling(_requests('loglikelihood_rolling', ('abc',), ('de',))) == [-3.0, -2.0]
    complete.close()
    lines = path.read_bytes().splitlines(keepends=True)
    for line in (lines[1][:-3], b'5\n', b'["a"]\n'):
        path.write_bytes(lines[0] + line)
        model = _Counting()
        again = remembering(model, path)
        assert again.loglikelihood_rolling(_requests('loglikelihood_rolling', ('abc',), ('de',))) == [-3.0, -2.0]
        assert model.asked == [('de',)]
        again.close()
        assert path.read_bytes().splitlines(keepends=True) == lines


def test_other_kinds_and_arguments_are_other_requests(remembering, tmp_path):
    model = _Counting()
    kept = remembering(model, tmp_path / 'x.jsonl')
    greedy = _requests('generate_until', ('a', {'until': ['\n']}), ('a', {'until': []}))
    assert kept.generate_until(greedy) == ['A', 'A']
    assert kept.generate_until(greedy) == ['A', 'A']
    assert len(model.asked) == 2


def test_sampled_texts_are_asked_for_each_time(remembering, tmp_path):
    model = _Counting()
    kept = remembering(model, tmp_path / 'x.jsonl')
    options = {'until': [], 'do_sample': True}, {'until': [], 'temperature': 0.5}  # the same for lm-eval
    sampled = _requests('generate_until', *(('a', each) for each in options))
    assert kept.generate_until(sampled) == kept.generate_until(sampled) == ['A', 'A']
    assert len(model.asked) == 4 and not (tmp_path / 'x.jsonl').read_text()


def test_another_model_or_protocol_has_another_file(tmp_path):
    identity = {'weights_sha256': 'a', 'protocol': 'paper'}
    others = [identity | {'protocol': 'current'}, identity | {'weights_sha256': 'b'}]
    assert len({responses.path(tmp_path, each) for each in (identity, *others)}) == 3
    assert responses.path(tmp_path, dict(reversed(identity.items()))) == responses.path(tmp_path, identity)


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(errors.RunError, match='kept answers, cannot be used'):
        responses.Remembering(types.SimpleNamespace(), tmp_path / 'file' / 'x.jsonl')
