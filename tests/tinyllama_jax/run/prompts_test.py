"""The command `generate`: prompts and continuations printed in order, whole characters at a time."""

from tests.support import tiny_export
from tinyllama_jax import generate, tokenizer
from tinyllama_jax.run import prompts as prompts_lib


def test_prompts_are_printed_in_order_as_their_tokens_come(tmp_path, capsys):
    pieces = tokenizer.Tokenizer(tiny_export.write_tokenizer(tmp_path / 'tokenizer.model'))
    texts = ['def one', 'class Two']
    prompts = [pieces.encode(text) for text in texts]
    tokens = [pieces.encode(' return x'), pieces.encode(' is here')]
    rows, shown = generate.Rows([[], []], [False, False]), []

    def blocks():
        for first, second in ((1, 2), (2, 99), (99, 99)):
            rows.tokens[:] = tokens[0][:first], tokens[1][:second]
            rows.ended[:] = first > len(tokens[0]), second > len(tokens[1])
            yield rows
            shown.append(capsys.readouterr().out)

    prompts_lib._print(prompts, blocks(), pieces)
    whole = [pieces.decode(ids + new) for ids, new in zip(prompts, tokens, strict=True)]
    assert ''.join(shown) == ''.join(f'{text}\n' for text in whole)
    assert shown[0] and whole[0].startswith(shown[0] + shown[1]), 'the second waits for the first'


def test_a_text_that_ends_within_a_character_is_printed(tmp_path, capsys):
    pieces = tokenizer.Tokenizer(tiny_export.write_tokenizer(tmp_path / 'tokenizer.model'))
    prompt, new = pieces.encode('def one'), [*pieces.encode(' is'), pieces.encode('é\U0001f600')[-4]]
    assert pieces.decode(prompt + new).endswith('\ufffd')
    prompts_lib._print([prompt], iter([generate.Rows([new], [True])]), pieces)
    assert capsys.readouterr().out == pieces.decode(prompt + new) + '\n'
