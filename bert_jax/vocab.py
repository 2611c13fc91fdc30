"""Learns a vocabulary from text.

    python -m bert_jax.vocab --input 'text/*.txt' --kind wordpiece --vocab_size 30000 --output vocab --lowercase

Inputs are those of bert_jax.prepare. An existing vocab.txt, tokenizer.json or SentencePiece .model needs
no training: give it to bert_jax.prepare as it is.

Which choices for which language:
  English, much data         wordpiece --lowercase --strip_accents --split_cjk: BERT's uncased model;
                             without --lowercase and --strip_accents: its cased one
  languages with accents     no --strip_accents: 'ano' is not 'año'
  Korean                     never --strip_accents: it takes Hangul syllables apart into jamo
  Chinese                    wordpiece --split_cjk: every character a word of its own
  Japanese, Thai, Lao,       sentencepiece: it needs no spaces between words
  Khmer, many languages
  named entities, tagging    no --lowercase
"""

import argparse
import io
import pathlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import sentencepiece
import tokenizers

from bert_jax import cli, paths, prepare
from bert_jax.cli import UserError
from bert_jax.data import corpora, store, tokenizer

SPECIALS = ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]')


def main() -> None:
    """Command line."""
    parser = cli.parser(__doc__)
    parser.add_argument('--input', nargs='+', required=True, metavar='GLOB')
    parser.add_argument('--kind', choices=('wordpiece', 'sentencepiece'), default='wordpiece')
    parser.add_argument('--vocab_size', type=int, required=True, metavar='N', help='entries, special ones counted')
    parser.add_argument('--output', required=True, metavar='DIR', help='the folder to write')
    parser.add_argument('--lowercase', action='store_true', help='upper and lower case are one')
    parser.add_argument('--strip_accents', action='store_true', help='é is e (wordpiece)')
    parser.add_argument('--split_cjk', action='store_true', help='each Chinese character is a word (wordpiece)')
    prepare.add_reader_arguments(parser)
    train(parser.parse_args())


def train(args: argparse.Namespace) -> None:
    """Trains the vocabulary that the arguments describe and writes it whole.

    Raises:
      UserError: no text, a size the text cannot fill, a folder that is not empty.
    """
    if args.vocab_size <= len(SPECIALS):
        raise UserError(f'--vocab_size {args.vocab_size}: {len(SPECIALS)} special entries alone need more.')
    output = paths.check_new(args.output, '--output')
    if args.kind == 'sentencepiece' and (args.strip_accents or args.split_cjk):
        raise UserError('--strip_accents and --split_cjk belong to --kind wordpiece.')
    reader, names = prepare.reader_from(args), corpora.expand(args.input)
    with paths.whole_folder(output) as partial:
        make = {'wordpiece': _train_wordpiece, 'sentencepiece': _train_sentencepiece}[args.kind]
        make(_Sentences(names, reader), args, partial)
    learned = tokenizer.load(output)
    print(f'{output}: {learned.vocab_size:,} entries ({args.kind}).')
    if learned.vocab_size < args.vocab_size:
        cli.note(f'the text has no more than {learned.vocab_size:,} pieces; {args.vocab_size:,} were asked for.')


class _Sentences:
    """All sentences of the inputs, with a progress bar; remembers whether there were any, and what was wrong."""

    def __init__(self, names: list[str], reader: corpora.Reader) -> None:
        self._names, self._reader, self.count, self.problem = names, reader, 0, None

    def __iter__(self) -> Iterator[str]:
        try:
            yield from self._read()
        except UserError as error:
            self.problem = error
            raise

    def _read(self) -> Iterator[str]:
        with cli.progress(unit='B', unit_scale=True, desc='read') as bar:
            for name in self._names:
                for block in self._reader.blocks(name):
                    for document in self._reader.documents(block):
                        self.count += len(document)
                        yield from document
                    bar.update(block.size)
        if not self.count:
            raise UserError(f'{", ".join(self._names)}: no text in it.')


def _train_wordpiece(sentences: _Sentences, args: argparse.Namespace, folder: pathlib.Path) -> None:
    options = {'do_lower_case': args.lowercase, 'strip_accents': args.strip_accents,
               'tokenize_chinese_chars': args.split_cjk}
    found = _trained(sentences, options, SPECIALS, len(SPECIALS))
    alphabet = sorted(set(found) - set(SPECIALS), key=_first_forms_first)
    if len(SPECIALS) + len(alphabet) > args.vocab_size:
        alphabet = _most_frequent(sentences, options, alphabet, args.vocab_size - len(SPECIALS))
    pieces = [*SPECIALS, *alphabet]
    if len(pieces) < args.vocab_size - 1:
        # The trainer numbers pieces as it meets them, in the order of a hash map, and breaks ties by those numbers:
        # given the alphabet as it is, the same text gives the same vocabulary.
        ids = _trained(sentences, options, pieces, args.vocab_size)
        pieces = sorted(ids, key=ids.__getitem__)
    (folder / 'vocab.txt').write_text('\n'.join(pieces) + '\n', encoding='utf-8')
    store.write_json(folder / 'tokenizer_config.json', options)


def _trained(sentences: Iterable[str], options: dict[str, bool], specials: Sequence[str], size: int) -> dict[str, int]:
    """The library's vocabulary of `size` entries, which begins with `specials`."""
    backend = tokenizer.wordpiece(specials, **options)
    backend.train_from_iterator(sentences, tokenizers.trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=list(specials), show_progress=False))
    return backend.get_vocab()


def _first_forms_first(piece: str) -> tuple[bool, str]:
    return piece.startswith('##'), piece


def _most_frequent(sentences: Iterable[str], options: dict[str, bool], alphabet: Sequence[str], room: int) -> list[str]:
    """As many of the alphabet's pieces, those of the most frequent characters first; says what is left out."""
    normalizer, counts, known = tokenizer.wordpiece(SPECIALS, **options).normalizer, Counter(), set(alphabet)
    for sentence in sentences:
        counts.update(normalizer.normalize_str(sentence))
    kept, lost = set(), Counter()
    for letter in sorted(counts, key=lambda letter: (-counts[letter], letter)):
        pieces = {letter, f'##{letter}'} & known
        if len(kept) + len(pieces) <= room and not lost:
            kept |= pieces
        elif pieces:
            lost[letter] = counts[letter]
    cli.note(f'the text has {len(alphabet):,} single characters and forms of them, more than --vocab_size holds: '
             f'{len(lost):,} characters, {lost.total() / counts.total():.2%} of the text, are in no entry and become '
             f'[UNK]; --vocab_size {len(alphabet) + len(SPECIALS):,} holds all.')
    return sorted(kept, key=_first_forms_first)


def _train_sentencepiece(sentences: _Sentences, args: argparse.Namespace, folder: pathlib.Path) -> None:
    model = io.BytesIO()
    roles = {role: i for i, role in enumerate(('pad', 'unk', 'bos', 'eos'))}
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=model, vocab_size=args.vocab_size,
            normalization_rule_name='nmt_nfkc_cf' if args.lowercase else 'nmt_nfkc',
            **{f'{role}_id': i for role, i in roles.items()},
            **{f'{role}_piece': SPECIALS[i] for role, i in roles.items()},
            control_symbols=SPECIALS[-1], input_sentence_size=5_000_000, shuffle_input_sentence=True,
            minloglevel=2)
    except (RuntimeError, OSError, UserError) as error:
        raise sentences.problem or UserError(f'sentencepiece: {cli.last_line(error)}') from error
    (folder / 'tokenizer.model').write_bytes(model.getvalue())


if __name__ == '__main__':
    cli.run(main)
