"""The reader of compiled programs, on programs that XLA compiled here and on the forms that it may print."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

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
        ('replica_groups={{0,3},{1,2},{4,7},{5,6},{8,11},{9,10},{12,15},{13,14}}', 'other'),
    ],
)
def test_groups_of_devices_are_read_in_every_form(text, axes):
    groups = _groups(text)
    assert sorted(device for group in groups for device in group) == list(range(16))
    assert hlo.mesh_axes(groups, SIZES) == axes


def test_an_unknown_form_raises():
    with pytest.raises(ValueError, match='unknown form'):
        _groups('replica_groups=<<0>>')


def _exchanged(mesh, function, *arrays):
    """(kind, axes, how often, bytes that a device sends) of each collective of a program compiled for the mesh."""
    program = hlo.parse(jax.jit(function).lower(*arrays).compile().as_text())
    found = []
    for instruction, computation, times in program.executed():
        if exchange := hlo.collective(instruction, computation, mesh.size):
            sent = times * exchange.sent_bytes
            found.append((exchange.kind, hlo.mesh_axes(exchange.groups, mesh.shape), times, sent))
    return found


def test_exchanges_of_a_real_program_are_found_and_counted_in_its_loops():
    """On 8 CPU devices: a gather in a loop within a loop, and a sum over another axis."""
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

    found = _exchanged(mesh, function, w, x)
    gathers = [each for each in found if each[0] == 'all-gather']
    assert sum(sent for *_, sent in gathers) == 15 * (64 * 32 * 4) * 3 / 4
    assert {(axes, times) for _, axes, times, _ in gathers} == {('fsdp', 15)}
    assert ('all-reduce', 'data', 15, 15 * 2 * 4 / 2) in found


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


@pytest.mark.parametrize(
    ('kind', 'sent'),
    [('all-gather', 300), ('reduce-scatter', 75), ('all-reduce', 150), ('all-to-all', 75), ('collective-permute', 100)],
)
def test_what_rings_send(kind, sent):
    groups = tuple(tuple(row) for row in np.arange(8).reshape(2, 4).tolist())
    assert hlo.Collective(kind, ('f32',), groups, 100, ((25,),)).sent_bytes == sent
