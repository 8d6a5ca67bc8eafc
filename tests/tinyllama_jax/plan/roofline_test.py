"""The time of an instruction, from its shapes and the chip's rates; and what hides an exchange."""

import dataclasses

import pytest

from tinyllama_jax.plan import hlo, roofline, targets

A100 = targets.find('a100-40gb')
MACHINE = roofline.Machine(A100, devices=16, gpus_per_node=8, seq_len=2048)
BANDWIDTH = 0.9 * 1555e9
GAP = 0.9e-6


def _estimate(lines: str, *, fused: str = '', machine=MACHINE) -> roofline.Estimate:
    body = '\n'.join(f'  {line}' for line in lines.strip().splitlines())
    return roofline.estimate(hlo.parse(f'{fused}\nENTRY %main () -> () {{\n{body}\n}}\n'), machine)


PRODUCT = """%x = {dtype}[16384,2048]{{1,0}} parameter(0)
%w = {dtype}[2048,5632]{{1,0}} parameter(1)
ROOT %y = ({dtype}[16384,5632]{{1,0}}, s8[4194304]{{0}}) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul", \
backend_config={{"gemm_backend_config":{{"dot_dimension_numbers":{{"lhs_contracting_dimensions":["1"],\
"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}}}}"""


def test_a_matrix_product_takes_whole_waves_of_tiles_and_then_writes():
    flops, tiles = 2 * 16384 * 2048 * 5632, 128 * 44  # of 128 x 128
    waves = -(-tiles // 108)
    written = 16384 * 5632 * 2 / BANDWIDTH  # without the library's workspace
    seconds = _estimate(PRODUCT.format(dtype='bf16')).seconds
    expected = flops / 271.2e12 * waves * 108 / tiles + written + GAP
    assert seconds['matrix products'] == pytest.approx(expected, rel=1e-6)
    assert sum(seconds.values()) == seconds['matrix products']


@pytest.mark.parametrize(('size', 'published'), [(4096, 613.74e12), (8192, 721.60e12)])
def test_products_are_as_fast_as_cublas_was_measured(size, published):
    """[2048, size] x [size, size] on an H100 (triton-lang/triton issue 2339, September 2023)."""
    lines = f"""%x = bf16[2048,{size}]{{1,0}} parameter(0)
%w = bf16[{size},{size}]{{1,0}} parameter(1)
ROOT %y = bf16[2048,{size}]{{1,0}} dot(%x, %w), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}"""
    machine = dataclasses.replace(MACHINE, target=targets.find('h100-80gb'))
    assert 2 * 2048 * size * size / _estimate(lines, machine=machine).total == pytest.approx(published, rel=0.15)


def test_a_float32_product_runs_without_tensor_cores():
    seconds = _estimate(PRODUCT.format(dtype='f32')).seconds['matrix products']
    assert seconds == pytest.approx(2 * 16384 * 2048 * 5632 / 19.5e12, rel=0.02)  # the data sheet's float32


def test_a_plain_dot_is_a_product_too():
    lines = """%x = bf16[8,4096,4096]{2,1,0} parameter(0)
ROOT %y = bf16[8,4096,4096]{2,1,0} dot(%x, %x), lhs_batch_dims={0}, lhs_contracting_dims={2}"""
    seconds = _estimate(lines).seconds['matrix products']
    assert seconds == pytest.approx(8 * 2 * 4096**3 / 271.2e12, rel=0.08)


def test_a_product_of_f8_operands_reads_their_bytes_and_takes_the_flops_of_bf16():
    lines = PRODUCT.format(dtype='f8e4m3fn').replace('ROOT %y = (f8e4m3fn', 'ROOT %y = (bf16')
    seconds = _estimate(lines).seconds['matrix products']
    assert seconds == pytest.approx(_estimate(PRODUCT.format(dtype='bf16')).seconds['matrix products'])
    machine = dataclasses.replace(MACHINE, target=dataclasses.replace(A100, matmul_flops=1e18))
    read = 16384 * 2048 + 2048 * 5632
    moved = read + 2 * 16384 * 5632 + 4194304  # and the library's workspace
    assert _estimate(lines, machine=machine).total == pytest.approx(moved / BANDWIDTH + GAP, rel=1e-3)


def test_a_call_of_jax_triton_without_a_kernel_raises():
    with pytest.raises(ValueError, match='custom-call y has no .*backend_config'):
        _estimate('ROOT %y = f32[4]{0} custom-call(), custom_call_target="triton_kernel_call"')


def test_a_product_of_a_thin_matrix_takes_the_bytes():
    lines = """%x = bf16[1,4096]{1,0} parameter(0)
%w = bf16[4096,65536]{1,0} parameter(1)
ROOT %y = bf16[1,65536]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}"""
    machine = dataclasses.replace(MACHINE, target=dataclasses.replace(A100, matmul_flops=1e18))
    assert _estimate(lines, machine=machine).seconds['matrix products'] == pytest.approx(
        4096 * 65536 * 2 / BANDWIDTH + GAP, rel=1e-3
    )


def test_a_fusion_reads_what_it_slices_and_writes_what_it_updates():
    fused = """%fused (a: f32[22,8,64], b: f32[22,8,64], i: s32[]) -> f32[22,8,64] {
  %a = f32[22,8,64]{2,1,0} parameter(0)
  %b = f32[22,8,64]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %slice = f32[1,8,64]{2,1,0} dynamic-slice(%b, %i, %i, %i), dynamic_slice_sizes={1,8,64}
  %target = f32[22,8,64]{2,1,0} bitcast(%a)
  ROOT %updated = f32[22,8,64]{2,1,0} dynamic-update-slice(%target, %slice, %i, %i, %i)
}
"""
    lines = """%p = f32[22,8,64]{2,1,0} parameter(0)
%q = f32[22,8,64]{2,1,0} parameter(1)
%k = s32[] parameter(2)
ROOT %r = f32[22,8,64]{2,1,0} fusion(%p, %q, %k), kind=kLoop, calls=%fused"""
    assert _estimate(lines, fused=fused).total == pytest.approx((2 * 8 * 64 * 4 + 4) / BANDWIDTH + GAP)


def test_a_copy_reads_and_writes():
    lines = '%p = f32[1024]{0} parameter(0)\nROOT %c = f32[1024]{0} copy(%p)'
    assert _estimate(lines).seconds['memory'] == pytest.approx(8192 / BANDWIDTH + GAP)


GATHER = """%x = f32[1024,2048]{1,0} parameter(0)
%big = f32[8192,2048]{1,0} parameter(1)
%start = (f32[1024,2048]{1,0}, f32[16384,2048]{1,0}) all-gather-start(%x), replica_groups=GROUPS, dimensions={0}
%work = f32[8192,2048]{1,0} copy(%big)
%done = f32[16384,2048]{1,0} all-gather-done(%start)
ROOT %end = f32[8192,2048]{1,0} copy(%work)"""
SENT = 15 * 1024 * 2048 * 4


def test_an_exchange_hides_behind_what_is_scheduled_within_it():
    work = 2 * 8192 * 2048 * 4 / BANDWIDTH + GAP
    exchange = SENT / (8 * 0.96 * 25e9)  # two nodes: each of a node's eight adapters carries its part
    estimate = _estimate(GATHER.replace('GROUPS', '[1,16]<=[16]'))
    assert exchange > work
    assert estimate.seconds['exchange'] == pytest.approx(exchange - work)
    assert estimate.hidden == pytest.approx(work)
    assert estimate.total == pytest.approx(exchange + work)


def test_an_exchange_leaves_products_fewer_multiprocessors():
    """Between two nodes NCCL takes two of 108 for each of eight adapters while it runs."""
    product = """%x = f32[1024,2048]{1,0} parameter(0)
%big = bf16[8192,8192]{1,0} parameter(1)
%start = (f32[1024,2048]{1,0}, f32[16384,2048]{1,0}) all-gather-start(%x), replica_groups=[1,16]<=[16], dimensions={0}
%work = bf16[8192,8192]{1,0} dot(%big, %big), lhs_contracting_dims={1}, rhs_contracting_dims={0}
%done = f32[16384,2048]{1,0} all-gather-done(%start)
ROOT %end = (bf16[8192,8192]{1,0}) tuple(%work)"""
    alone = _estimate('\n'.join(line for line in product.splitlines() if 'gather' not in line)).total
    estimate, exchange = _estimate(product), SENT / (8 * 0.96 * 25e9)
    assert estimate.hidden == pytest.approx(exchange) and estimate.seconds['exchange'] == 0
    assert estimate.total == pytest.approx(alone + exchange * 16 / 108)


def test_within_a_node_nvlink_carries_an_exchange_and_between_single_gpus_their_own_adapter():
    def exchange(groups):
        estimate = _estimate(GATHER.replace('GROUPS', groups))
        return estimate.hidden + estimate.seconds['exchange']

    size = 1024 * 2048 * 4
    assert exchange('[2,8]<=[16]') == pytest.approx(7 * size / (0.76 * 300e9))
    assert exchange('[8,2]<=[2,8]T(1,0)') == pytest.approx(size / (0.96 * 25e9))
