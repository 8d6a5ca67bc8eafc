"""JaxLM: log-likelihoods equal the plain forward pass; truncation, rolling windows, few programs, stop sequences."""

import types

import jax
import numpy as np
import pytest
from lm_eval.api.instance import Instance

from eval_bridge import lm
from eval_bridge.hf import convert
from tests.support import tiny_export
from tinyllama_jax import errors, model, sharding
from tinyllama_jax.config import MeshConfig
from tinyllama_jax.tokenizer import spm

CONFIG = tiny_export.MODEL
PAIRS = [
    ('def forward(self, x):\n    return', ' x'),
    ('The learning rate ', 'decays'),  # the space belongs to the continuation
    ('', 'The tokenizer'),
    ('a', ' b c d e f g'),
    ('import numpy as np\n' * 20, ' print(np.zeros(3))'),  # longer than the model reads
]


@pytest.fixture(scope='module')
def encoder(tmp_path_factory):
    return spm.SentencePieceTokenizer(
        tiny_export.write_tokenizer(tmp_path_factory.mktemp('lm') / 'tokenizer.model'), adds_bos=True
    )


@pytest.fixture(scope='module')
def jax_lm(encoder):
    return lm.JaxLM(tiny_export.params(), CONFIG, encoder)


def _requests(kind, arguments):
    return [Instance(kind, {}, pair, index) for index, pair in enumerate(arguments)]


_forward = jax.jit(model.forward, static_argnames='config')


def _expected(context, continuation):
    """Returns the sum of log-probabilities and the greediness of a continuation that has a row to itself."""
    tokens = (context + continuation)[-(CONFIG.seq_len + 1) :]
    padded = np.zeros((1, CONFIG.seq_len), np.int32)
    padded[0, : len(tokens) - 1] = tokens[:-1]
    logprobs_TV = np.asarray(jax.nn.log_softmax(_forward(tiny_export.params(), padded, config=CONFIG)[0]), np.float64)
    positions = range(len(tokens) - 1 - len(continuation), len(tokens) - 1)
    total = sum(logprobs_TV[position, tokens[position + 1]] for position in positions)
    return total, all(logprobs_TV[position].argmax() == tokens[position + 1] for position in positions)


def _ids(encoder, context, continuation):
    """Returns a pair's ids as the harness encodes them: trailing spaces move, both are encoded together and split."""
    kept = context.rstrip()
    if not kept:
        return [encoder.bos_id], encoder.encode(continuation)
    head = encoder.encode(kept)
    return head, encoder.encode(context + continuation)[len(head) :]


def test_log_likelihoods_equal_the_forward_pass(jax_lm, encoder):
    results = jax_lm.loglikelihood(_requests('loglikelihood', PAIRS * 15))
    np.testing.assert_allclose(results[:5], results[-5:], atol=1e-5)
    for (context, continuation), (logprob, greedy) in zip(PAIRS, results, strict=False):
        expected = _expected(*_ids(encoder, context, continuation))
        assert (logprob, greedy) == (pytest.approx(expected[0], abs=1e-4), expected[1])


def test_greedy_continuations_are_recognised(jax_lm, encoder):
    context = encoder.encode(PAIRS[0][0])
    first = _next(context)
    second = _next([*context, first])
    requests = [(None, context, [first, second]), (None, context, [first, (second + 1) % 400])]
    assert [greedy for _, greedy in jax_lm._loglikelihood_tokens(requests)] == [True, False]


def _next(ids):
    padded = np.zeros((1, CONFIG.seq_len), np.int32)
    padded[0, : len(ids)] = ids
    return int(_forward(tiny_export.params(), padded, config=CONFIG)[0, len(ids) - 1].argmax())


def test_requests_of_many_lengths_share_a_program(encoder):
    lm._score._clear_cache()
    short = lm.JaxLM(tiny_export.params(), CONFIG, encoder)
    short._loglikelihood_tokens([(None, [5] * length, [7]) for length in range(1, 40)])
    assert lm._score._cache_size() == 1


def test_continuations_of_a_context_are_scored_as_if_alone(jax_lm):
    context = [9, 30, 31, 8]
    requests = [(None, context, ids) for ids in ([40], [41, 42, 43], [40, 44], [41])]
    together = jax_lm._loglikelihood_tokens([*requests, (None, [9, 30, 31, 7], [41, 42, 43])])
    for (_, context, continuation), (logprob, greedy) in zip(requests, together, strict=False):
        expected = _expected(context, continuation)
        assert (logprob, greedy) == (pytest.approx(expected[0], abs=1e-4), expected[1])
    assert together[1][0] != together[-1][0]


def test_bos_comes_first_when_the_protocol_adds_it(jax_lm, encoder):
    with_bos = lm.JaxLM(tiny_export.params(), CONFIG, encoder, add_bos=True)
    assert with_bos.tok_encode('x') == [encoder.bos_id, *jax_lm.tok_encode('x')]
    assert with_bos.tok_encode('x', add_special_tokens=False) == encoder.encode('x')
    ((logprob, _),) = with_bos.loglikelihood(_requests('loglikelihood', PAIRS[:1]))
    context, continuation = _ids(encoder, *PAIRS[0])
    assert logprob == pytest.approx(_expected([encoder.bos_id, *context], continuation)[0], abs=1e-4)


def test_rolling_windows_score_every_token_once(jax_lm, encoder):
    texts = [('short',), (tiny_export.text()[:400],), ('',)]
    logprobs = jax_lm.loglikelihood_rolling(_requests('loglikelihood_rolling', texts))
    ids = encoder.encode(texts[1][0])
    assert len(ids) > 2 * CONFIG.seq_len, 'the text must need several windows'
    stream, S, expected = [encoder.bos_id, *ids], CONFIG.seq_len, 0.0
    for start in range(0, len(ids), S):
        stop = min(start + S, len(ids))
        context = stream[max(0, stop - S) : start + 1]
        expected += _expected(context, stream[start + 1 : stop + 1])[0]
    assert logprobs[1] == pytest.approx(expected, abs=1e-3)
    assert logprobs[2] == 0.0


def test_a_mesh_of_eight_devices_gives_the_same(jax_lm, encoder):
    if jax.device_count() < 8:
        pytest.skip('needs 8 CPU devices')
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    spread = lm.JaxLM(tiny_export.params(), CONFIG, encoder, batch_size=1, mesh=mesh)
    requests = _requests('loglikelihood', PAIRS)
    for ours, theirs in zip(jax_lm.loglikelihood(requests), spread.loglikelihood(requests), strict=True):
        assert ours == (pytest.approx(theirs[0], abs=1e-4), theirs[1])
    assert _texts(spread) == _texts(jax_lm)


def test_generation_ends_before_a_stop_sequence(jax_lm):
    def generated(**arguments):
        (text,) = jax_lm.generate_until(_requests('generate_until', [(PAIRS[0][0], {'until': [], **arguments})]))
        return text

    text = generated(max_gen_toks=20)
    assert text.startswith(generated(max_gen_toks=8).rstrip('\ufffd'))
    assert generated(max_gen_toks=20, until=['no such text', '']) == text
    stop = text[4:7]
    assert generated(max_gen_toks=20, until=stop) == text.split(stop)[0]
    assert generated(max_gen_toks=20, do_sample=False, temperature=2.0) == text


LONG = tiny_export.text()[:300]  # more tokens than the model reads
CONTEXTS = [(PAIRS[0][0], 20), ('', 9), (LONG, 20), ('import numpy as np', 20), ('a', 9), ('The tokenizer of', 20)]


def _texts(model, **options):
    asked = [(context, {'until': ['no such text'], 'max_gen_toks': count, **options}) for context, count in CONTEXTS]
    return model.generate_until(_requests('generate_until', asked), disable_tqdm=True)


def test_texts_of_a_batch_are_those_of_single_requests(encoder, jax_lm):
    kept = []
    single = lm.JaxLM(tiny_export.params(), CONFIG, encoder)
    single._generator = jax_lm._generator
    single.set_cache_hook(types.SimpleNamespace(add_partial=lambda *answer: kept.append(answer)))
    texts = _texts(single)
    asked = [(context, {'until': ['no such text'], 'max_gen_toks': count}) for context, count in CONTEXTS]
    for request, text in zip(_requests('generate_until', asked), texts, strict=True):
        assert jax_lm.generate_until([request]) == [text]
        assert ('generate_until', request.args, text) in kept
    assert len(kept) == len(asked) and len(set(texts)) == len(texts)


def test_a_repeated_request_is_sampled_again(jax_lm):
    options = {'until': [], 'max_gen_toks': 12, 'do_sample': True, 'temperature': 1.5}
    requests = _requests('generate_until', [('import', options)] * 2 + [('class', options)])
    texts = jax_lm.generate_until(requests)
    assert texts[0] != texts[1]
    assert jax_lm.generate_until(requests[1:]) == [texts[0], texts[2]]
    unlimited = _requests('generate_until', [('class', {**options, 'top_k': 0})])
    assert jax_lm.generate_until(unlimited) == texts[2:]
    of_one = _requests('generate_until', [('class', {**options, 'temperature': 1.0})])
    by_default = _requests('generate_until', [('class', {'until': [], 'max_gen_toks': 12, 'do_sample': True})])
    assert jax_lm.generate_until(by_default) == jax_lm.generate_until(of_one)


def test_requests_are_sampled_independently(encoder):
    flat = jax.tree.map(np.zeros_like, tiny_export.params())  # every token is as likely after any prompt
    options = {'until': [], 'max_gen_toks': 4, 'do_sample': True}
    texts = lm.JaxLM(flat, CONFIG, encoder).generate_until(
        _requests('generate_until', [(f'prompt {number}', options) for number in range(20)])
    )
    assert len(set(texts)) == 20


def test_texts_equal_lm_eval_s_hf_model(encoder, tmp_path):
    tiny_export.require_torch()
    huggingface = pytest.importorskip('lm_eval.models.huggingface')
    head_DV = tiny_export.params()['lm_head'].copy()
    # No <unk> and no bytes, which may not make a character: the two tokenizers decode these differently.
    head_DV[:, [0, *range(3, 259)]] = 0
    params = {**tiny_export.params(), 'lm_head': head_DV}
    convert.export(params, CONFIG, encoder.path, tmp_path / 'export')
    theirs = huggingface.HFLM(pretrained=str(tmp_path / 'export'), add_bos_token=False, batch_size=3, device='cpu')
    contexts = [pair for pair in CONTEXTS if pair[0]]  # lm-eval's hf model fails on an empty context
    asked = [(context, {'until': [' s'], 'max_gen_toks': count}) for context, count in contexts]
    texts = [
        each.generate_until(_requests('generate_until', asked)) for each in (lm.JaxLM(params, CONFIG, encoder), theirs)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == len(asked)


def test_what_does_not_fit_is_refused(jax_lm):
    with pytest.raises(errors.UsageError, match='does not fit seq_len = 48'):
        jax_lm._loglikelihood_tokens([(None, [1], [5] * 49)])
    with pytest.raises(errors.UsageError, match="an empty continuation, after 'def'"):
        jax_lm._loglikelihood_tokens([(('def', ''), [1], [])])
    with pytest.raises(errors.UsageError, match='256 new tokens'):
        jax_lm.generate_until(_requests('generate_until', [('x', {'until': ['\n']})]))
