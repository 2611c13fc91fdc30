"""Fine-tunes on every task with several seeds, with and without pre-training, and writes docs/results.md.

    python benchmarks/results.py --data "$DATA" --mini runs/mini --cased runs/cased --output runs/results [--only cola,mrpc]

$DATA holds glue/, squad/, ner/, multichoice/, and pretrain/ for the two models, whose commands the page has. Runs that are
finished are not repeated. Their scores are added to docs/results.json, and the page is written from it,
so rows may come from several machines, and the page can be made again at any time.
"""

import argparse
import ast
import json
import pathlib
import statistics
import subprocess
import sys

from bert_jax import cli
from bert_jax.tasks import tasks

ROOT = pathlib.Path(__file__).parent.parent
CHOICE = 'multichoice/commonsenseqa_v1.0'
WINDOW = ['--config.max_length=128', '--config.task.stride=96', '--config.epochs=2.0']  # as far as BERT-mini knows positions
CONLL = ['--config.task.folder=$DATA/ner/conll2003', '--config.task.document_context=False', '--config.max_length=64']
FROZEN = ['--config.task.lstm_size=384', '--config.schedule.peak=1e-3', '--config.epochs=1.0']
PHASES = {'mini': '((5000,64,32),(1500,128,16))', 'cased': '((7000,64,32),)'}
PRETRAINING = {
    name: [['python', '-m', 'bert_jax.vocab', '--input', '"$DATA/pretrain/en_wiki/*.txt"', '--vocab_size', '8192', *lower, '--output', f'runs/vocab_{name}'],
           ['python', '-m', 'bert_jax.prepare', '--input', '"$DATA/pretrain/en_wiki/*.txt"', '--tokenizer', f'runs/vocab_{name}',
            '--output', f'runs/store_{name}'],
           ['python', '-m', 'bert_jax.pretrain', '--config', 'configs/pretrain.py:mini', f'--config.store=runs/store_{name}', *more,
            f'"--config.phases={PHASES[name]}"', '--config.examples.mask_rate=0.4', *schedule,
            '--config.model.embeddings.dropout_rate=0.0', '--config.eval_every=1000', '--config.eval_examples=2048', '--workdir', f'runs/{name}']]
    for name, lower, more, schedule in (
        ('mini', ['--lowercase', '--strip_accents'], [], ['--config.schedule.peak=6e-4', '--config.schedule.warmup_share=0.2']),
        ('cased', [], ['--config.model.encoder.num_layers=6', '--config.model.embeddings.hidden_size=128', '--config.model.encoder.num_heads=2'],
         ['--config.schedule.peak=7e-4', '--config.schedule.warmup_share=0.05']))}


def glue(name, folder, *more):
    return (name, name, [f'--config.task.folder=$DATA/glue/{folder}', *more])


def files(train, dev, *more):
    return [f'--config.task.train_file=$DATA/{train}', f'--config.task.dev_file=$DATA/{dev}', *more]


ROWS = [  # name, config, settings; of every model that is given
    glue('cola', 'CoLA', '--config.schedule.peak=3e-4', '--config.epochs=4.0', '--config.max_length=64'),
    glue('sst2', 'SST-2', '--config.schedule.peak=3e-4', '--config.epochs=1.0', '--config.max_length=64'),
    glue('mrpc', 'MRPC', '--config.schedule.peak=1e-4'),
    glue('stsb', 'STS-B', '--config.schedule.peak=2e-4'),
    ('commonsenseqa', 'commonsenseqa', files(f'{CHOICE}/train_rand_split.jsonl', f'{CHOICE}/dev_rand_split.jsonl',
                                             '--config.schedule.peak=1e-4', '--config.epochs=1.0', '--config.max_length=64')),
    ('squad1', 'squad1', files('squad/devsplit-v1.1.train.json', 'squad/devsplit-v1.1.heldout.json',
                               '--config.schedule.peak=2e-4', *WINDOW)),
    ('squad2', 'squad2', files('squad/devsplit-v2.0.train.json', 'squad/devsplit-v2.0.heldout.json',
                               '--config.schedule.peak=2e-4', *WINDOW)),
    ('conll2003', 'conll2003', [*CONLL, '--config.schedule.peak=2e-4']),
    *((f'conll2003_{features}', 'conll2003', [*CONLL, f'--config.task.features={features}', *FROZEN])
      for features in tasks.FEATURES)]
BESIDE = {'mrpc': ['accuracy'], 'squad1': ['exact'], 'squad2': ['exact']}  # scores shown with the task's own
SEEDS = {'cola': 5}  # of runs of less than five minutes; else 3


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
    models = {model: getattr(args, model) for model in PHASES if getattr(args, model)}
    for name, task, settings in ROWS:
        if not args.only or name in args.only.split(','):
            for model, work in models.items():
                for scratch in (False, True):
                    run(args, name, task, model, work, settings, scratch)
    records = args.page.with_suffix('.json')
    found = json.loads(records.read_text()) if records.exists() else {'models': {}, 'rows': {}}
    found['models'] |= {model: describe(model, pathlib.Path(work)) for model, work in models.items()}
    for name, task, settings in ROWS:
        for model in PHASES:
            if one := record(args, name, task, model, settings):
                found['rows'].setdefault(name, {})[model] = one
    records.write_text(json.dumps(found, indent=1) + '\n')
    args.page.write_text(page(found))


def describe(name, work):
    """What a pre-trained model is, what it knows, and what it took, in a line."""
    config = json.loads((work / 'config.json').read_text())
    if str(config['phases']) != str([list(phase) for phase in ast.literal_eval(PHASES[name])]):
        sys.exit(f'{work}: phases {config["phases"]}, where {PHASES[name]} are expected')
    held_out = [json.loads(line) for line in (work / 'log.jsonl').read_text().splitlines() if 'held_out/mlm/loss' in line][-1]
    places = sum(steps * length * batch_size for steps, length, batch_size in config['phases'])
    encoder, embeddings = config['model']['encoder'], config['model']['embeddings']
    return (f'`{name}`: {encoder["num_layers"]} layers of {embeddings["hidden_size"]}, {"a cased" if name == "cased" else "an uncased"} vocabulary of '
            f'{embeddings["vocab_size"]:,}; {held_out["step"]:,} steps ({places / 1e6:.0f} million tokens, padding included, up to '
            f'{max(length for _, length, _ in config["phases"])} at a time) in {minutes(work) / 60:.1f} hours on one core, at the median rate; held-out MLM '
            f'{held_out["held_out/mlm/loss"]:.2f} nats (unigram model {held_out["held_out/mlm/unigram_loss"]:.2f}), NSP '
            f'{held_out["held_out/nsp/accuracy"]:.1%}.')


def folder(output, name, model, scratch):
    return output / model / name / ('scratch' if scratch else 'pretrained')


def command(name, task, start, settings, work, scratch=False):
    return ['python', '-m', 'bert_jax.finetune', '--config', f'configs/finetune.py:{task}', f'--config.init_from={start}',
            *settings, f'--config.seeds={SEEDS.get(name, 3)}', *(['--config.from_scratch=True'] if scratch else []), '--workdir', str(work)]


def run(args, name, task, model, start, settings, scratch):
    work = folder(args.output, name, model, scratch)
    if not (work / 'sweep.json').exists():
        print(f'\n=== {name}, {model}, {"random weights" if scratch else "pre-trained"}', flush=True)
        commit = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=ROOT, text=True, capture_output=True, check=True).stdout.strip()
        work.mkdir(parents=True, exist_ok=True)
        made = json.loads((work / 'made.json').read_text()) if (work / 'made.json').exists() else {'commits': []}
        (work / 'made.json').write_text(json.dumps({'commits': sorted({*made['commits'], commit})}))
        parts = command(name, task, start, settings, work, scratch)
        subprocess.run([sys.executable, *(part.replace('$DATA', args.data) for part in parts[1:])], cwd=ROOT, check=True)


HEADER = """# Results

Written by `benchmarks/results.py`: mean, standard deviation and range over seeds, on dev, of each run's checkpoint that is best there. Random weights are the
same model, data and settings with `--config.from_scratch=True`. The table also has what can be scored without reading: always the most frequent label, the label (or
mean) of the training rows of the same length, the longest choice, the first sentence, never an answer, each word's most frequent tag. The six rows of features are those
of Devlin et al. (2019), table 7, under a BiLSTM of 768, 384 in each direction, for one epoch. Learning rates were chosen beforehand, by a few
runs on dev, GLUE's and SQuAD's with BERT-mini; every model takes the same. Minutes are those of the training steps, at the median rate, on one core of a machine that did other things too.

| task | score | pre-trained | random weights | without reading | model | a run | seeds | commit |
|---|---|---|---|---|---|---|---|---|"""
EXPECT = """What to expect: a published BERT-Mini of 4 layers of 256, pre-trained for as long as BERT-base, has on GLUE's test sets 0.0 on CoLA, 85.9 on SST-2, 81.1 F1 and 71.8
accuracy on MRPC, and 73.3 Spearman on STS-B (Turc et al. 2019, the table of their models). Why a row is no further ahead: [log.md](log.md)."""


def record(args, name, task, model, settings):
    """What a row's runs came to: command, cost, and for every score its values over the seeds; None before all have ended."""
    works = [folder(args.output, name, model, scratch) for scratch in (False, True)]
    if not all((work / 'sweep.json').exists() for work in works):
        return None
    sweeps = [json.loads((work / 'sweep.json').read_text()) for work in works]
    parts, beside, scores = command(name, task, f'runs/{model}', settings, f'runs/{model}_{name}'), baselines(task, settings, args.data), {}
    for shown in (sweeps[0]['score'], *(f'dev/{other}' for other in BESIDE.get(name, ()))):
        pretrained, scratch = ([one[shown] for one in sweep['runs'].values()] for sweep in sweeps)
        measure = shown.removeprefix('dev/')
        scores[measure] = {'pretrained': pretrained, 'random_weights': scratch,
                           'without_reading': {key: value for key, value in beside.items() if key.endswith(f'_{measure}')}}
    return {'cost': cost(works[0]), 'scores': scores,
            'command': ' '.join(f'"{part}"' if '(' in part else part for part in parts),
            'commits': sorted({commit for work in works for commit in json.loads((work / 'made.json').read_text())['commits']})}


def page(found):
    lines = [HEADER]
    rows = [(name, model, row) for name, *_ in ROWS for model, row in sorted(found['rows'].get(name, {}).items())]
    for name, model, row in rows:
        for measure, values in row['scores'].items():
            beside = ', '.join(f'{key} {value:.3f}' for key, value in values['without_reading'].items())
            lines.append(f'| {name} | {measure} | {spread(values["pretrained"])} | {spread(values["random_weights"])} | {beside} | {model} '
                         f'| {row["cost"]} | {len(values["pretrained"])} | {", ".join(row["commits"])} |')
    made = [' '.join(parts) for name in found['models'] for parts in PRETRAINING[name]]
    missing = [name for name, *_ in ROWS if name not in found['rows']]
    lines += [f'\nNot run yet: {", ".join(missing)}.'] if missing else []
    return '\n'.join([*lines, '', EXPECT, '', *(f'{line}\n' for line in found['models'].values()), 'The commands:', '', '```bash', *made,
                      *(row['command'] for *_, row in rows), '```', ''])


def baselines(task, settings, data):
    """What the task's kind scores on dev without reading."""
    config = cli.load_config(str(ROOT / 'configs' / 'finetune.py') + f':{task}', [one.replace('$DATA', data) for one in settings])
    read = tasks.TASKS[config.task.name](**{key: value for key, value in config.task.items() if key != 'name'})
    return tasks.KINDS[read.kind].module.baseline(read, read.splits['dev'])


def cost(work):
    """Steps and minutes of a run, the mean over seeds."""
    runs = list(work.glob('runs/*'))
    steps = statistics.mean(rates(run)[-1]['step'] for run in runs)
    return f'{steps:,.0f} steps, {statistics.mean(map(minutes, runs)):.0f} min'


def rates(run):
    return [json.loads(line) for line in (run / 'rates.jsonl').read_text().splitlines()]


def minutes(run):
    """Of a run's training steps, at its median rate."""
    found = rates(run)
    return found[-1]['step'] / statistics.median(rate['steps_per_second'] for rate in found) / 60


def spread(values):
    return f'{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f} ({min(values):.3f}-{max(values):.3f})'


if __name__ == '__main__':
    main()
