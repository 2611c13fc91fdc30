"""Sequences a second of the input pipeline, without a model.

    python benchmarks/pipeline.py --store STORE --repeats 5

Every sequence is a new example with new masks: token or whole-word, with NSP or without, one a row or packed. The clock runs from
before the first batch to after the last. A sample of the batches is compared with `batch()`.
"""

import argparse
import pathlib
import statistics
import time

import numpy as np

from bert_jax import cli
from bert_jax.data import batches, examples, plan, store

LEAST = 50  # batches, fewer say nothing
ROOT = pathlib.Path(__file__).parent.parent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--store', required=True)
    parser.add_argument('--batch_size', type=int, default=256)
    parser.add_argument('--repeats', type=int, default=5)
    args = parser.parse_args()
    data = store.load(args.store)
    batches.import_tensorflow().join()  # until it is there, tf.data's part is done without it
    for length, steps in ((128, 600), (512, 250)):
        for option in ('', ',whole_word', ',no_nsp', ',packed', ',whole_word,packed', ',no_nsp,packed'):
            config = cli.load_config(f'{ROOT}/configs/pretrain.py:base{option}', [])
            source = examples.mixed([data.train], data.tokenizer, 0, length, **config.examples)
            start = time.perf_counter()
            size = source.epoch_size
            planning = time.perf_counter() - start
            taken = min(steps, size // args.batch_size)
            if taken < LEAST:
                parser.error(f'{taken} batches of {args.batch_size} in {args.store}; {LEAST} or more are needed: give more text.')
            real = plan.lengths(source.plan(0), source.pairing)
            print(f'length {length}, base{option}: plan of {len(real):,} examples in {size:,} rows of {source.row_length}, '
                  f'{real.sum() / size / source.row_length:.1%} real tokens, in {planning:.2f} s '
                  f'({len(data.train.sentence_lengths) / planning:,.0f} sentences/s)')
            each = len(real) / size  # examples a row
            for name, stream in batches.STREAMS.items():
                measure(stream, source, args.batch_size, 2)  # whatever is loaded first
                rates = [each * measure(stream, source, args.batch_size, taken) for _ in range(args.repeats)]
                print(f'  {name:<8}{statistics.median(rates):10,.0f} sequences/s '
                      f'({min(rates):,.0f}-{max(rates):,.0f}, n = {len(rates)}; {taken} batches of {args.batch_size})')


def measure(stream, source, batch_size, steps):
    sample = {}
    start = time.perf_counter()
    for step, batch in enumerate(stream(lambda step: source.batch(step, batch_size), 0, steps)):
        if step % 97 == 0:
            sample[step] = batch
    seconds = time.perf_counter() - start
    for step, batch in sample.items():
        expected = source.batch(step, batch_size)
        assert all(np.array_equal(batch[name], expected[name]) for name in expected)
    return steps * batch_size / seconds


if __name__ == '__main__':
    main()
