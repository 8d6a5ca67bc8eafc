"""The command line: main.py COMMAND --config=FILE[:arg] --workdir=DIR [--config.x.y=value ...]."""

import pathlib
import pkgutil
import shlex
import sys

from absl import flags

from tinyllama_jax import errors, experiment, runtime

COMMANDS = {  # what each calls, and the flags it takes besides --config and --workdir
    'prepare': ('tinyllama_jax.data.prepare:prepare', ''),
    'train': ('tinyllama_jax.train:train', ''),
    'evaluate': ('eval_bridge.evaluate:evaluate_run', 'model step tasks include_path limit log_samples output'),
    'export': ('eval_bridge.convert:export_run', 'step output dtype format'),
    'import': ('eval_bridge.convert:import_run', 'input model'),
    'generate': ('tinyllama_jax.generate:generate_run', 'step prompt max_new_tokens temperature top_k top_p seed'),
    'report': ('tinyllama_jax.report:report_run', ''),
}
_USAGE = f'usage: main.py {"|".join(COMMANDS)} --config=FILE --workdir=DIR'
FLAGS = flags.FLAGS
flags.DEFINE_bool('help', False, 'Show this.')
flags.DEFINE_string('config', None, 'Experiment file, with an optional variant: configs/tinyllama_1b.py[:original].')
flags.DEFINE_string('workdir', None, 'The folder of the run.')
flags.DEFINE_integer('step', None, 'evaluate, export, generate: the checkpoint to use; the newest by default.')
flags.DEFINE_string('output', None, 'export: a new folder; evaluate: a JSON file.')
flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'export: the type of the weights.')
flags.DEFINE_enum('format', 'safetensors', ['safetensors', 'pytorch'], 'export: the file format of the weights.')
flags.DEFINE_string('input', None, 'import: a Hugging Face Llama folder.')
flags.DEFINE_string('model', None, 'evaluate: a Hugging Face Llama folder instead of a workdir; import: --input.')
flags.DEFINE_list('tasks', [], 'evaluate: task names, separated by commas.')
flags.DEFINE_string('include_path', None, 'evaluate: a folder with task files of your own.')
flags.DEFINE_integer('limit', None, 'evaluate: only the first so many examples of each task.')
flags.DEFINE_bool('log_samples', False, 'evaluate: keep every example with its log-likelihoods.')
flags.DEFINE_multi_string('prompt', [], 'generate: a text to continue')
flags.DEFINE_integer('max_new_tokens', 128, 'generate: at most so many tokens.')
flags.DEFINE_float('temperature', 0.0, 'generate: 0 takes the likeliest token.')
flags.DEFINE_integer('top_k', None, 'generate: sample from the k likeliest tokens.')
flags.DEFINE_float('top_p', None, 'generate: sample from the likeliest tokens that make up this probability.')
flags.DEFINE_integer('seed', 0, 'generate: of the sampling.')


def _run(command: str, config, workdir: pathlib.Path, command_line: str) -> None:
    """Calls what a command stands for; imports only what it needs."""
    path, names = COMMANDS[command]
    call, options = pkgutil.resolve_name(path), {name: FLAGS[name].value for name in names.split()}
    if command == 'prepare':
        call(config.data, config.data.store_path(workdir))
    elif command == 'train':
        call(config, workdir, command=command_line)
    elif command == 'import':
        call(options['input'] or options['model'], workdir, config, command_line)
    else:
        call(workdir, config, **options)


def _check_flags(command: str) -> None:
    """Raises UsageError for a flag that was given and that another command takes."""
    for name in FLAGS:
        takers = [taker for taker, (_, names) in COMMANDS.items() if name in names.split()]
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
        if rest or command not in COMMANDS:
            raise errors.UsageError(f'{_USAGE} (--help lists the flags)')
        _check_flags(command)
        if not FLAGS.workdir and not (command == 'evaluate' and FLAGS.model):
            raise errors.UsageError(f'{command} needs --workdir=DIR, the folder of the run.')
        workdir = FLAGS.workdir and pathlib.Path(FLAGS.workdir)
        config = experiment.resolve(FLAGS.config, workdir, overrides, required=command in ('prepare', 'train'))
        runtime.set_up_jax()
        _run(command, config, workdir, shlex.join(['main.py', *argv[1:]]))
    except (flags.Error, errors.Failure) as error:
        print(f'main.py: {error}', file=sys.stderr)
        return getattr(error, 'exit_code', errors.UsageError.exit_code)


if __name__ == '__main__':
    runtime.end_on_ctrl_c('main.py: stopped by Ctrl-C; the same command takes it up again.')
    sys.exit(main(sys.argv))
