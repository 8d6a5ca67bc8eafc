"""The published scores: their averages are their source's, their names are ours, models are found in any case."""

import pytest

from eval_bridge.tables import published, results


def test_the_rows_of_table_2_average_as_their_source_says():
    for model, average in {'Pythia-1.0B': 48.30, 'TinyLlama-1.1B-503b': 48.28, 'TinyLlama-1.1B-2.5T': 53.86}.items():
        row = published.scores(2, model)
        assert row.keys() == results.TABLES[2].keys()
        assert sum(row.values()) / 7 == pytest.approx(average, abs=0.01)


@pytest.mark.parametrize('table', [2, 3])
def test_every_score_is_a_percentage_of_a_task_that_the_table_shows(table):
    for row in published.TABLES[table].values():
        assert row.keys() <= results.TABLES[table].keys()
        assert all(0 < score < 100 for score in row.values())


def test_a_model_is_found_by_its_name_in_any_case():
    assert published.scores(2, 'opt-1.3b') == published.TABLES[2]['OPT-1.3B']
    assert published.scores(3, 'OPT-1.3B') == {}  # the paper has no such row


def test_marked_models_have_rows():
    table = published.TABLES[2]
    assert {*published.SECOND_HAND, published.FIGURE_2_BASELINE, *published.TOKENS} <= table.keys()
    assert {name for name in table if name.startswith('TinyLlama')} == published.TOKENS.keys()


def test_tokens_are_those_of_the_models_names():
    for name, tokens in published.TOKENS.items():
        size = name.rpartition('-')[2]
        assert tokens == float(size[:-1]) * {'b': 1, 'T': 1_000}[size[-1]]
