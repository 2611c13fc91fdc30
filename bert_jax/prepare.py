"""Tokenizes text once, into a token store that serves every length, masking and target.

    python -m bert_jax.prepare --input 'wiki/*.txt' --tokenizer vocab.txt --output runs/store

Inputs (several globs, files ending in .gz are unpacked on the fly):
  *.txt         one sentence a line, a blank line between documents        (--format sentences)
                paragraphs, a blank line between documents; sentences are
                found by punctuation (docs/formats.md)                     (--format paragraphs)
  *.jsonl       one document a line, its text in --text_column
  *.parquet     one document a row, its text in --text_column
  tfds:NAME     a TensorFlow dataset, for example tfds:wikipedia/20230601.en
  stdlib:       the docstrings of this Python: a small corpus that is always at hand

Killed and started again, it resumes where it was. The same input gives the same bytes, whatever the
number of workers. Documents go to the held-out side by a hash of their text.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import json
import multiprocessing
import os
import pathlib
import platform
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from bert_jax import cli, lock, paths
from bert_jax.cli import UserError
from bert_jax.data import corpora, store, text_files, tokenizer


@dataclasses.dataclass
class EncodedBlock:
    """One block's share of the store: bytes to append to each file, and counts."""

    chunks: dict[str, bytes]
    counts: collections.Counter


def main() -> None:
    """Command line."""
    parser = cli.parser(__doc__)
    parser.add_argument('--input', nargs='+', required=True, metavar='GLOB')
    parser.add_argument('--tokenizer', required=True, metavar='PATH',
                        help='vocab.txt, tokenizer.json, SentencePiece .model, or a folder with one')
    parser.add_argument('--output', required=True, metavar='STORE', help='the folder to write')
    parser.add_argument('--held_out', type=float, default=0.01, metavar='SHARE',
                        help='share of documents kept for evaluation (default: 0.01)')
    parser.add_argument('--workers', type=int, default=os.cpu_count(), metavar='N')
    add_reader_arguments(parser)
    args = parser.parse_args()
    if not 0 <= args.held_out < 1:
        raise UserError(f'--held_out {args.held_out}: a share between 0 and 1 is expected, such as 0.01.')
    prepare(args.input, args.tokenizer, args.output, reader_from(args), args.held_out, max(1, args.workers))


def add_reader_arguments(parser: Any) -> None:
    """The arguments that `vocab` and `prepare` share."""
    parser.add_argument('--format', choices=('sentences', 'paragraphs'), default='sentences',
                        help='what plain text files hold (default: sentences)')
    parser.add_argument('--text_column', default='text', metavar='NAME',
                        help='where JSON lines, Parquet and TFDS have the text (default: text)')
    parser.add_argument('--errors', choices=('strict', 'replace'), default='strict',
                        help='what to do at invalid UTF-8: stop, or go on with U+FFFD')


def reader_from(args: Any) -> corpora.Reader:
    """The reader that the shared arguments describe."""
    return corpora.Reader(args.format, args.text_column, args.errors)


def prepare(inputs: Iterable[str], tokenizer_path: str, output: str, reader: corpora.Reader,
            held_out: float = 0.01, workers: int = 1) -> store.Store:
    """Writes the token store `output`, or continues it; returns it opened.

    Raises:
      UserError: bad input, or a folder that holds something else.
    """
    started = time.monotonic()
    tok = tokenizer.load(tokenizer_path)
    names = corpora.expand(list(inputs))
    body = {'inputs': names, 'input_bytes': [_size(name) for name in names],
            'input_sha256': [_identity(name) for name in names],
            'reader': dataclasses.asdict(reader), 'held_out': held_out,
            'tokenizer_hash': tok.hash, 'id_type': np.dtype(tok.id_type).str}
    path = paths.check_local(output, '--output')
    if not (paths.is_free(path) or (path / 'store.json').exists() or (path / 'journal.json').exists()):
        raise UserError(f'{path}: not empty and not a store; give another --output.')
    with lock.hold(path):
        writer = _Writer(path, body)
        if writer.finished:
            print(f'{path}: already complete.')
            return store.load(path)
        text_bytes, tokens, totals = _write_store(writer, tok, names, reader, held_out, workers)
    result = store.load(path)
    seconds = time.monotonic() - started
    print(f'{_summary(path, totals, result)}; {text_bytes / seconds / 1e6:.1f} MB/s, {tokens / seconds:,.0f} tokens/s.')
    for note in _notes(totals, held_out):
        cli.note(note)
    return result


def _write_store(writer: '_Writer', tok: tokenizer.Tokenizer, names: list[str], reader: corpora.Reader, held_out: float,
                 workers: int) -> tuple[int, int, collections.Counter]:
    """(bytes of text, tokens of now, counts of the whole store)."""
    path = writer.path
    try:
        tok.save(path / 'tokenizer')
        text_bytes, tokens = _write_all(writer, names, reader, held_out, str(path / 'tokenizer'), workers)
        return text_bytes, tokens, writer.finish()
    except UserError:
        writer.close()
        if not writer.tokens:  # nothing that another call could go on from
            writer.remove()
        raise
    except OSError as error:
        raise paths.disk_error(path, error) from error
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError(f'{path}: a worker process died (out of memory?); the same command resumes from here, '
                        'with fewer --workers if need be.') from error


UNKNOWN, PARAGRAPHS, SINGLE = 0.05, 0.2, 0.5  # shares above which there is a note


def _notes(counts: collections.Counter, held_out: float) -> Iterator[str]:
    """What looks as if the text were not what it is taken for."""
    tokens = counts['train_tokens'] + counts['held_out_tokens']
    documents = counts['train_documents'] + counts['held_out_documents']
    if counts['train_documents'] < 2:
        yield ('a single training document; next-sentence prediction needs another one to draw from (separate '
               'documents by blank lines, or train with --config configs/pretrain.py:SIZE,no_nsp).')
    elif held_out and counts['held_out_documents'] < 2:
        yield (f'fewer than two documents are held out, too few to score pre-training by; prepare with a larger '
               f'--held_out than {held_out:g}, or train with --config.eval_examples=0.')
    if counts['unknown'] > UNKNOWN * tokens:
        yield (f'{counts["unknown"] / tokens:.0%} of the tokens are [UNK]: is this tokenizer made for this text? '
               'python -m bert_jax.vocab makes one from it (Korean without --strip_accents).')
    if counts['paragraphs'] > PARAGRAPHS * counts['lines']:
        yield (f'{counts["paragraphs"] / counts["lines"]:.0%} of the lines hold several sentences; --format paragraphs '
               'finds them.')
    elif counts['single'] > SINGLE * documents:
        yield (f'{counts["single"] / documents:.0%} of the documents have one sentence: of these next-sentence '
               'prediction learns nothing. Blank lines separate documents, not sentences; or train with '
               '--config configs/pretrain.py:SIZE,no_nsp.')


def _write_all(writer: '_Writer', names: list[str], reader: corpora.Reader, held_out: float,
               tokenizer_path: str, workers: int) -> tuple[int, int]:
    """Encodes all blocks in worker processes, appends them in order; returns the bytes of text and tokens of now."""
    packed = any(':' in name or name.endswith((*text_files.PACKED_ENDINGS, '.parquet')) for name in names)
    total = None if packed else sum(map(_size, names))
    text_bytes = 0
    with _pool(workers, tokenizer_path, reader, held_out) as pool, \
            cli.progress(total=total, unit='B', unit_scale=True, desc='prepare') as bar:
        started = time.monotonic()
        tokens = 0
        for block, future in _in_order(pool, _blocks(names, reader, writer.blocks, bar), workers):
            encoded = future.result()
            writer.append(encoded)
            tokens += encoded.counts['train_tokens'] + encoded.counts['held_out_tokens']
            text_bytes += block.size
            bar.set_postfix_str(f'{tokens / (time.monotonic() - started):,.0f} tokens/s', refresh=False)
            bar.update(block.size)
    return text_bytes, tokens


def _blocks(names: list[str], reader: corpora.Reader, skip: int, bar: Any) -> Iterator[corpora.Block]:
    """All blocks of all inputs but the first `skip`, with which the progress bar begins."""
    blocks = (block for name in names for block in reader.blocks(name))
    for block in itertools.islice(blocks, skip):
        bar.initial += block.size
        bar.n += block.size
    yield from blocks


def _pool(workers: int, *initial: Any) -> concurrent.futures.ProcessPoolExecutor:
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # one thread a worker
    return concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context('spawn'), initializer=_start_worker, initargs=initial)


def _in_order(pool: concurrent.futures.Executor, blocks: Iterator[corpora.Block], workers: int
              ) -> Iterator[tuple[corpora.Block, concurrent.futures.Future]]:
    """Submits a few blocks ahead, gives them back in order."""
    waiting = collections.deque()
    try:
        for block in blocks:
            waiting.append((block, pool.submit(_encode_block, block)))
            if len(waiting) > workers + 1:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        for _, future in waiting:
            future.cancel()


_worker: dict[str, Any] = {}


def _start_worker(tokenizer_path: str, reader: corpora.Reader, held_out: float) -> None:
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # never an orphan
    _worker.update(tokenizer=tokenizer.load(tokenizer_path), reader=reader, held_out=held_out)


def _encode_block(block: corpora.Block) -> EncodedBlock:
    documents = _worker['reader'].documents(block)
    encoded = encode_documents(documents, _worker['tokenizer'], _worker['held_out'])
    encoded.counts['single'] += sum(len(document) == 1 for document in documents)
    if block.kind == 'sentences':
        lines = [line for document in documents for line in document]
        encoded.counts['lines'] += len(lines)
        encoded.counts['paragraphs'] += sum(line.count('. ') + line.count('。') > 2 for line in lines)
    return encoded


def encode_documents(documents: list[list[str]], tok: tokenizer.Tokenizer, held_out: float) -> EncodedBlock:
    """Tokenizes documents and sorts them to the two sides of the split."""
    sentences = [sentence for document in documents for sentence in document]
    tokens, lengths = tok.encode_batch(sentences)
    of_document = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    lengths, of_document = _cut_long(lengths, of_document)
    lengths, of_document = lengths[lengths > 0], of_document[lengths > 0]
    chosen = np.array([store.is_held_out(document, held_out) for document in documents], bool)
    counts = collections.Counter(unknown=int((tokens == tok.unk_id).sum()))
    chunks = {}
    for split, side in (('train', False), ('held_out', True)):
        here = chosen[of_document] == side
        parts = (tokens[np.repeat(here, lengths)],
                 lengths[here].astype(store.SENTENCE_TYPE),
                 np.unique(of_document[here], return_counts=True)[1].astype(store.DOCUMENT_TYPE))
        for part, array in zip(('tokens', 'sentences', 'documents'), parts):
            chunks[f'{split}.{part}'] = array.tobytes()
            counts[f'{split}_{part}'] = len(array)
    return EncodedBlock(chunks, counts)


def _cut_long(lengths: np.ndarray, of_document: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cuts sentences that are longer than the store's length type can say."""
    pieces = np.maximum(1, -(-lengths // store.MAX_SENTENCE))
    if (pieces == 1).all():
        return lengths, of_document
    cut = np.full(pieces.sum(), store.MAX_SENTENCE)
    cut[np.cumsum(pieces) - 1] = lengths - (pieces - 1) * store.MAX_SENTENCE
    return cut, np.repeat(of_document, pieces)


class _Writer:
    """Appends encoded blocks to `.partial` files and keeps a journal of how far they are whole."""

    def __init__(self, path: pathlib.Path, body: dict[str, Any]) -> None:
        self.path, self.body, self.blocks = path, body, 0
        self.counts: collections.Counter = collections.Counter()
        self.finished = False
        journal = path / 'journal.json'
        if (path / 'store.json').exists():
            self._must_agree(store.read_info(path))
            self.finished = True
        elif journal.exists():
            begun = json.loads(journal.read_text())
            self._must_agree(begun['body'])
            if begun.get('block_bytes') != corpora.BLOCK_BYTES:  # its count of blocks means something else
                raise UserError(f'{path}: begun by another version of bert_jax; delete it and start again.')
            self._open(begun['sizes'])
            self.blocks, self.counts = begun['blocks'], collections.Counter(begun['counts'])
            print(f'{path}: resuming after {self.blocks} blocks.')
        else:
            path.mkdir(parents=True, exist_ok=True)
            self._open({})
            self._write_journal()

    def _must_agree(self, found: dict[str, Any]) -> None:
        if found['reader']['errors'] == 'strict':  # and so far there were none
            found = found | {'reader': found['reader'] | {'errors': self.body['reader']['errors']}}
        if 'input_sha256' not in found:  # of an older version, which compared sizes
            found = found | {'input_sha256': self.body['input_sha256']}
        different = [key for key, value in self.body.items() if found.get(key) != value]
        if 'input_sha256' in different and 'inputs' not in different:
            changed = [name for name, there, here in zip(
                found['inputs'], found['input_sha256'], self.body['input_sha256']) if there != here]
            raise UserError(f'{self.path}: holds a store of other text; changed since: {", ".join(changed[:5])}. Give '
                            'another --output, or delete it.')
        if different:
            raise UserError(f'{self.path}: holds a store made with another {", ".join(different)}; '
                            'give another --output, or delete it.')

    def _open(self, sizes: dict[str, int]) -> None:
        self._files = {}
        for name in store.FILES:
            partial = self.path / f'{name}.partial'
            if (self.path / name).exists():  # stopped between the renames of `finish`
                os.replace(self.path / name, partial)
            self._files[name] = open(partial, 'ab')  # noqa: SIM115 - closed by `finish`
            if os.path.getsize(partial) < sizes.get(name, 0):
                raise UserError(f'{partial}: shorter than its journal says; delete {self.path} and start again.')
            self._files[name].truncate(sizes.get(name, 0))

    @property
    def tokens(self) -> int:
        """Of both sides, so far."""
        return self.counts['train_tokens'] + self.counts['held_out_tokens']

    def append(self, encoded: EncodedBlock) -> None:
        """Appends one block; it counts from the moment the journal says so."""
        for name, chunk in encoded.chunks.items():
            self._files[name].write(chunk)
        self.counts += encoded.counts
        self.blocks += 1
        if self.blocks % 4 == 0:
            self._write_journal()

    def _write_journal(self) -> None:
        for file in self._files.values():
            file.flush()
        store.write_json(self.path / 'journal.json', {
            'body': self.body, 'block_bytes': corpora.BLOCK_BYTES, 'blocks': self.blocks, 'counts': dict(self.counts),
            'sizes': {name: file.tell() for name, file in self._files.items()}})

    def remove(self) -> None:
        """Deletes what this has written: nothing else is there."""
        for name in (*(f'{name}.partial' for name in self._files), 'journal.json'):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path / 'tokenizer', ignore_errors=True)

    def close(self) -> None:
        """Leaves everything as it is: nothing is written by these files any more."""
        for file in self._files.values():
            file.close()

    def finish(self) -> collections.Counter:
        """Gives every file its final name and writes store.json."""
        if not self.tokens:
            raise UserError(f'{", ".join(self.body["inputs"])}: no text in it.')
        self._write_journal()
        for name, file in self._files.items():
            file.close()
            os.replace(self.path / f'{name}.partial', self.path / name)
        store.finish(self.path, self.body | {'counts': dict(self.counts)})
        (self.path / 'journal.json').unlink()
        return self.counts


def _size(name: str) -> int:
    return os.path.getsize(name) if os.path.exists(name) else 0


def _identity(name: str) -> str:
    """SHA-256 of a file; what there is of a source by name: TFDS' own name, the version of Python."""
    if os.path.exists(name):
        return store.file_hash(name)
    return f'Python {platform.python_version()}' if name.startswith('stdlib:') else 'by name'


def _summary(path: pathlib.Path, counts: collections.Counter, result: store.Store) -> str:
    tokens = counts['train_tokens'] + counts['held_out_tokens']
    size = sum(file['bytes'] for file in result.info['files'].values())
    return (f'{path}: {tokens:,} tokens in {counts["train_sentences"] + counts["held_out_sentences"]:,} sentences of '
            f'{counts["train_documents"]:,} training and {counts["held_out_documents"]:,} held-out documents; '
            f'{100 * counts["unknown"] / tokens:.2f} % unknown; {size / tokens:.2f} bytes a token')


if __name__ == '__main__':
    cli.run(main)
