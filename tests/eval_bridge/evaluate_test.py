"""Evaluation: lm-eval's own results with a protocol, the log-likelihoods of its hf model, refusals."""

import dataclasses
import json
import math
import re
import shutil

import pytest

from eval_bridge import command, evaluate, lm
from eval_bridge.hf import convert
from tests.support import tiny_export
from tinyllama_jax import errors
from tinyllama_jax.run import prompts
from tinyllama_jax.tokenizer import loading

pytestmark = pytest.mark.filterwarnings('ignore')  # lm-eval and datasets give warnings of their own

CONFIG = dataclasses.replace(tiny_export.MODEL, seq_len=256)
CLOZE = """
task: tiny_cloze
dataset_path: json
dataset_kwargs:
  data_files:
    test: data/cloze.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""
PERPLEXITY = """
task: tiny_perplexity
dataset_path: json
dataset_kwargs:
  data_files:
    test: data/cloze.jsonl
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{context}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""
REAL = ('local_hellaswag', 'local_arc_challenge', 'local_piqa')


@pytest.fixture(scope='module')
def tasks(tmp_path_factory):
    """A folder of task files, with their data beside it, as in published evaluation data."""
    root = tmp_path_factory.mktemp('evaluate')
    (root / 'data').mkdir()
    (root / 'tasks').mkdir()
    lines = [line for line in tiny_export.text().splitlines() if len(line) > 40][:24]
    records = [
        {'context': line[:30], 'choices': [' ' + line[30:], f' {number}', 'x' * number], 'answer': number % 3}
        for number, line in enumerate(lines, start=1)
    ]
    (root / 'data' / 'cloze.jsonl').write_text('\n'.join(map(json.dumps, records)))
    (root / 'tasks' / 'cloze.yaml').write_text(CLOZE)
    (root / 'tasks' / 'perplexity.yaml').write_text(PERPLEXITY)
    (root / 'tasks' / 'group.yaml').write_text('group: tiny_group\ntask: [tiny_cloze, tiny_perplexity]\n')
    (root / 'data' / 'broken.jsonl').write_text('{"context": "a", "choices": ["b"')
    for name, change in {'empty': {'choices': ['a', '']}, 'wrong': {'answer': 7}}.items():
        (root / 'data' / f'{name}.jsonl').write_text(json.dumps(records[0] | change))
    for name in ('empty', 'wrong', 'broken'):
        text = CLOZE.replace('tiny_cloze', f'tiny_{name}').replace('cloze.jsonl', f'{name}.jsonl')
        (root / 'tasks' / f'{name}.yaml').write_text(f'{text}target_delimiter: ""\n')
    text = CLOZE.replace('tiny_cloze', 'tiny_template').replace('{{context}}', '{{contxt}}')
    (root / 'tasks' / 'template.yaml').write_text(text)
    (root / 'tasks' / 'lost.yaml').write_text(CLOZE.replace('tiny_cloze', 'tiny_lost').replace('data/', 'nowhere/'))
    return root / 'tasks'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tiny_export.write_export(tmp_path_factory.mktemp('evaluate_export'), CONFIG)


@pytest.fixture(scope='module')
def jax_lm(folder):
    params, config = convert.import_weights(folder)
    return lm.JaxLM(params, config, loading.load(folder))


def test_the_file_holds_lm_eval_s_result_and_the_protocol(tasks, jax_lm, tmp_path):
    output = tmp_path / 'eval' / 'result.json'
    result = evaluate.evaluate(
        jax_lm, ['tiny_group'], include_path=tasks, limit=20, log_samples=True, identity={'step': 7}, output=output
    )
    written = json.loads(output.read_text())
    assert [path.name for path in output.parent.iterdir()] == ['result.json']
    assert written['results'] == json.loads(json.dumps(result['results']))
    assert 0 <= written['results']['tiny_cloze']['acc,none'] <= 1
    assert written['results']['tiny_cloze']['acc_stderr,none'] > 0
    _check_gold(written)
    assert 1 < written['results']['tiny_perplexity']['bits_per_byte,none'] < 20
    assert written['n-samples']['tiny_cloze'] == {'original': 24, 'effective': 20}
    assert written['configs']['tiny_cloze']['num_fewshot'] == 0
    assert set(written['versions']) >= {'tiny_cloze', 'tiny_perplexity'}
    assert len(written['samples']['tiny_cloze']) == 20
    assert written['protocol'] == {
        'name': 'paper', 'num_fewshot': dict.fromkeys(('tiny_group', 'tiny_cloze', 'tiny_perplexity'), 0),
        'limit': 20, 'step': 7, 'harness_version': '0.4.13', 'task_versions': written['versions'],
        'truncated_requests': {'tiny_cloze': 0, 'tiny_perplexity': 0},
    }  # fmt: skip


def _check_gold(written):
    """Compares the bits per byte of the right answers with a computation from the samples."""
    nats = size = 0.0
    for sample in written['samples']['tiny_cloze']:
        nats -= sample['filtered_resps'][sample['target']][0]
        size += len(sample['arguments'][sample['target']][1].encode())
    found = written['results']['tiny_cloze']
    assert found['gold_bits_per_byte,none'] == pytest.approx(nats / size / math.log(2))
    assert 0 < found['gold_bits_per_byte_stderr,none'] < found['gold_bits_per_byte,none']


def test_samples_are_left_out_by_default(tasks, jax_lm):
    assert 'samples' not in evaluate.evaluate(jax_lm, ['tiny_cloze'], include_path=tasks, limit=2)


def _responses(result):
    """Returns (task, document, choice) -> log-likelihood of a logged result."""
    return {
        (task, sample['doc_id'], choice): response[0][0] if isinstance(response[0], list | tuple) else response[0]
        for task, samples in result['samples'].items()
        for sample in samples
        for choice, response in enumerate(sample['resps'])
    }


def _check_agreement(folder, ours, tasks, include_path, limit):
    tiny_export.require_torch()
    huggingface = pytest.importorskip('lm_eval.models.huggingface')
    theirs = huggingface.HFLM(pretrained=str(folder), dtype='float32', device='cpu', batch_size=8, add_bos_token=False)
    options = {'include_path': include_path, 'limit': limit, 'log_samples': True}
    found, expected = (_responses(evaluate.evaluate(model, tasks, **options)) for model in (ours, theirs))
    assert len(expected) >= limit * len(tasks)
    assert found.keys() == expected.keys()
    assert found == {key: pytest.approx(value, abs=1e-3) for key, value in expected.items()}


def test_lm_eval_s_hf_model_agrees_on_our_tasks(folder, jax_lm, tasks):
    _check_agreement(folder, jax_lm, ['tiny_group'], tasks, 24)


def test_lm_eval_s_hf_model_agrees_on_real_tasks(folder, jax_lm, test_data_dir):
    _check_agreement(folder, jax_lm, REAL, test_data_dir / 'eval_tasks', 12)


def test_without_a_tokenizer_an_import_says_where_to_put_it_and_so_does_what_needs_it(folder, tasks, tmp_path, capsys):
    source, run = shutil.copytree(folder, tmp_path / 'source'), tmp_path / 'run'
    (source / 'tokenizer.model').unlink()
    (source / 'tokenizer.json').unlink()
    convert.import_run(None, run, input=str(source), command='main.py import')
    said = capsys.readouterr().err
    assert said.startswith(f'import: {run} has no tokenizer: copy the SentencePiece file')
    assert f'to {run}/tokenizer.model' in said

    def export():
        convert.export_run(None, run, step=None, output=str(tmp_path / 'export'))

    def evaluation():
        options = {'model': None, 'step': None, 'tasks': ['tiny_cloze'], 'include_path': tasks, 'output': None}
        command.evaluate_run(None, run, **options)

    for use in (export, evaluation, lambda: prompts.generate_run(None, run, prompt=['a'], max_new_tokens=1)):
        with pytest.raises(errors.UsageError, match=re.escape(said.removeprefix('import: ').strip())):
            use()
    shutil.copyfile(folder / 'tokenizer.model', run / 'tokenizer.model')
    export()
    assert (tmp_path / 'export/tokenizer.json').read_bytes() == (folder / 'tokenizer.json').read_bytes()


@pytest.mark.parametrize(
    ('names', 'message'),
    [
        (['tiny_close'], "no task 'tiny_close'; the nearest is 'tiny_cloze'"),
        (['hellaswagg'], "no task 'hellaswagg'; the nearest is 'hellaswag'"),
        (['piqa'], r'data of the task piqa cannot be loaded .*HF_HUB_OFFLINE=0'),
        (['tiny_lost'], 'data of the task tiny_lost cannot be loaded'),
        (
            ['hellaswag'],
            r'put hellaswag/validation.jsonl \(JSON lines, .*endings.*\) into a folder and give --task_data=',
        ),
        (['humaneval'], r'humaneval: these tasks run programs .* give --confirm_run_unsafe_code'),
        (['mbpp'], 'mbpp runs programs of the model outside our jail'),
        (['tiny_empty'], "tiny_empty has an empty choice or target in .*'choices': \\['a', ''"),
        (['tiny_wrong'], "tiny_wrong: the answer 7 is none of the choices .*'answer': 7"),
        (['tiny_template'], "tiny_template does not fit its task's template: 'contxt' is undefined"),
        (['tiny_broken'], 'tiny_broken cannot be loaded .*broken.jsonl'),
        ([], '--tasks=NAME,NAME is missing'),
    ],
)
def test_tasks_that_cannot_run_are_named(tasks, jax_lm, tmp_path, names, message):
    with pytest.raises(errors.UsageError, match=message):
        evaluate.evaluate(jax_lm, names, include_path=tasks, output=tmp_path / 'result.json')
    assert not list(tmp_path.iterdir())


def test_a_folder_of_tasks_that_is_not_there_is_named(jax_lm, tmp_path):
    with pytest.raises(errors.UsageError, match='--include_path=.* is not a folder'):
        evaluate.evaluate(jax_lm, ['piqa'], include_path=tmp_path / 'none')


def test_an_output_that_cannot_be_written_is_named(tasks, jax_lm, tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(errors.RunError, match='file/result.json could not be written: '):
        evaluate.evaluate(jax_lm, ['tiny_cloze'], include_path=tasks, limit=1, output=tmp_path / 'file' / 'result.json')
