"""The parity report, on samples written by hand."""

import pytest

from eval_bridge import parity
from tinyllama_jax import errors


def _result(first, second, *, texts=('a',), context='ctx'):
    """Returns a result of two questions, with the choices 'aa' and 'b' and these log-likelihoods, and of texts."""
    arguments = [(context, 'aa'), (context, 'b')]
    questions = [
        {'doc_id': number, 'filter': 'none', 'arguments': arguments, 'resps': [[(value, False)] for value in values]}
        for number, values in enumerate((first, second))
    ]
    written = [
        {'doc_id': number, 'filter': 'none', 'arguments': [('say', {'until': []})], 'resps': [[text]]}
        for number, text in enumerate(texts)
    ]
    return {'samples': {'choose': questions, 'write': written}}


def test_equal_answers_hold():
    result = _result((-1.0, -2.0), (-3.0, -1.0))
    report = parity.compare(result, result)
    assert report['holds'] and report['max_loglikelihood_difference'] == 0
    assert (report['loglikelihoods'], report['differing_choices'], report['texts']) == (4, [], 1)
    parity.require(report)
    assert '4 log-likelihoods, largest difference 0.0e+00' in parity.describe(report)


def test_the_largest_difference_is_found_and_refused():
    report = parity.compare(_result((-1.0, -2.0), (-3.0, -1.0)), _result((-1.0, -2.0), (-3.0, -1.5), texts=('b',)))
    assert (report['max_loglikelihood_difference'], report['at']) == (0.5, ['choose', 1, 1])
    assert report['differing_texts'] == 1
    with pytest.raises(errors.RunError, match=r"5\.0e-01 nats, at \['choose', 1, 1\]"):
        parity.require(report)


def test_a_differing_choice_comes_with_the_gap_that_decided_it():
    ours, theirs = _result((-1.0, -1.0004), (-3.0, -1.0)), _result((-1.0004, -1.0), (-3.0, -1.0))
    report = parity.compare(ours, theirs)
    assert report['holds']
    (choice,) = report['differing_choices']  # by likelihood only: a character, 'aa' has half of it, far from 'b'
    assert choice == {'task': 'choose', 'doc_id': 0, 'ours': 0, 'theirs': 1, 'gap': pytest.approx(0.0004)}
    assert 'document 0: 0 and 1, apart by 4.0e-04' in parity.describe(report)


def test_other_requests_are_not_compared():
    result = _result((-1.0, -2.0), (-3.0, -1.0))
    with pytest.raises(errors.RunError, match='choose, document 0: the requests differ'):
        parity.compare(result, _result((-1.0, -2.0), (-3.0, -1.0), context='other'))
