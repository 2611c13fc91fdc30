"""Writes docs/benchmarks.md and its picture from what benchmarks/run.sh left behind; called by it.

    python benchmarks/page.py --figures runs/benchmarks --output docs/benchmarks.md

The figures go to docs/benchmarks.json in addition to what is there, so sections may come from several machines.
"""

import argparse
import json
import pathlib
import statistics

SECTIONS = {  # title, what is aimed at, what the figures below come to and why
    'train_base': ('A training step of BERT-base on a CPU',
                   'Aims: 1.5 times `eager`, 1.25 times `eager_masked`, better 1.75 times; 75 % of the matmul peak.',
                   'How far ahead one is depends on the processor ([log.md](log.md), 2026-11-22): where products run at 0.07 TFLOP/s, `eager_masked` is at '
                   '80 % of the peak itself, and nobody can be 1.25 times ahead of it; where they ran at 0.19, we were 1.76 and 1.26 times.'),
    'train_base_tuned': ('The same against tuned peers', '', "`compiled_masked` is `torch.compile`'s, `eager_masked_kept` has our own setting of glibc."),
    'train_base_bf16': ('The same in bfloat16', '', 'The peers run under autocast. Meant for processors that multiply bfloat16.'),
    'train_base_512': ('The same at length 512', '', ''),
    'train_large_512': ("BERT-large at length 512, in this machine's memory", 'Aim: it trains.', ''),
    'gpu': ('On a GPU', 'Aims on an H200: BERT-large at length 128 without dropout on attention 45 % MFU, BERT-base 40 %; both 1.2 times '
                        '`compiled_masked`.', ''),
    'packed_128': ('Packing at length 128', 'Aim: 98 % real tokens (under "The input pipeline").',
                   'Real examples of the store: several in a row compared with one in a row.'),
    'packed_512': ('Packing at length 512', '', ''),
    'prepare': ('Text to token store', 'Aim: 8 MB/s.',
                'In 60 MB each worker sees some 400,000 words for the first time. Half of its time goes into looking words up, the rest into first '
                'sights, other letters and starting ([log.md](log.md), 2026-11-27). Where products run at 0.19 TFLOP/s, 100 MB went at 12.3 MB/s, at commit '
                'b7a9108.'),
    'pipeline': ('The input pipeline', 'Aims through tf.data: 100,000 sequences/s at 128, 25,000 at 512, half of that with whole words.',
                 'At 128 half of the first aim on this processor (104,000 on a faster one, at commit b7a9108): taking a batch out of tf.data, array by array, '
                 'competes with making the next for two cores and for the lock of Python ([log.md](log.md), 2026-11-27).'),
    'startup': ('From the command to the first step', 'Aims: 15 s, 8 s with a warm cache, 3 s for the import.',
                'Of a cold start XLA takes 10 s to compile the step and 2.6 to compile the initialisation, Python 4 s to trace them '
                'and 2 s to import; what did not shorten it: [log.md](log.md), 2026-11-27.'),
    'predict': ('Prediction', '', 'Short texts share rows. The peer is shown with three sizes of batch.'),
    'finetune': ('Fine-tuning', 'Aim: 1.2 times `trainer`, which pads to the longest of a batch and groups by length.',
                 'Not reached where products run at 0.07 TFLOP/s: they take three quarters of a step, at 95 % of the peak, compilation takes a twentieth of the '
                 'epoch, and the peer spends as little on the rest. What was tried: [log.md](log.md), 2026-11-22 and 2026-11-26.'),
}
HEADER = """# Benchmarks

Written by `benchmarks/run.sh`: each side in fresh processes that take turns; medians and ranges; ratios are of turns that lie side by side. On a shared
machine only ratios mean something. Each section ends with its commit, day and machine. `$TEXT` is 65 MB of English Wikipedia, `$VOCAB` the original
uncased vocabulary, `$SST2` GLUE's folder."""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--figures', required=True)
    parser.add_argument('--output', required=True)
    args = parser.parse_args()
    output = pathlib.Path(args.output)
    found = collect(pathlib.Path(args.figures), output.with_suffix('.json'))
    lines = [HEADER, '']
    if draw(found, output.with_suffix('.png')):
        lines += [f'![steps against peers]({output.with_suffix(".png").name})', '']
    for name, (title, aim, account) in SECTIONS.items():
        said = ['```', found[name]['text'], '```'] if name in found else ['Not run: no GPU was at hand.' if name == 'gpu' else 'Not run.']
        lines += [f'## {title}', '', *([aim, ''] if aim else []), *said, '', *([account, ''] if account else [])]
    output.write_text('\n'.join(lines).rstrip() + '\n')
    print(output)


def collect(folder, records):
    """Section -> {'text': what its benchmark printed, 'runs': its figures}: the folder's, and those that were there."""
    found = json.loads(records.read_text()) if records.exists() else {}
    for name in SECTIONS:
        text, figures = folder / f'{name}.txt', folder / f'{name}.json'
        if text.exists():
            runs = [json.loads(line) for line in figures.read_text().splitlines()] if figures.exists() else []
            found[name] = {'text': text.read_text().rstrip(), 'runs': runs}
    records.write_text(json.dumps(found, indent=1) + '\n')
    return found


def draw(found, path):
    """A bar a side of every training benchmark: its share of the matmul peak."""
    runs = [(name, run) for name in SECTIONS for run in found.get(name, {}).get('runs', ())]
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
    axes.set_xlim(0, 100)
    axes.set_xlabel("model FLOPs of real tokens, % of the machine's matmul peak; seconds a step next to them")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    return True


if __name__ == '__main__':
    main()
