"""The command evaluate: one model, kept answers, parity, tables, the figure, refusals."""

import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

from eval_bridge import command, lm
from eval_bridge.hf import convert
from eval_bridge.tables import results
from tests.conftest import ROOT
from tests.support import tiny_export
from tinyllama_jax import errors
from tinyllama_jax.settings import commands

PADDED = 304  # rows of the embedding: a few more than the tokenizer has pieces, as in Pythia
pytestmark = pytest.mark.filterwarnings('ignore')  # lm-eval and datasets give warnings of their own

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: data/questions.jsonl}}}}
test_split: test
num_fewshot: 2
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture(scope='module')
def task_files(tmp_path_factory):
    """Tasks with the names of Table 2's, on eight questions."""
    root = tmp_path_factory.mktemp('tasks')
    for folder in ('data', 'tasks'):
        (root / folder).mkdir()
    examples = [
        {'context': f'def f{number}(x): return', 'choices': [' x', ' (x + 1) * 2', '\n'], 'answer': number % 3}
        for number in range(8)
    ]
    (root / 'data' / 'questions.jsonl').write_text('\n'.join(map(json.dumps, examples)))
    for name in results.TABLES[2]:
        (root / 'tasks' / f'{name}.yaml').write_text(TASK.format(name=name))
    (root / 'tasks' / 'needy.yaml').write_text(TASK.format(name='needy') + 'process_docs: !function needy.process')
    (root / 'tasks' / 'needy.py').write_text('import nowhere_at_all')
    return str(root / 'tasks')


@pytest.fixture(scope='module')
def llama(tmp_path_factory):
    return tiny_export.write_export(tmp_path_factory.mktemp('llama'))


@pytest.fixture(scope='module')
def others(tmp_path_factory):
    """Random models with the architectures of OPT-1.3B and the two Pythias, and byte-level tokenizers like theirs."""
    transformers, torch = pytest.importorskip('transformers'), tiny_export.require_torch()
    tokenizers = pytest.importorskip('tokenizers')
    small = {'hidden_size': 32, 'num_attention_heads': 4, 'max_position_embeddings': 128, 'vocab_size': PADDED}
    configs = {
        'opt': transformers.OPTConfig(**small, num_hidden_layers=2, ffn_dim=64, word_embed_proj_dim=32),
        'pythia': transformers.GPTNeoXConfig(**small, num_hidden_layers=2, intermediate_size=64),
        'pythia-large': transformers.GPTNeoXConfig(**small, num_hidden_layers=3, intermediate_size=96),
    }
    bytes_only = tokenizers.ByteLevelBPETokenizer()
    bytes_only.train_from_iterator([tiny_export.text()], vocab_size=300, special_tokens=['<|endoftext|>'])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytes_only._tokenizer, bos_token='<|endoftext|>', eos_token='<|endoftext|>'
    )
    root = tmp_path_factory.mktemp('others')
    for name, config in configs.items():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture(scope='module')
def run(tmp_path_factory, llama):
    """A workdir with the Llama's weights at step 0."""
    folder = tmp_path_factory.mktemp('run') / 'run'
    convert.import_run(None, folder, input=str(llama), command='main.py import')
    return folder


def _evaluate(task_files, folder=None, **options):
    command.evaluate_run(None, folder, include_path=task_files, **options)


def test_the_flags_and_their_defaults_are_those_of_the_table_of_commands():
    defaults = {name: commands.FLAGS[name][1] for name in commands.COMMANDS['evaluate'].flags.split()}
    fields = {field.name: field.default for field in dataclasses.fields(command.Flags)}
    assert fields == {name: tuple(value) if isinstance(value, list) else value for name, value in defaults.items()}


def test_the_result_of_a_run_is_stamped_and_its_answers_are_kept(task_files, run, capsys):
    _evaluate(task_files, run, tasks=['piqa'])
    result = json.loads((run / 'eval' / 'step-0.json').read_text())
    stamp = result['protocol']
    assert (stamp['name'], stamp['num_fewshot'], stamp['dtype'], stamp['add_bos']) == (
        'paper', {'piqa': 0}, 'float32', False,
    )  # fmt: skip
    assert (stamp['step'], stamp['backend'], stamp['max_length']) == (0, 'jax', tiny_export.MODEL.seq_len)
    hashes = ('weights_sha256', 'settings_sha256', 'tokenizer_sha256')
    assert all(len(stamp[name]) == 64 for name in hashes) and set(hashes) < set(command._ANSWERS_DEPEND_ON)
    (kept,) = (run / 'eval' / 'responses').iterdir()
    lines = kept.read_text().splitlines()
    assert len(lines) == 24
    # Wrong answers in the file change the result: the kept answers are used.
    kept.write_text(''.join(json.dumps([json.loads(line)[0], [-1e3, False]]) + '\n' for line in lines))
    _evaluate(task_files, run, tasks=['piqa'])
    again = json.loads((run / 'eval' / 'step-0.json').read_text())['results']['piqa']
    kept.unlink()
    assert result['results']['piqa']['gold_bits_per_byte,none'] < 50 < again['gold_bits_per_byte,none']
    assert 'gold_bits_per_byte' in capsys.readouterr().out


def test_the_harness_s_own_protocol_takes_the_task_s_shots(task_files, run, tmp_path):
    _evaluate(task_files, run, tasks=['piqa'], protocol='current', output=str(tmp_path / 'current.json'))
    stamp = json.loads((tmp_path / 'current.json').read_text())['protocol']
    assert (stamp['name'], stamp['num_fewshot'], stamp['add_bos']) == ('current', {'piqa': 2}, False)


def test_results_of_other_tasks_and_settings_are_kept_apart(task_files, llama, tmp_path, capsys):
    folder = tmp_path / 'run'
    convert.import_run(None, folder, input=str(llama), command='main.py import')
    for tasks, options in ((['piqa'], {}), (['boolq'], {}), (['piqa'], {'limit': 2}), (['piqa'], {})):
        _evaluate(task_files, folder, tasks=tasks, **options)
    names = ['step-0-boolq-paper-jax', 'step-0-piqa-paper-jax-first2', 'step-0']
    kept = [json.loads((folder / 'eval' / f'{name}.json').read_text()) for name in names]
    assert [list(result['results']) for result in kept] == [['boolq'], ['piqa'], ['piqa']]
    assert [result['protocol']['limit'] for result in kept] == [None, 2, None]
    assert len(list((folder / 'eval').glob('*.json'))) == 3
    assert f'result: {folder}/eval/step-0-boolq-paper-jax.json' in capsys.readouterr().out


def test_parity_with_transformers_is_reported(task_files, llama, others, tmp_path, capsys):
    _evaluate(task_files, tasks=['piqa'], model=str(llama), parity=True, output=str(tmp_path / 'r.json'))
    result = json.loads((tmp_path / 'r.json').read_text())
    assert result['parity']['holds'] and result['parity']['loglikelihoods'] == 24
    assert 'parity: 24 log-likelihoods' in capsys.readouterr().out
    assert 'samples' not in result


def test_a_run_through_transformers_gives_the_same(task_files, run, others, tmp_path):
    for backend in ('jax', 'hf'):
        _evaluate(task_files, run, tasks=['piqa'], backend=backend, output=str(tmp_path / f'{backend}.json'))
    ours, theirs = (json.loads((tmp_path / f'{backend}.json').read_text()) for backend in ('jax', 'hf'))
    assert ours['results']['piqa']['gold_bits_per_byte,none'] == pytest.approx(
        theirs['results']['piqa']['gold_bits_per_byte,none'], abs=1e-4
    )
    assert ours['protocol']['weights_sha256'] == theirs['protocol']['weights_sha256']


def test_table_2_of_the_paper_s_models(task_files, llama, others, tmp_path, capsys):
    folders = {'OPT-1.3B': 'opt', 'Pythia-1.0B': 'pythia', 'Pythia-1.4B': 'pythia-large'}
    models = [str(llama), *(f'{name}={others / folder}' for name, folder in folders.items())]
    _evaluate(task_files, models=models, table=2, output=str(tmp_path))
    lines = (tmp_path / 'table2.md').read_text().splitlines()
    assert [line.split('|')[1].strip() for line in lines[2:6]] == ['export', *folders]
    for line, published in zip(lines[3:], ('53.65', '47.16', '52.01'), strict=False):
        assert re.search(rf'\d+\.\d\d ± \d+\.\d\d \({published}, [+-]\d+\.\d se\)', line)
    assert '(' not in lines[2]  # a model that was not published stands alone
    rows = json.loads((tmp_path / 'table2.json').read_text())
    assert len(rows) == 4 * 8  # seven tasks and their average
    for row in rows:
        if row['published'] is not None and row['stderr']:
            assert row['difference_in_stderr'] == pytest.approx((row['value'] - row['published']) / row['stderr'])
    stamps = [json.loads((tmp_path / f'{name}-table2.json').read_text())['protocol'] for name in ('export', *folders)]
    assert [stamp['backend'] for stamp in stamps] == ['jax', 'hf', 'hf', 'hf']
    assert {(stamp['name'], stamp['dtype'], stamp['add_bos']) for stamp in stamps} == {('paper', 'float32', False)}
    assert 'OPT-1.3B' in capsys.readouterr().out
    assert len(list((tmp_path / 'responses').iterdir())) == 4


def test_figure_2_of_folders_and_of_a_run(task_files, llama, run, tmp_path):
    _evaluate(task_files, tasks=['piqa'], models=[f'105b={llama}', f'x-1T={llama}'], figure=2, output=str(tmp_path))
    with open(tmp_path / 'figure2.csv') as file:
        assert [float(row['tokens']) for row in csv.DictReader(file)] == [105e9, 1e12]
    _evaluate(task_files, run, tasks=['piqa'], figure=2)
    assert (run / 'eval' / 'figure2.html').exists() and (run / 'eval' / 'step-0.json').exists()
    with pytest.raises(errors.UsageError, match='step-0 and x-0b have the same training tokens'):
        _evaluate(task_files, run, tasks=['piqa'], models=[f'x-0b={llama}'], figure=2)
    shutil.copytree(run, tmp_path / 'new', ignore=shutil.ignore_patterns('checkpoints'))
    with pytest.raises(errors.UsageError, match='--figure=2: the run has no checkpoint yet'):
        _evaluate(task_files, tmp_path / 'new', tasks=['piqa'], figure=2)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({}, r'evaluate needs --workdir=DIR, the folder of a run, or --model=FOLDER'),
        ({'table': 2, 'output': 'x'}, r'evaluate needs --workdir=DIR, .* \(--models for a table or figure\)'),
        ({'models': ['a']}, '--models=.* belongs to --table or --figure'),
        ({'table': 2}, '--output=DIR'),
        ({'table': 4, 'output': 'x'}, '--table=4: only tables 2 and 3 exist'),
        ({'figure': 3, 'output': 'x'}, '--figure=3: only figure 2 exists'),
        ({'table': 2, 'figure': 2, 'output': 'x'}, 'one at a time'),
        ({'figure': 2, 'models': ['somewhere'], 'output': 'x'}, 'somewhere does not end with its training tokens'),
        ({'table': 2, 'models': ['a=x', 'a=y'], 'output': 'x'}, 'a is given twice'),
        ({'table': 2, 'models': ['a', 'b=x'], 'output': 'x'}, 'a/config.json cannot be read'),
        ({'figure': 2, 'models': ['a-1b=x', 'b-1B=y'], 'output': 'x'}, 'a-1b and b-1B have the same training tokens'),
        ({'table': 3, 'output': 'x', 'model': 'nowhere'}, '--tasks: piqa: not in --table=3, which shows mmlu'),
        ({'table': 2, 'parity': True, 'output': 'x'}, '--parity compares one model'),
        ({'step': 3, 'model': 'nowhere'}, '--step=3 is a checkpoint of a run; give'),
        ({'model': 'nowhere', 'output': '.'}, '--output=. is a folder'),
        ({'limit': 0, 'model': 'nowhere'}, '--limit=0: give a number of examples'),
        ({'model': 'nowhere'}, 'nowhere/config.json cannot be read'),
        ({'tasks': ['humaneval'], 'model': 'nowhere'}, 'run programs that the model wrote; give --confirm_run'),
        ({'task_data': 'nowhere', 'model': 'nowhere'}, '--task_data=nowhere is not a folder'),
        ({'tasks': ['needy'], 'model': 'nowhere'}, 'the task needy needs the package nowhere_at_all'),
    ],
)
def test_what_cannot_be_evaluated_is_refused(task_files, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.UsageError, match=message):
        _evaluate(task_files, **{'tasks': ['piqa'], **options})


def test_a_folder_that_transformers_cannot_open_is_named(task_files, others, tmp_path):
    shutil.copytree(others / 'opt', tmp_path / 'broken')
    (tmp_path / 'broken' / 'model.safetensors').write_bytes(b'nothing')
    with pytest.raises(errors.UsageError, match='broken cannot be opened by transformers'):
        _evaluate(task_files, tasks=['piqa'], model=str(tmp_path / 'broken'))


def test_weights_that_transformers_would_make_up_are_refused(task_files, others, tmp_path):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(others / 'opt', tmp_path / 'short')
    path = tmp_path / 'short' / 'model.safetensors'
    weights = load_file(path)
    del weights['model.decoder.layers.1.fc1.weight']
    save_file(weights, path, metadata={'format': 'pt'})
    with pytest.raises(errors.UsageError, match=r'the weights have no model\.decoder\.layers\.1\.fc1\.weight'):
        _evaluate(task_files, tasks=['piqa'], model=str(tmp_path / 'short'))


def test_a_tokenizer_with_more_pieces_than_another_architecture_knows_is_refused(task_files, others, tmp_path):
    transformers = pytest.importorskip('transformers')
    shutil.copytree(others / 'opt', tmp_path / 'other')
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'other')
    tokenizer.add_tokens([f'<{number}>' for number in range(8)])
    tokenizer.save_pretrained(tmp_path / 'other')
    with pytest.raises(errors.UsageError, match='other has 308 pieces, but the model knows 304'):
        _evaluate(task_files, tasks=['piqa'], model=str(tmp_path / 'other'))


def test_weights_of_another_shape_are_refused_by_transformers_too(task_files, others, tmp_path):
    shutil.copytree(others / 'pythia', tmp_path / 'wide')
    path = tmp_path / 'wide' / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'intermediate_size': 96}))
    with pytest.raises(errors.UsageError, match='wide'):
        _evaluate(task_files, tasks=['piqa'], model=str(tmp_path / 'wide'))


KILLED = """
import os, signal, sys
from eval_bridge import branches, command, lm, opening
branches.ROW, lm._CHUNK, opening._BATCH_SIZE = 64, 64, 1  # a short row a batch
calls, score = [], lm.JaxLM._score_batch

def killed(self, batch):
    calls.append(batch)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return score(self, batch)

lm.JaxLM._score_batch = killed
command.evaluate_run(None, None, include_path=sys.argv[1], tasks=['piqa'], model=sys.argv[2], output=sys.argv[3])
"""


def test_a_killed_evaluation_resumes_and_asks_nothing_twice(task_files, llama, tmp_path, monkeypatch):
    output = tmp_path / 'result.json'
    arguments = [sys.executable, '-c', KILLED, task_files, str(llama), str(output)]
    one_device = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}  # so that a row is a batch
    killed = subprocess.run(arguments, cwd=ROOT, env=one_device, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (kept,) = (tmp_path / 'responses').iterdir()
    before = len(kept.read_text().splitlines())
    assert 0 < before < 24 and not output.exists()
    asked = []
    score = lm.JaxLM._loglikelihood_tokens

    def recorded(self, requests, **options):
        asked.extend(requests)
        return score(self, requests, **options)

    monkeypatch.setattr(lm.JaxLM, '_loglikelihood_tokens', recorded)
    _evaluate(task_files, tasks=['piqa'], model=str(llama), output=str(output))
    assert len(asked) == 24 - before
    fresh_output = tmp_path / 'fresh' / 'result.json'
    _evaluate(task_files, tasks=['piqa'], model=str(llama), output=str(fresh_output))
    resumed, fresh = (json.loads(path.read_text())['results']['piqa'] for path in (output, fresh_output))
    assert resumed['acc,none'] == fresh['acc,none']
    assert resumed['gold_bits_per_byte,none'] == pytest.approx(fresh['gold_bits_per_byte,none'], abs=1e-5)
