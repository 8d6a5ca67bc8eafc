"""The command line: main.py COMMAND --config=FILE[:arg] --workdir=DIR [--config.x.y=value ...]."""

import os
import pathlib
import shlex
import sys

from absl import flags

from tinyllama_jax import config as config_lib
from tinyllama_jax import errors

os.environ.setdefault('HF_HUB_OFFLINE', '1')  # no command asks the network

COMMANDS = ('prepare', 'train', 'evaluate', 'export', 'import', 'generate', 'report')
FLAGS = flags.FLAGS
flags.DEFINE_string('config', None, 'Experiment file, with an optional variant: configs/tinyllama_1b.py[:original].')
flags.DEFINE_string('workdir', None, 'The folder of the run.')
flags.DEFINE_integer('step', None, 'Checkpoint to use; the newest by default.')
flags.DEFINE_string('output', None, 'export: a new folder; evaluate: a JSON file.')
flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'export: the type of the weights.')
flags.DEFINE_enum('format', 'safetensors', ['safetensors', 'pytorch'], 'export: the file format of the weights.')
flags.DEFINE_string('input', None, 'import: a Hugging Face Llama folder.')
flags.DEFINE_string('model', None, 'evaluate: a Hugging Face Llama folder instead of a workdir.')
flags.DEFINE_list('tasks', [], 'evaluate: task names, separated by commas.')
flags.DEFINE_string('include_path', None, 'evaluate: a folder with task files of your own.')
flags.DEFINE_integer('limit', None, 'evaluate: only the first so many examples of each task.')
flags.DEFINE_bool('log_samples', False, 'evaluate: keep every example with its log-likelihoods.')
flags.DEFINE_multi_string('prompt', [], 'generate: a text to continue; may be given several times.')
flags.DEFINE_integer('max_new_tokens', 128, 'generate: at most so many tokens.')
flags.DEFINE_float('temperature', 0.0, 'generate: 0 takes the likeliest token.')
flags.DEFINE_integer('top_k', None, 'generate: sample from the k likeliest tokens.')
flags.DEFINE_float('top_p', None, 'generate: sample from the likeliest tokens that make up this probability.')
flags.DEFINE_integer('seed', 0, 'generate: of the sampling.')


def _config(overrides: list[tuple[str, str]]) -> config_lib.Config | None:
    """The configuration of --config, else the workdir's, with the overrides; None where there is neither."""
    if FLAGS.config:
        config = config_lib.load_experiment(FLAGS.config)
    elif FLAGS.workdir and os.path.isfile(os.path.join(FLAGS.workdir, 'config.json')):
        from tinyllama_jax import workdir

        config = workdir.read_config(pathlib.Path(FLAGS.workdir))
    elif overrides:
        raise errors.UsageError(f'--config.{overrides[0][0]} changes a setting of --config=FILE, which is missing.')
    else:
        return None
    for path, text in overrides:
        config = config_lib.override(config, path, text)
    return config_lib.validated(config)


def _path(name: str) -> pathlib.Path:
    if not FLAGS[name].value:
        raise errors.UsageError(f'--{name} is missing.')
    return pathlib.Path(FLAGS[name].value)


def _loaded(config: config_lib.Config | None):
    """The checkpoint that --workdir and --step name, for the commands that need no --config."""
    from tinyllama_jax import workdir

    if config is not None:
        workdir.refuse_contradiction(_path('workdir'), config)
    return workdir.load(_path('workdir'), FLAGS.step)


def _run(command: str, config: config_lib.Config | None, command_line: str) -> None:
    from tinyllama_jax import workdir

    if command in ('prepare', 'train') and config is None:
        raise errors.UsageError(f'{command} needs --config=FILE, for example --config=configs/demo.py.')
    if command == 'prepare':
        from tinyllama_jax.data import prepare

        prepare.prepare(config.data, workdir.store_path(config, _path('workdir')))
    elif command == 'train':
        from tinyllama_jax import train

        train.train(config, _path('workdir'), command=command_line)
    elif command == 'generate':
        from tinyllama_jax import generate

        generate.continue_prompts(_loaded(config), FLAGS.prompt)
    elif command == 'report':
        from tinyllama_jax import report

        print(report.report(_path('workdir')))


def main(argv: list[str]) -> int:
    """Parses, dispatches, and turns a foreseen failure into one line and its exit status."""
    try:
        arguments, overrides = config_lib.split_overrides(argv[1:])
        command, *rest = FLAGS([argv[0], *arguments])[1:] or ['']
        if rest or command not in COMMANDS:
            raise errors.UsageError(f'usage: main.py {"|".join(COMMANDS)} --config=FILE --workdir=DIR [--config.x=value]')
        _run(command, _config(overrides), shlex.join(['main.py', *argv[1:]]))
        return 0
    except flags.Error as error:
        print(f'main.py: {error}', file=sys.stderr)
        return errors.UsageError.exit_code
    except errors.Failure as error:
        print(f'main.py: {error}', file=sys.stderr)
        return error.exit_code


if __name__ == '__main__':
    sys.exit(main(sys.argv))
