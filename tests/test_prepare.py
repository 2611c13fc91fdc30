import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet
import pytest
from conftest import ROOT, call_module, expect_error, run_module, write_corpus

from bert_jax import prepare
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
        mine = [d for d in documents if prepare.is_held_out(d, 0.15) == side]
        assert len(mine) == len(split.document_lengths) > 2
        assert split.tokens.tolist() == [i for d in mine for s in d for i in tok.encode(s)]
        assert split.document_lengths.tolist() == [len(d) for d in mine]
        assert split.sentence_lengths.sum() == len(split.tokens) == split.sentence_starts[-1]
    size = sum(f['bytes'] for f in store.info['files'].values() if f) - (vocab / 'vocab.txt').stat().st_size
    assert size / (len(store.train.tokens) + len(store.held_out.tokens)) < 2.3


def test_a_document_is_on_the_same_side_in_every_store():
    document = ['A text.', 'Of two sentences.']
    shares = [share for share in np.linspace(0.01, 0.99, 99) if prepare.is_held_out(document, share)]
    assert shares == sorted(shares) and shares[-1] > 0.98  # once held out, held out at every larger share
    assert prepare.is_held_out(document, shares[0]) == prepare.is_held_out(['A  text. Of', 'two sentences.'], shares[0])
    held = np.mean([prepare.is_held_out([f'document {i}'], 0.2) for i in range(5000)])
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
        while not (output / 'journal.json').exists() or json.loads((output / 'journal.json').read_text())['blocks'] < blocks:
            assert process.poll() is None, 'it ended before it could be killed'
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    result = run_module('prepare', *args, '--output', output)
    assert result.returncode == 0, result.stderr
    assert 'going on after 8 blocks' in result.stdout
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
@pytest.mark.parametrize('name', [*stores.FILES, 'store.json', 'tokenizer/vocab.txt', 'tokenizer/tokenizer_config.json'])
def test_every_damaged_byte_is_noticed(store_path, tmp_path, name, damage):
    with pytest.raises(UserError, match='damaged|truncated'):
        stores.load(damaged(store_path, tmp_path, name, damage))


def test_a_store_of_another_version_or_tokenizer_is_refused(store_path, tmp_path):
    copy = tmp_path / 'copy'
    shutil.copytree(store_path, copy)

    def rewrite(**changes):
        body = json.loads((store_path / 'store.json').read_text()) | changes
        del body['sha256']
        (copy / 'store.json').write_text(json.dumps(body | {'sha256': stores.info_hash(body)}, indent=2, sort_keys=True) + '\n')

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
    done = call_module('prepare', '--tokenizer', vocab, '--input', tmp_path / 'few.txt', '--output', tmp_path / 'few', '--held_out', '0.001')
    assert done.returncode == 0 and 'fewer than two documents are held out' in done.stderr and '--held_out than 0.001' in done.stderr
    expect_error(run(corpus), str(output), 'another inputs')
    expect_error(call_module('prepare', '--tokenizer', vocab, '--input', corpus, '--output', vocab), 'not empty')
    expect_error(call_module('prepare', '--tokenizer', vocab, '--input', corpus, '--output', output, '--held_out', '1.5'),
                 '--held_out 1.5')


def test_bad_utf8_late_in_the_input_goes_on_with_errors_replace(corpus, vocab, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(corpora, 'BLOCK_BYTES', 20_000)
    text = tmp_path / 'late.txt'
    text.write_bytes(corpus.read_bytes() + b'\nbad \xff\n')
    args = [str(text)], str(vocab)
    with pytest.raises(UserError, match='--errors replace'):
        prepare.prepare(*args, str(tmp_path / 'store'), corpora.Reader())
    prepare.prepare(*args, str(tmp_path / 'store'), corpora.Reader(errors='replace'))
    assert 'going on after' in capsys.readouterr().out
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
