"""Fills [MASK]s, classifies, tags, answers or chooses with a model: your own, or one from Hugging Face or TF1.

    python -m bert_jax.predict --workdir W 'Paris is the [MASK] of France.'
    python -m bert_jax.predict --workdir W --input texts.txt --json > predictions.jsonl
    python -m bert_jax.predict --init_from google-bert/bert-base-cased 'Paris is the [MASK] of France.'
    cat texts.txt | python -m bert_jax.predict --workdir W --input -

What a model does follows from its head. Inputs are tables (.csv, .tsv) and JSON lines, also on standard input, whose
columns are those of the fine-tuning or else these; or one example a line, with tabs between its parts:

  fill-mask                   text with [MASK]s              {"text"}
  classification, multilabel,
  regression                  text, or text TAB text         {"text", "text_pair"}
  tagging                     words with spaces between      {"words": [...]}
  span (answers)              question TAB passage           {"question", "passage"}
  choice                      context TAB choice TAB ...     {"context", "choices": [...]}

Each input is predicted alone, also by a tagger that was trained with document_context; what is longer than the
max_length of the fine-tuning is read in windows (span, tagging) or cut, with a note on stderr. Each line or row has
its prediction, empty texts too; for spans and choices empty lines are left out, with a note. A model for spans says
that there is no answer if it was fine-tuned to, or with --null_threshold.

From Python, in three lines:

    import bert_jax
    model = bert_jax.load('W')
    model(['Paris is the [MASK] of France.'])
"""

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from bert_jax import cli, evaluate
from bert_jax.cli import UserError
from bert_jax.data import tokenizer as tokenizers
from bert_jax.formats import pretrained
from bert_jax.formats.weights import Pretrained
from bert_jax.model import model as models
from bert_jax.tasks import inputs, packed, scores, tables, tasks, texts
from bert_jax.tasks.task import Task

MASK = '[MASK]'
LENGTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # programs are compiled for these, as they are needed
KIND_OF_TARGET = {kind.target: name for name, kind in tasks.KINDS.items()}
SPANS = {'stride': 128, 'max_query_length': 64, 'max_answer_length': 30, 'n_best': 20, 'null_answers': False}
Input = str | tuple[str, ...] | dict[str, Any]


class Predictor:
    """A model ready to be called; `load` makes it.

    Attributes:
      kind: 'fill_mask' or a KINDS name: 'classification', 'tagging', ...
      labels: the names of classes or tags.
      truncated: inputs so far that were cut.
    """

    def __init__(self, source: Pretrained, path: str) -> None:
        self.target = next((target for target in (*KIND_OF_TARGET, 'mlm') if target in source.config.targets), '')
        if not self.target:
            raise UserError(f'{path}: its heads ({", ".join(source.config.targets) or "none"}) predict nothing.')
        self.kind, self.labels, self.truncated = KIND_OF_TARGET.get(self.target, 'fill_mask'), source.labels, 0
        self._config, self._params, self._tokenizer = source.config, jax.device_put(source.params), source.tokenizer
        config = source.about.get('config', {})
        self._task = task = config.get('task', {})
        self._max_length = config.get('max_length', source.config.embeddings.max_length)  # a fine-tuned model's own
        threshold = source.about.get('scores', {}).get('dev/null_threshold', 0.0)
        self._settings = SPANS | {key: value for key, value in task.items() if key in SPANS}
        self._settings |= {'null_threshold': threshold, 'document_context': False}
        self._pools = 'pooled' in models.build(self._config).targets[self.target].reads
        self._apply = self._jitted()
        self._module = tasks.KINDS[self.kind].module if self.target in KIND_OF_TARGET else texts

    def __call__(self, inputs: Input | Sequence[Input], top_k: int = 5, batch_size: int = 32,
                 null_threshold: float | None = None) -> Any:
        """Predictions for one input (see the module's table), or a list of them for a list.

        fill_mask: {'text', 'masks': [[{'token', 'score'}, ...top_k] for each [MASK]]}.
        classification: {'text', 'label', 'scores': {label: probability}}; multilabel: 'labels' instead of 'label';
        regression: {'text', 'value'}.
        tagging: {'words', 'tags', 'scores', 'entities': [{'type', 'begin', 'end', 'text', 'score'}]}, positions in
        words.
        span: {'question', 'text', 'begin', 'end', 'null_odds', 'nbest'}, positions in characters of the passage; the
        text is '' where null_odds are above null_threshold (None: the model's own, if it was fine-tuned with one).
        choice: {'context', 'choices', 'choice', 'text', 'scores'}.

        Raises:
          UserError: an input of another shape; a text without [MASK] for fill_mask.
        """
        if isinstance(inputs, (str, tuple, dict)):
            return self([inputs], top_k, batch_size, null_threshold)[0]
        if not inputs:
            return []
        if batch_size < 1:
            raise UserError(f'batch_size {batch_size}: one or more is expected.')
        return self.predict([self.parse(value) for value in inputs], top_k, batch_size, null_threshold)

    def predict(self, rows: list[Any], top_k: int = 5, batch_size: int = 32, null_threshold: float | None = None
                ) -> list[dict[str, Any]]:
        """As a call, of examples that are read already (`inputs.read`)."""
        module = self._module
        batch_size = min(batch_size, 1 << (len(rows) - 1).bit_length())
        if self.kind == 'fill_mask':
            return self._fill_masks(rows, top_k, batch_size)
        task = Task(self.kind, {}, self.labels, settings=dict(self._settings))
        if null_threshold is not None:
            task.settings.update(null_answers=True, null_threshold=null_threshold)
        apply = self._apply
        if self.kind == 'choice':  # the head scores each choice alone, so any number of them will do
            task.settings['num_choices'] = max(len(row.choices) for row in rows)
            apply = self._jitted(task.settings['num_choices'])
        data = module.encode(task, rows, self._tokenizer, self._max_length, lengths(self._max_length))
        self.truncated += data.truncated
        pretrained.check_segments(self._config, [data])
        if self._pools:
            data = packed.pack_into(data, data.lengths, batch_size)
        outputs, _ = evaluate.predict(lambda batch: (apply(self._params, batch), {}), data, batch_size, self.target)
        found = module.decode(task, rows, data, outputs)
        return [module.describe(row) | one for row, one in zip(rows, found)]

    @property
    def too_long(self) -> str:
        """What is cut, in words."""
        return self._module.TOO_LONG

    def parse(self, value: Input, where: str = '') -> Any:
        """The kind's example made of one input.

        Raises:
          UserError: an input of another shape; `where` is its file and line, if it has one.
        """
        row = inputs.parsed(self._module, self.kind, value, where)
        self.check(row)
        return row

    def read(self, file: str) -> tuple[list[Any], int]:
        """The examples of a file, and how many lines are none; see `inputs.read`."""
        rows, left_out = inputs.read(file, self.kind, self._task)
        for row in rows:
            if self.kind != 'fill_mask' or row.text.strip():
                self.check(row)
        return rows, left_out

    def check(self, row: Any) -> None:
        """Refuses a text without [MASK] for a model that fills them."""
        if self.kind == 'fill_mask' and MASK not in row.text + (row.pair or ''):
            at = f'{row.where}: ' if row.where else ''
            raise UserError(f'{at}no {MASK} in {row.text[:80]!r}; a pre-trained model fills {MASK}s '
                            '(fine-tune it to classify).')

    @functools.cache  # noqa: B019 - lives as long as the process
    def _jitted(self, num_choices: int = 0) -> Callable:
        config = self._config.copy_and_resolve_references()
        if num_choices:
            config.targets.multiple_choice.num_choices = num_choices
        model = models.build(config)
        return jax.jit(lambda params, batch: model.apply({'params': params}, batch, train=False))

    def _fill_masks(self, rows: list[texts.Row], top_k: int, batch_size: int) -> list[dict[str, Any]]:
        task = Task('classification', {})
        data = texts.encode(task, rows, _WithMasks(self._tokenizer), self._max_length, lengths(self._max_length))
        pretrained.check_segments(self._config, [data])
        results: list[Any] = [None] * len(rows)
        for numbers, batch in data.evaluation_batches(batch_size):
            at = batch['input_ids'] == self._tokenizer.mask_id
            for number, row_at in zip(numbers, at):
                row = rows[number]
                if row_at.sum() < (row.text + (row.pair or '')).count(MASK):
                    raise UserError(f'{row.text[:80]!r}...: a {MASK} lies beyond the {self._max_length} tokens that '
                                    'the model reads.')
            most = 1 << int(max(1, at.sum(1).max()) - 1).bit_length()
            positions = np.argsort(~at, axis=1, kind='stable')[:, :most].astype(np.int32)
            logits = np.asarray(self._apply(self._params, batch | {'masked_lm_positions': positions})['mlm']['logits'])
            for number, row_at, each in zip(numbers.tolist(), at, logits):
                masks = [self._top(one, top_k) for one in each[:int(row_at.sum())]]
                results[number] = texts.describe(rows[number]) | {'masks': masks}
        return results

    def _top(self, logits: np.ndarray, top_k: int) -> list[dict[str, Any]]:
        p = scores.softmax(logits)
        best = np.argsort(-p, kind='stable')[:top_k]
        return [{'token': self._tokenizer.pieces[i], 'score': round(float(p[i]), 6)} for i in best]


class _WithMasks:
    """A tokenizer for which '[MASK]' in a text is the mask."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.cls_id, self.sep_id, self.pad_id = tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id

    def encode(self, text: str) -> list[int]:
        """As Tokenizer.encode."""
        parts = [self._tokenizer.encode(part.strip()) for part in text.split(MASK)]
        return [i for part in parts for i in (*part, self._tokenizer.mask_id)][:-1]


def lengths(max_length: int) -> tuple[int, ...]:
    """The static lengths that batches are cut to."""
    return (*(length for length in LENGTHS if length < max_length), max_length)


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
    parser.add_argument('--null_threshold', type=float, metavar='X',
                        help='spans: no answer where the odds of none are above X (default: as fine-tuned)')
    parser.add_argument('--json', action='store_true', help='print JSON lines')
    args = parser.parse_args()
    for name in ('top_k', 'batch_size'):
        if getattr(args, name) < 1:
            raise UserError(f'--{name} {getattr(args, name)}: one or more is expected.')
    if not args.texts and not args.input:
        raise UserError('No text: give some as arguments, or --input FILE (- for standard input).')
    model = load(args.workdir or args.init_from)
    rows = [model.parse(inputs.parts_of(text)) for text in args.texts]
    if args.input:
        read, left_out = model.read(args.input)
        rows += read
        say_empty(args.input, read, left_out)
    if not rows:
        raise UserError(f'{args.input}: no text in it.')
    show: Callable = (lambda result: json.dumps(result, ensure_ascii=False)) if args.json else _plain
    for start in range(0, len(rows), 32 * args.batch_size):
        some = rows[start:start + 32 * args.batch_size]
        for result in model.predict(some, args.top_k, args.batch_size, args.null_threshold):
            print(show(result), flush=True)
    if model.truncated:
        cli.note(f'{model.truncated:,} {model.too_long} and were cut.')


def say_empty(name: str, rows: list[Any], left_out: int) -> None:
    """Notes on lines without a text."""
    empty, name = sum(map(tasks.has_empty_text, rows)), tables.shown(name)
    if left_out:
        cli.note(f'{left_out:,} empty lines of {name} are left out.')
    if empty:
        cli.note(f'{empty:,} texts of {name} are empty.')


def _plain(found: dict[str, Any]) -> str:
    """For people: what is predicted, then what it was predicted from, in one line; a [MASK] has one of its own."""
    text = ' | '.join(_one_line(found[name]) for name in ('text', 'text_pair') if name in found)
    if 'masks' in found:
        return '\n'.join([text, *('  ' + ', '.join(f'{guess["token"]} {guess["score"]:.3f}' for guess in mask)
                                  for mask in found['masks'])])
    if 'label' in found:
        return f'{found["label"]}\t{found["scores"][found["label"]]:.3f}\t{text}'
    if 'labels' in found:
        return f'{", ".join(found["labels"]) or "-"}\t{text}'
    if 'value' in found:
        return f'{found["value"]:.4f}\t{text}'
    if 'tags' in found:
        return ' '.join(f'{_one_line(word)}/{tag}' for word, tag in zip(found['words'], found['tags']))
    if 'choice' in found:
        return f'{found["choice"]}\t{max(found["scores"]):.3f}\t{_one_line(found["context"])} | {text}'
    return f'{text or "(no answer)"}\t{found["begin"]}-{found["end"]}\t{_one_line(found["question"])}'


def _one_line(text: str) -> str:
    return ' '.join(text.split())


if __name__ == '__main__':
    cli.run(main)
