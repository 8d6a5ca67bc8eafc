"""The command `plan`: whether a run fits GPUs that are not there, what would make it fit, and how fast it may be.

docs/plan.md says how to read the answers and how far to trust them.
"""

import json as json_lib
import math
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
    """Runs `main.py plan`: prints the plan of the configured step, or of the fastest that a search finds.

    Raises UsageError for bad input, and DoesNotFit, with a change that makes the step fit, if it needs too much memory.
    """
    cluster = compile_lib.make_cluster(target, topology)
    found = search_steps(config, cluster) if search else []
    compiled = found[0] if found else compile_lib.compile_step(config, cluster)
    plan = report.make_plan(compiled)
    if search:
        plan['search'] = [report.search_row(step) for step in found if step.fits]
    print(json_lib.dumps(plan, indent=2) if json else report.text(plan))
    if output:
        from tinyllama_jax.plan import page  # loads matplotlib

        written = page.write(plan, pathlib.Path(output))
        if not json:
            print(f'\nthe same with a chart: {written}')
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
    steps: list[Compiled] = []
    shards = sharding.batch_shards(sharding.make_mesh(config.mesh, cluster.devices()))
    for policy in config_lib.REMAT:
        for size in variants.sizes_to_search(config, shards):
            step = _compiled_or_none(variants.variant(config, remat=policy, micro_batch_size=size), cluster)
            if step:
                steps.append(step)
                if not step.fits:
                    break
    return sorted(steps, key=lambda step: (not step.fits, -step.tokens_per_second))


def _compiled_or_none(config: Config, cluster: Cluster) -> Compiled | None:
    """Returns the compiled step; None if `train` would refuse `config`, such as a mesh that the batch does not fit."""
    try:
        return compile_lib.compile_step(config, cluster)
    except errors.UsageError:
        return None


def remedy(config: Config, compiled: Compiled) -> str:
    """Returns words that name the least change of `config` that makes its step fit, found by compiling changed steps.

    `compiled` is a step that does not fit: that of `config`, or of a variant that a search compiled.
    """
    cluster = compiled.cluster
    peaks = {(compiled.config.mesh, compiled.config.train): float(compiled.peak_bytes)}  # infinite: `train` refuses it

    def fits(changed: Config) -> bool:
        key = changed.mesh, changed.train
        if key not in peaks:
            step = _compiled_or_none(changed, cluster)
            peaks[key] = step.peak_bytes if step else math.inf
        return peaks[key] <= cluster.capacity_bytes

    if changed := variants.least_change(config, fits):
        peak = peaks[changed.mesh, changed.train]
        return f'it fits ({peak / GIB:.1f} GiB) with {variants.flags(config, changed)}'
    return (
        f'no remat policy, micro-batch or mesh makes it fit {cluster.size} of these GPUs; take more of them '
        '(--topology), or larger ones (--target)'
    )
