"""The command `generate`: prompts and continuations printed in order, whole characters at a time."""

from tests.support import tiny, tiny_export
from tinyllama_jax import generate
from tinyllama_jax.run import prompts as prompts_lib
from tinyllama_jax.run import workdir
from tinyllama_jax.tokenizer import spm


def test_prompts_are_printed_in_order_as_their_tokens_come(tmp_path, capsys):
    tokenizer = spm.SentencePieceTokenizer(tiny_export.write_tokenizer(tmp_path / 'tokenizer.model'))
    texts = ['def one', 'class Two']
    prompts = [tokenizer.encode(text) for text in texts]
    tokens = [tokenizer.encode(' return x'), tokenizer.encode(' is here')]
    batch, shown = generate.Continuations([[], []], [False, False]), []

    def blocks():
        for first, second in ((1, 2), (2, 99), (99, 99)):
            batch.tokens[:] = tokens[0][:first], tokens[1][:second]
            batch.ended[:] = first > len(tokens[0]), second > len(tokens[1])
            yield batch
            shown.append(capsys.readouterr().out)

    prompts_lib._print_texts(prompts, blocks(), tokenizer)
    whole = [tokenizer.decode(ids + new) for ids, new in zip(prompts, tokens, strict=True)]
    assert ''.join(shown) == ''.join(f'{text}\n' for text in whole)
    assert shown[0] and whole[0].startswith(shown[0] + shown[1]), 'the second waits for the first'


def test_a_text_that_ends_within_a_character_is_printed(tmp_path, capsys):
    tokenizer = spm.SentencePieceTokenizer(tiny_export.write_tokenizer(tmp_path / 'tokenizer.model'))
    prompt, new = tokenizer.encode('def one'), [*tokenizer.encode(' is'), tokenizer.encode('é\U0001f600')[-4]]
    assert tokenizer.decode(prompt + new).endswith('\ufffd')
    prompts_lib._print_texts([prompt], iter([generate.Continuations([new], [True])]), tokenizer)
    assert capsys.readouterr().out == tokenizer.decode(prompt + new) + '\n'


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path, monkeypatch):
    tokenizer = spm.SentencePieceTokenizer(tiny_export.write_tokenizer(tmp_path / 'tokenizer.model'))
    (tmp_path / 'prompts').write_text('def one\r\nclass\r\n', encoding='utf-8-sig', newline='')
    asked = []

    class Stub:
        def batch(self, prompts, **_):
            asked.extend(prompts)
            return iter([generate.Continuations([[5]] * len(prompts), [True] * len(prompts))])

    loaded = workdir.Loaded(tiny.CONFIG, {}, 0, tokenizer.path)
    monkeypatch.setattr(workdir, 'load', lambda *_: loaded)
    monkeypatch.setattr(generate, 'Generator', lambda *_: Stub())
    prompts_lib.generate_run(None, tmp_path, prompt=[], prompts=str(tmp_path / 'prompts'))
    assert asked == [tokenizer.encode('def one'), tokenizer.encode('class')]
