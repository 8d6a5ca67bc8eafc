"""Prints the packages of a `pip install --dry-run --report` as a lock file: python .ci/lock.py REPORT."""

import json
import pathlib
import sys


def main() -> None:
    """Writes one `name==version` a line, sorted, to stdout."""
    report = json.loads(pathlib.Path(sys.argv[1]).read_text())
    python = '.'.join(report['environment']['python_full_version'].split('.')[:2])
    packages = [package['metadata'] for package in report['install']]
    print(f'# Every package of requirements-dev.txt on Python {python}, as resolved. Written by `make lock`.')
    for name, version in sorted((p['name'].lower().replace('_', '-'), p['version']) for p in packages):
        print(f'{name}=={version.partition("+")[0]}')


if __name__ == '__main__':
    main()
