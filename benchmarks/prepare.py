"""Speed, memory and size of `bert_jax.prepare` on real text.

    python benchmarks/prepare.py --input "$DATA/*.txt" --tokenizer vocab.txt --megabytes 100 1000 --repeats 5

The text is repeated, with a number before each copy's documents, until it has the size asked for. Memory is the
largest sum of resident memory over all processes, sampled ten times a second.
"""

import argparse
import contextlib
import glob
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import psutil


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--input', required=True, metavar='GLOB')
    parser.add_argument('--tokenizer', required=True, metavar='PATH')
    parser.add_argument('--megabytes', type=int, nargs='+', default=[100])
    parser.add_argument('--repeats', type=int, default=5, help='for the first size; larger ones run once')
    args = parser.parse_args()
    for number, size in enumerate(args.megabytes):
        with tempfile.TemporaryDirectory() as folder:
            text = enlarge(args.input, pathlib.Path(folder) / 'text.txt', size * 10**6)
            runs = [run(text, args.tokenizer, pathlib.Path(folder) / f'store{i}')
                    for i in range(args.repeats if number == 0 else 1)]
        rates = [text_bytes / seconds / 1e6 for seconds, _, text_bytes, _ in runs]
        print(f'{size} MB: {statistics.median(rates):.1f} MB/s ({min(rates):.1f}-{max(rates):.1f}, n = {len(runs)}), '
              f'peak memory of all processes {max(peak for _, peak, _, _ in runs) / 1e6:.0f} MB, '
              f'{runs[0][3]:.2f} bytes a token')


def enlarge(pattern, path, size):
    sources = [pathlib.Path(name).read_text(encoding='utf-8') for name in sorted(glob.glob(pattern))]
    with open(path, 'w', encoding='utf-8') as file:
        copy = 0
        while file.tell() < size:
            for source in sources:
                file.write(source.replace('\n\n', f'\n\n{copy} ')[:size - file.tell()].rstrip() + '\n\n')
            copy += 1
    return path


def run(text, tokenizer, store):
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, '-m', 'bert_jax.prepare', '--input', text, '--tokenizer', tokenizer,
                                '--output', store], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    root = psutil.Process(process.pid)
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            peak = max(peak, sum(p.memory_info().rss for p in [root, *root.children(recursive=True)]))
        time.sleep(0.1)
    seconds, said = time.perf_counter() - start, process.stdout.read()
    assert process.returncode == 0, said
    return seconds, peak, text.stat().st_size, float(said.split(' bytes a token')[0].split()[-1])


if __name__ == '__main__':
    main()
