import gzip
import json

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
