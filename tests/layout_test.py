"""The rules of docs/design.md, held against the imports and names in the code itself."""

import ast
import functools
import graphlib
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PACKAGES = ('configs', 'demo', 'eval_bridge', 'kernels', 'tinyllama_jax')
TOP_LEVEL = {'.ci', 'bench', 'configs', 'demo', 'docs', 'eval_bridge', 'kernels', 'launch', 'tests', 'tinyllama_jax'}
HF_NAMES = re.compile(
    r'self_attn|[qkvo]_proj|(gate|up|down)_proj|embed_tokens|(input|post_attention)_layernorm'
    r'|num_key_value_heads|rms_norm_eps|rope_theta|max_position_embeddings'
)


def _sources() -> dict[str, ast.Module]:
    """Returns path -> syntax tree of every source file outside tests and benchmarks."""
    paths = [ROOT / 'main.py', *(path for package in PACKAGES for path in sorted((ROOT / package).rglob('*.py')))]
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in paths if path.name != '__init__.py'}


SOURCES = _sources()


@functools.cache
def _imports(tree: ast.Module) -> set[str]:
    """Returns the dotted names that a file imports anywhere: modules, and members as module.member."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f'{node.module}.{alias.name}' for alias in node.names}
    return found


def _local_files(tree: ast.Module) -> set[str]:
    """Returns the files of this repository that a file imports."""
    candidates = {path for name in _imports(tree) for path in (name, name.rpartition('.')[0])}
    return {path for path in (f'{name.replace(".", "/")}.py' for name in candidates) if path in SOURCES}


@functools.cache
def _names(tree: ast.Module) -> set[str]:
    """Returns every identifier and attribute that a file mentions."""
    imported = {part for name in _imports(tree) for part in name.split('.')}
    nodes = list(ast.walk(tree))
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    return imported | used | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


@functools.cache
def _strings(tree: ast.Module) -> set[str]:
    """Returns every string in a file that isn't a docstring."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docstrings)
    return {node.value for node in constants if isinstance(node.value, str)}


def _files_where(predicate) -> set[str]:
    return {path for path, tree in SOURCES.items() if predicate(tree)}


# A file imports from its own line and the lines above, without circles. A name that ends with / is a folder; the other
# names without a folder are files of tinyllama_jax/, and rooms are its folders.
ORDER = (
    ('kernels/',),
    ('errors', 'files', 'storage', 'fields', 'config', 'flops', 'tokenizer/'),
    ('settings/', 'process/'),
    ('data/',),
    ('sharding', 'ops', 'model', 'optimizer', 'step', 'checkpoint_errors', 'checkpoint', 'decode', 'generate'),
    ('run/',),
    ('report/',),
    ('cluster/',),
    ('train',),
    ('plan/',),
    ('eval_bridge/',),
    ('configs/', 'demo/', 'main'),
)


def _line(path: str) -> int:
    """Returns the number of the line of ORDER that a file belongs to."""
    name = path.removeprefix('tinyllama_jax/').removesuffix('.py')
    return next(number for number, line in enumerate(ORDER) if {name, f'{name.split("/")[0]}/'} & set(line))


def test_every_line_of_the_order_has_files():
    names = {path.removeprefix('tinyllama_jax/').removesuffix('.py') for path in SOURCES}
    rooms = {f'{name.split("/")[0]}/' for name in names if '/' in name}
    assert {name for line in ORDER for name in line} == {name for name in names if '/' not in name} | rooms


@pytest.mark.parametrize('path', SOURCES)
def test_imports_from_its_line_and_the_lines_above(path):
    below = {other for other in _local_files(SOURCES[path]) if _line(other) > _line(path)}
    assert not below, f'{path} is in line {ORDER[_line(path)]} of ORDER'


def test_there_is_no_circle_of_imports():
    graph = {path: _local_files(tree) - {path} for path, tree in SOURCES.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_the_reader_of_imports_sees_them():
    assert _local_files(SOURCES['tinyllama_jax/train.py']) >= {'tinyllama_jax/step.py', 'tinyllama_jax/data/store.py'}


def test_only_the_model_imports_flax():
    assert _files_where(lambda tree: any(n.split('.')[0] == 'flax' for n in _imports(tree))) == {
        'tinyllama_jax/model.py'
    }


def test_only_ops_calls_shard_map():
    assert _files_where(lambda tree: 'shard_map' in _names(tree)) == {'tinyllama_jax/ops.py'}


def test_only_sharding_names_mesh_axes():
    # The axis `data` is a common word; whoever names axes names one of the others too.
    assert _files_where(lambda tree: _strings(tree) & {'fsdp', 'tensor'}) == {'tinyllama_jax/sharding.py'}


def test_only_two_files_know_hugging_face_names():
    files = {'eval_bridge/hf/convert.py', 'eval_bridge/hf/model_config.py'}
    assert _files_where(lambda tree: any(HF_NAMES.search(s) for s in _strings(tree))) == files


def test_only_main_reads_flags():
    readers = {'absl.flags', 'absl.app', 'argparse', 'argparse.ArgumentParser'}
    assert _files_where(lambda tree: _imports(tree) & readers) == {'main.py', 'kernels/resources.py'}
    assert _files_where(lambda tree: 'argv' in _names(tree)) <= {'main.py', 'demo/run.py', 'kernels/resources.py'}


def test_the_step_does_no_io_and_the_loop_no_maths():
    step, loop = SOURCES['tinyllama_jax/step.py'], SOURCES['tinyllama_jax/train.py']
    assert not _names(step) & {'open', 'print', 'os', 'pathlib', 'json', 'sys'}
    assert not {name for name in _imports(step) if name.startswith('tinyllama_jax.run.metrics')}
    assert not {name for name in _imports(loop) if name.startswith(('jax.numpy', 'jax.lax', 'optax'))}
    assert not _names(loop) & {'jnp', 'lax', 'grad', 'value_and_grad'}


def test_kernels_can_be_lifted_out():
    forbidden = ('tinyllama_jax', 'flax', 'eval_bridge')
    files = [path for path in SOURCES if path.startswith('kernels/')]
    assert files
    for path in files:
        assert not [name for name in _imports(SOURCES[path]) if name.split('.')[0] in forbidden], path


KERNEL_FILES = {f'kernels/{op}.py' for op in ('attention', 'rms_norm', 'rope', 'swiglu', 'cross_entropy')}
TRITON_FILES = KERNEL_FILES | {'kernels/interpreter.py', 'kernels/resources.py'}


def test_only_files_of_kernels_import_triton_and_only_launch_jax_triton():
    assert _files_where(lambda tree: any(n.split('.')[0] == 'triton' for n in _imports(tree))) == TRITON_FILES
    assert _files_where(lambda tree: any(n.startswith('jax_triton') for n in _imports(tree))) == {'kernels/launch.py'}


def _modules_after(code: str) -> set[str]:
    """Returns the top-level modules loaded in a fresh interpreter after `code`, in which Triton cannot be imported."""
    program = f"import sys\nsys.modules['triton'] = None\n{code}\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name.split('.')[0] for name in run.stdout.split()}


def test_kernels_import_without_triton_and_without_the_rest():
    files = [path for path in SOURCES if path.startswith('kernels/') and path not in TRITON_FILES]
    modules = [path.removesuffix('.py').replace('/', '.') for path in files]
    loaded = _modules_after('import ' + ', '.join(modules))
    assert not loaded & {'flax', 'tinyllama_jax'}
    assert 'jax' in loaded


def test_importing_the_package_kernels_costs_nothing():
    # transformers looks for a package of this name and may import it.
    assert not _modules_after('import kernels') & {'jax', 'numpy'}


def test_transformers_does_not_take_our_kernels_for_its_own():
    utils = pytest.importorskip('transformers.utils', reason='transformers is installed on Python 3.11 only')
    assert not utils.is_kernels_available()


def test_settings_are_read_without_jax():
    loaded = _modules_after('import tinyllama_jax.config, tinyllama_jax.settings.experiment')
    assert 'jax' not in loaded
    assert 'tinyllama_jax' in loaded


def test_the_top_level_is_the_designs():
    tracked = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip('not a git checkout: what belongs to the repository is unknown')
    folders = {path.split('/')[0] for path in tracked.stdout.splitlines() if '/' in path}
    assert folders == TOP_LEVEL


def test_the_first_files_to_read_stay_short():
    # Lines of comments and empty lines are not counted.
    names = ('config', 'model', 'optimizer', 'sharding', 'step', 'train', 'checkpoint')
    lines = [line.strip() for name in names for line in (ROOT / f'tinyllama_jax/{name}.py').read_text().splitlines()]
    assert sum(not line.startswith('#') for line in lines if line) < 1_120


TESTS = {str(path.relative_to(ROOT)) for path in (ROOT / 'tests').rglob('*_test.py')}
# These test more than one module, or what is not a module of the product.
ACROSS = {f'tests/{name}_test.py' for name in ('layout', 'trajectory', 'launch', 'bench/gpu')}


def test_every_module_has_a_test_file_of_its_name_and_every_test_file_its_module():
    # An experiment needs none: settings/experiment_test.py validates every file in configs/.
    modules = {path.removesuffix('.py') for path in SOURCES if not path.startswith('configs/')}
    assert {f'tests/{module}_test.py' for module in modules} == TESTS - ACROSS
