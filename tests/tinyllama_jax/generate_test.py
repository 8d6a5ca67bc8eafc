"""Generation: equality with the whole forward pass and with transformers, sampling, ends, refused arguments."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import tiny_export
from tinyllama_jax import decode, errors, generate, model

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
    assert len(theirs) == 50 or theirs[-1] == 2  # the EOS of its configuration


PROMPTS = [PROMPT, [5, 17], [300, 2, 7] * 15, [9]]


def _batch(params, prompts, **options):
    *_, batch = generate.Generator(params, CONFIG).batch(prompts, **options)
    assert all(batch.ended)
    return batch.tokens


def test_a_prompt_s_tokens_do_not_depend_on_the_batch(params, greedy):
    options = {'max_new_tokens': 60, 'eos_id': greedy[12]}
    together = _batch(params, PROMPTS[:3], **options)
    assert together == [_batch(params, [ids], **options)[0] for ids in PROMPTS[:3]]
    assert together[0] == greedy[: greedy.index(greedy[12]) + 1]
    assert len({len(tokens) for tokens in together}) == 3, 'they should differ in length'
    assert len(together[2]) <= CONFIG.seq_len - len(PROMPTS[2]) + 1


def test_a_sample_does_not_depend_on_the_batch(params):
    options = {'max_new_tokens': 50, 'temperature': 1.2, 'top_k': 50}
    together = _batch(params, PROMPTS[:2], seed=[1, 2], **options)
    assert together == [_batch(params, [PROMPTS[row]], seed=row + 1, **options)[0] for row in (0, 1)]
    assert _batch(params, [PROMPT, PROMPT], seed=[2, 1], **options)[1] == together[0]


def test_batches_equal_transformers(params, tmp_path):
    torch = tiny_export.require_torch()
    llama = tiny_export.transformers_llama(params, CONFIG, tmp_path).eval()
    width = max(map(len, PROMPTS))
    padded = torch.tensor([[0] * (width - len(ids)) + ids for ids in PROMPTS])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in PROMPTS])
    theirs = llama.generate(padded, attention_mask=mask, max_new_tokens=40, pad_token_id=0)[:, width:].tolist()
    for mine, other in zip(_batch(params, PROMPTS, max_new_tokens=40, eos_id=2), theirs, strict=True):
        assert mine == other[: len(mine)]
        assert len(mine) == 40 or mine[-1] == 2


def test_a_continuation_that_the_caller_ends_gets_no_more_tokens(params):
    lengths = []
    for batch in generate.Generator(params, CONFIG).batch(PROMPTS[:2], max_new_tokens=40):
        batch.ended[1] = True
        lengths.append(len(batch.tokens[1]))
    assert set(lengths) == {1} and len(batch.tokens[0]) == 40


def test_top_k_above_the_vocabulary_keeps_every_token(params):
    options = {'max_new_tokens': 4, 'temperature': 1.0}
    drawn = generate.generate(params, CONFIG, PROMPT, top_k=99_999_999_999, **options)
    assert drawn == generate.generate(params, CONFIG, PROMPT, **options)


def test_it_ends_after_eos_and_yields_it(params, greedy):
    eos = greedy[12]
    expected = greedy[: greedy.index(eos) + 1]
    assert generate.generate(params, CONFIG, PROMPT, max_new_tokens=50, eos_id=eos) == expected
    several = [index for index in range(CONFIG.vocab_size) if index not in expected[:-1]]
    assert generate.generate(params, CONFIG, PROMPT, max_new_tokens=50, eos_id=several) == expected


def test_it_ends_when_seq_len_tokens_are_read(params):
    prompt = list(range(CONFIG.seq_len - 3))
    assert len(generate.generate(params, CONFIG, prompt, max_new_tokens=50)) == 4
    assert len(generate.generate(params, CONFIG, [*prompt, 1, 2, 3], max_new_tokens=50)) == 1


def test_lengths_share_programs_and_tokens_arrive_one_by_one(params):
    generate.generate(params, CONFIG, PROMPT, max_new_tokens=50)
    programs = decode.begin._cache_size(), decode.advance._cache_size()
    stream = generate.stream(params, CONFIG, PROMPT[:3], max_new_tokens=40)
    assert isinstance(next(stream), int)
    generate.generate(params, CONFIG, PROMPT[:5], max_new_tokens=41)
    assert (decode.begin._cache_size(), decode.advance._cache_size()) == programs
    padded = {generate.padded_length(length) for length in range(2_049)}
    assert sorted(padded) == [32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]


def test_sampling_is_a_function_of_the_seed(params, greedy):
    def sample(**options):
        return generate.generate(params, CONFIG, PROMPT, max_new_tokens=50, **options)[:12]

    hot = sample(temperature=1.5, seed=1)
    assert sample(temperature=1.5, seed=1) == hot
    assert sample(temperature=1.5, seed=2) != hot != greedy[:12]
    assert sample(temperature=1.5, top_k=1, seed=1) == greedy[:12]
    assert sample(temperature=1.5, top_p=1e-6, seed=1) == greedy[:12]


def test_samples_follow_the_model_s_distribution(params):
    logits_V = _forward(params, np.array([PROMPT]), config=CONFIG)[0, -1] / 0.7
    expected_V = jax.nn.softmax(decode.restrict(logits_V, 3, 2.0))
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
        ({'temperature': 1e-39}, 'temperature must be 0, or a finite number from 1e-06 up'),
        ({'temperature': 1.0, 'top_k': 0}, 'top_k'),
        ({'temperature': 1.0, 'top_p': 0.0}, 'top_p'),
        ({'temperature': 1.0, 'top_p': 1.1}, 'top_p'),
        ({'seed': -1}, 'seed must be from 0 to'),
        ({'seed': 2**63}, 'seed must be from 0 to'),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(params, changed, named):
    options = {'prompt_ids': PROMPT, 'max_new_tokens': 4, **changed}
    with pytest.raises(errors.UsageError, match=named):
        generate.stream(params, CONFIG, options.pop('prompt_ids'), **options)


def test_all_bits_of_a_seed_count(params):
    options = {'max_new_tokens': 12, 'temperature': 1.5}
    texts = [generate.generate(params, CONFIG, PROMPT, seed=seed, **options) for seed in (0, 2**32, 2**63 - 1, 2**31)]
    assert len(set(map(tuple, texts))) == 4
    data = jax.random.key_data
    assert (data(model.random_key(2**32 - 1)) == data(jax.random.key(2**32 - 1))).all(), 'smaller seeds are as before'


def test_prompts_of_one_seed_are_drawn_independently():
    flat = jax.tree.map(jnp.zeros_like, tiny_export.random_params(CONFIG))  # every token is as likely after any prompt
    drawn = [tokens[0] for tokens in _batch(flat, [[i] for i in range(40)], max_new_tokens=1, temperature=1.0)]
    assert len(set(drawn)) > 30
    assert drawn[7:9] == [tokens[0] for tokens in _batch(flat, [[7], [8]], max_new_tokens=1, temperature=1.0)]
