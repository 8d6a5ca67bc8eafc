"""The command line: main.py COMMAND --config=FILE[:arg] --workdir=DIR [--config.x.y=value ...]."""

import pathlib
import pkgutil
import shlex
import sys

from absl import flags

from tinyllama_jax import errors
from tinyllama_jax.cluster import members as cluster
from tinyllama_jax.cluster import place
from tinyllama_jax.process import signals, xla
from tinyllama_jax.settings import commands, experiment

_USAGE = f'usage: main.py {"|".join(commands.COMMANDS)} --config=FILE --workdir=DIR'
_NEED_CONFIG = ('prepare', 'train', 'check', 'plan')  # the others find it in the workdir
FLAGS = flags.FLAGS
for _name, (_kind, *_arguments) in commands.OPTIONS.items():
    getattr(flags, f'DEFINE_{_kind}')(_name, *_arguments)


def _run(command: str, config, workdir: pathlib.Path, command_line: str) -> None:
    """Calls what a command stands for; imports only what it needs."""
    path, names = commands.COMMANDS[command]
    options = {name: FLAGS[name].value for name in names.split()}
    if command in ('train', 'check'):  # what the processes of a run disagree on is said before the slow imports
        where = [options.pop(name) for name in ('coordinator', 'num_processes', 'process_id')]
        options = options or {'command': command_line}
        with cluster.joined(place.find(*where), config) as members:
            if command == 'train' and config.train.evaluate_tasks:  # only then, for it imports lm-eval
                options['hooks'] = pkgutil.resolve_name('eval_bridge.in_training:hooks')(config, workdir, members.count)
            pkgutil.resolve_name(path)(config, workdir, **options, members=members)
        return
    call = pkgutil.resolve_name(path)
    if command == 'prepare':
        call(config.data, config.data.store_path(workdir))
    elif command == 'import':
        call(options['input'] or options['model'], workdir, config, command_line)
    else:
        call(workdir, config, **options)


def _check_flags(command: str) -> None:
    """Raises UsageError for a flag that was given and that another command takes."""
    for name in FLAGS:
        takers = [taker for taker, (_, names) in commands.COMMANDS.items() if name in names.split()]
        if FLAGS[name].present and takers and command not in takers:
            raise errors.UsageError(f'--{name} is a flag of {", ".join(takers)}, not of {command}; leave it out.')


def main(argv: list[str]) -> int | None:
    """Parses, dispatches, and turns a foreseen failure into one line and its exit status."""
    try:
        arguments, overrides = experiment.split_overrides(argv[1:])
        command, *rest = FLAGS([argv[0], *arguments])[1:] or ['']
        if FLAGS.help:
            print(f'{_USAGE} [--config.x.y=value ...]\n{FLAGS.main_module_help()}')
            return None
        if rest or command not in commands.COMMANDS:
            raise errors.UsageError(f'{_USAGE} (--help lists the flags)')
        _check_flags(command)
        if not FLAGS.workdir and command != 'plan' and not (command == 'evaluate' and (FLAGS.model or FLAGS.models)):
            raise errors.UsageError(f'{command} needs --workdir=DIR, the folder of the run.')
        workdir = FLAGS.workdir and pathlib.Path(FLAGS.workdir)
        config = experiment.resolve(FLAGS.config, workdir, overrides, required=command in _NEED_CONFIG)
        exact = command == 'train' and config.train.deterministic
        xla.set_up_jax(deterministic=exact, compiled=workdir / 'compiled' if exact else None)
        _run(command, config, workdir, shlex.join(['main.py', *argv[1:]]))
    except (flags.Error, errors.Failure) as error:
        print(f'main.py: {error}', file=sys.stderr)
        return getattr(error, 'exit_code', errors.UsageError.exit_code)


if __name__ == '__main__':
    signals.end_on_ctrl_c('main.py: stopped by Ctrl-C; the same command takes it up again.')
    sys.exit(main(sys.argv))
