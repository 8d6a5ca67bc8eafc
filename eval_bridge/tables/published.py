"""The scores that the paper and its repository published, in per cent, with their sources.

`EVAL.md` is the file in jzhang38/TinyLlama from which the paper's Tables 2 and 3 and Figure 2 were made. `SECOND_HAND`
names the models whose rows of Table 2 were not found at a first source.
"""

from types import MappingProxyType

# Zero-shot; acc for WinoGrande and BoolQ, acc_norm for the others. Source: EVAL.md.
_TASKS_2 = ('hellaswag', 'openbookqa', 'winogrande', 'arc_challenge', 'arc_easy', 'boolq', 'piqa')
# InstructEval's own protocol. Source: EVAL.md.
_TASKS_3 = ('instructeval_mmlu', 'instructeval_bbh', 'instructeval_humaneval', 'instructeval_drop')

_TABLE_2 = {
    'OPT-1.3B': (53.65, 33.40, 59.59, 29.44, 50.80, 60.83, 72.36),
    'Pythia-1.0B': (47.16, 31.40, 53.43, 27.05, 48.99, 60.83, 69.21),
    'Pythia-1.4B': (52.01, 33.20, 57.38, 28.50, 54.00, 63.27, 70.95),
    'TinyLlama-1.1B-103b': (43.50, 29.80, 53.28, 24.32, 44.91, 59.66, 67.30),
    'TinyLlama-1.1B-503b': (49.56, 31.40, 55.80, 26.54, 48.32, 56.91, 69.42),
    'TinyLlama-1.1B-1007b': (52.54, 33.40, 55.96, 27.82, 52.36, 59.54, 69.91),
    'TinyLlama-1.1B-1.5T': (53.68, 35.20, 58.33, 29.18, 51.89, 59.08, 71.65),
    'TinyLlama-1.1B-2T': (54.63, 33.40, 56.83, 28.07, 54.67, 63.21, 70.67),
    'TinyLlama-1.1B-2.5T': (58.96, 34.40, 58.72, 31.91, 56.78, 63.21, 73.07),
    'TinyLlama-1.1B-3T': (59.20, 36.00, 59.12, 30.12, 55.25, 57.83, 73.29),
}
_TABLE_3 = {
    'Pythia-1.0B': (25.70, 28.19, 1.83, 4.25),
    'TinyLlama-1.1B-103b': (26.45, 28.82, 5.49, 11.42),
    'TinyLlama-1.1B-503b': (26.16, 28.83, 4.88, 12.43),
    'TinyLlama-1.1B-1007b': (24.65, 29.21, 6.10, 13.03),
    'TinyLlama-1.1B-1.5T': (24.85, 28.20, 7.93, 14.43),
    'TinyLlama-1.1B-2T': (25.97, 29.07, 6.71, 13.14),
    'TinyLlama-1.1B-2.5T': (25.92, 29.32, 9.15, 15.45),
}
# Table -> model -> task -> per cent.
TABLES = MappingProxyType(
    {
        2: {name: dict(zip(_TASKS_2, row, strict=True)) for name, row in _TABLE_2.items()},
        3: {name: dict(zip(_TASKS_3, row, strict=True)) for name, row in _TABLE_3.items()},
    }
)
SECOND_HAND = ('OPT-1.3B', 'Pythia-1.4B')
FIGURE_2_BASELINE = 'Pythia-1.4B'
# The models above that are checkpoints of one run -> training tokens, in billions.
TOKENS = MappingProxyType(
    {
        'TinyLlama-1.1B-103b': 103, 'TinyLlama-1.1B-503b': 503, 'TinyLlama-1.1B-1007b': 1_007,
        'TinyLlama-1.1B-1.5T': 1_500, 'TinyLlama-1.1B-2T': 2_000, 'TinyLlama-1.1B-2.5T': 2_500,
        'TinyLlama-1.1B-3T': 3_000,
    }
)  # fmt: skip


def scores(table: int, model: str) -> dict[str, float]:
    """Returns task -> per cent for a model (any case); empty for a model without published scores."""
    return next((row for name, row in TABLES[table].items() if name.lower() == model.lower()), {})
