"""The reader of compiled programs, on programs that XLA compiles here and on the forms that it may print."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jaxlib import xla_client

from tinyllama_jax import sharding
from tinyllama_jax.config import MeshConfig
from tinyllama_jax.plan import hlo

SIZES = {'data': 2, 'fsdp': 4, 'tensor': 2}


def _groups(text: str) -> tuple[tuple[int, ...], ...]:
    program = hlo.parse(f"""ENTRY %main (x: f32[4]) -> f32[4] {{
  %x = f32[4]{{0}} parameter(0)
  ROOT %all-reduce-start = f32[4]{{0}} all-reduce-start(%x), channel_id=1, {text}, use_global_device_ids=true
}}
""")
    computation = program.computations['main']
    return hlo.collective(computation.instructions['all-reduce-start'], computation, 16).groups


@pytest.mark.parametrize(
    ('text', 'axes'),
    [
        ('replica_groups={{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}}', 'data+fsdp+tensor'),
        ('replica_groups={}', 'data+fsdp+tensor'),
        ('replica_groups={{0,1,2,3,4,5,6,7},{8,9,10,11,12,13,14,15}}', 'fsdp+tensor'),
        ('replica_groups=[8,2]<=[16]', 'tensor'),
        ('replica_groups=[4,4]<=[2,4,2]T(0,2,1)', 'fsdp'),
        ('replica_groups=[8,2]<=[2,8]T(1,0)', 'data'),
        ('replica_groups=[2,8]<=[8,2]T(1,0)', 'data+fsdp'),
        ("replica_groups=mesh['data'=2,'fsdp'=4,'tensor'=2] {'fsdp'}", 'fsdp'),
        ("replica_groups=mesh['data'=2,'fsdp'=4,'tensor'=2] {'data','fsdp'}", 'data+fsdp'),
        ("replica_groups=mesh['axis_0'=1,'axis_1'=8,'axis_2'=2], device_ids=([2,8]T(1,0)) {'axis_2'}", 'data'),
        ("replica_groups=mesh['axis_0'=1,'axis_1'=8,'axis_2'=2], device_ids=([2,8]T(1,0)) {'axis_1'}", 'fsdp+tensor'),
        ("replica_groups=mesh['a'=16] {'a':(2)4}", 'fsdp'),
        ("replica_groups=mesh['a'=8,'b'=2] {'b','a':(1)2}", 'data+tensor'),
        ("replica_groups=mesh['a'=2,'b'=8], device_ids=([8,2]T(1,0)) {'a','b':(2)4}", 'fsdp+tensor'),
        ('replica_groups={{0,3},{1,2},{4,7},{5,6},{8,11},{9,10},{12,15},{13,14}}', 'other'),
    ],
)
def test_groups_of_devices_are_read_in_every_form(text, axes):
    groups = _groups(text)
    assert sorted(device for group in groups for device in group) == list(range(16))
    assert hlo.mesh_axes(groups, SIZES) == axes


def test_groups_along_axes_in_another_order_list_their_devices_in_that_order():
    assert _groups("replica_groups=mesh['a'=2,'b'=8] {'b':(4)2,'a'}")[:2] == ((0, 8, 1, 9), (2, 10, 3, 11))


@pytest.mark.parametrize('text', ['<<0>>', '[2,4,2]<=[16]'])
def test_an_unknown_form_raises(text):
    with pytest.raises(ValueError, match='unknown form'):
        _groups(f'replica_groups={text}')


def test_an_axis_of_which_two_parts_are_named_raises():
    with pytest.raises(ValueError, match='repeated axis'):
        _groups("replica_groups=mesh['a'=16] {'a':(1)2,'a':(8)2}")


def _exchanged(mesh, function, *arrays):
    """Returns (kind, axes, times, bytes that a device sends) for each collective of a program compiled for the mesh."""
    program = hlo.parse(jax.jit(function).lower(*arrays).compile().as_text())
    exchanges = []
    for instruction, computation, times in program.executed():
        if exchange := hlo.collective(instruction, computation, mesh.size):
            sent = times * exchange.sent_bytes
            exchanges.append((exchange.kind, hlo.mesh_axes(exchange.groups, mesh.shape), times, sent))
    return exchanges


def test_exchanges_of_a_real_program_are_counted_as_often_as_its_loops_run():
    """On 8 CPU devices: an all-gather in a loop within a loop, and a sum over another axis."""
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))
    w = jax.ShapeDtypeStruct((5, 64, 32), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, P(None, 'fsdp')))
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, P('data')))

    def use(total, w_DF, x_BD):
        whole = jax.lax.with_sharding_constraint(w_DF, sharding.replicated(mesh))
        return total + jnp.sum(jnp.tanh((x_BD + total) @ whole)), None

    def function(w, x):
        def outer(total, _):
            return jax.lax.scan(lambda total, w_DF: use(total, w_DF, x), total, w)

        return jax.lax.scan(lambda total, _: (outer(total, _)[0], None), jnp.float32(0), None, length=3)[0]

    exchanges = _exchanged(mesh, function, w, x)
    gathers = [each for each in exchanges if each[0] == 'all-gather']
    assert sum(sent for *_, sent in gathers) == 15 * (64 * 32 * 4) * 3 / 4
    assert {(axes, times) for _, axes, times, _ in gathers} == {('fsdp', 15)}
    assert ('all-reduce', 'data', 15, 15 * 2 * 4 / 2) in exchanges


def _loop(condition: str, start: int) -> hlo.Program:
    return hlo.parse(f"""%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %p = (s32[], f32[8]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %step = s32[] constant(2)
  %next = s32[] add(%i, %step)
  %v = f32[8]{{0}} get-tuple-element(%p), index=1
  %w = f32[8]{{0}} negate(%v)
  ROOT %t = (s32[], f32[8]{{0}}) tuple(%next, %w)
}}

%fused_compare (a: s32[]) -> pred[] {{
  %a = s32[] parameter(0)
  %limit = s32[] constant(9)
  ROOT %c = pred[] compare(%a, %limit), direction={condition}
}}

%condition (p.1: (s32[], f32[8])) -> pred[] {{
  %p.1 = (s32[], f32[8]{{0}}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  ROOT %f = pred[] fusion(%i.1), kind=kLoop, calls=%fused_compare
}}

ENTRY %main (x: f32[8]) -> (s32[], f32[8]) {{
  %x = f32[8]{{0}} parameter(0)
  %zero = s32[] constant({start})
  %copy.1 = s32[] copy(%zero)
  %start = (s32[], f32[8]{{0}}) tuple(%copy.1, %x)
  ROOT %while.1 = (s32[], /*index=1*/f32[8]{{0}}) while(%start), condition=%condition, body=%body
}}
""")


@pytest.mark.parametrize(('condition', 'start', 'trips'), [('LT', 1, 4), ('LT', 0, 5), ('LE', 1, 5), ('LT', 9, 0)])
def test_a_loop_whose_length_xla_does_not_say_is_followed(condition, start, trips):
    program = _loop(condition, start)
    entry = program.computations['main']
    assert program.trip_count(entry.instructions['while.1'], entry) == trips
    negated = [times for instruction, _, times in program.executed() if instruction.opcode == 'negate']
    assert negated == [trips]


def test_a_loop_that_does_not_end_raises():
    program = _loop('NE', 0)
    entry = program.computations['main']
    with pytest.raises(ValueError, match=r'while\.1 does not end'):
        program.trip_count(entry.instructions['while.1'], entry)


def test_sizes_and_names_of_a_tuple():
    (entry,) = hlo.parse("""ENTRY %main (x: bf16[3,4]) -> (bf16[3,4], s8[16]) {
  %x = bf16[3,4]{1,0} parameter(0)
  ROOT %call = (bf16[3,4]{1,0}, /*index=1*/s8[16]{0}) custom-call(%x), custom_call_target="a(b"
}
""").computations.values()
    call = entry.instructions['call']
    assert (call.opcode, call.operands, entry.root) == ('custom-call', ('x',), 'call')
    assert [array.shape for array in call.results] == [(3, 4), (16,)]
    assert call.bytes == math.prod((3, 4)) * 2 + 16


NOT_ARRAYS = {'TUPLE', 'PRIMITIVE_TYPE_INVALID'}
NAMES = sorted(name for name in dir(xla_client.PrimitiveType) if name.isupper() and name not in NOT_ARRAYS)


@pytest.mark.parametrize('name', NAMES)
def test_every_element_type_of_the_installed_xla_is_known(name):
    (array,) = hlo.arrays(f'{name.lower().removesuffix("_type")}[3]{{0}}')
    assert array.shape == (3,)


@pytest.mark.parametrize(
    ('dtype', 'name', 'size'),
    [
        (jnp.float8_e4m3fn, 'f8e4m3fn', 5),
        (jnp.float8_e5m2, 'f8e5m2', 5),
        (jnp.bfloat16, 'bf16', 10),
        (jnp.int4, 's4', 3),  # two in a byte
        (jnp.bool_, 'pred', 5),
    ],
)
def test_an_array_takes_the_bytes_that_xla_says(dtype, name, size):
    compiled = jax.jit(lambda x: x[::-1]).lower(jax.ShapeDtypeStruct((5,), dtype)).compile()
    program = hlo.parse(compiled.as_text())
    (argument,) = (each for each, *_ in program.executed() if each.opcode == 'parameter')
    assert argument.results == (hlo.Array(name, (5,)),)
    assert argument.bytes == compiled.memory_analysis().argument_size_in_bytes == size


def test_a_product_of_f8_operands_is_read():
    program = hlo.parse("""ENTRY %main (x: f8e4m3fn[16,32], w: f8e5m2[32,64], scale: f32[]) -> bf16[16,64] {
  %x = f8e4m3fn[16,32]{1,0} parameter(0)
  %w = f8e5m2[32,64]{0,1} parameter(1)
  %scale = f32[] parameter(2)
  ROOT %y = (bf16[16,64]{1,0}, s8[100]{0}) custom-call(%x, %w, %scale), custom_call_target="__cublas$lt$matmul$f8"
}
""")
    entry = program.computations['main']
    operands = [array for each in entry.operands(entry.instructions['y']) for array in each.results]
    assert [array.dtype for array in operands] == ['f8e4m3fn', 'f8e5m2', 'f32']
    assert [array.bytes for array in operands] == [16 * 32, 32 * 64, 4]
    assert [array.dtype for array in entry.instructions['y'].results] == ['bf16', 's8']


@pytest.mark.parametrize('dtype', ['f9e4', 'b7', 'f8e4m3fnx'])
def test_an_unknown_element_type_raises_and_is_named(dtype):
    with pytest.raises(ValueError, match=rf'element type {dtype} is unknown'):
        hlo.parse(f'ENTRY %main () -> f32[] {{\n  %x = (f32[4]{{0}}, {dtype}[4]{{0}}) parameter(0)\n}}\n')


def test_a_shape_that_is_not_static_raises():
    with pytest.raises(ValueError, match='<=8'):
        hlo.arrays('f32[<=8,4]{1,0}')


def test_an_attribute_that_is_missing_is_named():
    program = hlo.parse('ENTRY %main () -> f32[] {\n  ROOT %x = f32[] fusion(), kind=kLoop\n}\n')
    with pytest.raises(ValueError, match=r'fusion x has no .*calls.* in \', kind=kLoop'):
        program.computations['main'].instructions['x'].called('calls')


@pytest.mark.parametrize(
    ('kind', 'sent'),
    [('all-gather', 300), ('reduce-scatter', 75), ('all-reduce', 150), ('all-to-all', 75), ('collective-permute', 100)],
)
def test_bytes_that_a_device_sends_in_a_ring(kind, sent):
    groups = tuple(tuple(row) for row in np.arange(8).reshape(2, 4).tolist())
    assert hlo.Collective(kind, ('f32',), groups, 100, ((25,),)).sent_bytes == sent
