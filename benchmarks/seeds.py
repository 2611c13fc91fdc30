"""Fine-tunes with several seeds, with and without pre-training, and prints means and spreads.

    python benchmarks/seeds.py --task mrpc --folder "$DATA/MRPC" --init_from runs/mini --output runs/mrpc --seeds 3 \\
        -- --config.epochs=3 --config.schedule.peak=1e-4

What follows -- goes to every run. Finished runs are not repeated.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
SCORES = ('dev/accuracy', 'dev/f1', 'dev/f1_macro')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--task', required=True, choices=('sst2', 'mrpc'))
    parser.add_argument('--folder', required=True)
    parser.add_argument('--init_from', required=True)
    parser.add_argument('--output', required=True, type=pathlib.Path)
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('overrides', nargs='*')
    args = parser.parse_args()
    table = {}
    for scratch in (False, True):
        table[scratch] = [run(args, seed, scratch) for seed in range(args.seeds)]
    print(f'{args.task}, {args.seeds} seeds, dev split; majority class {table[False][0]["dev/majority_accuracy"]:.3f}')
    for scratch, results in table.items():
        cells = [f'{name} {spread([r[name] for r in results])}' for name in SCORES if name in results[0]]
        print(f'  {"without pre-training" if scratch else "pre-trained":<22}' + '; '.join(cells))


def run(args, seed, scratch):
    work = args.output / f'{"scratch" if scratch else "pretrained"}-{seed}'
    if not (work / 'results.json').exists():
        subprocess.run([sys.executable, '-m', 'bert_jax.finetune', '--config', f'configs/finetune.py:{args.task}',
                        f'--config.init_from={args.init_from}', f'--config.task.folder={args.folder}', f'--config.seed={seed}',
                        f'--config.from_scratch={scratch}', '--workdir', str(work), *args.overrides], cwd=ROOT, check=True)
    return json.loads((work / 'results.json').read_text())


def spread(values):
    """Mean, standard deviation and range."""
    return f'{statistics.mean(values):.3f} +- {statistics.stdev(values):.3f} ({min(values):.3f}-{max(values):.3f})'


if __name__ == '__main__':
    main()
