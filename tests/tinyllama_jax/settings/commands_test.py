"""The tables of commands and flags, held against the functions that main.py calls."""

import ast

import pytest

from tests.conftest import ROOT
from tinyllama_jax.settings import commands


def _parameters(path: str) -> ast.arguments:
    """The parameters of MODULE:FUNCTION, read off its source: importing every command takes half a minute."""
    module, name = path.split(':')
    tree = ast.parse((ROOT / f'{module.replace(".", "/")}.py').read_text())
    return next(node.args for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)


@pytest.mark.parametrize('name', commands.COMMANDS)
def test_every_command_is_called_alike(name):
    command = commands.COMMANDS[name]
    parameters = _parameters(command.path)
    assert [argument.arg for argument in parameters.args] in (['config', 'workdir'], ['config', 'folder'])
    given = set(command.flags.split())
    if command.joins_cluster:
        given = given - set(commands.PLACE_FLAGS.split()) | {'members'}
    given |= ({'command'} if command.keeps_command else set()) | ({'hooks'} if command.trains else set())
    takes = {argument.arg for argument in parameters.kwonlyargs}
    assert takes <= given and (parameters.kwarg or takes == given)


def test_every_flag_is_defined_and_every_definition_used():
    taken = {flag for command in commands.COMMANDS.values() for flag in command.flags.split()}
    assert taken | {'config', 'workdir', 'help'} == commands.FLAGS.keys()


def test_the_help_of_a_flag_begins_with_the_commands_that_take_it():
    assert commands.takers('step') == ['evaluate', 'export', 'generate'] and commands.takers('workdir') == []
    assert commands.define_arguments('step') == (
        None,
        'evaluate, export, generate: the checkpoint to use; the newest by default.',
    )
    assert commands.define_arguments('dtype')[:2] == ('float32', ['float32', 'bfloat16'])
    assert commands.define_arguments('workdir') == (None, 'The folder of the run.')
