"""The command line: main.py COMMAND --config=FILE[:arg] --workdir=DIR [--config.x.y=value ...]."""

import pathlib
import pkgutil
import shlex
import sys
from typing import Any

from absl import flags

from tinyllama_jax import errors, files
from tinyllama_jax.cluster import members as cluster
from tinyllama_jax.cluster import place
from tinyllama_jax.process import signals, streams, xla
from tinyllama_jax.settings import commands, experiment

_USAGE = f'usage: main.py {"|".join(commands.COMMANDS)} --config=FILE --workdir=DIR'
FLAGS = flags.FLAGS
for _name, (_kind, *_) in commands.FLAGS.items():
    getattr(flags, f'DEFINE_{_kind}')(_name, *commands.define_arguments(_name))


def _run(name: str, config: Any, workdir: pathlib.Path | None, command_line: str) -> None:
    """Calls a command's function; imports only what it needs."""
    command = commands.COMMANDS[name]
    options: dict[str, Any] = {flag: FLAGS[flag].value for flag in command.flags.split()}
    if command.keeps_command:
        options['command'] = command_line
    if not command.joins_cluster:
        place.refuse_several(name)
        pkgutil.resolve_name(command.path)(config, workdir, **options)
        return
    here = place.find(**{flag: options.pop(flag) for flag in commands.PLACE_FLAGS.split()})
    with cluster.joined(here, config) as members:  # processes that disagree are told so before the slow imports
        if command.trains and config.train.evaluate_tasks:  # only then, for it imports lm-eval
            options['hooks'] = pkgutil.resolve_name('eval_bridge.in_training:hooks')(config, workdir, members)
        pkgutil.resolve_name(command.path)(config, workdir, **options, members=members)


def main(argv: list[str]) -> int | None:
    """Runs the command; prints a foreseen failure as one line and returns its exit status."""
    try:
        arguments, overrides = experiment.split_overrides(argv[1:])
        name, *rest = FLAGS([argv[0], *arguments])[1:] or ['']
        if FLAGS.help:
            print(f'{_USAGE} [--config.x.y=value ...]\n{FLAGS.main_module_help()}')
            return None
        if rest or name not in commands.COMMANDS:
            raise errors.UsageError(f'{_USAGE} (--help lists the flags)')
        for flag in FLAGS:
            takers = commands.takers(flag)
            if FLAGS[flag].present and takers and name not in takers:
                raise errors.UsageError(f'--{flag} is a flag of {", ".join(takers)}, not of {name}; leave it out.')
        command = commands.COMMANDS[name]
        if command.trains:
            streams.outlive()
        for flag in commands.PATHS.split():
            FLAGS[flag].value = files.local_paths(f'--{flag}', FLAGS[flag].value)
        if command.needs_workdir and not FLAGS.workdir:
            raise errors.UsageError(f'{name} needs --workdir=DIR, the folder of the run.')
        workdir = pathlib.Path(FLAGS.workdir) if FLAGS.workdir else None
        config = experiment.resolve(FLAGS.config, workdir, overrides, required=command.needs_config)
        exact = bool(command.trains and config and config.train.deterministic)
        xla.set_up_jax(deterministic=exact, compiled=workdir / 'compiled' if exact and workdir else None)
        _run(name, config, workdir, shlex.join(['main.py', *argv[1:]]))
        sys.stdout.flush()  # here, where a full disk is still told
    except Exception as error:
        failure = errors.foreseen(error)
        if not isinstance(failure, flags.Error | errors.Failure):
            raise
        print(f'main.py: {failure}', file=sys.stderr)
        return getattr(failure, 'exit_code', errors.UsageError.exit_code)


if __name__ == '__main__':
    streams.set_up()
    signals.end_on_ctrl_c('main.py: stopped by Ctrl-C; the same command resumes or starts over.')
    sys.exit(main(sys.argv))
