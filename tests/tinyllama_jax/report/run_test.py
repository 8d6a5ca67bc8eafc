"""The report of a run, from files in the formats that train and evaluate write."""

import dataclasses
import json
import re

import pytest
from matplotlib import axes, image
from matplotlib import pyplot as plt

from tests.support import corpora
from tinyllama_jax import errors
from tinyllama_jax.config import Config, ModelConfig, TrainConfig
from tinyllama_jax.data import prepare
from tinyllama_jax.report import run as report
from tinyllama_jax.run import workdir

CONFIG = Config(
    model=ModelConfig(vocab_size=corpora.PIECES, seq_len=31, num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=1),
    train=TrainConfig(num_steps=20, global_batch_size=8, micro_batch_size=8, eval_rows=20),
)


def _write_lines(path, entries):
    path.write_text(''.join(json.dumps(entry) + '\n' for entry in entries))


def _write_training(folder, config=CONFIG):
    workdir.write_config_file(folder, config, 'main.py train --config=<file>')
    entries = [
        {
            'step': step,
            'loss': 6 - step / 10,
            'learning_rate': 1e-3,
            'grad_norm': 1.0,
            'tokens_per_second': 100.0 + step,
        }
        | {'mfu': None, 'data_seconds': 0.1, 'checkpoint_seconds': 0.0}
        for step in range(5, 21, 5)
    ]
    _write_lines(folder / 'metrics.jsonl', entries)
    with open(folder / 'metrics.jsonl', 'a') as file:
        file.write('{"step": 25, "loss"')  # a kill in the middle of a line


def _evaluation(step, accuracy, bits_per_byte):
    samples = [
        {
            'arguments': [['it', ' is so'], ['it', ' is not']],
            'filtered_resps': [[-4.0, False], [-9.0, False]],
            'target': 0,
        }
        for _ in range(4)
    ]
    results = {'alias': 'cloze', 'acc,none': accuracy, 'acc_stderr,none': 0.05, 'sample_len': 4}
    results |= {'gold_bits_per_byte,none': bits_per_byte, 'gold_bits_per_byte_stderr,none': 0.1}
    other = {'alias': 'other', 'exact_match,none': 0.5, 'exact_match_stderr,none': 'N/A'}
    return {
        'results': {'cloze': results, 'other': other},
        'samples': {'cloze': samples},
        'protocol': {'step': step},
    }


@pytest.fixture(scope='module')
def full(tmp_path_factory):
    """The page and the summary of a workdir that has every file."""
    folder = tmp_path_factory.mktemp('runs') / 'a<b>run'
    data = corpora.config(folder)
    prepare.prepare(data, folder / 'store')
    (folder / 'tokenizer.model').write_bytes(corpora.tokenizer_path().read_bytes())
    _write_training(folder, dataclasses.replace(CONFIG, data=data))
    losses = [(10, {'slimpajama': 5.5, 'starcoder': 5.0}), (20, {'slimpajama': 4.5, 'starcoder': 4.0})]
    _write_lines(folder / 'validation.jsonl', [{'step': step, 'loss': loss} for step, loss in losses])
    (folder / 'eval').mkdir()
    evaluations = {'new': _evaluation(20, 0.75, 1.5), 'old': _evaluation(10, 0.5, 2.5), 'hf': {'protocol': {}}}
    for name, evaluation in evaluations.items():
        (folder / 'eval' / f'{name}.json').write_text(json.dumps(evaluation))
    (folder / 'eval' / 'table2.json').write_text('[]')
    tasks = {'cloze': {'acc': 0.4, 'acc_stderr': 0.1}, 'said': {'exact_match/strict': 0.0}}
    _write_lines(folder / 'evaluation.jsonl', [{'step': step, 'tasks': tasks} for step in (8, 16)])
    figure, _ = plt.subplots(figsize=(3, 3))
    figure.savefig(folder / 'eval' / 'figure2.png')
    plt.close(figure)
    page = report.report(folder)
    return page, json.loads((page.parent / 'summary.json').read_text())


def test_the_summary_holds_the_figures(full):
    _, summary = full
    assert (summary['step'], summary['tokens'], summary['training_loss']) == (20, 20 * 8 * 31, 4.0)
    assert summary['parameters'] > 0
    assert summary['heldout_loss'] == {'slimpajama': 4.5, 'starcoder': 4.0}
    assert summary['unigram_loss'].keys() == summary['heldout_loss'].keys()
    assert all(3 < loss < 7 for loss in summary['unigram_loss'].values())


def test_the_summary_shows_the_newest_evaluation(full):
    cloze = full[1]['tasks']['cloze']
    assert (cloze['step'], cloze['acc'], cloze['acc_stderr'], cloze['chance_acc']) == (20, 0.75, 0.05, 0.5)
    assert (cloze['gold_bits_per_byte'], cloze['gold_bits_per_byte_stderr']) == (1.5, 0.1)
    assert cloze['unigram_bits_per_byte'] > 0
    assert full[1]['tasks']['other'] == {'step': 20, 'exact_match': 0.5}


def test_the_page_is_self_contained_and_escaped(full):
    text = full[0].read_text()
    assert text.count('src="data:image/png;base64,') == 6
    assert 'Figure 2, of this run&#x27;s checkpoints' in text
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert '<h1>a&lt;b&gt;run</h1>' in text
    assert '--config=&lt;file&gt;' in text
    assert '0.7500 ± 0.0500' in text
    assert 'class="note"' not in text


def test_the_pictures_are_pictures(full):
    pictures = sorted(full[0].parent.glob('*.png'))
    assert [path.stem for path in pictures] == ['evaluation', 'in_training', 'throughput', 'training', 'validation']
    for path in pictures:
        pixels = image.imread(path)
        assert min(pixels.shape[:2]) > 200
        assert pixels[..., :3].std() > 0.05, f'{path.name} is empty'


def test_scores_are_drawn_with_their_standard_errors(tmp_path, monkeypatch):
    _write_training(tmp_path)
    (tmp_path / 'eval').mkdir()
    for step, accuracy in ((20, 0.75), (10, 0.5)):
        (tmp_path / f'eval/{30 - step}.json').write_text(json.dumps(_evaluation(step, accuracy, 1.5)))
    said = {'exact_match/strict': 0.25, 'exact_match_stderr/strict': 0.1}
    _write_lines(tmp_path / 'evaluation.jsonl', [{'step': 8, 'tasks': {}}, {'step': 16, 'tasks': {'said': said}}])
    drawn, errorbar = {}, axes.Axes.errorbar

    def record(self, steps, values, yerr, label, **options):
        drawn[label] = steps, values, yerr
        return errorbar(self, steps, values, yerr, label=label, **options)

    monkeypatch.setattr(axes.Axes, 'errorbar', record)
    report.report(tmp_path)
    assert drawn == {
        'cloze': ((10, 20), (0.5, 0.75), (0.05, 0.05)),
        'said, exact_match/strict': ((16,), (0.25,), (0.1,)),
    }


def test_a_note_names_what_is_missing(tmp_path):
    _write_training(tmp_path)
    text = report.report(tmp_path).read_text()
    assert 'The unigram baseline is left out' in text
    assert 'There is no validation loss yet' in text
    assert 'Nothing was evaluated yet' in text
    assert text.count('data:image/png') == 2
    summary = json.loads((tmp_path / 'report/summary.json').read_text())
    assert (summary['heldout_loss'], summary['unigram_loss'], summary['tasks']) == ({}, {}, {})


def test_without_metrics_the_train_command_is_named(tmp_path):
    with pytest.raises(errors.UsageError, match=r'no metrics\.jsonl .*main\.py train --config=FILE --workdir='):
        report.report(tmp_path)
    assert not (tmp_path / 'report').exists()


def test_how_a_score_was_measured_is_shown(tmp_path):
    _write_training(tmp_path)
    (tmp_path / 'eval').mkdir()
    whole, limited = _evaluation(20, 0.75, 1.5), _evaluation(20, 1.0, 1.5)
    whole['protocol'] |= {'name': 'paper', 'backend': 'jax', 'limit': None, 'truncated_requests': {'cloze': 3}}
    limited['protocol'] |= {'name': 'current', 'backend': 'hf', 'limit': 2}
    for name, evaluation in (('a', whole), ('b', limited)):
        (tmp_path / 'eval' / f'{name}.json').write_text(json.dumps(evaluation))
    (tmp_path / 'eval' / 'c.json').write_text('{"results"')
    text = report.report(tmp_path).read_text()
    tasks = json.loads((tmp_path / 'report/summary.json').read_text())['tasks']
    assert (tasks['cloze']['acc'], tasks['cloze']['measured']) == (0.75, 'paper, jax, all examples, 3 requests cut')
    assert tasks['cloze (first 2 examples, current, hf)']['acc'] == 1.0
    assert 'paper, jax, all examples, 3 requests cut' in text and 'current, hf, first 2 examples' in text
    assert 'c.json is left out, for it is not valid JSON' in text
