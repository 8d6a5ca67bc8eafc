"""Generation: equal to the whole forward pass and to transformers, sampling, where it ends, what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny_export
from tinyllama_jax import errors, generate, model

CONFIG = dataclasses.replace(tiny_export.MODEL, seq_len=96)
_forward = jax.jit(model.forward, static_argnames='config')
PROMPT = [5, 17, 250, 3, 9, 30, 31]


@pytest.fixture(scope='module')
def params():
    return tiny_export.random_params(CONFIG, std=0.2)


@pytest.fixture(scope='module')
def greedy(params):
    """Fifty greedy tokens by the whole forward pass, which has no cache."""
    tokens = list(PROMPT)
    for _ in range(50):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(jnp.argmax(_forward(params, padded, config=CONFIG)[0, len(tokens) - 1])))
    return tokens[len(PROMPT) :]


def test_greedy_equals_the_forward_pass_without_a_cache(params, greedy):
    assert len(set(greedy)) > 10, 'a continuation that repeats itself would show little'
    assert generate.generate(params, CONFIG, PROMPT, max_new_tokens=50) == greedy


def test_greedy_equals_transformers(params, greedy, tmp_path):
    torch = tiny_export.require_torch()
    llama = tiny_export.transformers_llama(params, CONFIG, tmp_path).eval()
    prompt = torch.tensor([PROMPT])
    theirs = llama.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=50, pad_token_id=0)
    theirs = theirs[0, len(PROMPT) :].tolist()
    assert theirs == greedy[: len(theirs)]
    assert len(theirs) == 50 or theirs[-1] == 2  # its configuration says where texts end


def test_it_ends_after_eos_and_yields_it(params, greedy):
    eos = greedy[12]
    expected = greedy[: greedy.index(eos) + 1]
    assert generate.generate(params, CONFIG, PROMPT, max_new_tokens=50, eos_id=eos) == expected


def test_it_ends_when_seq_len_tokens_are_read(params):
    prompt = list(range(CONFIG.seq_len - 3))
    assert len(generate.generate(params, CONFIG, prompt, max_new_tokens=50)) == 4
    assert len(generate.generate(params, CONFIG, [*prompt, 1, 2, 3], max_new_tokens=50)) == 1


def test_lengths_share_programs_and_tokens_arrive_one_by_one(params):
    generate.generate(params, CONFIG, PROMPT, max_new_tokens=50)
    programs = generate._advance._cache_size()
    stream = generate.stream(params, CONFIG, PROMPT[:3], max_new_tokens=40)
    assert isinstance(next(stream), int)
    generate.generate(params, CONFIG, PROMPT[:5], max_new_tokens=41)
    assert generate._advance._cache_size() == programs


def test_sampling_is_a_function_of_the_seed(params, greedy):
    def sample(**options):
        return generate.generate(params, CONFIG, PROMPT, max_new_tokens=50, **options)[:12]

    hot = sample(temperature=1.5, seed=1)
    assert sample(temperature=1.5, seed=1) == hot
    assert sample(temperature=1.5, seed=2) != hot != greedy[:12]
    assert sample(temperature=1.5, top_k=1, seed=1) == greedy[:12]
    assert sample(temperature=1.5, top_p=1e-6, seed=1) == greedy[:12]


def _kept(probabilities, *, top_k=5, top_p=2.0):
    return np.isfinite(generate.restrict(jnp.log(jnp.array(probabilities)), top_k, top_p)).tolist()


def test_top_k_and_top_p_keep_the_likeliest():
    p = [0.1, 0.4, 0.3, 0.15, 0.05]
    assert _kept(p, top_k=2) == [False, True, True, False, False]
    assert _kept(p, top_k=9) == [True] * 5
    assert _kept(p, top_p=0.65) == [False, True, True, False, False]
    assert _kept(p, top_p=0.75) == [False, True, True, True, False]
    assert _kept(p) == [True] * 5
    # top_p looks at what top_k left: 0.4 / 0.7 = 0.57 of it is the first.
    assert _kept(p, top_k=2, top_p=0.5) == [False, True, False, False, False]


def test_samples_follow_the_model_s_distribution(params):
    logits_V = _forward(params, np.array([PROMPT]), config=CONFIG)[0, -1] / 0.7
    expected_V = jax.nn.softmax(generate.restrict(logits_V, 3, 2.0))
    drawn = [
        next(generate.stream(params, CONFIG, PROMPT, max_new_tokens=50, temperature=0.7, top_k=3, seed=seed))
        for seed in range(300)
    ]
    shares_V = np.bincount(drawn, minlength=CONFIG.vocab_size) / len(drawn)
    assert np.count_nonzero(expected_V > 0.05) > 1
    np.testing.assert_allclose(shares_V, expected_V, atol=0.1)  # over three standard errors


@pytest.mark.parametrize(
    ('changed', 'named'),
    [
        ({'prompt_ids': []}, "prompt's length"),
        ({'prompt_ids': [1] * 97}, "prompt's length .* seq_len = 96"),
        ({'prompt_ids': [400]}, 'vocab_size'),
        ({'prompt_ids': [-1]}, "prompt's ids"),
        ({'max_new_tokens': 0}, 'max_new_tokens'),
        ({'temperature': -0.1}, 'temperature'),
        ({'temperature': float('nan')}, 'temperature'),
        ({'temperature': 1.0, 'top_k': 0}, 'top_k'),
        ({'temperature': 1.0, 'top_p': 0.0}, 'top_p'),
        ({'temperature': 1.0, 'top_p': 1.1}, 'top_p'),
    ],
)
def test_arguments_that_cannot_work_are_refused_by_name(params, changed, named):
    options = {'prompt_ids': PROMPT, 'max_new_tokens': 4, **changed}
    with pytest.raises(errors.UsageError, match=named):
        generate.stream(params, CONFIG, options.pop('prompt_ids'), **options)
