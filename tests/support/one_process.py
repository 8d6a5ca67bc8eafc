"""Runs main.py with two additions for tests: `python -m tests.support.one_process ARGUMENTS`.

It appends the rows that it reads to the file $READS.HOST, and on the host $STUCK its hook after a validation sleeps
forever.
"""

import functools
import json
import os
import signal
import sys

import main
from tinyllama_jax import train
from tinyllama_jax.data import store


def _main() -> None:
    def read_rows(self, source, split, rows, seq_len, _read=store.TokenStore.read_rows):
        with open(f'{os.environ["READS"]}.{os.environ["NODE_NAME"]}', 'a') as file:
            file.write(json.dumps([source, split, rows.tolist()]) + '\n')
        return _read(self, source, split, rows, seq_len)

    def hook(step, params):
        if os.environ['NODE_NAME'] == os.environ.get('STUCK'):
            signal.pause()

    if 'READS' in os.environ:
        store.TokenStore.read_rows = read_rows
    train.train = functools.partial(train.train, hooks=[hook])
    sys.exit(main.main(sys.argv))


if __name__ == '__main__':
    _main()
