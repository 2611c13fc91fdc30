"""Fine-tuning SST-2 with a model of BERT-base's size: one epoch of 2,000 examples, compilation included, beside its peers.

    python benchmarks/finetune.py --folder "$DATA/SST-2" --vocab vocab.txt

Each side runs in a process of its own, two cores, fp32, batch 32, from the same random weights, in turn, each time with another
seed: ours, with several texts a row; Hugging Face `Trainer` with dynamic padding and length grouping; `Trainer` with everything padded
to 128, over an eighth of the examples, since all its batches cost the same. Timed is the epoch from its first batch to its last update,
with the step's compilation in it; loading, tokenizing and making the first weights are not.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import train_step

ROOT = pathlib.Path(__file__).parent.parent
SIDES = ('ours', 'trainer', 'trainer_padded')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--folder', required=True)
    parser.add_argument('--vocab', required=True)
    parser.add_argument('--examples', type=int, default=2000)
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--layers', type=int, default=12)
    parser.add_argument('--sides', default=','.join(SIDES))
    parser.add_argument('--side', help=argparse.SUPPRESS)
    parser.add_argument('--work', help=argparse.SUPPRESS)
    parser.add_argument('--seed', type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
        print(json.dumps({'ours': ours, 'trainer': trainer, 'trainer_padded': trainer}[args.side](args)))
        return
    with tempfile.TemporaryDirectory() as work:
        prepare(args, pathlib.Path(work))
        found = {side: [] for side in args.sides.split(',')}
        for number in range(args.repeats):
            for side in found:
                with tempfile.TemporaryDirectory() as cache:  # nothing is compiled before
                    done = subprocess.run([sys.executable, __file__, *sys.argv[1:], '--side', side, '--work', work, '--seed', str(number)],
                                          text=True, stdout=subprocess.PIPE, check=True,
                                          env=os.environ | {'JAX_COMPILATION_CACHE_DIR': cache, 'PYTHONPATH': str(ROOT)})
                found[side].append(json.loads(done.stdout.splitlines()[-1]))
                print(number, side, found[side][-1], flush=True)
    peak, first = train_step.matmul_peak(), next(iter(found))
    work = found['ours'][0]['work'] / args.examples if 'ours' in found else 0
    print(f'matmul peak measured: {peak / 1e12:.3f} TFLOP/s; {", ".join(train_step.versions())}')
    for side, runs in found.items():
        rates, accuracies = [one['rate'] for one in runs], [one['accuracy'] for one in runs if 'accuracy' in one]
        dev = f'dev accuracy {statistics.mean(accuracies):.3f} ± {statistics.pstdev(accuracies):.3f}; ' if accuracies else ''
        ratios = sorted(one['rate'] / other['rate'] for one, other in zip(found[first], runs))
        print(f'{side:<16}{statistics.median(rates):8.2f} examples/s ({min(rates):.2f}-{max(rates):.2f}, n = {len(rates)}); '
              f'{statistics.median(rates) * work / peak:.0%} of the matmul peak, real tokens alone; {dev}'
              f'{first} / this: {statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})')


def prepare(args, work):
    """The subset, and one Hugging Face folder with random weights that both sides start from."""
    import shutil

    import transformers

    lines = (pathlib.Path(args.folder) / 'train.tsv').read_text().splitlines()
    (work / 'train.tsv').write_text('\n'.join(lines[:args.examples + 1]) + '\n')
    shutil.copy(pathlib.Path(args.folder) / 'dev.tsv', work / 'dev.tsv')
    vocab = pathlib.Path(args.vocab).read_text().splitlines()
    model = transformers.BertModel(transformers.BertConfig(vocab_size=len(vocab), num_hidden_layers=args.layers))
    model.save_pretrained(work / 'model')
    shutil.copy(args.vocab, work / 'model' / 'vocab.txt')
    (work / 'model' / 'tokenizer_config.json').write_text(json.dumps({'do_lower_case': True, 'tokenizer_class': 'BertTokenizer'}))


def ours(args):
    from bert_jax import cli, finetune, train

    config = cli.load_config(str(ROOT / 'configs/finetune.py') + ':sst2', [
        f'--config.init_from={args.work}/model', f'--config.task.folder={args.work}', '--config.epochs=1.0', '--config.log_every=1000',
        f'--config.seed={args.seed}'])
    seconds, fit = [], train.fit

    def timed(state, step, batches, **kwargs):
        start = time.perf_counter()
        evaluators, kwargs['evaluators'] = kwargs['evaluators'], {}
        state = fit(state, step, batches, **kwargs)
        import jax

        jax.block_until_ready(state.params)
        seconds.append(time.perf_counter() - start)
        scores.update(evaluators['dev'](0, state.params))
        return state

    scores, finetune.train.fit = {}, timed
    job = finetune.Job(config, finetune.read_task(config))
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, 'w') as nowhere:
        checkpoints = type('NoCheckpoints', (), {'save': lambda *a, **k: None, 'wait': lambda *a: None})()
        stdout, sys.stdout = sys.stdout, nowhere
        with config.unlocked():
            config.model = job.model_config
        from etils import epath

        finetune._train(job, config, finetune._initial(job, config), checkpoints, epath.Path(folder))
        sys.stdout = stdout
    sizes = job.data(config.batch_size)['train'].sizes.astype(float)
    work = job.model.flops({'tokens': sizes.sum(), 'squared_tokens': (sizes**2).sum()})
    return {'rate': args.examples / seconds[0], 'accuracy': scores['accuracy'], 'work': work}


def trainer(args):
    import numpy as np
    import torch
    import transformers

    torch.set_num_threads(2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(f'{args.work}/model')
    padded = args.side == 'trainer_padded'

    def rows(name):
        table = [line.split('\t') for line in pathlib.Path(args.work, name).read_text().splitlines()[1:]]
        kwargs = {'padding': 'max_length'} if padded else {}
        return [dict(tokenizer(text, truncation=True, max_length=128, **kwargs)) | {'labels': int(label)} for text, label in table]

    train_rows, dev_rows = rows('train.tsv'), rows('dev.tsv')
    train_rows = train_rows[:len(train_rows) // 8] if padded else train_rows
    model = transformers.BertForSequenceClassification.from_pretrained(f'{args.work}/model', num_labels=2)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, num_train_epochs=1, per_device_train_batch_size=32, per_device_eval_batch_size=32, learning_rate=5e-5, warmup_steps=0.1,
            weight_decay=0.01, seed=args.seed, use_cpu=True, report_to='none', save_strategy='no', logging_strategy='no', disable_tqdm=True,
            train_sampling_strategy='random' if padded else 'group_by_length')
        peer = transformers.Trainer(model, arguments, train_dataset=train_rows, eval_dataset=dev_rows,
                                    data_collator=transformers.DataCollatorWithPadding(tokenizer),
                                    compute_metrics=lambda found: {'accuracy': float(np.mean(found.predictions.argmax(-1) == found.label_ids))})
        start = time.perf_counter()
        peer.train()
        seconds = time.perf_counter() - start
        return {'rate': len(train_rows) / seconds} | ({} if padded else {'accuracy': peer.evaluate()['eval_accuracy']})


if __name__ == '__main__':
    main()
