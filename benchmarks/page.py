"""Writes docs/benchmarks.md and its picture from what benchmarks/run.sh left behind; called by it.

    python benchmarks/page.py --figures runs/benchmarks --output docs/benchmarks.md
"""

import argparse
import json
import os
import pathlib
import platform
import statistics

TITLES = {
    'train_base': ('A training step of BERT-base on a CPU', 'Targets: 1.5 times `eager`, 1.25 times `eager_masked`, 75 % of the matmul peak.'),
    'train_base_bf16': ('The same in bfloat16', 'CPUs emulate it; peers run under autocast.'),
    'train_base_512': ('The same at length 512', ''),
    'train_large_512': ("BERT-large at length 512, in this machine's memory", ''),
    'packed_128': ('Packing at length 128', 'Real examples of the store: several in a row beside one in a row.'),
    'packed_512': ('Packing at length 512', ''),
    'prepare': ('Text to token store', 'Target: 8 MB/s.'),
    'pipeline': ('The input pipeline', 'Targets through tf.data: 100,000 sequences/s at 128, 25,000 at 512, half of that with whole words.'),
    'startup': ('From the command to the first step', 'Targets: 15 s, 8 s with a warm cache, 3 s for the import.'),
    'predict': ('Prediction', ''),
    'finetune': ('Fine-tuning', "Target: 1.2 times `Trainer` with dynamic padding and length grouping."),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--figures', required=True)
    parser.add_argument('--output', required=True)
    args = parser.parse_args()
    folder, output = pathlib.Path(args.figures), pathlib.Path(args.output)
    found = {name: folder / f'{name}.txt' for name in TITLES if (folder / f'{name}.txt').exists()}
    cpu = next((line.split(': ')[1] for line in pathlib.Path('/proc/cpuinfo').read_text().splitlines() if line.startswith('model name')),
               platform.machine())
    lines = ['# Benchmarks', '', 'Written by `benchmarks/run.sh`, which runs each benchmark beside its peers, in fresh processes that take turns; medians and '
             f'ranges. On a shared machine only ratios mean something. {os.cpu_count()} cores of {cpu}.', '']
    if draw(folder, output.with_suffix('.png')):
        lines += [f'![steps against peers]({output.with_suffix(".png").name})', '']
    for name, file in found.items():
        title, aim = TITLES[name]
        lines += [f'## {title}', '', *([aim, ''] if aim else []), '```', file.read_text().rstrip(), '```', '']
    output.write_text('\n'.join(lines).rstrip() + '\n')
    print(f'{output}: {", ".join(found)}')


def draw(folder, path):
    """A bar a side of every training benchmark: its share of the matmul peak."""
    runs = [(name, json.loads(line)) for name in TITLES for file in [folder / f'{name}.json'] if file.exists()
            for line in file.read_text().splitlines()[-1:]]
    if not runs:
        return False
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.3 * sum(len(run['rows']) + 1 for _, run in runs) + 1))
    at, names = 0, []
    for name, run in runs:
        for row in run['rows']:
            ours = row['side'].startswith(('ours', 'packed'))
            axes.barh(at, 100 * row['of_matmul_peak'], color='C0' if ours else 'C7')
            axes.text(100 * row['of_matmul_peak'], at, f' {statistics.median(row["seconds"]):.2f} s', va='center', fontsize=7)
            names.append((at, f'{name}: {row["side"]}'))
            at += 1
        at += 1
    axes.set_yticks([at for at, _ in names], [name for _, name in names], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("model FLOPs of real tokens, % of the machine's matmul peak; seconds a step beside them")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    return True


if __name__ == '__main__':
    main()
