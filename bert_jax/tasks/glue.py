"""GLUE: each task's own TSV layout, or TFDS; and its file of predictions (Wang et al. 2019).

    python -m bert_jax.tasks.glue --runs runs/cola runs/sst2 runs/mnli --output submission.zip

puts the predictions of fine-tuned workdirs into one file for GLUE's server.
"""

import os
import pathlib
import zipfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from bert_jax import cli, paths
from bert_jax.cli import UserError
from bert_jax.data import corpora
from bert_jax.tasks import tables
from bert_jax.tasks.task import Task
from bert_jax.tasks.texts import Row, with_classes, with_numbers


class Layout(NamedTuple):
    """Where a task keeps what: columns of its TSV files, features of its TFDS data set.

    Where train and dev have no header (CoLA), columns are numbers, and `fields` is how many there are.
    """

    text: str
    pair: str
    label: str
    labels: tuple[str, ...]
    best: str
    files: dict[str, str]           # split -> file
    submission: dict[str, str]      # split -> file of predictions
    features: tuple[str, ...]       # TFDS: text, pair
    fields: int = 0                 # columns of train and dev files without a header


def _files(**more: str) -> dict[str, str]:
    return {'train': 'train.tsv', 'dev': 'dev.tsv', 'test': 'test.tsv'} | more


YES_NO, ENTAILMENT = ('0', '1'), ('entailment', 'not_entailment')
LAYOUTS = {
    'cola': Layout('3', '', '1', YES_NO, 'matthews', _files(), {'test': 'CoLA.tsv'}, ('sentence',), fields=4),
    'sst2': Layout('sentence', '', 'label', YES_NO, 'accuracy', _files(), {'test': 'SST-2.tsv'}, ('sentence',)),
    'mrpc': Layout('#1 String', '#2 String', 'Quality', YES_NO, 'f1', _files(), {'test': 'MRPC.tsv'},
                   ('sentence1', 'sentence2')),
    'stsb': Layout('sentence1', 'sentence2', 'score', (), 'spearman', _files(), {'test': 'STS-B.tsv'},
                   ('sentence1', 'sentence2')),
    'qqp': Layout('question1', 'question2', 'is_duplicate', YES_NO, 'f1', _files(), {'test': 'QQP.tsv'},
                  ('question1', 'question2')),
    'mnli': Layout('sentence1', 'sentence2', 'gold_label', ('contradiction', 'entailment', 'neutral'), 'accuracy',
                   {'train': 'train.tsv', 'dev': 'dev_matched.tsv', 'dev_mismatched': 'dev_mismatched.tsv',
                    'test': 'test_matched.tsv', 'test_mismatched': 'test_mismatched.tsv',
                    'test_diagnostic': 'diagnostic.tsv'},
                   {'test': 'MNLI-m.tsv', 'test_mismatched': 'MNLI-mm.tsv', 'test_diagnostic': 'AX.tsv'},
                   ('premise', 'hypothesis')),
    'qnli': Layout('question', 'sentence', 'label', ENTAILMENT, 'accuracy', _files(), {'test': 'QNLI.tsv'},
                   ('question', 'sentence')),
    'rte': Layout('sentence1', 'sentence2', 'label', ENTAILMENT, 'accuracy', _files(), {'test': 'RTE.tsv'},
                  ('sentence1', 'sentence2')),
    'wnli': Layout('sentence1', 'sentence2', 'label', YES_NO, 'accuracy', _files(), {'test': 'WNLI.tsv'},
                   ('sentence1', 'sentence2')),
}
IN_TFDS = {'train': 'train', 'dev': 'validation', 'test': 'test'}  # split -> TFDS' name for it
MNLI_IN_TFDS = {'train': 'train', 'dev': 'validation_matched', 'dev_mismatched': 'validation_mismatched',
                'test': 'test_matched', 'test_mismatched': 'test_mismatched'}


def read(name: str, folder: str) -> Task:
    """A task from a folder in GLUE's TSV layout, or from TFDS ('tfds:glue/sst2').

    The files of test splits may be missing. Rows of the wrong number of columns, which QQP has, are skipped and
    counted, the first of them named. MNLI's diagnostic set is `diagnostic.tsv`, in its folder or in a folder `AX` or
    `diagnostic` next to it.

    Raises:
      UserError: no folder given, a missing file or column, a label that is not one (file and line).
    """
    if not folder:
        raise UserError('--config.task.folder=FOLDER is missing: the folder with train.tsv and dev.tsv, '
                        f'or tfds:glue/{name}.')
    layout = LAYOUTS[name]
    if folder.startswith('tfds:'):
        splits, notes = _tfds_splits(folder.removeprefix('tfds:'), layout)
    else:
        splits, notes = _folder_splits(folder, layout)
    task = Task('classification' if layout.labels else 'regression', splits, layout.labels, layout.best,
                submission=layout.submission, notes=notes)
    return with_classes(task) if layout.labels else with_numbers(task)


def with_columns(settings: dict[str, Any]) -> dict[str, Any]:
    """A task's settings, of GLUE's with the columns that its files have."""
    layout = LAYOUTS.get(settings.get('name', ''))
    if layout is None:
        return settings
    text, pair = ('sentence', '') if layout.fields else (layout.text, layout.pair)
    return settings | {'text_column': text, 'text_pair_column': pair}


Found = tuple[dict[str, list[Row]], tuple[str, ...]]  # splits, notes


def _folder_splits(folder: str, layout: Layout) -> Found:
    splits, skipped = {}, []
    for split, file in layout.files.items():
        path = _find(folder, file)
        if os.path.exists(path) or not split.startswith('test'):
            splits[split] = list(_from_file(path, layout, split, skipped))
            if not splits[split]:
                raise UserError(f'{path}: no rows in it.')
    if not skipped:
        return splits, ()
    return splits, (f'{len(skipped):,} rows with a wrong number of columns were left out, the first at {skipped[0]}',)


def _tfds_splits(name: str, layout: Layout) -> Found:
    names = MNLI_IN_TFDS if 'dev_mismatched' in layout.files else IN_TFDS
    splits = {split: list(_from_tfds(name, layout, tfds_split)) for split, tfds_split in names.items()}
    if 'test_diagnostic' not in layout.files:
        return splits, ()
    try:
        return splits | {'test_diagnostic': list(_from_tfds('glue/ax', layout, 'test'))}, ()
    except UserError as error:
        return splits, (f'without the diagnostic set ({error})',)


def _find(folder: str, file: str) -> str:
    beside = [os.path.join(folder, '..', other, file) for other in ('AX', 'diagnostic')]
    found = [path for path in beside if file == 'diagnostic.tsv' and os.path.exists(path)]
    return (*found, os.path.join(folder, file))[0]


def _from_file(path: str, layout: Layout, split: str, skipped: list[str]) -> Iterator[Row]:
    rows, test = tables.read_rows(path), split.startswith('test')
    if layout.fields and not test:
        header = [str(number) for number in range(layout.fields)]
    else:
        _, header = next(rows, (path, []))
    text = layout.features[0] if layout.fields and test else layout.text
    names = [text, *filter(None, (layout.pair, '' if test else layout.label))]
    for name in names:
        if name not in header:
            raise UserError(f'{path}: no column {name!r}; there are: {", ".join(header)}.')
    for where, fields in rows:
        if len(fields) != len(header):
            if test:
                raise UserError(f'{where}: {len(fields)} columns where the header has {len(header)}; the predictions '
                                'would lose their numbers.')
            skipped.append(where)
            continue
        record = dict(zip(header, fields))
        pair, label = record[layout.pair] if layout.pair else None, None if test else record[layout.label]
        yield Row(record[text], pair, label, where)


def _from_tfds(name: str, layout: Layout, split: str) -> Iterator[Row]:
    records = list(corpora.tfds_records(name, split))  # in an order of TFDS' own
    for record, _ in records:
        missing = [feature for feature in ('idx', *layout.features) if feature not in record]
        if missing:
            raise UserError(f'tfds:{name}: no {missing[0]!r} in it; there are: {", ".join(record)}.')
    for number, (record, names) in enumerate(sorted(records, key=lambda found: int(found[0]['idx']))):
        label = None
        if not split.startswith('test'):
            label = str(record['label'])
            if names:  # TFDS has its own names; ours are those of the TSV files
                label = names[int(label)] if names[int(label)] in layout.labels else label
        text, pair, *_ = (*(record[feature].decode() for feature in layout.features), None)
        yield Row(text, pair, label, f'{name}:{number}')


def submission(task: Task, split: str, predictions: list[dict[str, Any]]) -> tuple[str, str] | None:
    """(file name, content) of GLUE's file of predictions for a test split; None where GLUE wants none."""
    if split not in task.submission:
        return None

    def value(found: dict[str, Any]) -> str:
        return f'{min(max(found["value"], 0.0), 5.0):.3f}' if task.kind == 'regression' else found['label']

    lines = ['index\tprediction'] + [f'{number}\t{value(found)}' for number, found in enumerate(predictions)]
    return task.submission[split], '\n'.join(lines) + '\n'


def main() -> None:
    """Writes the file that GLUE's server takes."""
    parser = cli.parser(__doc__, prog='python -m bert_jax.tasks.glue')
    parser.add_argument('--runs', nargs='+', required=True, metavar='W', help='fine-tuned workdirs, or sweeps')
    parser.add_argument('--output', required=True, metavar='FILE.zip')
    args = parser.parse_args()
    found = {}
    for run in map(pathlib.Path, args.runs):
        if (run / 'sweep.json').exists():
            run = run / 'runs' / paths.read_json(run / 'sweep.json')['chosen']
        files = sorted(run.glob('submission/*.tsv'))
        if not files:
            raise UserError(f'{run}: no submission/*.tsv there; was it fine-tuned on a GLUE task with a test file?')
        for file in files:
            if file.name in found:
                raise UserError(f'{file} and {found[file.name]}: two runs of one task.')
            found[file.name] = file
    output = paths.check_local(args.output, '--output')
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + '.partial')
    with zipfile.ZipFile(partial, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, file in sorted(found.items()):
            archive.write(file, name)
    partial.replace(output)
    missing = {name for layout in LAYOUTS.values() for name in layout.submission.values()} - found.keys()
    print(f'{args.output}: {", ".join(sorted(found))}.')
    if missing:
        cli.note(f"the server wants all of GLUE's files; missing: {', '.join(sorted(missing))}.")


if __name__ == '__main__':
    cli.run(main)
