"""The ops under a mesh: eight devices give what one does, and the train step has the kernels that it should."""

import dataclasses
import math
import re
import sys

import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels import dispatch
from tests.support import kernel_checks, tiny
from tests.support.kernel_checks import normal
from tinyllama_jax import config as config_lib
from tinyllama_jax import errors, model, ops, sharding
from tinyllama_jax import step as step_lib
from tinyllama_jax.config import KernelConfig, MeshConfig, ModelConfig

MESHES = {'fsdp': MeshConfig(fsdp=8), 'data-fsdp-tensor': MeshConfig(data=2, fsdp=2, tensor=2)}
INTERPRETED = ops.every_op('interpret')
B, T, N, K, H, D, F, V = 8, 20, 4, 2, 64, 32, 48, 50


def _cases():
    ids_BT = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 3, (B, T)), axis=1), jnp.int32)
    positions_BT = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    targets_BT = jnp.asarray(np.random.default_rng(1).integers(0, V, (B, T)), jnp.int32)
    weights_BT = jnp.asarray(np.random.default_rng(2).integers(0, 3, (B, T)), jnp.float32)
    x, scale = normal(0, B, T, D), 1 + 0.1 * normal(1, D)
    q, k, v = normal(2, B, T, N, H), normal(3, B, T, K, H), normal(4, B, T, K, H)
    return {
        'attention': (lambda ops, *qkv: ops.attention(*qkv), [q, k, v]),
        'attention with segments': (lambda ops, *qkv: ops.attention(*qkv, segment_ids_BT=ids_BT), [q, k, v]),
        'rms_norm': (lambda ops, *args: ops.rms_norm(*args, eps=1e-5), [x, scale]),
        'rms_norm with residual': (
            lambda ops, x, scale, r: ops.rms_norm(x, scale, eps=1e-5, residual_BTD=r), [x, scale, normal(5, B, T, D)],
        ),
        'rope': (lambda ops, q: ops.rope(q, positions_BT, base=1e4), [q]),
        'swiglu': (lambda ops, *args: ops.swiglu(*args), [normal(6, B, T, F), normal(7, B, T, F)]),
        'cross_entropy': (
            lambda ops, *args: ops.cross_entropy(*args, targets_BT, weights_BT=weights_BT, z_loss=1e-3)[0],
            [x, normal(8, D, V)],
        ),
        'linear': (lambda ops, *args: ops.linear(*args), [x, normal(10, D, N, H)]),
        'linear over two axes': (lambda ops, *args: ops.linear(*args), [q, normal(11, N, H, D)]),
        'embed': (lambda ops, table: ops.embed(table, targets_BT, jnp.float32), [normal(9, 64, D)]),
    }  # fmt: skip


CASES = _cases()


@pytest.mark.parametrize('mesh', MESHES)
@pytest.mark.parametrize('case', CASES)
def test_eight_devices_give_values_and_gradients_of_one(case, mesh):
    function, arrays = CASES[case]
    sharded = ops.make_ops(mesh=sharding.make_mesh(MESHES[mesh]))
    found = kernel_checks.results(jax.jit(lambda *arrays: function(sharded, *arrays)), arrays)
    wanted = kernel_checks.results(lambda *arrays: function(ops.make_ops(), *arrays), arrays)
    assert kernel_checks.within(kernel_checks.errors(found, wanted), kernel_checks.FLOAT32)


@kernel_checks.needs_triton
@pytest.mark.parametrize('case', CASES)
def test_kernels_on_eight_devices_give_what_plain_jax_gives_on_one(case):
    function, arrays = CASES[case]
    sharded = ops.make_ops(INTERPRETED, sharding.make_mesh(MESHES['data-fsdp-tensor']))
    found = kernel_checks.results(jax.jit(lambda *arrays: function(sharded, *arrays)), arrays)
    wanted = kernel_checks.results(lambda *arrays: function(ops.make_ops(), *arrays), arrays)
    assert kernel_checks.within(kernel_checks.errors(found, wanted), kernel_checks.FLOAT32)


# A model whose heads the kernels take, of sizes that no two axes share.
MODEL = dataclasses.replace(
    tiny.MODEL, vocab_size=96, seq_len=40, embed_dim=64, num_heads=4, num_kv_heads=2, head_dim=64, hidden_dim=112
)


def _config(**changes):
    train = dataclasses.replace(tiny.CONFIG.train, micro_batch_size=1, remat=changes.pop('remat', 'none'))
    return dataclasses.replace(tiny.CONFIG, model=dataclasses.replace(MODEL, **changes), train=train)


def _lowered(config, mesh, chip=None, **options):
    """Returns the train step's program, as lowered for the chip (for a CPU without one)."""
    the_ops = ops.for_run(config, mesh, chip=chip)
    rows = sharding.batch_sharding(mesh, leading=1)
    arguments = (
        step_lib.abstract_state(config, mesh),
        jax.ShapeDtypeStruct((1, 8, config.model.seq_len + 1), jnp.uint16, sharding=rows),
        None,
    )
    return step_lib.jit_train_step(config, mesh, the_ops).trace(*arguments).lower(**options)


@pytest.mark.parametrize('kernels', [KernelConfig(), pytest.param(INTERPRETED, marks=kernel_checks.needs_triton)])
@pytest.mark.parametrize('mesh', MESHES)
def test_no_activation_is_gathered(mesh, kernels):
    config = dataclasses.replace(_config(), kernels=kernels)
    program = _lowered(config, sharding.make_mesh(MESHES[mesh])).compile().as_text()
    gathered = re.findall(r'= (\(?\w+\[.*?) all-gather(?:-start)?\(', program)
    assert gathered, 'the weights are split and have to be gathered'
    shapes = jax.eval_shape(lambda: model.init_params(config.model, jax.random.key(0)))
    sizes = {math.prod(leaf.shape[path[0].key == 'layers' :]) for path, leaf in jax.tree.leaves_with_path(shapes)}
    found = [math.prod(map(int, shape.split(','))) for shape in re.findall(r'\w\[([\d,]+)\]', ' '.join(gathered))]
    tensor = MESHES[mesh].tensor  # which keeps its part of a weight
    assert {size * tensor for size in found} <= sizes | {size * tensor for size in sizes}
    assert ' all-to-all(' not in program


FORWARD = ['rms_norm_forward', 'rope', 'rope', 'attention_forward', 'rms_norm_add_forward', 'swiglu_forward']
LOSS = ['rms_norm_forward', 'cross_entropy_sums', 'cross_entropy_gradient', 'rms_norm_backward']
BACKWARD = ['swiglu_backward', 'rms_norm_backward', 'attention_delta', 'attention_dq', 'attention_dkv', 'rope', 'rope',
            'rms_norm_backward']  # fmt: skip
AGAIN = {  # what the backward pass runs again
    'none': [],
    'attention': [name for name in FORWARD if name != 'attention_forward'],
    'full': FORWARD,
}


@kernel_checks.needs_triton
@pytest.mark.parametrize('mesh', [MeshConfig(fsdp=8), None], ids=['eight devices', 'one'])
@pytest.mark.parametrize('remat', AGAIN)
def test_the_step_for_a_gpu_holds_exactly_the_expected_kernels(remat, mesh):
    mesh = sharding.make_mesh(mesh) if mesh else sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    program = _lowered(_config(remat=remat), mesh, 'sm_90', lowering_platforms=('cuda',)).as_text()
    expected = FORWARD + LOSS + AGAIN[remat] + BACKWARD
    assert sorted(kernel_checks.kernels_in(program)) == sorted(f'{name}_kernel' for name in expected)
    assert not re.findall(r'stablehlo\.(logistic|rsqrt|exponential|maximum)\b.*tensor<(?:\d+x){2,}', program)
    scores = rf'tensor<[\dx]*{MODEL.seq_len}x{MODEL.seq_len}x'
    assert not re.search(scores, program)
    angles = re.findall(r'stablehlo\.(?:cosine|sine) .*tensor<[\dx]*?x(\d+x\d+)xf32>', program)
    assert set(angles) == {f'1x{MODEL.head_dim // 2}'}, 'the angles of a position are for all heads'


@kernel_checks.needs_triton
@pytest.mark.parametrize('kernels', [KernelConfig(), ops.PLAIN], ids=['triton', 'xla'])
@pytest.mark.parametrize(('dtype', 'precision'), [('float32', 'HIGHEST'), ('bfloat16', 'DEFAULT')])
def test_products_have_the_precision_of_the_compute_dtype(dtype, precision, kernels):
    config = dataclasses.replace(_config(compute_dtype=dtype), kernels=kernels)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    program = _lowered(config, mesh, 'sm_90', lowering_platforms=('cuda',)).as_text()
    products = re.findall(r'stablehlo\.dot_general.*', program)
    wanted = f'precision = [{precision}, {precision}]'
    assert products and [product for product in products if wanted not in product] == []


def test_attention_is_not_recomputed_on_a_cpu_either():
    mesh, products = sharding.make_mesh(MeshConfig(), jax.devices()[:1]), {}
    for remat in AGAIN:
        products[remat] = _lowered(_config(remat=remat), mesh).as_text().count('stablehlo.dot_general')
    assert products['none'] < products['attention'] == products['full'] - 2, 'scores and their sum of values'


def test_the_step_for_a_cpu_holds_no_kernel():
    program = _lowered(_config(), sharding.make_mesh(MeshConfig(), jax.devices()[:1])).as_text()
    assert 'triton' not in program and 'callback' not in program


def _kib_kept_per_token(the_ops, capsys, remat='none') -> float:
    """Returns the KiB a token that a layer of the 1.1 B model keeps, without weights, by jax's own list."""
    config = dataclasses.replace(ModelConfig(), compute_dtype='bfloat16')
    layer = nnx.eval_shape(lambda: model.Layer(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(layer)
    positions_BT = jnp.broadcast_to(jnp.arange(config.seq_len)[None], (3, config.seq_len))

    def attend(q_BTNH, k_BTKH, v_BTKH, _):
        return the_ops.attention(q_BTNH, k_BTKH, v_BTKH), None

    def run(x_BTD, weights):
        return nnx.merge(graphdef, nnx.State(weights))(x_BTD, the_ops, positions_BT, attend)[0]

    run = run if remat == 'none' else jax.checkpoint(run, policy=model.remat_policy(remat))
    x_BTD = jax.ShapeDtypeStruct((3, config.seq_len, config.embed_dim), jnp.bfloat16)
    capsys.readouterr()
    jax.ad_checkpoint.print_saved_residuals(run, x_BTD, nnx.to_pure_dict(state))
    arrays = re.findall(r'^[a-z]+(\d+)\[(3,[\d,]*)\]', capsys.readouterr().out, re.MULTILINE)  # no weight is [3, ...]
    bits = sum(int(bits) * math.prod(map(int, shape.split(','))) for bits, shape in arrays)
    return bits / 8 / 1024 / (3 * config.seq_len)


@kernel_checks.needs_triton
@pytest.mark.parametrize(('remat', 'kib'), [('none', 58), ('names', 40), ('attention', 8), ('full', 4)])
def test_a_layer_keeps_what_the_config_says(capsys, remat, kib):
    assert kib - 1 < _kib_kept_per_token(ops.make_ops(chip='sm_90'), capsys, remat) <= kib + 0.5


@kernel_checks.needs_triton
def test_a_layer_keeps_at_most_64_kib_a_token_without_remat(capsys):
    assert 50 < _kib_kept_per_token(ops.make_ops(chip='sm_90'), capsys) <= 64
    assert _kib_kept_per_token(ops.make_ops(ops.PLAIN, chip='sm_90'), capsys) > 90, 'autodiff keeps more'


def test_a_choice_that_cannot_run_names_the_field():
    with pytest.raises(errors.UsageError, match=r"config\.kernels\.rope: impl='triton' runs on chips .*; choose 'xla'"):
        ops.make_ops(KernelConfig(rope='triton'))


@pytest.mark.parametrize(
    ('chip', 'kernels', 'changes', 'message'),
    [
        (None, {'attention': 'interpret'}, {'head_dim': 8}, 'kernels.attention: .* head dims .*, not 8'),
        ('sm_90', {'attention': 'cudnn'}, {'compute_dtype': 'float32'}, 'attention: .* takes bfloat16, not float32'),
        ('sm_90', {'attention': 'cudnn'}, {'document_mask': True}, 'attention: .* takes no segment ids'),
        ('sm_90', {'attention': 'cudnn'}, {'remat': 'attention'}, 'train.remat=attention .* attention is cudnn'),
        ('sm_90', {'attention': 'xla'}, {'remat': 'names'}, 'train.remat=names .* attention is xla'),
        ('sm_90', {}, {'embed_dim': 20_000}, 'kernels.rms_norm: rows of 20000'),
    ],
)
def test_a_run_that_its_ops_cannot_do_names_the_field(chip, kernels, changes, message):
    document_mask = changes.pop('document_mask', False)
    config = _config(**({'compute_dtype': 'bfloat16'} | changes))
    config = dataclasses.replace(config, kernels=KernelConfig(**kernels))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, document_mask=document_mask))
    with pytest.raises(errors.UsageError, match=message):
        ops.for_run(config, sharding.make_mesh(MeshConfig(), jax.devices()[:1]), chip=chip)


@pytest.mark.parametrize('missing', ['triton', 'jax_triton'])
def test_without_triton_a_run_for_a_gpu_says_what_to_install(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(errors.UsageError, match=rf'config\.kernels\.attention: .*{missing}, which is not installed'):
        ops.make_ops(chip='sm_90')


def test_the_table_names_every_op():
    assert ops.make_ops(chip='sm_80').table() == (
        'ops on sm_80: attention triton, rms_norm triton, rope triton, swiglu triton, cross_entropy triton, '
        'linear xla, embed xla'
    )
    assert ops.make_ops(KernelConfig(swiglu='interpret')).table().startswith('ops on CPU: attention xla')


@pytest.mark.parametrize('op', [field.name for field in dataclasses.fields(KernelConfig) if field.name in dispatch.OPS])
def test_the_config_allows_the_implementations_that_an_op_has(op):
    for impl in (None, *dispatch.OPS[op]):
        config_lib.validated(dataclasses.replace(tiny.CONFIG, kernels=KernelConfig(**{op: impl})))
    others = {impl for implementations in dispatch.OPS.values() for impl in implementations} - set(dispatch.OPS[op])
    for impl in (*others, 'cuda'):
        with pytest.raises(errors.UsageError, match=rf"config\.kernels\.{op}: '{impl}' is not one of none, xla"):
            config_lib.validated(dataclasses.replace(tiny.CONFIG, kernels=KernelConfig(**{op: impl})))


def test_every_op_chooses_an_implementation_for_the_ops_that_have_it():
    assert dataclasses.asdict(ops.every_op('cudnn')) == dataclasses.asdict(KernelConfig(attention='cudnn'))
    assert ops.PLAIN.rope == ops.PLAIN.cross_entropy == 'xla' and ops.PLAIN.self_test
