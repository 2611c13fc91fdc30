import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet
import pytest
from conftest import ROOT, call_module, expect_error, run_module, write_corpus

from bert_jax import lock, prepare
from bert_jax.cli import UserError
from bert_jax.data import corpora, tokenizer
from bert_jax.data import store as stores


def contents(path):
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob('*')) if f.is_file()}


def test_the_same_bytes_with_1_and_4_workers(corpus, vocab, tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, 'BLOCK_BYTES', 20_000)  # many blocks
    one, four = (prepare.prepare([str(corpus)], str(vocab), str(tmp_path / str(n)), corpora.Reader(), 0.15, n).path
                 for n in (1, 4))
    assert contents(one) == contents(four)
    assert {'store.json', *stores.FILES} <= contents(one).keys()


def test_the_store_holds_the_text(corpus, vocab, store):
    reader, tok = corpora.Reader(), tokenizer.load(vocab)
    documents = [d for block in reader.blocks(str(corpus)) for d in reader.documents(block)]
    for split, side in ((store.train, False), (store.held_out, True)):
        mine = [d for d in documents if stores.is_held_out(d, 0.15) == side]
        assert len(mine) == len(split.document_lengths) > 2
        assert split.tokens.tolist() == [i for d in mine for s in d for i in tok.encode(s)]
        assert split.document_lengths.tolist() == [len(d) for d in mine]
        assert split.sentence_lengths.sum() == len(split.tokens) == split.sentence_starts[-1]
    size = sum(f['bytes'] for f in store.info['files'].values() if f) - (vocab / 'vocab.txt').stat().st_size
    assert size / (len(store.train.tokens) + len(store.held_out.tokens)) < 2.3


def test_a_document_is_on_the_same_side_in_every_store():
    document = ['A text.', 'Of two sentences.']
    shares = [share for share in np.linspace(0.01, 0.99, 99) if stores.is_held_out(document, share)]
    assert shares == sorted(shares) and shares[-1] > 0.98  # once held out, held out at every larger share
    assert stores.is_held_out(document, shares[0]) == stores.is_held_out(['A  text. Of', 'two sentences.'], shares[0])
    held = np.mean([stores.is_held_out([f'document {i}'], 0.2) for i in range(5000)])
    assert abs(held - 0.2) < 0.02


def test_a_sentence_longer_than_the_length_type_is_cut(vocab):
    tok = tokenizer.load(vocab)
    encoded = prepare.encode_documents([['a'] * 2, ['the ' * 70_000]], tok, 0.0)
    lengths = np.frombuffer(encoded.chunks['train.sentences'], stores.SENTENCE_TYPE)
    assert lengths.tolist() == [1, 1, 65535, 70_000 - 65535]
    assert encoded.counts['train_tokens'] == 70_002 and encoded.counts['train_documents'] == 2


def test_killed_and_started_again_it_goes_on(vocab, tmp_path):
    """SIGKILL at several moments; the store that comes out is the one of an undisturbed run."""
    text = write_corpus(tmp_path / 'big.txt').read_text()
    corpus = tmp_path / 'big.txt'
    corpus.write_text('\n\n'.join(text.replace('the', f'the {i}') for i in range(80)))
    args = ['--input', str(corpus), '--tokenizer', str(vocab), '--workers', '2', '--held_out', '0.1']
    assert run_module('prepare', *args, '--output', tmp_path / 'whole').returncode == 0
    output = tmp_path / 'killed'
    for blocks in (0, 4, 8):  # which the journal has when the kill comes
        process = subprocess.Popen([sys.executable, '-m', 'bert_jax.prepare', *args, '--output', str(output)],
                                   cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while (
            not (output / 'journal.json').exists()
            or json.loads((output / 'journal.json').read_text())['blocks'] < blocks
        ):
            assert process.poll() is None, 'it ended before it could be killed'
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    result = run_module('prepare', *args, '--output', output)
    assert result.returncode == 0, result.stderr
    assert 'resuming after 8 blocks' in result.stdout
    assert contents(output) == contents(tmp_path / 'whole')
    assert 'already complete' in call_module('prepare', *args, '--output', output).stdout


@pytest.mark.parametrize('stage', range(1, len(stores.FILES) + 1))
def test_stopped_between_the_last_renames_it_goes_on(stage, corpus, vocab, tmp_path, monkeypatch):
    renames = []

    def replace(source, target, real=os.replace):
        if str(source).endswith('.partial') and 'json' not in str(source):
            renames.append(source)
            if len(renames) == stage:
                raise KeyboardInterrupt
        real(source, target)

    args = ([str(corpus)], str(vocab), str(tmp_path / 'store'), corpora.Reader(), 0.15)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, 'replace', replace)
        prepare.prepare(*args)
    assert len(prepare.prepare(*args).train.tokens) > 1000


def damaged(path, tmp_path, name, damage):
    copy = tmp_path / 'copy'
    shutil.copytree(path, copy)
    content = bytearray((copy / name).read_bytes())
    if damage == 'flip':
        content[len(content) // 2] ^= 1
    else:
        content = content[:-1]
    (copy / name).write_bytes(bytes(content))
    return copy


@pytest.mark.parametrize('damage', ['flip', 'cut'])
@pytest.mark.parametrize(
    'name', [*stores.FILES, 'store.json', 'tokenizer/vocab.txt', 'tokenizer/tokenizer_config.json']
)
def test_every_damaged_byte_is_noticed(store_path, tmp_path, name, damage):
    with pytest.raises(UserError, match='damaged|truncated'):
        stores.load(damaged(store_path, tmp_path, name, damage))


def test_a_store_of_another_version_or_tokenizer_is_refused(store_path, tmp_path):
    copy = tmp_path / 'copy'
    shutil.copytree(store_path, copy)

    def rewrite(**changes):
        body = json.loads((store_path / 'store.json').read_text()) | changes
        del body['sha256']
        (copy / 'store.json').write_text(
            json.dumps(body | {'sha256': stores.info_hash(body)}, indent=2, sort_keys=True) + '\n'
        )

    rewrite(format_version=2)
    with pytest.raises(UserError, match='format 2, this version reads 1'):
        stores.load(copy)
    rewrite(tokenizer_hash='0' * 64)
    with pytest.raises(UserError, match='do not belong together'):
        stores.load(copy)
    (copy / 'store.json').unlink()
    with pytest.raises(UserError, match='no finished store'):
        stores.load(copy)


def test_bad_input_is_one_line_and_leaves_nothing(corpus, vocab, tmp_path):
    output = tmp_path / 'store'
    run = lambda *args: call_module('prepare', '--tokenizer', vocab, '--output', output, '--input', *args)  # noqa: E731
    expect_error(run(tmp_path / 'missing.txt'), 'missing.txt', 'no such file')
    (tmp_path / 'empty.txt').write_text('\n \n')
    expect_error(run(tmp_path / 'empty.txt'), 'empty.txt', 'no text')
    assert not output.exists()
    (tmp_path / 'bad.txt').write_bytes(b'fine\nbad \xff\n')
    expect_error(run(tmp_path / 'bad.txt'), 'bad.txt:2', 'UTF-8', '--errors replace')
    assert not output.exists()
    done = run(tmp_path / 'bad.txt', '--errors', 'replace')
    assert done.returncode == 0 and 'a single training document' in done.stderr
    (tmp_path / 'few.txt').write_text('one document\n\nand another\n')
    done = call_module(
        'prepare',
        '--tokenizer',
        vocab,
        '--input',
        tmp_path / 'few.txt',
        '--output',
        tmp_path / 'few',
        '--held_out',
        '0.001',
    )
    assert (
        done.returncode == 0
        and 'fewer than two documents are held out' in done.stderr
        and '--held_out than 0.001' in done.stderr
    )
    expect_error(run(corpus), str(output), 'another inputs')
    expect_error(call_module('prepare', '--tokenizer', vocab, '--input', corpus, '--output', vocab), 'not empty')
    expect_error(
        call_module('prepare', '--tokenizer', vocab, '--input', corpus, '--output', output, '--held_out', '1.5'),
        '--held_out 1.5',
    )


def test_bad_utf8_late_in_the_input_goes_on_with_errors_replace(corpus, vocab, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(corpora, 'BLOCK_BYTES', 20_000)
    text = tmp_path / 'late.txt'
    text.write_bytes(corpus.read_bytes() + b'\nbad \xff\n')
    args = [str(text)], str(vocab)
    with pytest.raises(UserError, match='--errors replace'):
        prepare.prepare(*args, str(tmp_path / 'store'), corpora.Reader())
    prepare.prepare(*args, str(tmp_path / 'store'), corpora.Reader(errors='replace'))
    assert 'resuming after' in capsys.readouterr().out
    prepare.prepare(*args, str(tmp_path / 'whole'), corpora.Reader(errors='replace'))
    assert contents(tmp_path / 'store') == contents(tmp_path / 'whole')
    with pytest.raises(UserError, match='another reader'):
        prepare.prepare(*args, str(tmp_path / 'store'), corpora.Reader())


def test_what_another_version_began_is_refused(corpus, vocab, tmp_path, monkeypatch):
    text = tmp_path / 'late.txt'
    text.write_bytes(corpus.read_bytes() + b'\nbad \xff\n')
    args = [str(text)], str(vocab), str(tmp_path / 'store')
    with monkeypatch.context() as other:
        other.setattr(corpora, 'BLOCK_BYTES', 20_000)
        with pytest.raises(UserError, match='--errors replace'):
            prepare.prepare(*args, corpora.Reader())
    with pytest.raises(UserError, match='another version'):
        prepare.prepare(*args, corpora.Reader(errors='replace'))


@pytest.mark.parametrize('kind', ['wordpiece', 'sentencepiece'])
def test_bad_input_of_a_vocabulary_is_one_line_and_leaves_nothing(kind, corpus, tmp_path):
    output, bad = tmp_path / 'vocab', tmp_path / 'bad.txt'
    run = lambda *args: call_module('vocab', '--kind', kind, '--output', output, '--input', *args)  # noqa: E731
    bad.write_bytes(b'fine\nbad \xff\n')
    expect_error(run(corpus, bad, '--vocab_size', '200'), 'bad.txt:2', 'UTF-8', '--errors replace')
    (tmp_path / 'empty.txt').write_text('\n \n')
    expect_error(run(tmp_path / 'empty.txt', '--vocab_size', '200'), 'empty.txt', 'no text')
    expect_error(run(corpus, '--vocab_size', '5'), '--vocab_size 5')
    assert not output.exists() and not list(tmp_path.glob('.vocab*'))


@pytest.mark.parametrize('form', ['sentences', 'paragraphs', 'jsonl', 'parquet'])
def test_gzip_gives_the_same_tokens(form, corpus, vocab, tmp_path):
    documents = [document.replace('\n', ' ') for document in corpus.read_text().split('\n\n')]
    plain = tmp_path / f'topics.{form if form in ("jsonl", "parquet") else "txt"}'
    if form == 'parquet':
        pyarrow.parquet.write_table(pyarrow.table({'text': documents}), plain)
    elif form == 'jsonl':
        plain.write_text('\n'.join(json.dumps({'text': document}) for document in documents))
    else:
        plain.write_bytes(corpus.read_bytes())
    packed = tmp_path / f'{plain.name}.gz'
    with gzip.open(packed, 'wb') as file:
        file.write(plain.read_bytes())
    reader = corpora.Reader('paragraphs' if form == 'paragraphs' else 'sentences')
    one, other = (prepare.prepare([str(name)], str(vocab), str(tmp_path / str(number)), reader, 0.15)
                  for number, name in enumerate((plain, packed)))
    assert len(one.train.tokens) > 10_000 and (one.train.tokens == other.train.tokens).all()


def test_damaged_gzip_is_one_line(tmp_path, vocab):
    for name in ('a.txt.gz', 'a.parquet.gz'):
        (tmp_path / name).write_bytes(gzip.compress(b'text ' * 100)[:-9])
        with pytest.raises(UserError, match=name):
            prepare.prepare([str(tmp_path / name)], str(vocab), str(tmp_path / 'store'), corpora.Reader())


def test_a_store_is_of_the_text_that_it_was_made_of(corpus, vocab, tmp_path, monkeypatch):
    """A rewritten file of the same size is other text, for a finished store and for an interrupted one."""
    text, args = tmp_path / 'a.txt', ([str(tmp_path / 'a.txt')], str(vocab), str(tmp_path / 'store'), corpora.Reader())
    words = corpus.read_text()[:30_000]
    text.write_text(words)
    first = prepare.prepare(*args)
    text.write_text(words[::-1])
    with pytest.raises(UserError, match=f'holds a store of other text; changed since: {text}'):
        prepare.prepare(*args)
    text.write_text(words)
    assert prepare.prepare(*args).info == first.info
    info = json.loads((tmp_path / 'store/store.json').read_text())
    assert info.pop('input_sha256') == [stores.file_hash(text)]
    del info['sha256']  # as an older version wrote it
    stores.write_json(tmp_path / 'store/store.json', info | {'sha256': stores.info_hash(info)})
    assert prepare.prepare(*args).info['counts'] == first.info['counts']
    monkeypatch.setattr(corpora, 'BLOCK_BYTES', 2_000)
    late = tmp_path / 'late.txt'
    late.write_bytes(words.encode() + b'\nbad \xff\n')
    late_args = ([str(late)], str(vocab), str(tmp_path / 'late'), corpora.Reader())
    with pytest.raises(UserError, match='UTF-8'):
        prepare.prepare(*late_args)
    late.write_text(words[::-1])
    with pytest.raises(UserError, match='holds a store of other text'):
        prepare.prepare(*late_args)


def test_two_processes_never_write_one_store(corpus, vocab, tmp_path):
    args = ([str(corpus)], str(vocab), str(tmp_path / 'store'), corpora.Reader())
    with lock.hold(tmp_path / 'store'), pytest.raises(UserError, match='store: in use by process'):
        prepare.prepare(*args)
    assert 'lock.json' not in contents(prepare.prepare(*args).path)


def test_a_strangers_folder_is_left_as_it_is(corpus, vocab, tmp_path, monkeypatch):
    (tmp_path / 'notes').mkdir()
    (tmp_path / 'notes/a.txt').write_text('mine')
    (tmp_path / 'empty.txt').write_text('\n')
    (tmp_path / 'there').mkdir()
    for output, source, words in (
        ('notes', corpus, 'not empty and not a store'),
        ('there', tmp_path / 'empty.txt', 'no text'),
    ):
        with pytest.raises(UserError, match=words):
            prepare.prepare([str(source)], str(vocab), str(tmp_path / output), corpora.Reader())
    assert (
        contents(tmp_path / 'notes') == {'a.txt': b'mine'}
        and (tmp_path / 'there').exists()
        and not contents(tmp_path / 'there')
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='a path is expected'):
        prepare.prepare([str(corpus)], str(vocab), '', corpora.Reader())


@pytest.mark.parametrize(
    'text, words',
    [
        (
            'One is here. Two is there. Three is not. Four.\n' * 30,
            '100% of the lines hold several sentences; --format paragraphs',
        ),
        ('One line.\n\n' * 30, '100% of the documents have one sentence'),
        ('漢字仮名 交じり文\n' * 30, r'100% of the tokens are \[UNK\]'),
    ],
)
def test_what_a_text_does_not_look_like_is_said(text, words, vocab, tmp_path, capsys):
    (tmp_path / 'a.txt').write_text('\n\n'.join([text, text.replace('One', 'Any')]))
    prepare.prepare([str(tmp_path / 'a.txt')], str(vocab), str(tmp_path / 'store'), corpora.Reader(), 0.0)
    assert re.search(words, capsys.readouterr().err)


def test_a_quiet_text_has_no_notes(corpus, vocab, tmp_path, capsys):
    prepare.prepare([str(corpus)], str(vocab), str(tmp_path / 'store'), corpora.Reader(), 0.15)
    assert 'note:' not in capsys.readouterr().err


def test_the_same_text_has_the_same_vocabulary(tmp_path):
    """In processes of their own, whose hash maps have orders of their own; many words, many ties."""
    rng = np.random.default_rng(0)
    (tmp_path / 'a.txt').write_text(
        '\n'.join(' '.join(''.join(rng.choice(list('abcdeéxyz'), 5)) for _ in range(8)) for _ in range(200))
    )
    made = []
    for i in range(3):
        arguments = ['--input', tmp_path / 'a.txt', '--vocab_size', '300', '--output', tmp_path / str(i)]
        assert (call_module if i else run_module)('vocab', *arguments).returncode == 0  # two hash seeds at least
        made.append(contents(tmp_path / str(i)))
    assert made[0] == made[1] == made[2] and len(made[0]['vocab.txt'].split()) == 300


def test_an_alphabet_that_does_not_fit_is_said(tmp_path):
    """The most frequent characters stay; how many are lost, and what share of the text they are, is said."""
    text = 'aab ccd ' * 40 + 'e f g h i j k l m n o p q r s t u v w x y z'
    (tmp_path / 'a.txt').write_text(text)
    done = call_module('vocab', '--input', tmp_path / 'a.txt', '--vocab_size', '14', '--output', tmp_path / 'v')
    pieces = (tmp_path / 'v/vocab.txt').read_text().split()
    assert done.returncode == 0 and len(pieces) <= 14 and {'a', '##a', '##b', 'c', '##c', '##d'} <= set(pieces)
    lost = [c for c in set(text.replace(' ', '')) if not {c, f'##{c}'} & set(pieces)]
    share = sum(map(text.count, lost)) / len(text)
    assert f'{len(lost)} characters, {share:.2%} of the text' in done.stderr, done.stderr
