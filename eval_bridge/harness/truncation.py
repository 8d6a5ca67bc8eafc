"""Counts the requests that were longer than the model reads and so were truncated on the left.

lm-eval's `hf` model truncates the same requests. They are counted in lm-eval's samples, not while they are answered,
so kept answers and the other backend count too.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from lm_eval.models import utils

# Room for BOS, the space that SentencePiece puts in front, and one more piece where two texts meet.
_SLACK = 16


def count(model, samples: Mapping[str, Iterable[Mapping[str, Any]]]) -> dict[str, int] | None:
    """Returns task -> number of requests in lm-eval's samples that lost tokens; None for a model without tokens.

    `model` is an lm-eval TemplateLM, or wraps one. Rolling log-likelihoods lose nothing: they are scored in windows.
    """
    if not hasattr(model, '_encode_pair'):
        return None
    tokens = functools.lru_cache(maxsize=1)(lambda text: len(model.tok_encode(text)))
    counts = {}
    for task, logged in samples.items():
        # A document has a sample for each filter, all with the same requests.
        requests = {sample['doc_id']: sample['arguments'] for sample in logged}
        counts[task] = sum(_is_cut(model, tokens, *arguments) for each in requests.values() for arguments in each)
    return counts


def _is_cut(model, tokens, context: str, second: str | dict[str, Any] | None = None) -> bool:
    """Returns whether a request loses tokens; `second`: a continuation, generation options, or None (rolling)."""
    if second is None:
        return False
    if isinstance(second, dict):
        new = utils.normalize_gen_kwargs(second, model.max_gen_toks)['max_gen_toks']
        return tokens(context) > model.max_length - new
    most = model.max_length + 1  # the last token is predicted, not read
    if tokens(context) + len(second.encode()) + _SLACK <= most:  # a token has at least one byte
        return False
    return bool(context) and sum(map(len, model._encode_pair(context, second))) > most
