"""Training steps a second against Hugging Face on PyTorch, side by side.

    python benchmarks/train_step.py --size base --length 128 --batch_size 16 --steps 5

Each side is a process of its own with the same sizes, dropout 0.1 everywhere, fp32, the erf GELU, AdamW, and all
cores. They take their steps in turn, one at a time, so that a slow minute of the machine meets all of them.
Peers: BertForPreTraining (SDPA) as it comes, which computes logits at every position, and the same with its head cut
down to the masked positions. Prints medians, ranges and ratios.
"""

import argparse
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from importlib import metadata

ROOT = pathlib.Path(__file__).parent.parent
SIDES = ('bert_jax', 'hugging_face', 'hugging_face_masked')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--size', default='base')
    parser.add_argument('--length', type=int, default=128)
    parser.add_argument('--batch_size', type=int, default=16)
    parser.add_argument('--steps', type=int, default=5, help='timed steps of each side, after two that are not')
    parser.add_argument('--side', choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        serve(ours(args) if args.side == 'bert_jax' else peer(args))
        return
    sides = {side: subprocess.Popen([sys.executable, __file__, '--side', side, *sys.argv[1:]], cwd=ROOT, text=True,
                                    stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                    env=os.environ | {'PYTHONPATH': str(ROOT)}) for side in SIDES}
    results = {side: [] for side in SIDES}
    for number in range(args.steps + 2):
        for side, process in sides.items():
            process.stdin.write('step\n')
            process.stdin.flush()
            seconds = float(process.stdout.readline())
            if number > 1:  # the first two compile and warm up
                results[side].append(seconds)
    for process in sides.values():
        process.communicate()
    report(args, results)


def report(args, results):
    print(f'BERT-{args.size}, batch {args.batch_size}, length {args.length}, fp32, dropout 0.1; {os.cpu_count()} cores, '
          f'{platform.machine()}; ' + ', '.join(f'{p} {metadata.version(p)}' for p in ('jax', 'jaxlib', 'torch', 'transformers')))
    rates = {side: args.batch_size / statistics.median(times) for side, times in results.items()}
    for side, times in results.items():
        print(f'{side:<22}{rates[side]:7.3f} sequences/s  (step {statistics.median(times):.2f} s, '
              f'{min(times):.2f}-{max(times):.2f}, n = {len(times)})  '
              f'ours / this: {rates["bert_jax"] / rates[side]:.2f}')


def example(args, vocab_size=30522):
    """A batch of full-length random examples."""
    import numpy as np

    rng = np.random.default_rng(0)
    shape, predictions = (args.batch_size, args.length), round(0.15 * args.length + 0.5)
    positions = np.sort(np.stack([rng.permutation(args.length - 2)[:predictions] + 1 for _ in range(args.batch_size)]), 1)
    return {
        'input_ids': rng.integers(1000, vocab_size, shape).astype(np.int32), 'input_mask': np.ones(shape, np.int32),
        'segment_ids': np.repeat([np.arange(args.length) > args.length // 2], args.batch_size, 0).astype(np.int32),
        'position_ids': np.repeat([np.arange(args.length)], args.batch_size, 0).astype(np.int32),
        'masked_lm_positions': positions.astype(np.int32),
        'masked_lm_ids': rng.integers(1000, vocab_size, positions.shape).astype(np.int32),
        'masked_lm_weights': np.ones(positions.shape, np.float32), 'cls_positions': np.zeros((args.batch_size, 1), np.int32),
        'next_sentence_labels': rng.integers(0, 2, (args.batch_size, 1)).astype(np.int32),
        'next_sentence_weights': np.ones((args.batch_size, 1), np.float32)}


def serve(step):
    """Takes a step for each line of standard input and prints its seconds."""
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)


def ours(args):
    import jax

    from bert_jax import cli, optimizer, partition, train
    from bert_jax.model import model as models

    config = cli.load_config(f'configs/pretrain.py:{args.size}', ['--config.model.encoder.activation=gelu'])
    config.model.embeddings.vocab_size = 30522
    mesh, model = partition.make_mesh(config.mesh), models.build(config.model)
    tx, batch = optimizer.make_optimizer(**config.optimizer), example(args)
    state = train.make_init(model, tx, {name: value[:1] for name, value in batch.items()}, mesh)(0)
    step = train.make_train_step(model, tx, mesh, 1, state)
    hyper = train.as_hyper(1e-4, models.target_weights(config.model), 0)

    def run():
        nonlocal state
        state, metrics = step(state, batch, hyper)
        jax.block_until_ready((state, metrics))

    return run


def peer(args):
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    sizes = {'tiny': (2, 128, 2), 'mini': (4, 256, 4), 'small': (4, 512, 8), 'medium': (8, 512, 8),
             'base': (12, 768, 12), 'large': (24, 1024, 16)}
    layers, width, heads = sizes[args.size]
    model = transformers.BertForPreTraining._from_config(transformers.BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width),
        attn_implementation='sdpa').train()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    batch = {k: torch.tensor(v).long() for k, v in example(args).items()}
    labels = torch.full_like(batch['input_ids'], -100).scatter(1, batch['masked_lm_positions'], batch['masked_lm_ids'])

    def loss_everywhere():
        return model(input_ids=batch['input_ids'], attention_mask=batch['input_mask'], token_type_ids=batch['segment_ids'],
                     labels=labels, next_sentence_label=batch['next_sentence_labels'][:, 0]).loss

    def loss_masked():
        hidden, pooled = model.bert(input_ids=batch['input_ids'], attention_mask=batch['input_mask'],
                                    token_type_ids=batch['segment_ids'], return_dict=False)
        at = batch['masked_lm_positions'][..., None].expand(-1, -1, width)
        logits, pair = model.cls(torch.gather(hidden, 1, at), pooled)
        entropy = torch.nn.functional.cross_entropy
        return (entropy(logits.flatten(0, 1), batch['masked_lm_ids'].flatten())
                + entropy(pair, batch['next_sentence_labels'][:, 0]))

    loss = loss_masked if args.side.endswith('masked') else loss_everywhere

    def run():
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()

    return run


if __name__ == '__main__':
    main()
