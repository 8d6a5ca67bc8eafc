"""What records must hold: nothing is wrong with the real ones."""

import gzip
import json

import pytest

from eval_bridge.harness import records

FILES = {
    'hellaswag/validation.jsonl': records.hellaswag, 'arc_challenge/test.jsonl': records.lettered,
    'boolq/validation.jsonl': records.boolq, 'piqa/validation.jsonl': records.piqa,
    'drop/validation.jsonl': records.drop, 'mmlu/astronomy_dev.jsonl': records.mmlu,
    'mmlu/astronomy_test.jsonl': records.mmlu, 'bbh/word_sorting.json': records.bbh,
}  # fmt: skip


@pytest.mark.parametrize('path', FILES)
def test_nothing_is_wrong_with_real_records(test_data_dir, path):
    file = test_data_dir / 'eval' / path
    text = file.read_bytes() if file.exists() else gzip.decompress(file.with_name(f'{file.name}.gz').read_bytes())
    found = json.loads(text)['examples'] if path.endswith('.json') else list(map(json.loads, text.splitlines()))
    assert found and not [fault for fault in map(FILES[path], found) if fault]


def test_the_fault_says_what_is_there():
    record = {'goal': 'g', 'sol1': 'a', 'sol2': 'b', 'label': 2}
    assert records.piqa(record) == 'label is 2, which is none of 0, 1'
    assert records.piqa(record | {'label': '1'}) is None
    assert records.piqa(record | {'sol2': None}).startswith("sol1 and sol2 is ['a', None], and each must be a text")
