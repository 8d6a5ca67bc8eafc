"""How many requests were longer than the model reads, and so were cut on the left (as lm-eval's `hf` model does too).

Counted from what was asked, not while it is answered, so that kept answers and every backend count alike.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from lm_eval.models import utils

# A piece more or less where two texts meet, BOS, the space that SentencePiece puts in front.
_SLACK = 16


def count(model, samples: Mapping[str, Iterable[Mapping[str, Any]]]) -> dict[str, int] | None:
    """Task -> number of its requests that lost tokens, of lm-eval's logged samples; None for a model without tokens.

    `model` is an lm-eval TemplateLM, or stands for one. Rolling log-likelihoods lose nothing: they come in windows.
    """
    if not hasattr(model, '_encode_pair'):
        return None
    tokens = functools.lru_cache(maxsize=1)(lambda text: len(model.tok_encode(text)))
    found = {}
    for task, logged in samples.items():
        asked = {sample['doc_id']: sample['arguments'] for sample in logged}  # a sample for each filter
        found[task] = sum(_is_cut(model, tokens, *arguments) for requests in asked.values() for arguments in requests)
    return found


def _is_cut(model, tokens, context: str, second: str | dict[str, Any] | None = None) -> bool:
    """`second`: a continuation, what is said of a text to generate, or nothing for a rolling log-likelihood."""
    if second is None:
        return False
    if isinstance(second, dict):
        new = utils.normalize_gen_kwargs(second, model.max_gen_toks)['max_gen_toks']
        return tokens(context) > model.max_length - new
    most = model.max_length + 1  # the last token is predicted, not read
    if tokens(context) + len(second.encode()) + _SLACK <= most:  # a token has a byte or more
        return False
    return bool(context) and sum(map(len, model._encode_pair(context, second))) > most
