import bz2
import gzip
import json
import lzma
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from bert_jax.cli import UserError
from bert_jax.data import corpora

DOCUMENTS = [['One sentence.', 'Another one.'], ['A second document.']]


def read(path, **kwargs):
    reader = corpora.Reader(**kwargs)
    return [document for name in corpora.expand([str(path)]) for block in reader.blocks(name)
            for document in reader.documents(block)]


def as_text(documents):
    return '\n\n'.join('\n'.join(document) for document in documents)


@pytest.mark.parametrize('end', ['\n', '\r\n'])
@pytest.mark.parametrize('suffix', ['.txt', '.txt.gz'])
def test_sentences(tmp_path, suffix, end):
    content = ('\n' * 3 + as_text(DOCUMENTS) + '\n \n\n').replace('\n', end).encode()
    path = tmp_path / f'a{suffix}'
    path.write_bytes(gzip.compress(content) if suffix.endswith('gz') else content)
    assert read(path) == DOCUMENTS


def test_paragraphs(tmp_path):
    path = tmp_path / 'a.txt'
    path.write_text('\n\n'.join(' '.join(document) for document in DOCUMENTS))
    assert read(path, text_format='paragraphs') == DOCUMENTS


@pytest.mark.parametrize('suffix', ['.jsonl', '.jsonl.gz', '.parquet'])
def test_records(tmp_path, suffix):
    path = tmp_path / f'a{suffix}'
    texts = [' '.join(document) for document in DOCUMENTS]
    if suffix == '.parquet':
        pyarrow.parquet.write_table(pyarrow.table({'body': texts, 'n': [1, 2]}), path)
    else:
        content = ''.join(json.dumps({'body': text}) + '\n' for text in texts).encode()
        path.write_bytes(gzip.compress(content) if suffix.endswith('gz') else content)
    assert read(path, text_column='body') == DOCUMENTS
    with pytest.raises(UserError, match="no column 'text'; there are: body"):
        read(path)


def test_tfds_through_its_own_mock():
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=3):
        documents = read('tfds:ag_news_subset', text_column='description')
        assert len(documents) == 3
        with pytest.raises(UserError, match="no column 'text'; there are: .*description"):
            read('tfds:ag_news_subset')
    with pytest.raises(UserError, match='TFDS cannot load it'):
        read('tfds:no_such_dataset')


def test_small_blocks_change_nothing(tmp_path, monkeypatch):
    path = tmp_path / 'a.txt'
    path.write_text(as_text(DOCUMENTS * 40))
    for size in (7, 64, 1000):
        monkeypatch.setattr(corpora, 'BLOCK_BYTES', size)
        assert read(path) == DOCUMENTS * 40


@pytest.mark.parametrize('text, sentences', [
    ('He met Dr. Smith. They spoke.', ['He met Dr. Smith.', 'They spoke.']),
    ('J. S. Bach wrote it in 1723. Then he left!', ['J. S. Bach wrote it in 1723.', 'Then he left!']),
    ('Is it 3.14? "Yes," she said. (Good.) ok', ['Is it 3.14?', '"Yes," she said.', '(Good.) ok']),
    ('今日は。明日は！', ['今日は。', '明日は！']),
    ('비가 온다. 우산이 없다! 어쩌지?', ['비가 온다.', '우산이 없다!', '어쩌지?']),
    ('Он ушёл. Она осталась… и ждала.', ['Он ушёл.', 'Она осталась… и ждала.']),
    ('Vino tarde. ¿Qué pasó? «Nada.» dijo.', ['Vino tarde.', '¿Qué pasó?', '«Nada.» dijo.']),
    ('वह आया। फिर गया।', ['वह आया।', 'फिर गया।']),
    ('no stop at all', ['no stop at all']),
    ('', []),
])
def test_the_sentence_splitter(text, sentences):
    assert corpora.split_sentences(text) == sentences


def test_invalid_utf8_names_file_and_line(tmp_path):
    path = tmp_path / 'bad.txt'
    path.write_bytes(b'good\nline\n\nb\xffd\n')
    with pytest.raises(UserError, match=r'bad\.txt:4: not valid UTF-8'):
        read(path)
    assert read(path, errors='replace') == [['good', 'line'], ['b\ufffdd']]


def test_a_very_long_line_is_a_mistake(tmp_path):
    path = tmp_path / 'long.txt'
    path.write_text('fine\n' + 'word ' * 2_000_000 + '\n')
    with pytest.raises(UserError, match=r'long\.txt:2: a line of 9,999,999 characters'):
        read(path)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(UserError, match='nothing matches'):
        corpora.expand([str(tmp_path / '*.txt')])
    (tmp_path / 'a.jsonl').write_text('{"text": "x"}\nnot json\n')
    with pytest.raises(UserError, match=r'a\.jsonl:2: not JSON'):
        read(tmp_path / 'a.jsonl')
    (tmp_path / 'a.parquet').write_bytes(b'PAR1')
    with pytest.raises(UserError, match='not a Parquet file'):
        read(tmp_path / 'a.parquet')
    pyarrow.parquet.write_table(pyarrow.table({'text': [1, 2]}), tmp_path / 'b.parquet')
    with pytest.raises(UserError, match="column 'text' is not text but int64"):
        read(tmp_path / 'b.parquet')
    (tmp_path / 'c.jsonl').write_text('{"text": "half a pair: \\ud83d"}\n')
    with pytest.raises(UserError, match=r'c\.jsonl:1: not valid UTF-8'):
        read(tmp_path / 'c.jsonl')
    assert read(tmp_path / 'c.jsonl', errors='replace')[0][0].startswith('half a pair: \ufffd')
    (tmp_path / 'd[1].txt').write_text('a name that looks like a pattern\n')
    assert read(tmp_path / 'd[1].txt') == [['a name that looks like a pattern']]
    (tmp_path / 'a.txt.gz').write_bytes(b'not gzip')
    with pytest.raises(UserError, match='cannot be read'):
        read(tmp_path / 'a.txt.gz')


WIKI = ('{"id": "12", "url": "u", "title": "A", "text": "One is here. Two is there.\\nThree follows."}\n'
        '{"id": "25", "url": "u", "title": "B", "text": "Four."}\n')
DOCS = ('<doc id="12" url="u" title="A &amp; B">\nA & B\n\nOne is here. Two is there.\nThree follows.\n\n</doc>\n'
        '<doc id="25" url="u" title="C">\nFour.\n</doc>\n')


@pytest.mark.parametrize('name, content', [('wiki_00', WIKI), ('wiki_01', DOCS), ('wiki.txt', DOCS)])
@pytest.mark.parametrize('pack', [None, gzip, bz2, lzma])
def test_what_a_file_is_follows_from_its_content(tmp_path, name, content, pack):
    """WikiExtractor's two forms, packed or not, whatever the ending."""
    data = content.encode()
    (tmp_path / name).write_bytes(pack.compress(data) if pack else data)
    assert read(tmp_path / name) == [['One is here.', 'Two is there.', 'Three follows.'], ['Four.']]


def test_prose_that_begins_like_something_else_is_prose(tmp_path):
    for text in (
        '{ a brace } in prose.\nMore.\n',
        '{"quoted"} words\nMore.\n',
        '<documents> in angles\nMore.\n',
        'BZ is short\nMore.\n',
        '[1] a note\nMore.\n',
    ):
        (tmp_path / 'a.txt').write_text(text)
        assert read(tmp_path / 'a.txt') == [text.split('\n')[:2]]


@pytest.mark.parametrize(
    'name, content, words',
    [
        ('a.csv', b'text,label\na,b\n', 'a table; give its texts as JSON lines'),
        ('a.tsv.gz', gzip.compress(b'a\tb\n', mtime=0), 'a table'),
        ('a.txt', b'\x28\xb5\x2f\xfd\x04\x00', 'packed with zstd'),
        ('a.txt', b'PK\x03\x04\x14\x00', 'a zip archive'),
        ('a.txt', 'text\n'.encode('utf-16'), 'UTF-16; iconv'),
        ('a.txt', 'text\n'.encode('utf-16-le'), r'binary data \(it holds zero bytes\)'),
        ('a.txt', b'%PDF-1.7 x', 'a PDF'),
        ('dump', b'<mediawiki xmlns="x">\n<page>\n', 'WikiExtractor does for Wikipedia'),
        ('a.json', b'[\n {"text": "a"}]', 'a JSON array; JSON lines'),
        ('a.txt.bz2', b'plain', 'by its name it is packed, but it is not'),
        ('a.jsonl', b'plain text\nmore\n', r'a\.jsonl:1: not JSON'),
        ('wiki', b'<doc id="1">\na\n</doc>\nstray\n', 'text outside of <doc>'),
        (
            'a.txt',
            'Où est la forêt ? Là-bas, près de la rivière gelée.\n'.encode('latin-1') * 9,
            r'is not: iconv -f ENCODING',
        ),
    ],
)
def test_what_is_no_text_is_refused_by_name(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        read(tmp_path / name)


def plain_split(text):
    """The sentence rule, written down as it is meant: each end is looked at with all that stands before it."""
    text, sentences, start = ' '.join(text.split()), [], 0
    for match in corpora.SENTENCE_END.finditer(text):
        piece = text[start:match.end()].strip()
        if piece and not ((match['next'] or '').islower() or corpora.ABBREVIATION.search(piece)):
            sentences, start = [*sentences, piece], match.end()
    return [*sentences, *([text[start:].strip()] if text[start:].strip() else [])]


def test_sentences_of_any_text_are_those_of_the_rule():
    rng = np.random.default_rng(0)
    words = [
        'Mr.',
        'e.g.',
        'a.',
        'B.',
        'Prof.',
        'so.',
        'end!',
        '"Yes."',
        '(no?)',
        '好。',
        '”',
        'Then',
        'it',
        '1',
        'etc.',
        'Lt. Ltd.',
        'xCapt.',
        '...',
    ]
    for _ in range(2000):
        text = ''.join(word + ' ' * rng.integers(0, 2) for word in rng.choice(words, rng.integers(1, 12)))
        assert corpora.split_sentences(text) == plain_split(text), text


def grows(make):
    """How much longer four times as much takes."""
    def seconds(size):
        start = time.process_time()
        make(size)
        return time.process_time() - start

    return min(seconds(4) for _ in range(3)) / min(seconds(1) for _ in range(3))


def test_reading_takes_as_long_as_the_text_is(tmp_path, monkeypatch):
    """Sixteen times as long for four times as much, where each block or sentence is looked at from the beginning."""
    assert grows(lambda n: corpora.split_sentences('a. b. c. ' * 15_000 * n)) < 9
    assert grows(lambda n: corpora.split_sentences('Mr. A. ' * 15_000 * n)) < 9
    monkeypatch.setattr(corpora, 'BLOCK_BYTES', 4096)
    for n in (1, 4):
        (tmp_path / f'{n}.txt').write_text('one line of it\n' * 150_000 * n)
    assert grows(lambda n: [len(block.content) for block in corpora.Reader().blocks(str(tmp_path / f'{n}.txt'))]) < 9


def test_a_gap_that_two_blocks_share_parts_documents(tmp_path, monkeypatch):
    text = b'a\nb\n \t \n\nc\n\n\n   \nd\ne'
    (tmp_path / 'a.txt').write_bytes(text)
    for size in range(1, len(text) + 1):
        monkeypatch.setattr(corpora, 'BLOCK_BYTES', size)
        assert read(tmp_path / 'a.txt') == [['a', 'b'], ['c'], ['d', 'e']], size
