"""lm-eval's language-model interface on our model; needs neither torch nor transformers.

Requests are encoded, truncated and scored as lm-eval's own `hf` model does, so both
give the same log-likelihoods. Rows are padded on the right to one of a few lengths,
each of which is compiled once; generation takes its prompts in batches of one such length.

Shapes: B rows, T positions, C positions whose logits exist at once, D model, V vocabulary.
"""

import contextlib
import dataclasses
import functools
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.sharding import Mesh
from lm_eval import utils as lm_eval_utils
from lm_eval.api.model import TemplateLM
from lm_eval.models import utils as lm_eval_models_utils

from tinyllama_jax import errors, generate, model, sharding
from tinyllama_jax import ops as ops_lib
from tinyllama_jax.config import ModelConfig

_CHUNK = 64  # positions C; padded lengths are this times 1, 2, 3, 4, 6, 8, 12, ...
_MOST_ROWS = 64


class JaxLM(TemplateLM):
    """A model and its tokenizer, for lm-eval's simple_evaluate.

    Args:
      params: nested dict of float32 arrays.
      tokenizer: encode, decode, bos_id and eos_id as of tinyllama_jax.tokenizer.Tokenizer.
      batch_size: rows of `seq_len` tokens in a batch; shorter rows come in larger batches.
      add_bos: put BOS before every text; the paper's protocol does not.
      mesh: devices to spread parameters and rows over; none: the default device.
      dtype: float32 or bfloat16, of the computation.

    Attribute truncated_requests: how many requests were longer than the model reads, and were cut on the left.
    """

    def __init__(
        self,
        params: dict,
        model_config: ModelConfig,
        tokenizer,
        *,
        batch_size: int = 8,
        add_bos: bool = False,
        mesh: Mesh | None = None,
        dtype: str = 'float32',
    ):
        super().__init__()
        # The scan compiles fast, and there are several programs to compile.
        self._config = dataclasses.replace(model_config, compute_dtype=dtype, scan_layers=True)
        self._encoder = tokenizer  # lm-eval takes an attribute `tokenizer` for Hugging Face's
        self._mesh = mesh
        self._ops = ops_lib.make_ops(ops_lib.PLAIN, mesh)
        self._params = jax.device_put(params, sharding.shardings(params, mesh) if mesh else None)
        self.batch_size = batch_size
        self.add_bos = add_bos
        self.dtype = dtype
        self.truncated_requests = 0

    @property
    def max_length(self) -> int:
        """Most tokens the model reads."""
        return self._config.seq_len

    @property
    def max_gen_toks(self) -> int:
        """Tokens generated where a task names no number; lm-eval's own default."""
        return 256

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self._encoder.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: BOS where the tokenizer has it, as in lm-eval's hf model."""
        return self._encoder.bos_id if self._encoder.bos_id >= 0 else self._encoder.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Ids of `string`, after BOS if `add_special_tokens`, by default if the protocol adds it."""
        bos = self.add_bos if add_special_tokens is None else add_special_tokens
        return ([self._encoder.bos_id] if bos else []) + self._encoder.encode(string)

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, whether greedy decoding gives it) of each continuation."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in windows that leave no token out."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            pairs = lm_eval_utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            )
            for context, continuation in map(lm_eval_utils.make_disjoint_window, pairs):
                windows.append((None, context, continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial('loglikelihood_rolling', request.args, total)
        return totals

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        """Scores (texts, context ids, continuation ids), each truncated on the left to what the model reads."""
        with self._counting_truncated():
            rows = [self._row(context, continuation) for _, context, continuation in requests]
        results = [(0.0, True)] * len(rows)
        # disable=None: no bar where stderr is no terminal.
        bar = tqdm.tqdm(total=len(rows), desc='Log-likelihoods', disable=disable_tqdm or None)
        with bar:
            for T, batch_rows, indices in self._batches(rows):
                scores = self._score_batch([rows[index] for index in indices], batch_rows, T)
                for index, score in zip(indices, scores, strict=True):
                    results[index] = score
                bar.update(len(indices))
        for (texts, _, _), result in zip(requests, results, strict=True):
            if texts is not None:
                self.cache_hook.add_partial('loglikelihood', texts, result)
        return results

    def _row(self, context: list[int], continuation: list[int]) -> tuple[list[int], int]:
        """The last seq_len + 1 tokens, and how many of them are scored."""
        if len(continuation) > self.max_length:
            raise errors.UsageError(
                f'a continuation of {len(continuation)} tokens does not fit seq_len = {self.max_length}; '
                'leave this task out.'
            )
        if not continuation:
            raise errors.UsageError('a task asks for the log-likelihood of no token at all; leave this task out.')
        return self._truncated(context + continuation, self.max_length + 1), len(continuation)

    def _batches(self, rows) -> Iterator[tuple[int, int, list[int]]]:
        """(padded length, padded number of rows, indices of rows), the longest first."""
        buckets = defaultdict(list)
        for index, (tokens, _) in enumerate(rows):
            buckets[_padded(len(tokens) - 1)].append(index)
        shards = sharding.batch_shards(self._mesh) if self._mesh else 1
        for T, indices in sorted(buckets.items(), reverse=True):
            count = min(_MOST_ROWS, max(1, self.batch_size * self.max_length // T))
            count = -(-count // shards) * shards
            for start in range(0, len(indices), count):
                yield T, count, indices[start : start + count]

    def _score_batch(self, rows, B: int, T: int) -> list[tuple[float, bool]]:
        inputs_BT, targets_BT = np.zeros((2, B, T), np.int32)
        for index, (tokens, _) in enumerate(rows):
            inputs_BT[index, : len(tokens) - 1] = tokens[:-1]
            targets_BT[index, : len(tokens) - 1] = tokens[1:]
        if self._mesh:
            inputs_BT, targets_BT = jax.device_put((inputs_BT, targets_BT), sharding.batch_sharding(self._mesh))
        scored = _score(self._params, inputs_BT, targets_BT, config=self._config, ops=self._ops)
        logprobs_BT, greedy_BT = jax.device_get(scored)
        scores = []
        for index, (tokens, count) in enumerate(rows):
            scored = slice(len(tokens) - 1 - count, len(tokens) - 1)
            logprob = float(logprobs_BT[index, scored].sum(dtype=np.float64))
            scores.append((logprob, bool(greedy_BT[index, scored].all())))
        return scores

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """A text for each (context, generation arguments), ended before the first stop sequence.

        Contexts are cut on the left to what leaves room for all tokens asked for. Sampled texts are drawn anew
        each time the same request comes again.
        """
        texts = [''] * len(requests)
        with self._counting_truncated(), tqdm.tqdm(
            total=len(requests), desc='Generating', disable=disable_tqdm or None
        ) as bar:  # fmt: skip
            for options, batch in self._generation_batches([request.args for request in requests]):
                for index, text in self._generate(options, batch):
                    texts[index] = text
                    self.cache_hook.add_partial('generate_until', requests[index].args, text)
                    bar.update()
        return texts

    def _generation_batches(self, arguments) -> Iterator[tuple[dict, list['_Prompt']]]:
        """Batches of prompts with equal options and about equal lengths, the longest first."""
        groups, repeats = defaultdict(list), Counter()
        for index, (context, options) in enumerate(arguments):
            name = json.dumps(options, sort_keys=True)
            groups[name].append(_Prompt(index, self._prompt(context, options), repeats[name, context]))
            repeats[name, context] += 1
        for name, prompts in groups.items():
            options = dict(lm_eval_models_utils.normalize_gen_kwargs(json.loads(name), self.max_gen_toks))
            buckets = defaultdict(list)
            for prompt in prompts:
                buckets[generate.rounded(len(prompt.ids))].append(prompt)
            for P, bucket in sorted(buckets.items(), reverse=True):
                slots = generate.rounded(P + options['max_gen_toks'])
                count = min(_MOST_ROWS, max(1, self.batch_size * self.max_length // slots))
                for start in range(0, len(bucket), count):
                    yield options, bucket[start : start + count]

    def _prompt(self, context: str, arguments: dict) -> list[int]:
        count = lm_eval_models_utils.normalize_gen_kwargs(arguments, self.max_gen_toks)['max_gen_toks']
        if count >= self.max_length:
            raise errors.UsageError(f'a task wants {count} new tokens, but seq_len is {self.max_length}.')
        return self._truncated(self.tok_encode(context) or [self.prefix_token_id], self.max_length - count)

    def _generate(self, options: dict, prompts: list['_Prompt']) -> Iterator[tuple[int, str]]:
        """(index, text) of each prompt, as it ends."""
        blocks = self._generator.batch(
            [prompt.ids for prompt in prompts],
            max_new_tokens=options['max_gen_toks'],
            temperature=options.get('temperature', 0.0) if options.get('do_sample') else 0.0,
            top_k=options.get('top_k'),
            top_p=options.get('top_p'),
            seed=[prompt.repeat for prompt in prompts],
            eos_id=self.eot_token_id,
        )
        stops, waiting = options['until'], dict(enumerate(prompts))
        for rows in blocks:
            for row, prompt in list(waiting.items()):
                text = self._encoder.decode(rows.tokens[row])
                if rows.ended[row] or any(stop and stop in text for stop in stops):
                    rows.ended[row] = True
                    del waiting[row]
                    yield prompt.index, lm_eval_models_utils.postprocess_generated_text(text, stops, None)

    @functools.cached_property
    def _generator(self) -> generate.Generator:
        return generate.Generator(self._params, self._config, ops=self._ops)

    def _truncated(self, tokens: list[int], length: int) -> list[int]:
        """The last `length` tokens; a request that loses some is counted."""
        self.truncated_requests += len(tokens) > length
        return tokens[-length:]

    @contextlib.contextmanager
    def _counting_truncated(self):
        """A context after which the requests that were cut in it are told of."""
        before = self.truncated_requests
        yield
        if count := self.truncated_requests - before:
            what = f'{count:,} requests were longer than the model reads and were cut on the left'
            print(f'evaluate: {what} (seq_len = {self.max_length}).', file=sys.stderr)


@dataclasses.dataclass(frozen=True)
class _Prompt:
    """A context to continue: number of the request, ids, and how often the same request came before."""

    index: int
    ids: list[int]
    repeat: int


def _padded(length: int) -> int:
    """The least of C times 1, 2, 3, 4, 6, 8, 12, ... that is at least `length`."""
    size = _CHUNK
    while size < length:
        if size >= 2 * _CHUNK and size * 3 // 2 >= length:
            return size * 3 // 2
        size *= 2
    return size


@functools.partial(jax.jit, static_argnames=('config', 'ops'))
def _score(params, inputs_BT, targets_BT, *, config: ModelConfig, ops: ops_lib.Ops):
    """Log-probability of each target and whether it is the likeliest token; [B, T] each."""
    x_BTD, _ = model.hidden(params, inputs_BT, config, ops=ops)

    def chunk(arguments):
        x_BCD, targets_BC = arguments
        logits_BCV = model.logits(params, x_BCD)
        picked_BC = jnp.take_along_axis(logits_BCV, targets_BC[:, :, None], axis=-1)[:, :, 0]
        return picked_BC - jax.nn.logsumexp(logits_BCV, axis=-1), jnp.argmax(logits_BCV, axis=-1) == targets_BC

    scored = jax.lax.map(chunk, (_chunks(x_BTD), _chunks(targets_BT)))
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1).reshape(targets_BT.shape), scored)


def _chunks(x):
    """[B, T, ...] as [T / C, B, C, ...]."""
    B, T, *rest = x.shape
    return jnp.moveaxis(x.reshape(B, T // _CHUNK, _CHUNK, *rest), 1, 0)
