"""The commands of main.py and their flags: a new command is a row in COMMANDS, a new flag a row in FLAGS."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Command:
    """One command: main.py calls `path` as `run(config, workdir, **flags)`."""

    path: str  # MODULE:FUNCTION, imported only when the command runs
    flags: str = ''  # the flags it takes besides --config and --workdir
    needs_config: bool = False  # otherwise `config` is the workdir's own, or None where it has none yet
    needs_workdir: bool = True
    joins_cluster: bool = False  # it runs in several processes: PLACE_FLAGS become `members`
    keeps_command: bool = False  # it also takes `command`, the command line, which config.json keeps
    trains: bool = False  # it obeys config.train.deterministic, and takes hooks if config.train.evaluate_tasks are set


PLACE_FLAGS = 'coordinator num_processes process_id'
# The flags that name files or folders.
PATHS = 'config workdir plan output input model models include_path task_data prompts'

COMMANDS = {
    'prepare': Command('tinyllama_jax.data.prepare:prepare_run', needs_config=True),
    'train': Command(
        'tinyllama_jax.train:train', PLACE_FLAGS, needs_config=True, joins_cluster=True, keeps_command=True, trains=True
    ),
    'evaluate': Command(
        'eval_bridge.command:evaluate_run',
        'model models step tasks table figure protocol backend parity include_path task_data confirm_run_unsafe_code '
        'limit log_samples output',
        needs_workdir=False,
    ),
    'export': Command('eval_bridge.hf.convert:export_run', 'step output dtype format'),
    'import': Command('eval_bridge.hf.convert:import_run', 'input model', keeps_command=True),
    'generate': Command(
        'tinyllama_jax.run.prompts:generate_run', 'step prompt prompts max_new_tokens temperature top_k top_p seed'
    ),
    'plan': Command(
        'tinyllama_jax.plan.command:plan_run',
        'target topology search json output',
        needs_config=True,
        needs_workdir=False,
    ),
    'report': Command('tinyllama_jax.report.run:report_run'),
    'check': Command(
        'tinyllama_jax.cluster.check:check_run', f'{PLACE_FLAGS} plan', needs_config=True, joins_cluster=True
    ),
}

# Flag -> how absl defines it: kind, default, an enum's choices, help.
FLAGS = {
    'help': ('bool', False, 'Print this help.'),
    'config': ('string', None, 'Experiment file, with an optional variant: configs/tinyllama_1b.py[:original].'),
    'workdir': ('string', None, 'The folder of the run.'),
    'coordinator': ('string', None, 'HOST:PORT of process 0, where neither Slurm nor Kubernetes tells.'),
    'num_processes': ('integer', None, 'the number of processes, with --coordinator.'),
    'process_id': ('integer', None, 'the number of this process, from 0, with --coordinator.'),
    'plan': ('string', None, 'a file with the output of `plan --json`; without it the needs are estimated.'),
    'step': ('integer', None, 'the checkpoint to use; the newest by default.'),
    'output': ('string', None, 'a new folder; evaluate writes a JSON file, or a folder for --table and --figure.'),
    'dtype': ('enum', 'float32', ['float32', 'bfloat16'], 'the type of the weights.'),
    'format': ('enum', 'safetensors', ['safetensors', 'pytorch'], 'the file format of the weights.'),
    'input': ('string', None, 'a Hugging Face Llama folder.'),
    'model': ('string', None, 'a Hugging Face Llama folder; evaluate takes it instead of a workdir.'),
    'target': ('string', None, 'the kind of GPU, such as a100-40gb.'),
    'topology': ('string', None, 'NODESxGPUS, such as 2x8.'),
    'search': ('bool', False, 'try micro-batches and remat policies, and list the fastest first.'),
    'json': ('bool', False, 'print one JSON object.'),
    'models': (
        'list',
        [],
        '[NAME=]FOLDER,... for a table or figure; NAME as published, or for a figure with its tokens, such as x-105b.',
    ),
    'table': ('integer', None, "the paper's table 2 or 3, beside the published values."),
    'figure': ('integer', None, "the paper's figure 2, from all checkpoints of a workdir or from --models."),
    'protocol': ('enum', 'paper', ['paper', 'current'], 'score as the paper did, or as lm-eval does now.'),
    'backend': ('enum', None, ['jax', 'hf'], "our model or transformers'; by default ours for a Llama."),
    'parity': ('bool', False, 'evaluate with the other backend too, and compare.'),
    'tasks': ('list', [], 'task names, separated by commas.'),
    'include_path': ('string', None, 'a folder with task files of your own.'),
    'task_data': ('string', None, "a folder with the tasks' data, laid out as docs/evaluation.md says."),
    'confirm_run_unsafe_code': ('bool', False, 'run the programs that the model writes, in a jail.'),
    'limit': ('integer', None, 'only the first LIMIT examples of each task.'),
    'log_samples': ('bool', False, 'keep every example with its log-likelihoods.'),
    'prompt': ('multi_string', [], 'a text to continue; may be given several times.'),
    'prompts': ('string', None, 'a file with one text to continue per line.'),
    'max_new_tokens': ('integer', 128, 'at most this many tokens.'),
    'temperature': ('float', 0.0, '0 takes the most likely token.'),
    'top_k': ('integer', None, 'sample from the k most likely tokens.'),
    'top_p': ('float', None, 'sample from the most likely tokens that together have this probability.'),
    'seed': ('integer', 0, 'sampling seed.'),
}


def takers(flag: str) -> list[str]:
    """Returns the commands that take a flag; none for --config, --workdir and --help, which belong to all."""
    return [name for name, command in COMMANDS.items() if flag in command.flags.split()]


def define_arguments(flag: str) -> tuple:
    """Returns what absl's DEFINE of a flag takes after its name; the help begins with the commands that take it."""
    _, *values, text = FLAGS[flag]
    return *values, ': '.join(filter(None, [', '.join(takers(flag)), text]))
