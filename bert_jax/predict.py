"""Fills [MASK]s or classifies texts with a model: your own, or one from Hugging Face or TF1.

    python -m bert_jax.predict --workdir W 'Paris is the [MASK] of France.'
    python -m bert_jax.predict --workdir W --input texts.txt --json > predictions.jsonl
    python -m bert_jax.predict --init_from google-bert/bert-base-cased 'Paris is the [MASK] of France.'
    cat texts.txt | python -m bert_jax.predict --workdir W --input -

A pre-trained model fills [MASK]s, a fine-tuned one classifies. Inputs are one text a line (a pair is two
texts with a tab between them), or JSON lines {"text": ..., "text_pair": ...} from a .jsonl file.

From Python, in three lines:

    import bert_jax
    model = bert_jax.load('W')
    model(['Paris is the [MASK] of France.'])
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from bert_jax import cli, metrics, pretrained
from bert_jax.cli import UserError
from bert_jax.data import tasks
from bert_jax.data import tokenizer as tokenizers
from bert_jax.model import model as models
from bert_jax.weights import Pretrained

MASK = '[MASK]'
Text = str | tuple[str, str]


class Predictor:
    """A model ready to be called with texts; `load` makes it.

    Attributes:
      kind: 'fill_mask' or 'classification'.
      labels: the class names of a classifier.
    """

    def __init__(self, source: Pretrained, path: str) -> None:
        if not {'mlm', 'classification'} & set(source.model.targets):
            raise UserError(f'{path}: its heads ({", ".join(source.model.targets) or "none"}) predict nothing.')
        self._model, self._params, self._tokenizer = models.build(source.model), source.params, source.tokenizer
        self._max_length = source.model.embeddings.max_length
        self.labels = source.labels
        self.kind = 'classification' if 'classification' in source.model.targets else 'fill_mask'
        self._apply = jax.jit(lambda params, batch: self._model.apply({'params': params}, batch, train=False))

    def __call__(self, texts: Text | Sequence[Text], top_k: int = 5, batch_size: int = 32) -> Any:
        """Predictions for one text, or a list of them for a list; a pair is a tuple of two texts.

        fill_mask: {'text', 'masks': [[{'token', 'score'}, ...top_k] for each [MASK]]}.
        classification: {'text', 'label', 'scores': {label: probability}}.

        Raises:
          UserError: a text without [MASK] for fill_mask.
        """
        if isinstance(texts, (str, tuple)):
            return self([texts], top_k, batch_size)[0]
        if not texts:
            return []
        rows = [tasks.Row(*((text, None) if isinstance(text, str) else text), None, '') for text in texts]
        batch_size = min(batch_size, 1 << (len(rows) - 1).bit_length())
        predict = {'fill_mask': self._fill_masks, 'classification': self._classify}[self.kind]
        return predict(rows, top_k, batch_size)

    def _classify(self, rows: list[tasks.Row], top_k: int, batch_size: int) -> list[dict[str, Any]]:
        encoded = tasks.encode(rows, (), self._tokenizer, self._max_length)
        results: list[Any] = [None] * len(rows)
        for numbers, batch in encoded.evaluation_batches(batch_size):
            logits = np.asarray(self._apply(self._params, batch)['classification']['logits'])
            for number, scores in zip(numbers.tolist(), metrics.softmax(logits)):
                results[number] = _described(rows[number]) | {
                    'label': self.labels[int(scores.argmax())],
                    'scores': dict(zip(self.labels, scores.round(6).tolist()))}
        return results

    def _fill_masks(self, rows: list[tasks.Row], top_k: int, batch_size: int) -> list[dict[str, Any]]:
        for row in rows:
            if MASK not in row.text + (row.pair or ''):
                raise UserError(f'No {MASK} in {row.text[:80]!r}; a pre-trained model fills {MASK}s '
                                '(fine-tune it to classify).')
        encoded = tasks.encode(rows, (), _WithMasks(self._tokenizer), self._max_length)
        results: list[Any] = [None] * len(rows)
        for numbers, batch in encoded.evaluation_batches(batch_size):
            at = batch['input_ids'] == self._tokenizer.mask_id
            most = 1 << int(max(1, at.sum(1).max()) - 1).bit_length()
            positions = np.argsort(~at, axis=1, kind='stable')[:, :most].astype(np.int32)
            logits = np.asarray(self._apply(self._params, batch | {'masked_lm_positions': positions})['mlm']['logits'])
            for number, row_at, scores in zip(numbers.tolist(), at, logits):
                masks = [self._top(one, top_k) for one in scores[:int(row_at.sum())]]
                results[number] = _described(rows[number]) | {'masks': masks}
        return results

    def _top(self, logits: np.ndarray, top_k: int) -> list[dict[str, Any]]:
        scores = metrics.softmax(logits)
        best = np.argsort(-scores, kind='stable')[:top_k]
        return [{'token': self._tokenizer.pieces[i], 'score': round(float(scores[i]), 6)} for i in best]


class _WithMasks:
    """A tokenizer for which '[MASK]' in a text is the mask."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.cls_id, self.sep_id, self.pad_id = tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """As Tokenizer.encode_batch."""
        rows = []
        for text in texts:
            parts = [self._tokenizer.encode(part.strip()) for part in text.split(MASK)]
            rows.append([i for part in parts for i in (*part, self._tokenizer.mask_id)][:-1])
        return np.array([i for row in rows for i in row], np.int32), np.array([len(row) for row in rows], np.int64)


def _described(row: tasks.Row) -> dict[str, Any]:
    return {'text': row.text} | ({} if row.pair is None else {'text_pair': row.pair})


def load(path: str) -> Predictor:
    """The model in a workdir (a fine-tuned one at its best step), a Hugging Face folder or name, or a TF1 folder.

    Raises:
      UserError: no model there, or nothing in it that predicts.
    """
    return Predictor(pretrained.load(path), path)


def main() -> None:
    """Command line."""
    parser = cli.parser(__doc__)
    parser.add_argument('texts', nargs='*', metavar='TEXT')
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument('--workdir', metavar='W', help='a pre-trained or fine-tuned model of yours')
    source.add_argument('--init_from', metavar='PATH', help='a Hugging Face folder or name, or a TF1 folder')
    parser.add_argument('--input', metavar='FILE', help='a file of texts; - for standard input')
    parser.add_argument('--top_k', type=int, default=5, metavar='K', help='tokens for each [MASK] (default: 5)')
    parser.add_argument('--batch_size', type=int, default=32, metavar='B')
    parser.add_argument('--json', action='store_true', help='print JSON lines')
    args = parser.parse_args()
    texts = [_pair(text) for text in args.texts] + (list(_read(args.input)) if args.input else [])
    if not texts:
        raise UserError('No text: give some as arguments, or --input FILE (- for standard input).')
    model = load(args.workdir or args.init_from)
    show: Callable = (lambda result: json.dumps(result, ensure_ascii=False)) if args.json else _plain
    for start in range(0, len(texts), 32 * args.batch_size):
        for result in model(texts[start:start + 32 * args.batch_size], args.top_k, args.batch_size):
            print(show(result), flush=True)


def _read(name: str) -> Iterator[Text]:
    if name.endswith('.jsonl'):
        for where, record in tasks.read_table(name):
            if not isinstance(record.get('text'), str):
                raise UserError(f'{where}: no column \'text\'; there are: {", ".join(record)}.')
            yield (record['text'], record['text_pair']) if record.get('text_pair') else record['text']
        return
    try:
        with contextlib.nullcontext(sys.stdin) if name == '-' else open(name, encoding='utf-8') as lines:
            yield from (_pair(line.rstrip('\n')) for line in lines if line.strip())
    except OSError as error:
        raise UserError(f'{name}: {error.strerror}.') from error
    except UnicodeDecodeError as error:
        raise UserError(f'{name}: not valid UTF-8 ({error.reason}).') from error


def _pair(text: str) -> Text:
    first, tab, second = text.partition('\t')
    return (first, second) if tab else text


def _plain(result: dict[str, Any]) -> str:
    text = result['text'] + (' | ' + result['text_pair'] if 'text_pair' in result else '')
    if 'label' in result:
        return f'{result["label"]}\t{result["scores"][result["label"]]:.3f}\t{text}'
    masks = ['  ' + ', '.join(f'{guess["token"]} {guess["score"]:.3f}' for guess in mask) for mask in result['masks']]
    return '\n'.join([text, *masks])


if __name__ == '__main__':
    cli.run(main)
