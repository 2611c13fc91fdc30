import json
import string
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_jax.cli import UserError
from bert_jax.data import tokenizer


def write(folder, pieces, name='vocab.txt'):
    (folder / name).write_text('\n'.join(pieces) + '\n')
    return folder / name


SPECIALS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60) | st.text(alphabet='aAéß ,.中한\u0301\u3000\t\u200bx9-', max_size=40)
       | st.text(st.characters(max_codepoint=127), max_size=60) | st.text(alphabet='aZ0', min_size=95, max_size=105))
def test_cached_chunks_equal_the_library(both_cases, text):
    for tok in both_cases:
        whole = tok._backend.encode(text, add_special_tokens=False).ids
        assert tok.encode(text) == whole


@pytest.fixture(scope='module')
def both_cases(vocab, tmp_path_factory):
    cased = tmp_path_factory.mktemp('cased')
    letters = [prefix + letter for letter in string.ascii_letters + string.digits for prefix in ('', '##')]
    return tokenizer.load(vocab), tokenizer.load(write(cased, [*SPECIALS, *letters, *string.punctuation, 'The', 'the']))


def test_the_unknown_piece_may_have_its_other_name(tmp_path):
    tok = tokenizer.load(write(tmp_path, ['<pad>', '<unk>', '<cls>', '<sep>', '<mask>', 'go']))
    assert tok.encode('go, né') == [5, 1, 1]


def test_batches_are_flat(vocab):
    tok = tokenizer.load(vocab)
    flat, lengths = tok.encode_batch(['the import statement', '', 'a  b'])
    assert flat.dtype == np.uint16 and lengths.tolist()[1] == 0
    assert flat[:lengths[0]].tolist() == tok.encode('the import statement')
    assert lengths.sum() == len(flat)


def test_every_way_to_name_a_wordpiece_tokenizer_agrees(vocab, tmp_path):
    by_folder, by_file = tokenizer.load(vocab), tokenizer.load(vocab / 'vocab.txt')
    by_folder._backend.save(str(tmp_path / 'tokenizer.json'))
    by_json = tokenizer.load(tmp_path / 'tokenizer.json')
    text = 'The Import statement raises [MASK] ModuleNotFoundError!'
    assert by_folder.encode(text) == by_file.encode(text) == by_json.encode(text)
    assert by_folder.hash == by_file.hash == by_json.hash
    assert by_json.mask_id not in by_json.encode(text)  # written out, it is ordinary text


def test_sentencepiece_serves_the_same_interface(sentencepiece_vocab):
    tok = tokenizer.load(sentencepiece_vocab)
    assert (tok.pad_id, tok.unk_id, tok.cls_id, tok.sep_id, tok.mask_id) == (0, 1, 2, 3, 4)
    ids = tok.encode('the import statement')
    assert tok.decode(ids) == 'the import statement'
    assert tok.word_starts[ids[0]] and not set(ids) & set(tok.special_ids)
    assert not tok.word_starts.all()


def test_word_starts_and_regular_ids(vocab):
    tok = tokenizer.load(vocab)
    assert all(tok.word_starts[i] == (not p.startswith('##')) for i, p in enumerate(tok.pieces))
    assert set(tok.regular_ids) == set(range(tok.vocab_size)) - set(tok.special_ids)


def test_case_is_read_beside_the_vocabulary_or_from_it(tmp_path):
    cased = tokenizer.load(write(tmp_path, [*SPECIALS, 'Go', 'go']))
    assert cased.encode('Go go') == [5, 6]
    lower = tmp_path / 'lower'
    lower.mkdir()
    assert tokenizer.load(write(lower, [*SPECIALS, 'go'])).encode('Go') == [5]
    (lower / 'tokenizer_config.json').write_text(json.dumps({'do_lower_case': False}))
    assert tokenizer.load(lower).encode('Go') == [1]


@pytest.mark.parametrize('pieces, words', [
    ([*SPECIALS[:-1], 'a'], ('no [MASK]',)),
    ([*SPECIALS, 'a', 'b', 'a'], ("'a'", 'twice')),
])
def test_bad_vocabularies_are_refused(tmp_path, pieces, words):
    with pytest.raises(UserError) as error:
        tokenizer.load(write(tmp_path, pieces))
    assert all(word in str(error.value) for word in words)


def test_nothing_to_load(tmp_path):
    with pytest.raises(UserError, match='no tokenizer there'):
        tokenizer.load(tmp_path)
    with pytest.raises(UserError, match='no such tokenizer file'):
        tokenizer.load(tmp_path / 'vocab.txt')
    (tmp_path / 'x.model').write_bytes(b'nonsense')
    with pytest.raises(UserError, match='not a SentencePiece model'):
        tokenizer.load(tmp_path / 'x.model')
    (tmp_path / 'tokenizer.json').write_text('{"model": {"type": "BPE"}}')
    with pytest.raises(UserError, match='tokenizer.json'):
        tokenizer.load(tmp_path / 'tokenizer.json')


def test_marks_that_bert_strips_belong_to_their_word(tmp_path):
    """All of Unicode's category Mn, also those whose combining class is 0: Hindi's, Thai's, an emoji's selector."""
    tok = tokenizer.load(write(tmp_path, [*SPECIALS, 'a', 'b', '##b', 'दलल', 'म']))
    strip = tok._backend.normalizer.normalize_str
    marks = [
        c
        for c in map(chr, range(0x300, sys.maxunicode + 1))
        if unicodedata.category(c) == 'Mn' and strip(f'a{c}') == 'a'
    ]
    assert (
        len(marks) > 1500 and sum(not unicodedata.combining(mark) for mark in marks) > 800
    )  # those that the library knows
    for mark in marks:
        text = f'a{mark} b a{mark}{mark}b{mark}'
        _, offsets = tok.encode_with_offsets(text)
        words = [text[begin:end] for begin, end in offsets]
        assert words[0] == f'a{mark}' and words[1] == 'b' and text.endswith(words[-1]) and mark in words[-1], hex(
            ord(mark)
        )
    text = 'दिल्ली में'
    _, offsets = tok.encode_with_offsets(text)
    assert text[offsets[0][0]:offsets[-1][1]] == text


def test_the_cache_is_bounded_in_bytes(both_cases, monkeypatch):
    """Lines without spaces do not come again; words do, until they fill it."""
    tok, _ = both_cases
    tok._words.clear()
    tok.encode_batch(['漢' * 65, 'x' * 200 + 'é'])
    assert not any(len(word) > tokenizer.LONGEST_WORD for word in tok._words)
    monkeypatch.setattr(tokenizer, 'CACHE_BYTES', 50_000)
    for i in range(40):
        tok.encode_batch([f'w{i}x{j}é' for j in range(50)])
        assert tok._words.bytes <= 50_000 + 50 * 300 and len(tok._words) * 200 <= tok._words.bytes
