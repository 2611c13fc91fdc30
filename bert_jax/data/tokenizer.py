"""WordPiece and SentencePiece behind one small interface.

A tokenizer comes from a `vocab.txt`, a `tokenizer.json`, a SentencePiece `.model`, or a folder that
holds one of them (a store and a workdir keep theirs in `tokenizer/`).
"""

import functools
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from etils import epath

from bert_jax import cli, paths
from bert_jax.cli import UserError
from bert_jax.data.tokenizer_settings import BERT_CLASSES, JSON_CLASSES, check_specials, read_options, read_settings

SPECIALS = {  # role -> the names it goes by
    'pad': ('[PAD]', '<pad>'), 'unk': ('[UNK]', '<unk>'), 'cls': ('[CLS]', '<cls>', '<s>'),
    'sep': ('[SEP]', '<sep>', '</s>'), 'mask': ('[MASK]', '<mask>')}
FILES = ('tokenizer.json', 'vocab.txt')  # and *.model, before either
BERT_WORDPIECE = {'unk_token': '[UNK]', 'continuing_subword_prefix': '##', 'max_input_chars_per_word': 100,
                  'clean_text': True}
CACHE_BYTES = 200 << 20  # of words and their ids
WORD_BYTES = 200         # what a cached word costs in addition to its characters
LONGEST_WORD = 64        # characters; a longer chunk (a line without spaces, as Chinese has) will not come again
ascii_words = re.compile('[A-Za-z0-9]+|.').findall  # how BERT cuts printable ASCII without spaces


class Tokenizer:
    """Text to ids and back.

    Attributes:
      pieces: the V vocabulary entries, in id order.
      pad_id, unk_id, cls_id, sep_id, mask_id: the special ids.
      word_starts: bool [V], False for a piece that continues the word before it.
      regular_ids: int32, every id that is not special: what a random replacement is drawn from.
      kind: 'wordpiece' or 'sentencepiece'.
    """

    def __init__(self, kind: str, pieces: list[str], backend: Any, files: dict[str, bytes],
                 source: str) -> None:
        self.kind, self.pieces, self._backend, self._files = kind, pieces, backend, files
        ids = {piece: i for i, piece in enumerate(pieces)}
        if len(ids) < len(pieces):
            twice = next(p for i, p in enumerate(pieces) if ids[p] != i)
            raise UserError(f'{source}: {twice!r} is in the vocabulary twice; every entry must be unique.')
        for role, names in SPECIALS.items():
            found = [ids[name] for name in names if name in ids]
            if not found:
                raise UserError(f'{source}: the vocabulary has no {names[0]}; '
                                'BERT needs [PAD], [UNK], [CLS], [SEP] and [MASK].')
            setattr(self, f'{role}_id', found[0])
        self.special_ids = tuple(getattr(self, f'{role}_id') for role in SPECIALS)
        self.regular_ids = np.setdiff1d(np.arange(len(pieces)), self.special_ids).astype(np.int32)
        if kind == 'wordpiece':
            self.word_starts = np.array([not p.startswith('##') for p in pieces])
        else:
            self.word_starts = np.array([p.startswith('▁') for p in pieces])
        self.word_starts[list(self.special_ids)] = True
        self._words = _WordCache(self._encode_chunk)
        if kind == 'wordpiece':
            self._wordpiece = backend.model
            self._bytes_of = [row.tobytes() for row in np.arange(len(pieces), dtype=self.id_type)[:, None]]

    @property
    def vocab_size(self) -> int:
        """V, the number of entries; models pad it inside, files never show the padding."""
        return len(self.pieces)

    @functools.cached_property
    def lowercases(self) -> bool:
        """Whether a WordPiece tokenizer takes upper and lower case as one."""
        return self.kind == 'wordpiece' and json.loads(self._files['tokenizer_config.json'])['do_lower_case']

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 over the tokenizer's files: equal when and only when the ids mean the same."""
        digest = hashlib.sha256()
        for name in sorted(self._files):
            digest.update(name.encode() + b'\0' + self._files[name] + b'\0')
        return digest.hexdigest()

    @property
    def id_type(self) -> type[np.unsignedinteger]:
        """The narrowest unsigned type that holds every id."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts in one flat array [sum(lengths)], and their lengths [len(texts)]; no specials.

        Special tokens written out in a text ('[MASK]') are ordinary text here. WordPiece never joins
        what a space separates, so each space-separated chunk is looked up in a cache of words.
        """
        if self.kind == 'wordpiece':
            words = self._words
            rows = [b''.join(map(words.__getitem__, text.split(' '))) for text in texts]
            flat = np.frombuffer(b''.join(rows), self.id_type)
            lengths = np.fromiter(map(len, rows), np.int64, len(rows)) // flat.itemsize
            if words.bytes > CACHE_BYTES:
                words.clear()
            return flat, lengths
        rows = self._backend.encode(list(texts))
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        flat = np.fromiter((i for row in rows for i in row), self.id_type, int(lengths.sum()))
        return flat, lengths

    def encode(self, text: str) -> list[int]:
        """Ids of one text, no specials added."""
        return self.encode_batch([text])[0].tolist()

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of one text, and where in it each piece lies: `text[begin:end]`, in characters.

        A piece that normalisation made out of nothing (SentencePiece's leading space) has an empty span.
        """
        if self.kind == 'wordpiece':
            encoded = self._backend.encode(text, add_special_tokens=False)
            return encoded.ids, _with_accents(text, encoded.offsets)
        encoded = self._backend.encode(text, return_type='offset_mapping')
        return list(encoded['ids']), list(encoded['offsets'])

    def decode(self, ids: Sequence[int]) -> str:
        """Readable text of ids, specials left out; WordPiece text comes back with spaced punctuation."""
        ids = [int(i) for i in ids if i not in self.special_ids]
        if self.kind == 'sentencepiece':
            return self._backend.decode(ids)
        return ' '.join(self.pieces[i] for i in ids).replace(' ##', '')

    def as_library(self, max_length: int) -> tokenizers.Tokenizer:
        """The same for the `tokenizers` library: [CLS] A [SEP] (B [SEP]), cut at max_length, specials matched.

        Raises:
          UserError: a SentencePiece model of another kind than unigram.
        """
        name = {role: self.pieces[getattr(self, f'{role}_id')] for role in SPECIALS}
        if self.kind == 'wordpiece':
            backend = wordpiece(self.pieces, **json.loads(self._files['tokenizer_config.json']))
        else:
            backend = _unigram(self._files['tokenizer.model'])
        backend.add_special_tokens([name[role] for role in SPECIALS])
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=f'{name["cls"]}:0 $A:0 {name["sep"]}:0',
            pair=f'{name["cls"]}:0 $A:0 {name["sep"]}:0 $B:1 {name["sep"]}:1',
            special_tokens=[(name['cls'], self.cls_id), (name['sep'], self.sep_id)])
        backend.enable_truncation(max_length)
        return backend

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the tokenizer's own files into `folder`."""
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (folder / name).write_bytes(content)

    def _encode_chunk(self, chunk: str) -> bytes:
        """The bytes of a chunk's ids. ASCII, whose rules are few, goes word by word: in half of the time."""
        if not (chunk.isascii() and chunk.isprintable()):
            ids = self._backend.encode(chunk, add_special_tokens=False).ids
        elif len(words := ascii_words(chunk)) == 1:
            ids = [token.id for token in self._wordpiece.tokenize(chunk.lower() if self.lowercases else chunk)]
        else:
            return b''.join(map(self._words.__getitem__, words))
        return b''.join([self._bytes_of[i] for i in ids])


def _with_accents(text: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans that end before an accent that normalisation dropped, written as a character of its own, take it in."""
    widened, limit, after = [], len(text), len(text)
    for begin, end in reversed(offsets):
        limit = after if after >= end else limit  # pieces of one character share their span, and its limit
        after = begin
        while begin < end < limit and unicodedata.category(text[end]) == 'Mn':  # what BERT strips
            end += 1
        widened.append((begin, end))
    return widened[::-1]


class _WordCache(dict):
    """word -> the bytes of its ids; what it holds is counted in `bytes`."""

    def __init__(self, encode: Any) -> None:
        super().__init__()
        self._encode, self.bytes = encode, 0

    def __missing__(self, word: str) -> bytes:
        value = self._encode(word)
        if len(word) <= LONGEST_WORD:
            self[word] = value
            self.bytes += WORD_BYTES + 4 * len(word) + len(value)
        return value

    def clear(self) -> None:
        """Begins anew."""
        super().clear()
        self.bytes = 0


def load(path: str | os.PathLike) -> Tokenizer:
    """Loads a tokenizer from a file or folder; in a Hugging Face folder, as transformers' AutoTokenizer does.

    Raises:
      UserError: nothing to load there, a special token is missing, an entry stands twice, or transformers reads there
        what is not read here: another class, added tokens, special tokens of other names.
    """
    file = find(epath.Path(path))
    paths.refuse_pointer(file)
    settings = read_settings(file.parent)
    if file.name.endswith('.model'):
        tokenizer = _load_sentencepiece(file, settings)
    elif file.name.endswith('.json'):
        tokenizer = _load_json(file, settings)
    else:
        tokenizer = _load_vocab(file, settings)
    pieces = {role: tokenizer.pieces[getattr(tokenizer, f'{role}_id')] for role in SPECIALS}
    bert = settings['tokenizer_class'] in BERT_CLASSES and tokenizer.kind == 'wordpiece'
    check_specials(file, settings, pieces, {role: SPECIALS[role][0] for role in SPECIALS} if bert else pieces)
    return tokenizer


def find(path: epath.Path) -> epath.Path:
    """The tokenizer file that `path` names: itself, or the one inside the folder."""
    if path.is_dir():
        for folder in (path, path / 'tokenizer'):
            models = sorted(folder.glob('*.model')) if folder.exists() else []
            others = [folder / name for name in FILES if (folder / name).exists()]
            if models and others and read_settings(folder)['tokenizer_class'] in BERT_CLASSES:
                return others[0]
            if models or others:
                return (*models, *others)[0]
        raise UserError(f'{path}: no tokenizer there; expected {", ".join(FILES)} or a SentencePiece *.model.')
    if not path.exists():
        raise UserError(f'{path}: no such tokenizer file.')
    return path


def _load_vocab(path: epath.Path, settings: dict[str, Any]) -> Tokenizer:
    """A vocab.txt."""
    try:
        pieces = path.read_text(encoding='utf-8').split('\n')
    except UnicodeDecodeError as error:
        raise UserError(f'{path}: not UTF-8 ({error.reason} at byte {error.start}).') from error
    pieces = [piece.rstrip('\r') for piece in pieces]
    while pieces and not pieces[-1]:
        pieces.pop()
    return _wordpiece_tokenizer(pieces, read_options(path, pieces, settings), str(path))


def _wordpiece_tokenizer(pieces: list[str], options: dict[str, bool | None], source: str) -> Tokenizer:
    backend = wordpiece(pieces, **options)
    files = {'vocab.txt': ('\n'.join(pieces) + '\n').encode(),
             'tokenizer_config.json': (json.dumps(options, indent=2, sort_keys=True) + '\n').encode()}
    return Tokenizer('wordpiece', pieces, backend, files, source)


def wordpiece(pieces: Sequence[str], do_lower_case: bool, strip_accents: bool | None,
              tokenize_chinese_chars: bool) -> tokenizers.Tokenizer:
    """BERT's own tokenization (clean, lower, split at spaces, punctuation and CJK; greedy pieces)."""
    unknown = next((name for name in SPECIALS['unk'] if name in pieces), '[UNK]')
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(
        {piece: i for i, piece in enumerate(pieces)}, unk_token=unknown, max_input_chars_per_word=100))
    backend.normalizer = tokenizers.normalizers.BertNormalizer(
        lowercase=do_lower_case, strip_accents=strip_accents, handle_chinese_chars=tokenize_chinese_chars)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.decoder = tokenizers.decoders.WordPiece()
    return backend


def _load_json(path: epath.Path, settings: dict[str, Any]) -> Tokenizer:
    """A tokenizer.json of BERT WordPiece: its entries and options, as if they came from a vocab.txt.

    transformers' BertTokenizer reads its entries alone, the options from tokenizer_config.json.
    """
    try:
        content = json.loads(path.read_text())
        model, normalizer = content['model'], content.get('normalizer') or {}
        library = tokenizers.Tokenizer.from_str(json.dumps(content))
        ids = library.get_vocab()
    except Exception as error:  # the library raises bare Exception
        raise UserError(f'{path}: not a tokenizer.json ({cli.first_line(error)}).') from error
    kinds = [model.get('type'), normalizer.get('type'), (content.get('pre_tokenizer') or {}).get('type')]
    if kinds != ['WordPiece', 'BertNormalizer', 'BertPreTokenizer']:
        raise UserError(f'{path}: only BERT WordPiece is read from a tokenizer.json, this one is {kinds}; '
                        'for SentencePiece give its .model file.')
    found = {'unk_token': model.get('unk_token'), 'continuing_subword_prefix': model.get('continuing_subword_prefix'),
             'max_input_chars_per_word': model.get('max_input_chars_per_word'),
             'clean_text': normalizer.get('clean_text')}
    for key, value in BERT_WORDPIECE.items():
        if found[key] != value:
            raise UserError(f'{path}: {key} is {found[key]!r} there; BERT WordPiece has {value!r}.')
    settings['added'] += [token['content'] for token in content.get('added_tokens') or ()]
    pieces = sorted(ids, key=ids.__getitem__)
    if [ids[piece] for piece in pieces] != list(range(len(pieces))):
        raise UserError(f'{path}: ids are not 0..{len(pieces) - 1} without gaps.')
    options = {'do_lower_case': normalizer['lowercase'], 'strip_accents': normalizer['strip_accents'],
               'tokenize_chinese_chars': normalizer['handle_chinese_chars']}
    if settings['tokenizer_class'] in BERT_CLASSES:
        for key, value in read_options(path, pieces, settings).items():
            if value != options[key]:
                cli.note(f'{path}: {key} is {options[key]} there; {value} is taken, which transformers reads from '
                         'tokenizer_config.json or has as its default.')
                options[key] = value
    tokenizer = _wordpiece_tokenizer(pieces, options, str(path))
    if settings['tokenizer_class'] in JSON_CLASSES and library.post_processor is not None:
        _check_frame(path, library, tokenizer)
    return tokenizer


def _check_frame(path: epath.Path, library: tokenizers.Tokenizer, tokenizer: Tokenizer) -> None:
    """Refuses a tokenizer.json that puts a pair together in another way than [CLS] A [SEP] B [SEP]."""
    library.no_padding()
    library.no_truncation()
    found, a, b = library.encode('a', 'b'), tokenizer.encode('a'), tokenizer.encode('b')
    if found.ids != [tokenizer.cls_id, *a, tokenizer.sep_id, *b, tokenizer.sep_id] or (
            found.type_ids != [0] * (len(a) + 2) + [1] * (len(b) + 1)):
        raise UserError(f'{path}: a pair of texts is {" ".join(found.tokens)} there, with segments '
                        f'{found.type_ids}; BERT has [CLS] a [SEP] b [SEP] and 0, 1.')


def _load_sentencepiece(path: epath.Path, settings: dict[str, Any]) -> Tokenizer:
    content = path.read_bytes()
    backend = sentencepiece.SentencePieceProcessor()
    try:
        backend.LoadFromSerializedProto(content)
    except RuntimeError as error:
        raise UserError(f'{path}: not a SentencePiece model ({cli.first_line(error)}).') from error
    pieces = [backend.id_to_piece(i) for i in range(len(backend))]
    beside = path.parent / 'tokenizer.json'
    if settings['tokenizer_class'] in JSON_CLASSES and beside.exists():
        theirs = paths.read_json(beside)
        theirs = (theirs.get('model') or {}).get('vocab') if isinstance(theirs, dict) else None
        if not isinstance(theirs, list) or [entry[0] for entry in theirs if entry] != pieces:
            raise UserError(f'{beside}: its entries, which transformers reads, are not those of {path.name}.')
    return Tokenizer('sentencepiece', pieces, backend, {'tokenizer.model': content}, str(path))


def _unigram(model: bytes) -> tokenizers.Tokenizer:
    """A SentencePiece unigram model as the `tokenizers` library runs it."""
    from sentencepiece import sentencepiece_model_pb2

    spec = sentencepiece_model_pb2.ModelProto.FromString(model)
    if spec.trainer_spec.model_type != spec.trainer_spec.UNIGRAM:
        raise UserError('Only SentencePiece models of type unigram can be written for the tokenizers library.')
    scores = [(piece.piece, piece.score) for piece in spec.pieces]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(
        scores, spec.trainer_spec.unk_id, spec.trainer_spec.byte_fallback))
    steps = [tokenizers.normalizers.Precompiled(spec.normalizer_spec.precompiled_charsmap)
             ] if spec.normalizer_spec.precompiled_charsmap else []
    steps.append(tokenizers.normalizers.Replace(tokenizers.Regex(' {2,}'), ' '))
    backend.normalizer = tokenizers.normalizers.Sequence([*steps, tokenizers.normalizers.Strip()])
    metaspace = {'replacement': '▁', 'prepend_scheme': 'always' if spec.normalizer_spec.add_dummy_prefix else 'never'}
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(**metaspace)
    backend.decoder = tokenizers.decoders.Metaspace(**metaspace)
    return backend
