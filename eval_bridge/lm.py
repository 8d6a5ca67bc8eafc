"""Our model behind lm-eval's language-model interface; needs neither torch nor transformers.

Requests are encoded, truncated and scored as lm-eval's own `hf` model does, so both give the same
log-likelihoods. Continuations of one context are scored together, in rows of a few lengths
(branches.py), so that few programs are compiled. Prompts of about the same length are continued
together.

Shapes: B rows, T positions, P predictions, C predictions of a chunk, D model, V vocabulary.
"""

import dataclasses
import functools
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.sharding import Mesh
from lm_eval import utils as lm_eval_utils
from lm_eval.api.model import TemplateLM
from lm_eval.models import utils as lm_eval_models_utils

from eval_bridge import branches
from tinyllama_jax import errors, generate, model, sharding
from tinyllama_jax import ops as ops_lib
from tinyllama_jax.config import Dtype, ModelConfig
from tinyllama_jax.tokenizer.base import BaseTokenizer

MOST_NEW_TOKENS = 256
_CPU_TOKENS = 4_096  # a larger batch is no faster on a CPU, and its last batch has more padding
_CHUNK = 256  # predictions C whose logits exist at once; divides the positions of every row
_MOST_PROMPTS = 64  # continued together


class JaxLM(TemplateLM):
    """A model and its tokenizer, for lm-eval's simple_evaluate.

    Args:
      params: nested dict of float32 arrays.
      batch_size: rows of `seq_len` tokens in a batch; a batch of shorter rows has more of them.
      add_bos: puts before every text what the tokenizer adds to one, BOS for most; the paper's protocol does not.
      mesh: the devices to shard parameters and rows over; None: the default device.
      dtype: float32 or bfloat16, of the computation.
    """

    def __init__(
        self,
        params: dict,
        model_config: ModelConfig,
        tokenizer: BaseTokenizer,
        *,
        batch_size: int = 8,
        add_bos: bool = False,
        mesh: Mesh | None = None,
        dtype: Dtype = 'float32',
    ):
        super().__init__()
        # A scan over layers compiles fast, and there are several programs to compile.
        self._config = dataclasses.replace(model_config, compute_dtype=dtype, scan_layers=True)
        self._tokenizer = tokenizer  # lm-eval would take an attribute `tokenizer` for Hugging Face's
        self._mesh = mesh
        self._ops = branches.make_ops(mesh)
        self._params = jax.device_put(params, sharding.shardings(params, mesh) if mesh else None)
        self.batch_size = batch_size
        self.add_bos = add_bos
        self.dtype = dtype

    @property
    def max_length(self) -> int:
        """The largest number of tokens that the model reads."""
        return self._config.seq_len

    @property
    def max_gen_toks(self) -> int:
        """How many tokens to generate for a task that sets no number; lm-eval's own default."""
        return MOST_NEW_TOKENS

    @property
    def eot_token_id(self) -> int:
        """The id of EOS, which ends a text."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The context of a text without one: BOS, or EOS if the tokenizer has no BOS, as in lm-eval's hf model."""
        return self._tokenizer.bos_id if self._tokenizer.bos_id >= 0 else self._tokenizer.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Returns the ids of `string`, with what the tokenizer adds if `add_special_tokens`.

        By default that is as `add_bos` says, but not for a string that begins with BOS, as in lm-eval's hf model.
        """
        if add_special_tokens is None:
            add_special_tokens = self.add_bos and not self._tokenizer.begins_with(string, self.prefix_token_id)
        return self._tokenizer.encode(string, special=add_special_tokens)

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Returns (sum of log-probabilities, whether greedy decoding gives it) of each continuation."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of each text, scored in windows that leave no token out."""
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
        trees = branches.make_trees(
            [self._truncated(*request) for request in requests],
            longest=max(branches.ROW, branches.padded_length(self.max_length)),
        )
        shards = sharding.batch_shards(self._mesh) if self._mesh else 1
        most_tokens = self.batch_size * self.max_length
        if not self._ops.chip:
            most_tokens = min(most_tokens, _CPU_TOKENS * shards)
        results = [(0.0, True)] * len(requests)
        # disable=None: no bar unless stderr is a terminal.
        with tqdm.tqdm(total=len(requests), desc='Log-likelihoods', disable=disable_tqdm or None) as bar:
            for batch in branches.make_batches(trees, most_tokens, shards):
                for number, result in self._score_batch(batch):
                    results[number] = result
                    if requests[number][0] is not None:
                        self.cache_hook.add_partial('loglikelihood', requests[number][0], result)
                bar.update(len(batch.spans))
        return results

    def _truncated(self, texts, context: list[int], continuation: list[int]) -> branches.Request:
        """Returns context and continuation, without the beginning of the context if the model cannot read all."""
        if not continuation:
            raise errors.UsageError(
                f'a task asks for the log-likelihood of an empty continuation, after {(texts or [""])[0][-40:]!r} (no '
                'text, or no token of its own); mend the data of this task or leave the task out.'
            )
        if len(continuation) > self.max_length:
            raise errors.UsageError(
                f'a continuation of {len(continuation)} tokens does not fit seq_len = {self.max_length}; '
                'leave the task out.'
            )
        tokens = (context + continuation)[-self.max_length - 1 :]  # the last token is predicted, not read
        return tokens[: -len(continuation)], continuation

    def _score_batch(self, batch: branches.Batch) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Yields (number of a request, its result)."""
        arrays = batch.tokens_BT, batch.positions_BT, batch.branch_ids_BT
        if self._mesh:
            arrays = jax.device_put(arrays, sharding.batch_sharding(self._mesh))
        count = sum(span.stop - span.start for span in batch.spans.values())
        logprobs_P, greedy_P = jax.device_get(
            _score(self._params, *arrays, batch.indices_P, batch.targets_P, count, config=self._config, ops=self._ops)
        )
        for number, span in batch.spans.items():
            yield number, (float(logprobs_P[span].sum(dtype=np.float64)), bool(greedy_P[span].all()))

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Returns a text for each (context, generation arguments), cut before the first stop sequence.

        Contexts are truncated on the left to leave room for all tokens asked for. Sampled requests are drawn
        independently: the generator mixes a prompt's ids into its seed, and each repetition has another seed.
        """
        texts = [''] * len(requests)
        with tqdm.tqdm(total=len(requests), desc='Generating', disable=disable_tqdm or None) as bar:
            for options, batch in self._generation_batches([request.args for request in requests]):
                for index, text in self._generate(options, batch):
                    texts[index] = text
                    self.cache_hook.add_partial('generate_until', requests[index].args, text)
                    bar.update()
        return texts

    def _generation_batches(self, arguments) -> Iterator[tuple[dict, list['_Prompt']]]:
        """Yields batches of prompts with equal options and about equal lengths, the longest first."""
        groups, repeats = defaultdict(list), Counter()
        for index, (context, options) in enumerate(arguments):
            count = lm_eval_models_utils.normalize_gen_kwargs(options, self.max_gen_toks)['max_gen_toks']
            if count >= self.max_length:
                raise errors.UsageError(f'a task wants {count} new tokens, but seq_len is {self.max_length}.')
            ids = (self.tok_encode(context) or [self.prefix_token_id])[count - self.max_length :]
            name = json.dumps(options, sort_keys=True)
            groups[name].append(_Prompt(index, ids, repeats[name, tuple(ids)]))
            repeats[name, tuple(ids)] += 1
        for name, prompts in groups.items():
            options: dict[str, Any] = {**lm_eval_models_utils.normalize_gen_kwargs(json.loads(name), self.max_gen_toks)}
            buckets = defaultdict(list)
            for prompt in prompts:
                buckets[generate.padded_length(len(prompt.ids))].append(prompt)
            for P, bucket in sorted(buckets.items(), reverse=True):
                slots = generate.padded_length(P + options['max_gen_toks'])
                count = min(_MOST_PROMPTS, max(1, self.batch_size * self.max_length // slots))
                for start in range(0, len(bucket), count):
                    yield options, bucket[start : start + count]

    def _generate(self, options: dict, prompts: list['_Prompt']) -> Iterator[tuple[int, str]]:
        """Yields (index, text) of each prompt as soon as its text ends."""
        blocks = self._generator.batch(
            [prompt.ids for prompt in prompts],
            max_new_tokens=options['max_gen_toks'],
            temperature=options.get('temperature', 1.0) if options.get('do_sample') else 0.0,
            top_k=options.get('top_k') or None,  # 0 means all tokens, as in transformers
            top_p=options.get('top_p'),
            seed=[prompt.repeat for prompt in prompts],
            eos_id=self._tokenizer.stop_ids,
        )
        stops, waiting = options['until'], dict(enumerate(prompts))
        for rows in blocks:
            for row, prompt in list(waiting.items()):
                text = self._tokenizer.decode(rows.tokens[row])
                if rows.ended[row] or any(stop and stop in text for stop in stops):
                    rows.ended[row] = True
                    del waiting[row]
                    yield prompt.index, lm_eval_models_utils.postprocess_generated_text(text, stops, None)

    @functools.cached_property
    def _generator(self) -> generate.Generator:
        return generate.Generator(self._params, self._config, ops=ops_lib.make_ops(ops_lib.PLAIN, self._mesh))


@dataclasses.dataclass(frozen=True)
class _Prompt:
    """A context to continue: the number of its request, its ids, and how often the same request came before."""

    index: int
    ids: list[int]
    repeat: int


@functools.partial(jax.jit, static_argnames=('config', 'ops'))
def _score(params, tokens_BT, positions_BT, branch_ids_BT, indices_P, targets_P, count, *, config: ModelConfig, ops):
    """Returns each target's log-probability [P] and whether it is the likeliest token [P].

    Only the first `count` are targets; the rest of P is padding.
    """
    x_BTD, _ = model.hidden(params, tokens_BT, config, ops=ops, positions_BT=positions_BT, segment_ids_BT=branch_ids_BT)
    x_PD = x_BTD.reshape(-1, x_BTD.shape[-1])

    def chunk(number, scored):
        start = number * _CHUNK
        indices_C, targets_C = (jax.lax.dynamic_slice_in_dim(x_P, start, _CHUNK) for x_P in (indices_P, targets_P))
        logits_CV = model.logits(params, x_PD[indices_C][None])[0]
        picked_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0]
        new = picked_C - jax.nn.logsumexp(logits_CV, axis=-1), jnp.argmax(logits_CV, axis=-1) == targets_C
        return jax.tree.map(lambda x_P, x_C: jax.lax.dynamic_update_slice_in_dim(x_P, x_C, start, 0), scored, new)

    unscored = jnp.zeros(indices_P.shape, jnp.float32), jnp.zeros(indices_P.shape, bool)
    return jax.lax.fori_loop(0, (count + _CHUNK - 1) // _CHUNK, chunk, unscored)
