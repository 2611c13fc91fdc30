"""Sequences a second of the input pipeline, without a model.

    python benchmarks/pipeline.py --store STORE --repeats 5

Every sequence is a new example with new masks (MLM + NSP); a sample of the batches is compared with `batch()`.
"""

import argparse
import statistics
import time

import numpy as np

from bert_jax.data import batches, examples, store


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--store', required=True)
    parser.add_argument('--batch_size', type=int, default=256)
    parser.add_argument('--repeats', type=int, default=5)
    args = parser.parse_args()
    data = store.load(args.store)
    for length, steps in ((128, 600), (512, 250)):
        for masking in ('token', 'whole_word'):
            source = examples.Examples(data.train, data.tokenizer, 0, length, masking=masking)
            start = time.perf_counter()
            size = source.epoch_size
            planning = time.perf_counter() - start
            steps = min(steps, size // args.batch_size)
            print(f'length {length}, {masking}: plan of {size:,} examples in {planning:.2f} s '
                  f'({len(data.train.sentence_lengths) / planning:,.0f} sentences/s)')
            for name, stream in batches.STREAMS.items():
                rates = [measure(stream, source, args.batch_size, steps) for _ in range(args.repeats)]
                print(f'  {name:<8}{statistics.median(rates):10,.0f} sequences/s '
                      f'({min(rates):,.0f}-{max(rates):,.0f}, n = {len(rates)}; {steps} batches of {args.batch_size})')


def measure(stream, source, batch_size, steps):
    sample = {}
    given = stream(lambda step: source.batch(step, batch_size), 0, steps)
    sample[0] = next(given)
    start = time.perf_counter()
    for step, batch in enumerate(given, 1):
        if step % 97 == 0:
            sample[step] = batch
    seconds = time.perf_counter() - start
    for step, batch in sample.items():
        expected = source.batch(step, batch_size)
        assert all(np.array_equal(batch[name], expected[name]) for name in expected)
    return (steps - 1) * batch_size / seconds


if __name__ == '__main__':
    main()
