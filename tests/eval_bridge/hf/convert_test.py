"""Export and import: bit-equal round trips, published folders, what transformers loads, what is refused."""

import dataclasses
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from eval_bridge.hf import convert, weights
from tests.conftest import ROOT
from tests.support import json_tokenizers, tiny_export
from tinyllama_jax import errors, model
from tinyllama_jax.config import ModelConfig
from tinyllama_jax.tokenizer import loading

MODEL = tiny_export.MODEL


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tiny_export.write_export(tmp_path_factory.mktemp('convert'))


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / 'copy')


def _same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def _edit(folder, **fields):
    path = folder / 'config.json'
    values = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({field: value for field, value in values.items() if value != 'drop'}))


def _computed(config):
    """Returns the settings that weights decide, with import's defaults for the others."""
    return dataclasses.replace(config, init='normal', compute_dtype=None)


@pytest.mark.parametrize('max_shard_bytes', [weights.MAX_SHARD_BYTES, 40_000])
@pytest.mark.parametrize('format', ['safetensors', 'pytorch'])
@pytest.mark.parametrize('rope_scaling', [1.0, 4.0])
def test_round_trip_is_bit_equal(tmp_path, format, max_shard_bytes, rope_scaling):
    if format == 'pytorch':
        pytest.importorskip('torch')
    config = dataclasses.replace(MODEL, rope_scaling=rope_scaling)
    folder = tiny_export.write_export(tmp_path, config, format=format, max_shard_bytes=max_shard_bytes)
    shards = [path for path in folder.iterdir() if path.suffix in ('.safetensors', '.bin')]
    assert len(shards) == 1 if max_shard_bytes > 40_000 else len(shards) > 2
    params, imported = convert.import_weights(folder)
    _same(params, tiny_export.params())
    assert imported == _computed(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['export', 'tokenizer.model']


@pytest.mark.parametrize('format', ['safetensors', 'pytorch'])
def test_bfloat16_rounds_once_and_then_stays(tmp_path, format):
    if format == 'pytorch':
        pytest.importorskip('torch')
    folder = tiny_export.write_export(tmp_path, dtype='bfloat16', format=format)
    params, config = convert.import_weights(folder)
    _same(params, jax.tree.map(lambda leaf: leaf.astype('bfloat16').astype('float32'), tiny_export.params()))
    again = tmp_path / 'again'
    convert.export(params, config, tmp_path / 'tokenizer.model', again, dtype='bfloat16', format=format)
    if format == 'safetensors':  # torch's files hold a time
        assert (again / 'model.safetensors').read_bytes() == (folder / 'model.safetensors').read_bytes()
    _same(convert.import_weights(again)[0], params)


def test_the_safetensors_library_reads_the_file(folder):
    tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
    params = tiny_export.params()
    D = MODEL.embed_dim
    np.testing.assert_array_equal(tensors['lm_head.weight'], params['lm_head'].T)
    np.testing.assert_array_equal(
        tensors['model.layers.1.self_attn.q_proj.weight'], params['layers']['attention']['q'][1].reshape(D, -1).T
    )
    np.testing.assert_array_equal(
        tensors['model.layers.0.self_attn.o_proj.weight'], params['layers']['attention']['o'][0].reshape(-1, D).T
    )


def test_transformers_loads_it_offline(tmp_path):
    transformers = pytest.importorskip('transformers')
    folder = tiny_export.write_export(tmp_path, dataclasses.replace(MODEL, rope_scaling=4.0), dtype='bfloat16')
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert str(loaded.dtype) == 'torch.bfloat16'
    assert loaded.config.rope_parameters['rope_type'] == 'linear'
    assert loaded.config.rope_parameters['factor'] == 4.0
    assert (loaded.config.rms_norm_eps, loaded.config.max_position_embeddings) == (MODEL.norm_eps, MODEL.seq_len)
    assert not loaded.generation_config.do_sample
    assert loaded.generation_config.eos_token_id == 2


# Import of other people's folders.


def _published(folder):
    """Rewrites an export in the form of TinyLlama's published folders: .bin, old config, rotary buffers."""
    torch = pytest.importorskip('torch')
    tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
    state = {name: torch.from_numpy(array).to(torch.float16) for name, array in tensors.items()}
    for layer in range(MODEL.num_layers):
        state[f'model.layers.{layer}.self_attn.rotary_emb.inv_freq'] = torch.ones(4)
    torch.save(state, folder / 'pytorch_model.bin')
    (folder / 'model.safetensors').unlink()
    _edit(
        folder,
        head_dim='drop',
        rope_theta='drop',
        attention_bias='drop',
        mlp_bias='drop',
        pretraining_tp=1,
        transformers_version='4.31.0.dev0',
    )


def test_a_folder_as_published_is_imported(copied):
    _published(copied)
    params, config = convert.import_weights(copied)
    assert config == _computed(MODEL)
    _same(params, jax.tree.map(lambda leaf: leaf.astype('float16').astype('float32'), tiny_export.params()))


def test_a_folder_saved_by_transformers_is_imported(copied, tmp_path):
    transformers = pytest.importorskip('transformers')
    _edit(copied, rope_scaling={'type': 'linear', 'factor': 4.0})
    transformers.AutoModelForCausalLM.from_pretrained(copied).save_pretrained(tmp_path / 'saved')
    params, config = convert.import_weights(tmp_path / 'saved')
    _same(params, tiny_export.params())
    assert config == dataclasses.replace(_computed(MODEL), rope_scaling=4.0)


def test_tied_embeddings_become_two_equal_matrices(copied):
    tensors = safetensors.numpy.load_file(copied / 'model.safetensors')
    del tensors['lm_head.weight']
    safetensors.numpy.save_file(tensors, copied / 'model.safetensors')
    with pytest.raises(errors.UsageError, match=r'lacks 1 tensors, lm_head\.weight'):
        convert.import_weights(copied)
    _edit(copied, tie_word_embeddings=True)
    params, _ = convert.import_weights(copied)
    np.testing.assert_array_equal(params['lm_head'], params['embed'].T)


def test_tied_matrices_that_differ_are_refused_and_either_may_be_missing(copied):
    _edit(copied, tie_word_embeddings=True)
    with pytest.raises(errors.UsageError, match=r'tie_word_embeddings is true, but .*embed_tokens.* and lm_head'):
        convert.import_weights(copied)
    tensors = safetensors.numpy.load_file(copied / 'model.safetensors')
    del tensors['model.embed_tokens.weight']
    safetensors.numpy.save_file(tensors, copied / 'model.safetensors')
    params, _ = convert.import_weights(copied)
    np.testing.assert_array_equal(params['embed'], tiny_export.params()['lm_head'].T)
    np.testing.assert_array_equal(params['lm_head'], tiny_export.params()['lm_head'])


def test_names_without_model_as_llamamodel_saves_them_are_imported(copied):
    tensors = safetensors.numpy.load_file(copied / 'model.safetensors')
    short = {name.removeprefix('model.'): array for name, array in tensors.items() if name != 'lm_head.weight'}
    safetensors.numpy.save_file(short, copied / 'model.safetensors')
    _edit(copied, tie_word_embeddings=True)
    params, _ = convert.import_weights(copied)
    _same(params['layers'], tiny_export.params()['layers'])
    _same(params['embed'], tiny_export.params()['embed'])


def test_a_bin_of_parameters_is_imported(copied):
    torch = pytest.importorskip('torch')
    tensors = safetensors.numpy.load_file(copied / 'model.safetensors')
    (copied / 'model.safetensors').unlink()
    state = {name: torch.nn.Parameter(torch.from_numpy(array)) for name, array in tensors.items()}
    torch.save(state, copied / 'pytorch_model.bin')
    _same(convert.import_weights(copied)[0], tiny_export.params())


@pytest.mark.parametrize(
    ('fields', 'named'),
    [
        ({'model_type': 'mistral'}, 'model_type'),
        ({'model_type': 'drop'}, 'model_type'),
        ({'hidden_act': 'gelu'}, 'hidden_act'),
        ({'attention_bias': True}, 'attention_bias'),
        ({'mlp_bias': True}, 'mlp_bias'),
        ({'quantization_config': {'bits': 4}}, 'quantization_config'),
        ({'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}}, 'rope_scaling'),
        ({'rope_parameters': {'rope_type': 'yarn'}}, 'rope_parameters'),
        ({'rope_scaling': {'type': 'linear'}}, 'factor'),
        ({'hidden_size': 'drop'}, 'hidden_size'),
        ({'num_key_value_heads': 3}, 'num_kv_heads'),
        ({'intermediate_size': 50}, r'mlp\.\w+_proj\.weight has the shape'),
    ],
)
def test_another_model_is_refused_naming_the_field(copied, fields, named):
    _edit(copied, **fields)
    with pytest.raises(errors.UsageError, match=named):
        convert.import_weights(copied)


def _extra_tensor(folder, name='model.layers.0.self_attn.q_proj.bias'):
    tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
    safetensors.numpy.save_file(tensors | {name: np.zeros(32, np.float32)}, folder / 'model.safetensors')


def _compiled(folder):
    tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
    compiled = {f'_orig_mod.{name}': array for name, array in tensors.items()}
    safetensors.numpy.save_file(compiled, folder / 'model.safetensors')


def _twice(folder):
    norm = {'model.norm.weight': np.ones(MODEL.embed_dim, np.float32)}
    (folder / 'model.safetensors').rename(folder / 'a.safetensors')
    safetensors.numpy.save_file(norm, folder / 'b.safetensors')
    index = {'weight_map': {'model.norm.weight': 'b.safetensors', 'lm_head.weight': 'a.safetensors'}}
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))


@pytest.mark.parametrize(
    ('spoil', 'named'),
    [
        (_extra_tensor, r'q_proj\.bias'),
        (lambda folder: _extra_tensor(folder, 'model.layers.2.mlp.up_proj.weight'), r'layers\.2\..* of 2 layers'),
        (lambda folder: _extra_tensor(folder, 'norm.weight'), 'tensor norm.weight twice'),
        (_compiled, r'tensor _orig_mod\.'),
        (_twice, r'tensor model\.norm\.weight twice'),
        (lambda folder: (folder / 'config.json').write_text('[1]'), r'config\.json holds a list, not a JSON object'),
        (lambda folder: (folder / 'config.json').unlink(), r'config\.json cannot be read'),
        (lambda folder: (folder / 'config.json').write_text('{'), r'config\.json is not valid JSON'),
    ],
)
def test_a_spoilt_folder_is_refused_naming_the_file(copied, spoil, named):
    spoil(copied)
    with pytest.raises(errors.UsageError, match=named):
        convert.import_weights(copied)


def test_an_export_of_an_import_has_its_settings_and_what_is_lost_is_named(copied, tmp_path, capsys):
    special = {'bos_token_id': 1, 'eos_token_id': [2, 5], 'pad_token_id': 0}
    generation = {**special, 'do_sample': True, 'temperature': 0.6, 'repetition_penalty': 1.2}
    _edit(copied, **special, attention_dropout=0.1, custom=3, tie_word_embeddings=True)
    tensors = safetensors.numpy.load_file(copied / 'model.safetensors')
    del tensors['lm_head.weight']
    safetensors.numpy.save_file(tensors, copied / 'model.safetensors')
    (copied / 'generation_config.json').write_text(json.dumps(generation))
    convert.import_run(None, tmp_path / 'run', input=str(copied), command='')
    said = capsys.readouterr().err
    assert "will not have config.json's tie_word_embeddings, custom" in said
    assert 'texts are generated without repetition_penalty=1.2' in said
    convert.export_run(None, tmp_path / 'run', step=None, output=str(tmp_path / 'out'))
    values = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert values.items() >= (special | {'attention_dropout': 0.1, 'tie_word_embeddings': False}).items()
    assert json.loads((tmp_path / 'out' / 'generation_config.json').read_text()) == generation


FILES = ['tokenizer.json', 'tokenizer.model', 'tokenizer.model and added_tokens.json', 'tokenizer.json and config.json']


@pytest.mark.parametrize('files', FILES)
def test_transformers_reads_an_import_s_export_as_it_reads_the_folder(tmp_path, files):
    transformers = pytest.importorskip('transformers')
    torch = tiny_export.require_torch()
    config, source = dataclasses.replace(MODEL, vocab_size=408), tmp_path / 'source'
    path = tiny_export.write_tokenizer(tmp_path / 'tokenizer.model')
    convert.export(model.init_params(config, jax.random.key(1)), config, path, source, add_bos=True)
    special = {'bos_token_id': 1, 'eos_token_id': [2, 5], 'pad_token_id': 0}
    _edit(source, **special, rope_scaling={'type': 'linear', 'factor': 2.0})
    (source / 'generation_config.json').write_text(json.dumps({**special, 'do_sample': True, 'temperature': 0.6}))
    template = '{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}'
    edit = json_tokenizers.edit
    edit(source / 'tokenizer_config.json', pad_token='<unk>', chat_template=template)
    if 'tokenizer.model' in files:
        (source / 'tokenizer.json').unlink()
        edit(source / 'tokenizer_config.json', tokenizer_class='LlamaTokenizer', add_bos_token=True)
    if 'config' in files:  # the class, without which texts would have other ids, is named there alone
        edit(source / 'config.json', tokenizer_class='LlamaTokenizer')
        edit(source / 'tokenizer_config.json', tokenizer_class=None)
        (source / 'generation_config.json').unlink()
    if 'added' in files:
        edit(source / 'added_tokens.json', **{'<|im_start|>': 400, '<|im_end|>': 401})
    convert.import_run(None, tmp_path / 'run', input=str(source), command='')
    convert.export_run(None, tmp_path / 'run', step=None, output=str(tmp_path / 'out'))
    before, after = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (source, tmp_path / 'out'))
    ours = loading.load(tmp_path / 'run' / 'tokenizer')
    for text in ('hello world', '  two\nlines <s>x</s>', 'naïve', '', 'a<|im_end|> b'):
        assert after(text).input_ids == before(text).input_ids == ours.encode(text, special=True), text
    assert before('hello').input_ids[0] == 1
    chat = [{'role': 'user', 'content': 'hi'}]
    assert (after.pad_token, after.apply_chat_template(chat, tokenize=False)) == ('<unk>', 'user: hi')
    theirs, ours = (transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in (source, tmp_path / 'out'))
    kept = [loaded.generation_config.to_dict() for loaded in (ours, theirs)]
    if 'config' in files:
        kept = [{name: value for name, value in values.items() if name.endswith('_id')} for values in kept]
    assert kept[0] == kept[1]
    tokens_BT = torch.arange(40)[None]
    np.testing.assert_array_equal(ours(tokens_BT).logits.detach(), theirs(tokens_BT).logits.detach())


# Where an export goes.


def test_without_torch_the_pytorch_format_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch', None)
    with pytest.raises(errors.UsageError, match='--format=pytorch needs torch'):
        tiny_export.write_export(tmp_path, format='pytorch')
    assert [path.name for path in tmp_path.iterdir()] == ['tokenizer.model']


def test_an_output_that_is_not_empty_is_refused_and_kept(tmp_path):
    output = tmp_path / 'export'
    output.mkdir()
    (output / 'mine').write_text('precious')
    with pytest.raises(errors.UsageError, match=f'--output={output}'):
        tiny_export.write_export(tmp_path)
    assert [path.name for path in output.iterdir()] == ['mine']
    (output / 'mine').unlink()
    tiny_export.write_export(tmp_path)
    assert (output / 'model.safetensors').exists()


def test_an_empty_folder_that_cannot_be_replaced_is_written_inside(tmp_path, monkeypatch):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'export').symlink_to('empty')
    tiny_export.write_export(tmp_path)
    names = {path.name for path in (tmp_path / 'empty').iterdir()}
    assert (
        (tmp_path / 'export').is_symlink() and {'config.json', 'model.safetensors'} <= names and '.partial' not in names
    )
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    convert.export(tiny_export.params(), MODEL, tmp_path / 'tokenizer.model', pathlib.Path('.'))
    assert set(os.listdir('.')) == names
    (tmp_path / 'dangling').symlink_to('nowhere')
    with pytest.raises(errors.UsageError, match='--output=.*dangling exists'):
        convert.export(tiny_export.params(), MODEL, tmp_path / 'tokenizer.model', tmp_path / 'dangling')


@pytest.mark.parametrize('format', ['safetensors', 'pytorch'])
def test_a_write_that_fails_leaves_nothing(tmp_path, format):
    if format == 'pytorch':
        pytest.importorskip('torch')
    tiny_export.write_tokenizer(tmp_path / 'tokenizer.model')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # the weights are larger than this
    try:
        with pytest.raises(errors.RunError, match='could not be written'):
            convert.export(
                tiny_export.params(), MODEL, tmp_path / 'tokenizer.model', tmp_path / 'export', format=format
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ['tokenizer.model']


_INTERRUPTED = """
import os, pathlib, signal, sys
from eval_bridge.hf import convert, weights
from tinyllama_jax.process import signals
from tinyllama_jax.run import workdir

def interrupt(*_, **__):
    assert len(os.listdir(sys.argv[2])) == 1  # the folder that is being made
    os.kill(os.getpid(), signal.SIGINT)

weights.write = workdir.write_config_file = interrupt
signals.end_on_ctrl_c('stopped')
source, output = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2], 'output')
"""


@pytest.mark.parametrize(
    'program',
    [
        "convert.export(*convert.import_weights(source), source / 'tokenizer.model', output)",
        "convert.import_run(None, output, input=str(source), command='')",
    ],
)
def test_ctrl_c_leaves_nothing_half_made(folder, tmp_path, program):
    command = [sys.executable, '-c', _INTERRUPTED + program, folder, tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 130 and done.stderr.endswith('stopped\n'), done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('config', 'options', 'named'),
    [
        (dataclasses.replace(MODEL, vocab_size=300), {}, 'vocab_size'),
        (dataclasses.replace(MODEL, num_heads=6), {}, 'embed_dim'),
        (MODEL, {'dtype': 'float16'}, '--dtype'),
        (MODEL, {'format': 'gguf'}, '--format'),
    ],
)
def test_what_cannot_be_exported_is_named(tmp_path, config: ModelConfig, options, named):
    with pytest.raises(errors.UsageError, match=named):
        tiny_export.write_export(tmp_path, config, **options)
    assert not (tmp_path / 'export').exists()
