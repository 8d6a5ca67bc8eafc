"""The command `plan`: whether a run fits GPUs that are not there, what would make it fit, and how fast it may be.

docs/plan.md says how to read the answers and how far to trust them.
"""

import json as json_lib
import pathlib

from tinyllama_jax import config as config_lib
from tinyllama_jax import errors, sharding
from tinyllama_jax.config import Config
from tinyllama_jax.plan import compile as compile_lib
from tinyllama_jax.plan import report, variants
from tinyllama_jax.plan.compile import Cluster, Compiled
from tinyllama_jax.plan.memory import GIB


def plan_run(
    config: Config,
    workdir: pathlib.Path | None,
    *,
    target: str | None,
    topology: str | None,
    search: bool = False,
    json: bool = False,
    output: str | None = None,
) -> None:
    """Runs `main.py plan` and prints the plan. Raises UsageError, or DoesNotFit with a change that makes it fit."""
    cluster = compile_lib.make_cluster(target, topology)
    tried = search_steps(config, cluster) if search else []
    compiled = tried[0] if tried else compile_lib.compile_step(config, cluster)
    plan = report.make_plan(compiled)
    if search:
        plan['search'] = [report.search_row(each) for each in tried if each.fits]
    print(json_lib.dumps(plan, indent=2) if json else report.text(plan))
    if output:
        from tinyllama_jax.plan import page  # loads matplotlib

        written = page.write(plan, pathlib.Path(output))
        print('' if json else f'\nthe same with a chart: {written}', end='' if json else '\n')
    if not compiled.fits:
        raise errors.DoesNotFit(
            f'{compiled.peak_bytes / GIB:.1f} GiB do not fit into {cluster.capacity_bytes / GIB:.1f} GiB a GPU; '
            f'{remedy(config, compiled)}.'
        )


def search_steps(config: Config, cluster: Cluster) -> list[Compiled]:
    """Compiles the step with each remat policy and each micro-batch of `variants.sizes_to_search`.

    With each policy the micro-batches grow until one does not fit. Returns the steps that fit, the fastest first, and
    then those that do not.
    """
    tried: list[Compiled] = []
    shards = sharding.batch_shards(sharding.make_mesh(config.mesh, cluster.devices()))
    for policy in config_lib.REMAT:
        for size in variants.sizes_to_search(config, shards):
            compiled = _compiled_or_none(variants.variant(config, remat=policy, micro_batch_size=size), cluster)
            tried += [compiled] if compiled else []
            if compiled and not compiled.fits:
                break
    return sorted(tried, key=lambda step: (not step.fits, -step.tokens_per_second))


def _compiled_or_none(config: Config, cluster: Cluster) -> Compiled | None:
    """Returns the compiled step, or None if `train` would refuse `config`, for a mesh that does not divide, say."""
    try:
        return compile_lib.compile_step(config, cluster)
    except errors.UsageError:
        return None


def remedy(config: Config, compiled: Compiled) -> str:
    """Returns words that name the least change of `config` with which its step fits; `compiled`, its step, does not.

    Compiles the changed steps to find out.
    """
    cluster = compiled.cluster
    known: dict[tuple, Compiled | None] = {(compiled.config.mesh, compiled.config.train): compiled}

    def compiled_if_it_fits(other: Config) -> Compiled | None:
        key = other.mesh, other.train
        if key not in known:
            known[key] = _compiled_or_none(other, cluster)
        step = known[key]
        return step if step and step.fits else None

    if fitting := variants.least_change(config, compiled_if_it_fits):
        return f'it fits ({fitting.peak_bytes / GIB:.1f} GiB) with {variants.flags(config, fitting.config)}'
    return (
        f'no remat policy, micro-batch or mesh makes it fit {cluster.size} of these GPUs; take more of them '
        '(--topology), or larger ones (--target)'
    )
