"""The report of a compiled step, against hand calculation: three instructions on two nodes of four GPUs."""

import dataclasses
import json

import pytest

from tests.support import tiny
from tinyllama_jax import sharding
from tinyllama_jax.config import MeshConfig
from tinyllama_jax.plan import compile as compile_lib
from tinyllama_jax.plan import hlo, report, targets
from tinyllama_jax.plan.memory import GIB

# On each GPU a product of 2 x 64 x 128 x 256 FLOPs, and an all-gather of 64 x 128 bfloat16 between 4 GPUs.
PROGRAM = hlo.parse("""ENTRY %main (x: bf16[64,128], w: bf16[128,256]) -> bf16[64,256] {
  %x = bf16[64,128]{1,0} parameter(0)
  %w = bf16[128,256]{1,0} parameter(1)
  %gathered = bf16[256,128]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %summed = bf16[64,128]{1,0} all-reduce(%x), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  ROOT %y = bf16[64,256]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
""")


def _compiled(**changes) -> compile_lib.Compiled:
    train = dataclasses.replace(tiny.CONFIG.train, num_steps=1_000, global_batch_size=64, micro_batch_size=2)
    config = dataclasses.replace(tiny.CONFIG, train=train)
    cluster = compile_lib.Cluster(targets.find('a100-40gb'), nodes=2, gpus_per_node=4, memory_fraction=0.9)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))
    memory = {'parameters': 2 * GIB, 'loss': 1000, 'gaps': GIB - 1000}
    step = compile_lib.Compiled(config, cluster, mesh, {'attention': 'triton'}, PROGRAM, 3 * GIB, memory)
    return dataclasses.replace(step, **changes)


def test_the_plan_has_what_each_gpu_sends_and_the_rate_of_each_axis():
    plan = report.make_plan(_compiled())
    size, seconds = 64 * 128 * 2, sum(plan['seconds_per_step'].values()) - plan['seconds_per_step']['hidden exchange']
    assert plan['collectives'] == [
        {'kind': 'all-gather', 'axis': 'fsdp', 'dtype': 'bf16', 'count_per_step': 1, 'bytes_per_step': 3 * size},
        {'kind': 'all-reduce', 'axis': 'data', 'dtype': 'bf16', 'count_per_step': 1, 'bytes_per_step': size},
    ]
    assert plan['bytes_per_second_per_axis'] == pytest.approx({'fsdp': 3 * size / seconds, 'data': size / seconds})


def test_speed_days_and_gpu_hours_follow_from_the_time_of_a_step():
    step = _compiled()
    plan, seconds = report.make_plan(step), step.estimate.total
    tokens = 64 * tiny.MODEL.seq_len
    assert (plan['tokens_per_step'], plan['accumulation_steps'], plan['devices']) == (tokens, 4, 8)
    assert plan['estimated_tokens_per_second'] == pytest.approx(tokens / seconds)
    assert plan['estimated_tokens_per_second_per_gpu'] == pytest.approx(tokens / seconds / 8)
    assert plan['estimated_days'] == pytest.approx(1_000 * seconds / 86_400)
    assert plan['estimated_gpu_hours'] == pytest.approx(8 * 1_000 * seconds / 3_600)
    assert plan['gpu_hours_per_300b_tokens']['this plan'] == pytest.approx(8 * 300e9 / tokens * seconds / 3_600)
    assert plan['product_flops_per_token'] == 8 * 2 * 64 * 128 * 256 / tokens
    assert json.loads(json.dumps(plan)) == plan


def test_the_text_says_whether_it_fits_and_what_takes_the_memory():
    lines = report.text(report.make_plan(_compiled())).splitlines()
    assert '8 x NVIDIA A100-SXM4-40GB on 2 nodes: data 2 x fsdp 4 x tensor 1' in lines
    (verdict,) = (line for line in lines if line.startswith('memory a GPU: 3.00 GiB of'))
    assert verdict.endswith('(0.9 of the device, less 1.5 GiB): fits')
    assert '      2.00 GiB  parameters' in lines and '      1.00 GiB  gaps' in lines
    assert not any(line.endswith('GiB  loss') for line in lines)  # a few bytes
    too_large = report.text(report.make_plan(_compiled(peak_bytes=40 * GIB)))
    assert 'less 1.5 GiB): DOES NOT FIT\n' in too_large


def test_a_search_is_listed_before_the_first_of_its_steps():
    fast, slow = _compiled(), _compiled(peak_bytes=2 * GIB)
    plan = report.make_plan(fast) | {'search': [report.search_row(fast), report.search_row(slow)]}
    lines = report.text(plan).splitlines()
    assert lines[0] == 'these fit, the fastest first:'
    assert lines[1].startswith('    2 sequences, remat none         3.00 GiB') and '2.00 GiB' in lines[2]
    assert lines[4] == 'the first of them:'
