"""The parts of a program's memory, from files in XLA's format."""

from tinyllama_jax.plan import hlo, memory

PROGRAM = hlo.parse("""%body (p: (f32[2,8,16], bf16[2,4,8])) -> (f32[2,8,16], bf16[2,4,8]) {
  %p = (f32[2,8,16]{2,1,0}, bf16[2,4,8]{2,1,0}) parameter(0)
  %fusion.3 = bf16[2,4,8]{2,1,0} fusion(%p), kind=kLoop, calls=%fused
  %gathered = bf16[8,16]{1,0} all-gather(%p), replica_groups={{0,1}}
  %logits = f32[4,100]{1,0} custom-call(%p), custom_call_target="x"
}

ENTRY %main (param.1: f32[2,8,16], param.2: f32[2,8,16]) -> f32[2,8,16] {
  %param.1 = f32[2,8,16]{2,1,0} parameter(0), metadata={op_name="state.params[\\'layers\\'][\\'up\\']"}
  %param.2 = f32[2,8,16]{2,1,0} parameter(1), metadata={op_name="state.opt_state[0].mu[\\'layers\\'][\\'up\\']"}
  %rows.1 = s32[1,2,9]{2,1,0} parameter(2), metadata={op_name="rows_ABR"}
}
""")
ASSIGNMENT = """BufferAssignment:
allocation 0: size 1024, page 0, parameter 0, shape |f32[2,8,16]| at ShapeIndex {}:
 value: <1 param.1 @0> (size=1024,offset=0): f32[2,8,16]{2,1,0}
allocation 1: size 1024, page 0, parameter 1, shape |f32[2,8,16]| at ShapeIndex {}:
 value: <2 param.2 @0> (size=1024,offset=0): f32[2,8,16]{2,1,0}
allocation 2: size 72, page 0, parameter 2, shape |s32[1,2,9]| at ShapeIndex {}:
 value: <3 rows.1 @0> (size=72,offset=0): s32[1,2,9]{2,1,0}
allocation 3: size 9000, page 0, preallocated-temp:
 value: <4 p{0} (phi) @0> (size=1024,offset=0): f32[2,8,16]{2,1,0}
 value: <5 sum.1 @0> (size=1024,offset=0): f32[2,8,16]{2,1,0}
 value: <6 fusion.3{} @0> (size=128,offset=1024): bf16[2,4,8]{2,1,0}
 value: <7 gathered @0> (size=256,offset=2048): bf16[8,16]{1,0}
 value: <8 logits @0> (size=1600,offset=4096): f32[4,100]{1,0}
 value: <9 later @0> (size=1600,offset=4096): f32[4,100]{1,0}
 value: <10 table{} @0> (size=16,offset=8192): (f32[2,8,16], bf16[2,4,8])
"""
LIVE_RANGES = """HloLiveRange (max 20):
  BufferLiveRange:
    later{}:12-14
  Live ranges at 7 (peak):
    logits{}: 1600 bytes (cumulative: 1600 bytes)
    p{0}: 1024 bytes (cumulative: 2624 bytes)
    sum.1{}: 1024 bytes (cumulative: 3648 bytes)
    param.1{}: 1024 bytes (cumulative: 4672 bytes)
    param.2{}: 1024 bytes (cumulative: 5696 bytes)
    gathered{}: 256 bytes (cumulative: 5952 bytes)
    fusion.3{}: 128 bytes (cumulative: 6080 bytes)
    rows.1{}: 72 bytes (cumulative: 6152 bytes)
  Stack trace breakdown for peak usage: 6152 bytes
    main: 99 bytes (cumulative
"""


def test_each_value_alive_at_the_peak_counts_for_its_part():
    values = memory.at_peak(LIVE_RANGES, ASSIGNMENT)
    assert {value.name for value in values} == set('logits sum.1 param.1 param.2 gathered fusion.3 rows.1'.split())
    shapes = memory.Shapes([(2, 8, 16), (2, 4, 16)], layers=2, vocab=100)
    assert memory.parts(values, PROGRAM, shapes, 6000) == {
        'parameters': 1024,
        'optimiser state': 1024,
        'gradients': 1024,  # one: the loop's parameter and the sum are at the same address
        'saved activations': 128,
        'copies of parameters': 256,
        'loss': 1600,
        'other buffers': 0,
        'batch': 72,
        'gaps': 6000 - 5128,
    }
