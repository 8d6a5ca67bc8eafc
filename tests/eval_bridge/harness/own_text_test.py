"""Texts of local data files stay as they are written, whatever they look like."""

import json

import datasets
import pytest

from eval_bridge.harness import own_text

DATES = ['2020-01-01', '2020-01-01 10:00:00', '1999-12-31']


def _load(tmp_path, kind, name, text, **options):
    (tmp_path / name).write_text(text)
    with own_text.kept():
        path = str(tmp_path / name)
        return datasets.load_dataset(kind, data_files={'test': path}, cache_dir=str(tmp_path), **options)['test']


def test_json_s_dates_stay_texts_at_any_depth(tmp_path):
    rows = [
        {
            'date': day,
            'many': [day],
            'inner': {'day': day, 'number': 1},
            'list': [{'created_at': day}],
            'n': 0.5,
            'code': '007',
        }
        for day in DATES
    ]
    lines = '\n'.join(map(json.dumps, rows))
    assert list(_load(tmp_path, 'json', 'a.jsonl', lines)) == rows
    assert list(_load(tmp_path, 'json', 'b.json', json.dumps(rows))) == rows
    assert list(_load(tmp_path, 'json', 'c.json', json.dumps({'examples': rows}), field='examples')) == rows
    mixed = [{'date': day} for day in (*DATES, 'a day')]
    assert list(_load(tmp_path, 'json', 'd.jsonl', '\n'.join(map(json.dumps, mixed)), chunksize=20)) == mixed


def test_json_s_texts_beside_numbers_stay_texts(tmp_path):
    answers = ['007', 12, 'true', 'null', None, '[1]', 'a "word"', 0.5, '12']
    rows = [{'answer': answer, 'inner': {'many': [answer, 'a']}} for answer in answers]
    assert list(_load(tmp_path, 'json', 'a.jsonl', '\n'.join(map(json.dumps, rows)))) == rows
    assert list(_load(tmp_path, 'json', 'b.json', json.dumps(rows))) == rows


def test_csv_s_texts_stay_texts_and_its_numbers_numbers(tmp_path):
    text = 'word,code,label,share,truth\nNA,007,0,0.5,True\nNone,012,1,0.25,False\n,13,2,1.0,True\n'
    assert list(_load(tmp_path, 'csv', 'a.csv', text)) == [
        {'word': 'NA', 'code': '007', 'label': 0, 'share': 0.5, 'truth': 'True'},
        {'word': 'None', 'code': '012', 'label': 1, 'share': 0.25, 'truth': 'False'},
        {'word': None, 'code': '13', 'label': 2, 'share': 1.0, 'truth': 'True'},
    ]
    assert list(_load(tmp_path, 'csv', 'd.csv', 'answer,many\n12,9007199254740993\n,\n')) == [
        {'answer': 12, 'many': 9007199254740993},
        {'answer': None, 'many': None},
    ]
    assert list(_load(tmp_path, 'csv', 'e.csv', f'a\n{"12" * 20}\n13\n')) == [{'a': '12' * 20}, {'a': '13'}]
    assert list(_load(tmp_path, 'csv', 'b.csv', 'a\tb\nnan\t1e3\n', sep='\t')) == [{'a': 'nan', 'b': '1e3'}]
    assert list(_load(tmp_path, 'csv', 'c.csv', 'a\nNA\nx\n', na_values=['x'])) == [{'a': None}, {'a': None}]


@pytest.mark.parametrize('text', ['', 'a,b\n1\n2,3,4,5\n'])
def test_a_csv_file_that_cannot_be_read_still_fails(tmp_path, text):
    with pytest.raises((ValueError, datasets.exceptions.DatasetsError)):
        _load(tmp_path, 'csv', 'a.csv', text)
