"""Benchmarks the train step of TinyLlama 1.1 B on one GPU against plain JAX and Hugging Face.

    bench/gpu.sh peers [RESULTS] [--only=PHASE,...] [--smoke]

The peers are plain JAX with cuDNN's and with XLA's attention, and Hugging Face's Llama under torch.compile with
cuDNN's attention forced and with its default. All start from the same weights and take turns. JAX and torch run in
their own processes, since neither gives GPU memory back. Ends with 1 if losses differ or something broke
(docs/gpu_benchmarks.md).
"""

import functools
import json
import statistics
import sys

import jax
import jax.numpy as jnp
import numpy as np

from bench.gpu import benchmark
from bench.gpu import step as gpu_step
from bench.peers import plain_llama
from tinyllama_jax import model, sharding
from tinyllama_jax import ops as ops_lib
from tinyllama_jax import step as step_lib

CHECKED_STEPS = 3
LOSS_TOLERANCE = 0.02  # nats, for each of the first losses in bfloat16, which are near ln 32,000 = 10.4
# Nats: the mean difference of the losses of one row's tokens. Rounding to bfloat16 gives some thousandths; wrongly
# converted weights give the spread of the logits, 0.9 at the start (0.1 in the smoke run).
TOKEN_TOLERANCE = 0.05
_TURNS = {'repeats': 3, 'count': 1}


def _weights_folder(setting: benchmark.Setting):
    return setting.work / 'weights'


def save_weights(setting: benchmark.Setting) -> None:
    """Saves our initial parameters, one file per path."""
    config = setting.config()
    params = jax.jit(functools.partial(model.init_params, config.model))(jax.random.key(config.seed))
    _weights_folder(setting).mkdir()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator='.')
        np.save(_weights_folder(setting) / f'{name}.npy', np.asarray(leaf))


def load_weights(setting: benchmark.Setting) -> dict[str, np.ndarray]:
    """Returns {path: memory-mapped array}."""
    files = sorted(_weights_folder(setting).glob('*.npy'))
    return {file.stem.replace('.', '/'): np.load(file, mmap_mode='r') for file in files}


def _fresh_state(setting: benchmark.Setting, config, mesh) -> step_lib.TrainState:
    weights, abstract = load_weights(setting), step_lib.abstract_state(config, mesh).params
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.device_put(
            np.asarray(weights[jax.tree_util.keystr(path, simple=True, separator='/')]), leaf.sharding
        ),
        abstract,
    )
    make = functools.partial(step_lib.make_state, config)
    return jax.jit(make, out_shardings=step_lib.state_shardings(config, mesh), donate_argnums=0)(params)


def _jax_trainers(setting: benchmark.Setting, mesh) -> dict[str, gpu_step.Trainer]:
    """Returns our step and plain JAX's, which update one shared state."""
    config = gpu_step.train_config(setting)
    trainers = {'ours': gpu_step.compiled_step(config, setting, ('none', 'attention', 'full'))}
    attentions = {'xla': ('full',)} if setting.smoke else {'cudnn': ('none', 'full'), 'xla': ('full',)}
    state = step_lib.abstract_state(config, mesh)
    rows = jax.ShapeDtypeStruct(gpu_step.make_rows(setting, 1)[0].shape, np.uint16)
    for attention, remats in attentions.items():

        def compiled(remat, attention=attention):
            function = functools.partial(plain_llama.train_step, config=config, attention=attention, remat=remat)
            return (
                jax.jit(function, donate_argnums=0, out_shardings=_out_shardings(state, mesh))
                .lower(state, rows)
                .compile()
            )

        trainers[f'plain JAX, {attention} attention'] = gpu_step.fitting(compiled, remats)
    return trainers


def _out_shardings(state, mesh):
    return jax.tree.map(lambda leaf: leaf.sharding, state), sharding.replicated(mesh)


def _jax_token_losses(setting: benchmark.Setting, params, row_BR) -> dict[str, np.ndarray]:
    config = gpu_step.train_config(setting)
    ops = ops_lib.for_run(config, gpu_step.make_mesh(config))

    def ours(params, row_BR):
        row_BR = row_BR.astype(jnp.int32)
        logits_BTV = model.logits(params, model.hidden(params, row_BR[:, :-1], config.model, ops=ops)[0])
        picked_BT = jnp.take_along_axis(logits_BTV, row_BR[:, 1:, None], axis=-1)[:, :, 0]
        return jax.nn.logsumexp(logits_BTV, axis=-1) - picked_BT

    plain = functools.partial(plain_llama.token_losses, config=config.model, attention='xla')
    functions = {'ours': ours, 'plain JAX': plain}
    return {name: np.asarray(jax.jit(function)(params, row_BR)) for name, function in functions.items()}


def jax_peers(setting: benchmark.Setting, turn: int) -> dict:
    """Runs a turn of our step and plain JAX's; the first turn also makes the weights and checks the losses."""
    if not turn:
        save_weights(setting)
    config = gpu_step.train_config(setting)
    mesh, batches = gpu_step.make_mesh(config), list(gpu_step.make_rows(setting, CHECKED_STEPS))
    trainers, rows, state = _jax_trainers(setting, mesh), {}, _fresh_state(setting, config, mesh)
    if not turn:
        row_BR = batches[0][0, :1]
        for name, losses in _jax_token_losses(setting, state.params, row_BR).items():
            _save_token_losses(setting, name, losses)
    for name, trainer in trainers.items():
        rows[name] = {'remat': trainer.remat, **trainer.memory, 'losses': []}
        if not turn:
            del state
            state = _fresh_state(setting, config, mesh)
            for rows_ABR in batches:
                state, metrics = trainer.step(state, rows_ABR)
                rows[name]['losses'].append(float(metrics['loss']))
    seconds = gpu_step.take_turns(trainers, state, batches, setting, **_TURNS)
    for name, row in rows.items():
        row['seconds'] = seconds[name]
    return _noted(setting, 'jax', turn, rows, jax.devices()[0].device_kind)


def torch_peers(setting: benchmark.Setting, turn: int) -> dict:
    """Runs a turn of Hugging Face's Llama; on a CPU without torch.compile, which would take minutes."""
    jax.config.update('jax_platforms', 'cpu')  # leaves the GPU's memory to torch
    try:
        import torch

        from bench.peers import torch_llama as torch_peer
    except ImportError as error:
        raise benchmark.Skipped(f'{error.name} is not installed') from None
    config, batches = setting.config(), list(gpu_step.make_rows(setting, CHECKED_STEPS)[:, 0])
    device = 'cpu' if setting.smoke else 'cuda'
    how = 'eager' if setting.smoke else 'compiled'
    initial = torch_peer.state_dict(load_weights(setting), config.model.num_layers)
    net = torch_peer.make_net(config.model, initial, device)
    if not turn:
        _save_token_losses(setting, 'Hugging Face', torch_peer.token_losses(net, batches[0][:1]))
    rows, calls = {}, {}
    for name, cudnn in (('cudnn attention', True), ('default attention', False)):
        optimizer = torch_peer.make_optimizer(net, config)
        train = torch_peer.Trainer(net, config, cudnn=cudnn, compiled=not setting.smoke)
        _make_it_fit(torch, train, batches[0], optimizer)
        net.load_state_dict(initial)
        optimizer = torch_peer.make_optimizer(net, config)
        losses = [float(train(rows_BR, optimizer)) for rows_BR in batches]
        row = rows[f'Hugging Face {how}, {name}'] = {'remat': 'full' if train.recomputes else 'none'}
        row |= {'losses': losses if not turn else [], 'attention': train.implementation}
        if not setting.smoke:
            row['kernels'] = torch_peer.attention_kernels(functools.partial(train, batches[0], optimizer))
            row['peak_bytes_so_far'] = torch.cuda.max_memory_allocated()
        calls[f'Hugging Face {how}, {name}'] = functools.partial(_train_all, train, batches, optimizer)
    turns = {'repeats': 1, 'count': 1} if setting.smoke else _TURNS
    for name, seconds in benchmark.in_turns(calls, **turns).items():
        rows[name]['seconds'] = [each / len(batches) for each in seconds]
    return _noted(setting, 'torch', turn, rows, '')


def _train_all(train, batches, optimizer):
    for rows_BR in batches:
        loss = train(rows_BR, optimizer)
    return loss


def _make_it_fit(torch, train, rows_BR, optimizer) -> None:
    """Runs a step, which compiles it; if memory is short, enables recomputation and runs it again."""
    try:
        train(rows_BR, optimizer)
        return
    except torch.cuda.OutOfMemoryError:
        pass  # the failed step's arrays are freed outside this block
    train.net.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    train.recomputes = True
    train(rows_BR, optimizer)


def _save_token_losses(setting: benchmark.Setting, name: str, losses: np.ndarray) -> None:
    np.save(setting.work / f'token losses {name}.npy', losses)


def _noted(setting: benchmark.Setting, framework: str, turn: int, rows: dict, kind: str) -> dict:
    """Saves a turn's results for `compare`, and returns them."""
    (setting.work / f'turn {turn} {framework}.json').write_text(json.dumps({'rows': rows, 'kind': kind}))
    return {'peers': rows}


def compare(setting: benchmark.Setting) -> dict:
    """Returns median tokens/s and MFU of each peer over all turns; fails if losses differ."""
    turns = [json.loads(path.read_text()) for path in sorted(setting.work.glob('turn *.json'))]
    if not turns:
        raise benchmark.Skipped('no turn has run')
    kind = ''.join({turn['kind'] for turn in turns})
    merged: dict[str, dict] = {}
    for turn in turns:
        for name, row in turn['rows'].items():
            known = merged.setdefault(name, {**row, 'seconds': []})
            known['seconds'] = known['seconds'] + row['seconds']
    tokens, rows = setting.batch * setting.model.seq_len, []
    for name, row in merged.items():
        per_second = tokens / statistics.median(row['seconds'])
        rows.append({'peer': name, 'remat': row['remat'], **gpu_step.speed(setting, per_second, kind)})
        rows[-1] |= {f'loss_{index}': loss for index, loss in enumerate(row['losses'])}
        rows[-1]['time_relative_to_ours'] = statistics.median(row['seconds']) / statistics.median(
            merged['ours']['seconds']
        )
    losses = {name: row['losses'] for name, row in merged.items() if row['losses']}
    failures = gpu_step.loss_failures(losses, LOSS_TOLERANCE) + _token_failures(setting)
    return {'loss_tolerance': LOSS_TOLERANCE, 'token_tolerance': TOKEN_TOLERANCE, 'rows': rows, 'failures': failures}


def _token_failures(setting: benchmark.Setting) -> list[str]:
    """Returns a sentence for each peer whose per-token losses differ from ours."""
    ours = np.load(setting.work / 'token losses ours.npy')
    failures = []
    for file in sorted(setting.work.glob('token losses *.npy')):
        difference = float(np.mean(np.abs(np.load(file) - ours)))
        if not difference <= TOKEN_TOLERANCE:
            failures.append(f'{file.stem} are {difference:.2g} from ours, more than {TOKEN_TOLERANCE}')
    return failures


PHASES = {
    'jax': functools.partial(jax_peers, turn=0),
    'torch': functools.partial(torch_peers, turn=0),
    'jax_again': functools.partial(jax_peers, turn=1),
    'torch_again': functools.partial(torch_peers, turn=1),
    'compare': compare,
}


def main(arguments=None) -> int:
    """Runs the command; returns its exit status."""
    return benchmark.run('bench.gpu.peers', __doc__, PHASES, name='gpu_peers', arguments=arguments)


if __name__ == '__main__':
    sys.exit(main())
