"""Fine-tunes on every task with several seeds, with and without pre-training, and writes docs/results.md.

    python benchmarks/results.py --data "$DATA" --mini runs/mini --cased runs/cased --output runs/results [--only cola,mrpc]

$DATA holds glue/, squad/, ner/ and multichoice/. Runs that are finished are not repeated; the page is written from those
that are there, so it can be made again at any time.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

from bert_jax.data import tasks

ROOT = pathlib.Path(__file__).parent.parent
CHOICE = 'multichoice/commonsenseqa_v1.0'
WINDOW = ['--config.max_length=128', '--config.task.stride=64']  # as far as BERT-mini knows positions
SHORT = ['--config.max_length=64']
FROZEN = ["--config.frozen=('embeddings','encoder')", '--config.schedule.peak=1e-3', '--config.epochs=5.0', '--config.task.lstm_size=768']


def glue(name, folder, *more):
    return (name, name, 'mini', [f'--config.task.folder=$DATA/glue/{folder}', *more])


def files(train, dev, *more):
    return [f'--config.task.train_file=$DATA/{train}', f'--config.task.dev_file=$DATA/{dev}', *more]


ROWS = [  # name, config, model, settings; seeds by name
    glue('cola', 'CoLA', '--config.schedule.peak=1e-4', '--config.max_length=64'),
    glue('sst2', 'SST-2', '--config.schedule.peak=3e-4', '--config.epochs=1.0', '--config.max_length=64'),
    glue('mrpc', 'MRPC', '--config.schedule.peak=1e-4'),
    glue('stsb', 'STS-B', '--config.schedule.peak=1e-4', '--config.epochs=4.0'),
    ('commonsenseqa', 'commonsenseqa', 'mini', files(f'{CHOICE}/train_rand_split.jsonl', f'{CHOICE}/dev_rand_split.jsonl',
                                                     '--config.schedule.peak=1e-4', '--config.max_length=64')),
    ('squad1', 'squad1', 'mini', files('squad/devsplit-v1.1.train.json', 'squad/devsplit-v1.1.heldout.json',
                                       '--config.schedule.peak=2e-4', *WINDOW)),
    ('squad2', 'squad2', 'mini', files('squad/devsplit-v2.0.train.json', 'squad/devsplit-v2.0.heldout.json',
                                       '--config.schedule.peak=2e-4', *WINDOW)),
    ('conll2003', 'conll2003', 'cased', ['--config.task.folder=$DATA/ner/conll2003', '--config.schedule.peak=2e-4', *SHORT]),
    *((f'conll2003_{features}', 'conll2003', 'cased', ['--config.task.folder=$DATA/ner/conll2003',
                                                       f'--config.task.features={features}', *SHORT, *FROZEN]) for features in tasks.FEATURES)]
BESIDE = {'mrpc': ['accuracy'], 'squad1': ['exact'], 'squad2': ['exact']}  # scores shown beside the task's own
SEEDS = {'cola': 5, 'mrpc': 5, 'stsb': 5, 'commonsenseqa': 5}  # else 3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', required=True)
    parser.add_argument('--mini', default='')
    parser.add_argument('--cased', default='')
    parser.add_argument('--output', required=True, type=pathlib.Path)
    parser.add_argument('--only', default='', help='names with commas between them')
    parser.add_argument('--page', type=pathlib.Path, default=ROOT / 'docs' / 'results.md')
    args = parser.parse_args()
    unknown = set(filter(None, args.only.split(','))) - {row[0] for row in ROWS}
    if unknown:
        parser.error(f'--only {", ".join(unknown)}: known are {", ".join(row[0] for row in ROWS)}')
    for name, task, model, settings in ROWS:
        if getattr(args, model) and (not args.only or name in args.only.split(',')):
            for scratch in (False, True):
                run(args, name, task, getattr(args, model), settings, scratch)
    args.page.write_text(page(args.output))


def folder(output, name, scratch):
    return output / name / ('scratch' if scratch else 'pretrained')


def command(name, task, model, settings, work, scratch=False):
    return ['python', '-m', 'bert_jax.finetune', '--config', f'configs/finetune.py:{task}', f'--config.init_from={model}',
            *settings, f'--config.seeds={SEEDS.get(name, 3)}', *(['--config.from_scratch=True'] if scratch else []), '--workdir', str(work)]


def run(args, name, task, model, settings, scratch):
    work = folder(args.output, name, scratch)
    if not (work / 'sweep.json').exists():
        commit = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=ROOT, text=True, capture_output=True, check=True).stdout.strip()
        work.mkdir(parents=True, exist_ok=True)
        (work / 'made.json').write_text(json.dumps({'commit': commit}))
        parts = command(name, task, model, settings, work, scratch)
        subprocess.run([sys.executable, *(part.replace('$DATA', args.data) for part in parts[1:])], cwd=ROOT, check=True)


def page(output):
    lines = ['# Results', '', 'Written by `benchmarks/results.py`: mean, standard deviation and range over seeds, on dev, the best checkpoint on dev of each run. '
             '`runs/mini` is the BERT-mini of the README.', '',
             '| task | score | pre-trained | the same without pre-training | baselines | seeds | commit |', '|---|---|---|---|---|---|---|']
    commands = []
    for name, task, model, settings in ROWS:
        found = [folder(output, name, scratch) for scratch in (False, True)]
        if not all((work / 'sweep.json').exists() for work in found):
            continue
        sweeps = [json.loads((work / 'sweep.json').read_text()) for work in found]
        commits = sorted({json.loads((work / 'made.json').read_text())['commit'] for work in found})
        score = sweeps[0]['score']
        first = next(iter(sweeps[0]['runs'].values()))
        baselines = ', '.join(f'{key.removeprefix("dev/")} {value:.3f}' for key, value in first.items()
                              if key.startswith('dev/') and any(word in key for word in ('majority', 'baseline', 'longest', 'first_', 'no_answer_f1')))
        for shown in (score, *(f'dev/{other}' for other in BESIDE.get(name, ()))):
            cells = [spread([one[shown] for one in sweep['runs'].values()]) for sweep in sweeps]
            lines.append(f'| {name} | {shown.removeprefix("dev/")} | {cells[0]} | {cells[1]} | {baselines} | {len(sweeps[0]["runs"])} '
                         f'| {", ".join(commits)} |')
        parts = command(name, task, f'runs/{model}', settings, f'runs/{name}')
        commands.append(' '.join(f'"{part}"' if '(' in part else part for part in parts))
    return '\n'.join([*lines, '', 'The commands (without pre-training: `--config.from_scratch=True`):', '', '```bash', *commands, '```', ''])


def spread(values):
    return f'{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f} ({min(values):.3f}-{max(values):.3f})'


if __name__ == '__main__':
    main()
