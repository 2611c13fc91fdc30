"""WordPiece against transformers' port of the original code: equal, but for what docs/conversion.md lists."""

import itertools
import json
import pathlib
import sys
import sysconfig
import unicodedata

import pytest
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(ROOT / 'benchmarks'))
import tokenizer_parity as parity

SPECIALS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
ALPHABETS = (
    'aAbBzZéÉöÖßñçøåÅ',
    'αβΓδςσΆέ',
    'жЯйЁ',
    '한국어각힣',
    '\u1100\u1161\u11a8\u1102',
    '中文字々〆',
    'ひらカナー',
    '👩👧🏽\u200d\ufe0f❤',
    '\u0301\u0327\u0308\u200b\u00ad\ufeff\x00\x07\x7f\ufffd',
    '\ue000\uf8ff',
    ' \t\n\r\u00a0\u3000\u2028',
    '.,!?-—“”’()[]{}$+<=>^`|~@#%&*¿、。',
    '0123456789٣½²',
    'عربيةהעברית',
    'हिन्दीไทย',
    'ﬁﬀＡｂ①㎏',
)
TEXTS = st.text(max_size=30) | st.text(alphabet=''.join(ALPHABETS), max_size=60) | st.builds(
    lambda letters, n: letters * n, st.text(alphabet='abc한e\u0301', min_size=1, max_size=3), st.integers(1, 80))


@pytest.fixture(scope='module', params=['uncased', 'cased'])
def tokenizers(request, tmp_path_factory):
    """A vocabulary with all letters of the alphabets, alone and as continuations, so that [UNK] hides nothing."""
    letters = sorted(
        {
            c
            for alphabet in ALPHABETS
            for form in ('NFC', 'NFD')
            for a in (alphabet, alphabet.lower())
            for c in unicodedata.normalize(form, a)
            if not c.isspace() and unicodedata.category(c) not in ('Cc', 'Cf')
        }
    )
    pieces = (
        SPECIALS
        + letters
        + [f'##{c}' for c in letters]
        + ['the', '##ing', 'import', '한국', '##국어', 'state', '##ment']
    )
    folder = tmp_path_factory.mktemp(request.param)
    (folder / 'vocab.txt').write_text('\n'.join(pieces) + '\n')
    (folder / 'tokenizer_config.json').write_text(json.dumps({'do_lower_case': request.param == 'uncased'}))
    return parity.both(folder / 'vocab.txt')


def test_real_text(tokenizers):
    """The standard library's sources: its tests hold the odd characters."""
    ours, legacy, lower = tokenizers
    files = sorted(pathlib.Path(sysconfig.get_paths()['stdlib']).glob('*.py')) + sorted(
        pathlib.Path(sysconfig.get_paths()['stdlib']).glob('test/test_uni*.py'))
    lines = (line.rstrip('\n') for file in files for line in file.open(encoding='utf-8'))
    different = [line for line in itertools.islice(lines, 10_000) if ours.encode(line) != legacy(line)]
    assert all(parity.explain(line, lower) for line in different), different
    assert len(different) < 10


def test_every_character(tokenizers):
    ours, legacy, lower = tokenizers
    for code in itertools.chain(range(0xD800), range(0xE000, 0x110000)):
        if unicodedata.category(chr(code)) in ('Cn', 'Co', 'Lo') and code > 0x3100 and code % 50:
            continue  # one in fifty of the large uniform ranges
        text = f'a{chr(code)}b'
        assert ours.encode(text) == legacy(text) or parity.explain(text, lower), (hex(code), text)


@settings(max_examples=1500, deadline=None)
@given(text=TEXTS)
@example('a' * 101)
@example('a' * 100 + ' ' + 'b' * 250)
@example('e\u0301' * 60)
@example('각 \u1100\u1161\u11a8')
@example('👩🏽\u200d👧 ❤\ufe0f')
def test_any_unicode(tokenizers, text):
    ours, legacy, lower = tokenizers
    assert ours.encode(text) == legacy(text) or parity.explain(text, lower)


def test_each_listed_class_of_difference_exists(tokenizers):
    """So that the list says nothing that is not so; a library that mends one is noticed here."""
    ours, legacy, lower = tokenizers
    shown = {
        parity.UNASSIGNED: 'a\u0378b',
        parity.NEWER: 'a\u2e5db',
        parity.IDEOGRAPHS: 'a\U0002b820b',
        parity.WRITTEN_OUT: '[MASK]',
    }
    shown |= {parity.FINAL_SIGMA: 'ασΣ'} if lower else {parity.NFC: 'Ae\u0301'}
    for reason, text in shown.items():
        assert reason in parity.explain(text, lower) and ours.encode(text) != legacy(text), reason


@settings(max_examples=500, deadline=None)
@given(text=TEXTS)
def test_offsets_slice_back_to_what_each_piece_came_from(tokenizers, text):
    ours, _, _ = tokenizers
    ids, offsets = ours.encode_with_offsets(text)
    assert ids == ours.encode(text)
    end = 0
    for (begin, stop), together in itertools.groupby(zip(ids, offsets), key=lambda item: item[1]):
        assert end <= begin < stop <= len(text)
        end, pieces = stop, [ours.pieces[i] for i, _ in together]
        if '[UNK]' not in pieces:  # several pieces share a span where one character became many: Hangul's jamo
            normal = ours._backend.normalizer.normalize_str(text[begin:stop]).strip()
            assert normal == ''.join(piece.removeprefix('##') for piece in pieces), (text[begin:stop], pieces)


def test_sentencepiece_offsets_slice_back_too(sentencepiece_vocab):
    from bert_jax.data import tokenizer

    ours = tokenizer.load(sentencepiece_vocab)
    text = 'The  import—statement ｒａｉｓｅｓ ½ ﬁnd 한국'
    ids, offsets = ours.encode_with_offsets(text)
    assert ids == ours.encode(text)
    assert ''.join(text[begin:end] for begin, end in offsets).replace(' ', '') == text.replace(' ', '')
    at = text.index('ｒａｉｓｅｓ')
    inside = [ours.pieces[i].strip('▁') for i, (begin, end) in zip(ids, offsets) if at - 1 <= begin and end <= at + 6]
    assert ''.join(inside) == 'raises'
