"""Tables and figure from made-up results: values beside the published ones, files, missing tasks."""

import csv
import json

import pytest

from eval_bridge.tables import published, results


def _result(**accuracies):
    """Returns a result with these scores, from 0 to 1, under each task's metric, and with another metric."""
    metric = results.TABLES[2] | results.TABLES[3]
    return {
        'results': {
            task: {'alias': task, f'{metric[task]},none': value, f'{metric[task]}_stderr,none': 0.01, 'other,none': 0.9}
            for task, value in accuracies.items()
        }
    }


WHOLE = _result(**dict.fromkeys(results.TABLES[2], 0.5))


def test_scores_stand_beside_the_published_ones():
    scores = results.scores(2, WHOLE, 'pythia-1.0b')
    assert (scores['hellaswag'].value, scores['hellaswag'].published) == (50.0, 47.16)
    assert scores['hellaswag'].difference == pytest.approx((50 - 47.16) / 1.0)
    assert str(scores['hellaswag']) == '50.00 ± 1.00 (47.16, +2.8 se)'
    average = scores['average']
    assert (average.value, average.stderr) == (50.0, pytest.approx(1 / 7**0.5))
    assert average.published == pytest.approx(48.30, abs=0.01)  # as EVAL.md has it


def test_a_model_that_was_not_published_stands_alone():
    assert str(results.scores(2, WHOLE, 'mine')['piqa']) == '50.00 ± 1.00'


def test_part_of_a_table_has_no_average():
    assert list(results.scores(2, _result(piqa=0.6), 'mine')) == ['piqa']


def test_table_3_keeps_the_two_protocols_apart():
    scores = results.scores(3, _result(drop=0.1, instructeval_drop=0.05), 'Pythia-1.0B')
    assert scores['drop'].published is None
    assert scores['instructeval_drop'].published == 4.25


def test_the_files_of_a_table_agree(tmp_path):
    rows = {'OPT-1.3B': results.scores(2, WHOLE, 'OPT-1.3B'), 'mine': results.scores(2, _result(piqa=0.61), 'mine')}
    text = results.write_table(tmp_path, 2, rows)
    header, _, opt, mine, *_ = text.splitlines()
    assert [cell.strip() for cell in header.strip('|').split('|')][:3] == ['model', 'hellaswag', 'openbookqa']
    assert '50.00 ± 1.00 (53.65, -3.6 se)' in opt and '61.00 ± 1.00' in mine
    assert (tmp_path / 'table2.md').read_text() == text
    flat = json.loads((tmp_path / 'table2.json').read_text())
    assert len(flat) == 9 and flat[-1]['value'] == 61
    with open(tmp_path / 'table2.csv') as file:
        assert [float(row['value']) for row in csv.DictReader(file)] == [row['value'] for row in flat]
    page = (tmp_path / 'table2.html').read_text()
    assert '53.65' in page and 'OPT-1.3B: published values second-hand' in page


def test_the_figure_has_its_points_and_its_baseline(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(results, '_published', lambda model, task: lines.append((model, task)) or 50.0)
    points = {2e9: results.scores(2, WHOLE, 'b'), 1e9: results.scores(2, _result(piqa=0.4), 'a')}
    page = results.write_figure(tmp_path, points)
    with open(tmp_path / 'figure2.csv') as file:
        rows = list(csv.DictReader(file))
    assert [(float(row['tokens']), row['task']) for row in rows[:2]] == [(1e9, 'piqa'), (2e9, 'hellaswag')]
    assert len(rows) == 9
    assert (tmp_path / 'figure2.png').read_bytes().startswith(b'\x89PNG')
    assert page.read_text().count('data:image/png;base64') == 1
    assert {task for model, task in lines if model == published.FIGURE_2_BASELINE} == {*results.TABLES[2], 'average'}
