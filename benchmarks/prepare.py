"""Speed, memory and size of `bert_jax.prepare` on real text.

    python benchmarks/prepare.py --input "$DATA/*.txt" --tokenizer vocab.txt --megabytes 100 1000 --repeats 5

Text that is shorter than the size asked for is repeated, with a number before each copy's documents (and its words are
known by then, which is said). Memory is the largest sum of resident memory over all processes, sampled ten times a second.
With --peers, on --peer_megabytes of the same text, ours and `datasets.map` with a fast tokenizer, batched, two processes, which leaves ids of lines; and a plain Python loop that
does what create_pretraining_data.py does for one copy at length 128: tokenizes, pairs, masks, writes TFRecords.
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
    parser.add_argument('--peers', action='store_true')
    parser.add_argument('--peer_megabytes', type=int, default=20)
    parser.add_argument('--peer', nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        name, text, output = args.peer
        print({'datasets': map_datasets, 'python_loop': python_loop}[name](text, args.tokenizer, output))
        return
    for number, size in enumerate(args.megabytes):
        with tempfile.TemporaryDirectory() as folder:
            text, copies = enlarge(args.input, pathlib.Path(folder) / 'text.txt', size * 10**6)
            runs = [run(text, args.tokenizer, pathlib.Path(folder) / f'store{i}')
                    for i in range(args.repeats if number == 0 else 1)]
        rates = [text_bytes / seconds / 1e6 for seconds, _, text_bytes, _ in runs]
        print(f'{size} MB{f", the text {copies:.1f} times" if copies > 1 else ""}: {statistics.median(rates):.1f} MB/s ({min(rates):.1f}-{max(rates):.1f}, n = {len(runs)}), '
              f'peak memory of all processes {max(peak for _, peak, _, _ in runs) / 1e6:.0f} MB, '
              f'{runs[0][3]:.2f} bytes a token', flush=True)
    if args.peers:
        compare(args)


def compare(args):
    """Each side in a fresh process, in turn, on the same text; the peers' seconds begin after their imports, ours before."""
    sides = {'bert_jax': [], 'datasets': [], 'python_loop': []}
    with tempfile.TemporaryDirectory() as folder:
        text, _ = enlarge(args.input, pathlib.Path(folder) / 'text.txt', args.peer_megabytes * 10**6)
        short, _ = enlarge(args.input, pathlib.Path(folder) / 'short.txt', 10**6)  # the loop has one speed, and it is low
        for number in range(args.repeats):
            seconds, peak, size, _ = run(text, args.tokenizer, pathlib.Path(folder) / f'store{number}')
            sides['bert_jax'].append((seconds / size, peak))
            for name, file in (('datasets', text), ('python_loop', short)):
                _, peak, said = watch(sys.executable, __file__, *sys.argv[1:], '--peer', name, file, f'{folder}/{name}{number}')
                sides[name].append((float(said.split()[-1]) / file.stat().st_size, peak))
    for name, found in sides.items():
        rates = [1e-6 / seconds for seconds, _ in found]
        ratios = sorted(seconds / ours for (ours, _), (seconds, _) in zip(sides['bert_jax'], found))
        print(f'{name:<12}{statistics.median(rates):8.2f} MB/s ({min(rates):.2f}-{max(rates):.2f}, n = {len(rates)}), peak memory of all processes '
              f'{max(peak for _, peak in found) / 1e6:.0f} MB; ours / this: {statistics.median(ratios):.1f} ({ratios[0]:.1f}-{ratios[-1]:.1f})')


def map_datasets(text, vocab, output):
    import datasets
    import transformers

    start = time.perf_counter()
    tokenizer = transformers.BertTokenizer(vocab, do_lower_case=True)
    lines = datasets.load_dataset('text', data_files=text, split='train', cache_dir=output)
    lines.map(lambda batch: tokenizer(batch['text'], add_special_tokens=False, return_token_type_ids=False,
                                      return_attention_mask=False), batched=True, num_proc=2, remove_columns=['text'])
    return time.perf_counter() - start


def python_loop(text, vocab, output, length=128, mask_rate=0.15, most=20):
    import random

    import tensorflow as tf
    from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

    start = time.perf_counter()
    tokenizer, rng = BertTokenizerLegacy(vocab, do_lower_case=True), random.Random(0)
    words = list(tokenizer.vocab)
    documents = [[tokenizer.tokenize(line) for line in part.split('\n') if line]
                 for part in pathlib.Path(text).read_text(encoding='utf-8').split('\n\n')]
    documents = [[line for line in document if line] for document in documents if any(document)]
    with tf.io.TFRecordWriter(output) as writer:
        for number, document in enumerate(documents):
            for a, b, is_random in pairs(documents, number, document, length - 3, rng):
                tokens = ['[CLS]', *a, '[SEP]', *b, '[SEP]']
                places = [i for i, token in enumerate(tokens) if token not in ('[CLS]', '[SEP]')]
                rng.shuffle(places)
                places = sorted(places[:min(most, max(1, round(len(tokens) * mask_rate)))])
                labels = [tokens[i] for i in places]
                for i in places:
                    if rng.random() < 0.8:
                        tokens[i] = '[MASK]'
                    elif rng.random() < 0.5:
                        tokens[i] = rng.choice(words)
                padding = [0] * (length - len(tokens))
                features = {'input_ids': tokenizer.convert_tokens_to_ids(tokens) + padding, 'input_mask': [1] * len(tokens) + padding,
                            'segment_ids': [0] * (len(a) + 2) + [1] * (len(b) + 1) + padding,
                            'masked_lm_positions': places + [0] * (most - len(places)),
                            'masked_lm_ids': tokenizer.convert_tokens_to_ids(labels) + [0] * (most - len(places)),
                            'next_sentence_labels': [int(is_random)]}
                writer.write(tf.train.Example(features=tf.train.Features(feature={
                    name: tf.train.Feature(int64_list=tf.train.Int64List(value=value)) for name, value in features.items()})).SerializeToString())
    return time.perf_counter() - start


def pairs(documents, number, document, budget, rng):
    """The original algorithm's (A, B, whether B is random) of one document."""
    target = rng.randint(2, budget) if rng.random() < 0.1 else budget
    chunk, i = [], 0
    while i < len(document):
        chunk.append(document[i])
        if i == len(document) - 1 or sum(map(len, chunk)) >= target:
            cut = rng.randint(1, len(chunk) - 1) if len(chunk) > 1 else 1
            a, b = [token for line in chunk[:cut] for token in line], [token for line in chunk[cut:] for token in line]
            is_random = len(chunk) == 1 or rng.random() < 0.5
            if is_random:
                other = documents[(number + rng.randint(1, len(documents) - 1)) % len(documents)]
                b = []
                for line in other[rng.randint(0, len(other) - 1):]:
                    b += line
                    if len(b) >= target - len(a):
                        break
                i -= len(chunk) - cut
            while len(a) + len(b) > budget:
                (a if len(a) > len(b) else b).pop(0 if rng.random() < 0.5 else -1)
            yield a, b, is_random
            chunk = []
        i += 1


def enlarge(pattern, path, size):
    sources = [pathlib.Path(name).read_text(encoding='utf-8') for name in sorted(glob.glob(pattern))]
    if not any(sources):
        sys.exit(f'{pattern}: no text there')
    with open(path, 'w', encoding='utf-8') as file:
        copy = 0
        while file.tell() < size:
            for source in sources:
                file.write(source.replace('\n\n', f'\n\n{copy} ')[:size - file.tell()].rstrip() + '\n\n')
            copy += 1
        written = file.tell()
    return path, written / sum(len(source.encode()) for source in sources)


def run(text, tokenizer, store):
    """(seconds, bytes of memory, bytes of text, bytes a token)."""
    seconds, peak, said = watch(sys.executable, '-m', 'bert_jax.prepare', '--input', text, '--tokenizer', tokenizer, '--output', store)
    return seconds, peak, text.stat().st_size, float(said.split(' bytes a token')[0].split()[-1])


def watch(*command):
    """(seconds, the most memory of all processes, what it printed)."""
    with tempfile.TemporaryFile('w+') as errors:
        start, peak = time.perf_counter(), 0
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        root = psutil.Process(process.pid)
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                peak = max(peak, sum(p.memory_info().rss for p in [root, *root.children(recursive=True)]))
            time.sleep(0.1)
        seconds, said = time.perf_counter() - start, process.stdout.read()
        errors.seek(0)
        if process.returncode:
            sys.exit(f'error: {" ".join(map(str, command[1:]))} ended with code {process.returncode}:\n{errors.read()[-2000:]}')
    return seconds, peak, said


if __name__ == '__main__':
    main()
