"""Builds the cloze task: which of four continuations belongs to a passage of a held-out document?

The passages come from the validation files of a corpus in SlimPajama's format. The
three wrong continuations come from other held-out documents of the same corpus, cut
in the same way, so chance is one in four.
"""

import bisect
import io
import json
import pathlib
import random
import re
from collections.abc import Iterator

import zstandard

TASK = 'cloze'
_ITEMS = 300
_CHOICES = 4
_PASSAGE = 320  # characters of context, at least; the demo's model reads about 900
_CONTINUATION = 40  # characters of a continuation, at most: its beginning shows whether it fits
_GAP = re.compile(r'(?<=\S) (?=\S)')  # a single space: lm-eval puts one between context and choice

_YAML = f"""\
task: {TASK}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {TASK}/items.jsonl  # relative to the folder that holds --include_path
test_split: test
output_type: multiple_choice
doc_to_text: '{{{{context}}}}'
doc_to_choice: '{{{{choices}}}}'
doc_to_target: '{{{{gold}}}}'
num_fewshot: 0
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def build(corpus: pathlib.Path, folder: pathlib.Path, *, items: int = _ITEMS, seed: int = 0) -> int:
    """Writes the task to `folder` (whose name must be `TASK`) and returns its number of items.

    Args:
      corpus: a SlimPajama folder; reads only its validation/.
      folder: the task's folder.
      items: the largest number of items to write.
      seed: decides, with the corpus, which passages become items.
    """
    rng = random.Random(seed)
    passages = [(owner, *passage) for owner, text in enumerate(_held_out(corpus)) for passage in _passages(text)]
    rng.shuffle(passages)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f'{TASK}.yaml').write_text(_YAML, encoding='utf-8')
    with open(folder / 'items.jsonl', 'w', encoding='utf-8') as file:
        for owner, context, right in passages[:items]:
            others = [continuation for other, _, continuation in passages if other != owner]
            choices = rng.sample(others, _CHOICES - 1)
            gold = rng.randrange(_CHOICES)
            choices.insert(gold, right)
            file.write(json.dumps({'context': context, 'choices': choices, 'gold': gold}) + '\n')
    return min(items, len(passages))


def _held_out(corpus: pathlib.Path) -> Iterator[str]:
    for path in sorted((corpus / 'validation').rglob('*.jsonl.zst')):
        with open(path, 'rb') as file, zstandard.ZstdDecompressor().stream_reader(file) as reader:
            for line in io.TextIOWrapper(reader, encoding='utf-8'):
                yield json.loads(line)['text']


def _passages(text: str) -> Iterator[tuple[str, str]]:
    """Yields (context, continuation) pairs of a text, without overlap, cut at single spaces."""
    gaps = [match.start() for match in _GAP.finditer(text)]
    begin = 0
    for gap in gaps:
        end = gaps[bisect.bisect_right(gaps, gap + _CONTINUATION) - 1]
        if gap >= begin + _PASSAGE and end >= gap + _CONTINUATION // 2:
            yield text[begin:gap].strip(), text[gap + 1 : end]
            begin = end + 1
