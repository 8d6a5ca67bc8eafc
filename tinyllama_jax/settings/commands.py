"""The commands and flags of main.py: what a command calls, which flags it takes, what a flag means. No code."""

COMMANDS = {  # what each calls, and the flags it takes besides --config and --workdir
    'prepare': ('tinyllama_jax.data.prepare:prepare', ''),
    'train': ('tinyllama_jax.train:train', 'coordinator num_processes process_id'),
    'evaluate': (
        'eval_bridge.command:evaluate_run',
        'model models step tasks table figure protocol backend parity include_path task_data confirm_run_unsafe_code '
        'limit log_samples output',
    ),
    'export': ('eval_bridge.hf.convert:export_run', 'step output dtype format'),
    'import': ('eval_bridge.hf.convert:import_run', 'input model'),
    'generate': (
        'tinyllama_jax.run.prompts:generate_run',
        'step prompt prompts max_new_tokens temperature top_k top_p seed',
    ),
    'plan': ('tinyllama_jax.plan.command:plan_run', 'target topology search json output'),
    'report': ('tinyllama_jax.report.run:report_run', ''),
    'check': ('tinyllama_jax.cluster.check:check', 'coordinator num_processes process_id plan'),
}

# Flag -> how absl defines it: kind, default, an enum's choices, help (which begins with the commands that take it).
OPTIONS = {
    'help': ('bool', False, 'Show this.'),
    'config': ('string', None, 'Experiment file, with an optional variant: configs/tinyllama_1b.py[:original].'),
    'workdir': ('string', None, 'The folder of the run.'),
    'coordinator': ('string', None, 'train, check: HOST:PORT of process 0, where neither Slurm nor Kubernetes tells.'),
    'num_processes': ('integer', None, 'train, check: how many processes there are, with --coordinator.'),
    'process_id': ('integer', None, 'train, check: which of them this is, from 0 on.'),
    'plan': ('string', None, 'check: a file with what plan --json printed; else what it needs is estimated.'),
    'step': ('integer', None, 'evaluate, export, generate: the checkpoint to use; the newest by default.'),
    'output': ('string', None, 'export, plan: a new folder; evaluate: a JSON file, of a table or figure a folder.'),
    'dtype': ('enum', 'float32', ['float32', 'bfloat16'], 'export: the type of the weights.'),
    'format': ('enum', 'safetensors', ['safetensors', 'pytorch'], 'export: the file format of the weights.'),
    'input': ('string', None, 'import: a Hugging Face Llama folder.'),
    'model': ('string', None, 'evaluate: a Hugging Face Llama folder instead of a workdir; import: --input.'),
    'target': ('string', None, 'plan: the kind of GPU, as a100-40gb.'),
    'topology': ('string', None, 'plan: NODESxGPUS, as 2x8.'),
    'search': ('bool', False, 'plan: try micro-batches and remat policies, best first.'),
    'json': ('bool', False, 'plan: print one JSON object.'),
    'models': (
        'list',
        [],
        'evaluate: [NAME=]FOLDER,... of a table or figure; NAME as published, or a figure: as -105b.',
    ),
    'table': ('integer', None, "evaluate: the paper's table 2 or 3, beside the published values."),
    'figure': ('integer', None, "evaluate: the paper's figure 2, of all checkpoints of a workdir or of --models."),
    'protocol': ('enum', 'paper', ['paper', 'current'], 'evaluate: as the paper did, or as lm-eval does now.'),
    'backend': ('enum', None, ['jax', 'hf'], "evaluate: our model, or transformers'; Llamas by default ours."),
    'parity': ('bool', False, 'evaluate: also with the other backend, and compare.'),
    'tasks': ('list', [], 'evaluate: task names, separated by commas.'),
    'include_path': ('string', None, 'evaluate: a folder with task files of your own.'),
    'task_data': ('string', None, "evaluate: a folder with the tasks' data, laid out as docs/evaluation.md says."),
    'confirm_run_unsafe_code': ('bool', False, 'evaluate: run the programs that the model writes, in a jail.'),
    'limit': ('integer', None, 'evaluate: only the first so many examples of each task.'),
    'log_samples': ('bool', False, 'evaluate: keep every example with its log-likelihoods.'),
    'prompt': ('multi_string', [], 'generate: a text to continue'),
    'prompts': ('string', None, 'generate: a file with a text to continue on each line.'),
    'max_new_tokens': ('integer', 128, 'generate: at most so many tokens.'),
    'temperature': ('float', 0.0, 'generate: 0 takes the likeliest token.'),
    'top_k': ('integer', None, 'generate: sample from the k likeliest tokens.'),
    'top_p': ('float', None, 'generate: sample from the likeliest tokens that make up this probability.'),
    'seed': ('integer', 0, 'generate: of the sampling.'),
}
