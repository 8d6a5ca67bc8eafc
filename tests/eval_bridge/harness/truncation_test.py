"""Requests too long for the model: counted by task, the same for every backend, and reported on stderr."""

import dataclasses
import json

import pytest

from eval_bridge import evaluate, lm
from eval_bridge.harness import responses, truncation
from eval_bridge.hf import convert
from tests.support import tiny_export
from tinyllama_jax.tokenizer import loading

# lm-eval and datasets issue warnings of their own.
pytestmark = pytest.mark.filterwarnings('ignore')

CONFIG = dataclasses.replace(tiny_export.MODEL, seq_len=48)
CHOICE = """
task: choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: data/documents.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: [" yes", " no, at "]
doc_to_target: 0
target_delimiter: ""
"""
TEXT = """
task: text
dataset_path: json
dataset_kwargs:
  data_files:
    test: data/documents.jsonl
test_split: test
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "x"
generation_kwargs:
  until: ["."]
  max_gen_toks: 8
filter_list:
  - name: first
    filter: [{function: take_first}]
  - name: again
    filter: [{function: take_first}]
"""
WHOLE = """
task: whole
dataset_path: json
dataset_kwargs:
  data_files:
    test: data/documents.jsonl
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{context}}"
metric_list: [{metric: bits_per_byte}]
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tiny_export.write_export(tmp_path_factory.mktemp('truncation_export'), CONFIG)


@pytest.fixture(scope='module')
def encoder(folder):
    return loading.load(folder)


@pytest.fixture(scope='module')
def texts(encoder):
    """Returns texts of 35, 36, ... 52 tokens."""
    by_length = {len(encoder.encode(text)): text for text in (tiny_export.text()[:end] for end in range(40, 400))}
    return [by_length[length] for length in range(35, 53)]


@pytest.fixture(scope='module')
def task_files(texts, tmp_path_factory):
    root = tmp_path_factory.mktemp('truncation')
    (root / 'data').mkdir()
    (root / 'tasks').mkdir()
    for name, text in {'choice': CHOICE, 'text': TEXT, 'whole': WHOLE}.items():
        (root / 'tasks' / f'{name}.yaml').write_text(text)
    lines = (json.dumps({'context': text}) + '\n' for text in texts)
    (root / 'data' / 'documents.jsonl').write_text(''.join(lines))
    return root / 'tasks'


@pytest.fixture(scope='module')
def expected(encoder, texts):
    """Returns the counts by hand: all but the last token of a choice is read; a prompt leaves room for eight."""
    lengths = [len(encoder.encode(text + choice)) for text in texts for choice in (' yes', ' no, at ')]
    return {
        'choice': sum(length - 1 > 48 for length in lengths),
        'text': sum(len(encoder.encode(text)) > 40 for text in texts),
        'whole': 0,
    }


def _counts(model, task_files):
    result = evaluate.evaluate(model, ['choice', 'text', 'whole'], include_path=task_files)
    return result['protocol']['truncated_requests']


def test_truncated_requests_are_counted_and_reported(folder, task_files, expected, tmp_path, capsys):
    params, config = convert.import_weights(folder)
    model = lm.JaxLM(params, config, loading.load(folder))
    for remembered in (0, 72):  # kept answers count too
        keeping = responses.Remembering(model, tmp_path / 'kept.jsonl')
        assert _counts(keeping, task_files) == expected
        keeping.close()
        assert keeping.remembered == remembered
        line = f'cut on the left: {expected["choice"]} of choice, {expected["text"]} of text.'
        assert line in capsys.readouterr().err
    assert 0 < expected['choice'] < 36
    assert 0 < expected['text'] < 18


def test_lm_eval_s_hf_model_counts_the_same(folder, task_files, expected):
    tiny_export.require_torch()
    huggingface = pytest.importorskip('lm_eval.models.huggingface')
    model = huggingface.HFLM(pretrained=str(folder), add_bos_token=False, batch_size=4, device='cpu')
    assert _counts(model, task_files) == expected


def test_a_model_without_tokens_counts_nothing():
    assert truncation.count(object(), {'task': []}) is None
