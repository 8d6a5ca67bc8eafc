"""The page of a plan: its files and its figures."""

import json

from tinyllama_jax.plan import page

PLAN = {
    'fits': False,
    'peak_bytes_per_gpu': 43 * 2**30,
    'capacity_bytes': 34 * 2**30,
    'memory': {'parameters': 4 * 2**30, 'gaps': 0},
    'target': 'NVIDIA A100-SXM4-40GB',
    'devices': 1,
    'mesh': {'data': 1, 'fsdp': 1},
    'parameters': 1_100_048_384,
    'tokens_per_step': 2_097_152,
    'micro_batch_size': 8,
    'accumulation_steps': 128,
    'remat': 'none',
    'kernels': {'attention': 'triton'},
    'flops_per_token': {'C': 6.76e9},
    'collectives': [
        {
            'kind': 'all-gather',
            'axis': 'fsdp',
            'dtype': 'bf16',
            'count_per_step': 1416,
            'bytes_per_step': 30_049_566_720,
        }
    ],
    'seconds_per_step': {'memory': 1.25},
    'estimated_tokens_per_second': 24_000.4,
    'estimated_days': 1_446.8,
    'estimated_gpu_hours': 34_722.2,
    'gpu_hours_per_300b_tokens': {'this plan': 3_472.2, 'TinyLlama-1.1B': 3_456},
}


def test_the_page_shows_the_plan(tmp_path):
    path = page.write(PLAN, tmp_path / 'a/plan')
    assert json.loads((path.parent / 'plan.json').read_text()) == PLAN
    assert (path.parent / 'gpu_hours.png').read_bytes().startswith(b'\x89PNG')
    text = path.read_text()
    for shown in (
        '1 x NVIDIA A100',
        'NO',
        '43.00 of 34.00 GiB',
        '1,100,048,384',
        '128 x 8',
        '1,416',
        '30.050',
        '24,000',
        '34,722',
    ):
        assert shown in text, shown
    assert 'gaps' not in text  # parts of 0 bytes are left out
