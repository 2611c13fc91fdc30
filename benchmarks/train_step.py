"""Training steps a second against Hugging Face on PyTorch, side by side.

    python benchmarks/train_step.py --config configs/pretrain.py:base --length 128 --batch_size 16
    python benchmarks/train_step.py --config configs/pretrain.py:large,bf16 --config.model.encoder.attention_dropout_rate=0 \\
        --batch_size 256 --turn 10 --sides ours,compiled,compiled_masked            # on a GPU
    python benchmarks/train_step.py --config configs/pretrain.py:mini --store STORE --length 512 --sides ours,packed

Each side is a process of its own with the sizes, dropout rates and dtype of the config, the erf GELU, AdamW, clipping,
and all cores or the GPU. They take turns, so that a slow minute of the machine meets all of them. Sides:

    ours, ours_xla, ours_cudnn         bert_jax; with that implementation of attention
    packed                             bert_jax with several examples a row; needs --store
    eager, eager_masked                BertForPreTraining (SDPA) as it comes, with logits at every position; with its head cut
    compiled, compiled_masked          down to the masked positions; both under torch.compile; bf16 is autocast
    eager_masked_kept                  eager_masked with our own setting of glibc, which keeps freed memory: on a CPU, what
                                       PyTorch's tuning guide has jemalloc or tcmalloc for

Batches are random and full, or with --store real ones. Prints medians, ranges, ratios of turns that lie side by side, the share
of the matmul peak measured in the same run (the better of XLA's and PyTorch's; FLOPs by bert_jax.flops, real tokens alone), and
memory: of our side's arrays, and the most that each process held.
"""

import argparse
import contextlib
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib import metadata

ROOT = pathlib.Path(__file__).parent.parent
PEERS = ('eager', 'eager_masked', 'compiled', 'compiled_masked', 'eager_masked_kept')
SIDES = ('ours', 'ours_xla', 'ours_cudnn', 'packed', *PEERS)
VOCAB_SIZE = 30522


def main():
    from bert_jax import cli

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--length', type=int, default=128)
    parser.add_argument('--batch_size', type=int, default=16)
    parser.add_argument('--repeats', type=int, default=5, help='timed turns of each side, after two that are not')
    parser.add_argument('--turn', type=int, default=1, help='steps a turn; more on a GPU')
    parser.add_argument('--sides', default='ours,eager,eager_masked', help=f'some of {",".join(SIDES)}')
    parser.add_argument('--store', help='a token store to take batches from')
    parser.add_argument('--json', metavar='FILE', help='also append the figures there, a line')
    parser.add_argument('--side', help=argparse.SUPPRESS)
    args, config = cli.parse_with_config(parser)
    config.model.encoder.activation = 'gelu'
    config.examples.pack_lengths = max(1, config.examples.pack_lengths) if args.side == 'packed' else 0
    if args.side in ('ours_xla', 'ours_cudnn'):
        config.model.run.kernel = args.side.removeprefix('ours_')
    if args.side:
        {'matmul': matmul, 'matmul_torch': matmul_torch}.get(args.side, peer if args.side in PEERS else ours)(args, config)
        return
    names = [*args.sides.split(','), 'matmul', 'matmul_torch']
    unknown = set(args.sides.split(',')) - set(SIDES)
    if unknown:
        parser.error(f'--sides {", ".join(sorted(unknown))}: known are {", ".join(SIDES)}')
    if 'packed' in names and not args.store:
        parser.error('the side packed needs --store')
    env = {'PYTHONPATH': f'{ROOT}:{os.environ.get("PYTHONPATH", "")}', 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
           'CUDA_VISIBLE_DEVICES': os.environ.get('CUDA_VISIBLE_DEVICES', '0')}  # one GPU for every side
    processes = {name: subprocess.Popen([sys.executable, __file__, *sys.argv[1:], '--side', name], cwd=ROOT, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | env) for name in names}
    answers, failed = {name: [] for name in names}, []
    for _ in range(args.repeats + 2):
        for name, process in processes.items():
            if name in failed:
                continue
            line = ask(process)
            if line:
                answers[name].append(json.loads(line))
            else:
                failed.append(name)
    for process in processes.values():
        with contextlib.suppress(BrokenPipeError):
            process.communicate()
    report(args, config, {name: turns for name, turns in answers.items() if name not in failed})
    if failed:
        sys.exit(f'error: these sides ended early, what they said stands above: {", ".join(failed)}')


def ask(process):
    """One turn's line; nothing when the side has ended."""
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write('turn\n')
        process.stdin.flush()
        return process.stdout.readline()


def report(args, config, answers):
    """Two turns of each side compile and warm up; the others count."""
    rates = {name: [turn['work'] / turn['seconds'] for turn in turns[2:]] for name, turns in answers.items()}
    tflops = {name: statistics.median(values) / 1e12 for name, values in rates.items()}
    of_device = next((turns[0]['peak_tflops'] for turns in answers.values() if turns[0].get('peak_tflops')), None)
    peak, matmuls = max((tflops[name], name) for name in tflops if name.startswith('matmul')), answers['matmul']
    shape = f'{config.model.encoder.num_layers} x {config.model.embeddings.hidden_size}'
    print(f'{shape}, length {args.length}, batch {args.batch_size}, {config.model.run.dtype}, dropout '
          f'{config.model.encoder.dropout_rate:g}, of attention {config.model.encoder.attention_dropout_rate:g}; '
          f'{matmuls[0]["device"]}, {len(os.sched_getaffinity(0))} cores, {platform.machine()}; {", ".join(versions())}')
    print(f'matmul peak measured: {peak[0]:.3f} TFLOP/s ({", ".join(f"{name} {tflops[name]:.3f}" for name in tflops if name.startswith("matmul"))})')
    rows, first = [], next(iter(answers))
    for name, turns in answers.items():
        if name.startswith('matmul'):
            continue
        seconds = sorted(turn['seconds'] / args.turn for turn in turns[2:])
        examples, tokens = (statistics.median(turn[what] / turn['seconds'] for turn in turns[2:]) for what in ('examples', 'tokens'))
        row = {'side': name, 'examples_per_second': examples, 'tokens_per_second': tokens, 'seconds': seconds,
               'ratios': sorted(ours / other for ours, other in zip(rates[first], rates[name])), 'of_matmul_peak': tflops[name] / peak[0],
               'mfu': tflops[name] / of_device if of_device else None, 'memory': turns[-1]['memory']}
        rows.append(row)
        print(f'{name:<16}{examples:9.3f} examples/s {tokens:11,.0f} real tokens/s  step {statistics.median(seconds):.4f} s '
              f'({seconds[0]:.4f}-{seconds[-1]:.4f}, n = {len(seconds)}); {row["of_matmul_peak"]:.0%} of the matmul peak'
              + (f', MFU {row["mfu"]:.1%}' if row['mfu'] else '') + f'; {first} / this: {statistics.median(row["ratios"]):.2f} '
              f'({row["ratios"][0]:.2f}-{row["ratios"][-1]:.2f})')
        print(' ' * 16 + ', '.join(f'{what} {size / 2**20:,.0f} MiB' for what, size in row['memory'].items()))
    if args.json:
        with open(args.json, 'a') as file:
            file.write(json.dumps({'arguments': sys.argv[1:], 'shape': shape, 'length': args.length, 'batch_size': args.batch_size,
                                   'dtype': config.model.run.dtype, 'matmul_tflops': peak[0], 'device': matmuls[0]['device'],
                                   'versions': versions(), 'rows': rows}) + '\n')


def versions():
    return [f'{name} {metadata.version(name)}' for name in ('jax', 'jaxlib', 'torch', 'transformers')]


def batches(args, config):
    """An endless stream of batches: one random and full, again and again, or those of a store."""
    import numpy as np

    if args.store:
        from bert_jax.data import examples, store

        data = store.load(args.store)
        config.model.embeddings.vocab_size = data.tokenizer.vocab_size
        source = examples.mixed([data.train], data.tokenizer, 0, args.length, **config.examples)
        made = [source.batch(step, args.batch_size) for step in range(8)]
    else:
        config.model.embeddings.vocab_size = VOCAB_SIZE
        rng, rows = np.random.default_rng(0), args.batch_size
        shape, predictions = (rows, args.length), int(np.ceil(config.examples.mask_rate * args.length))
        positions = np.sort(np.stack([rng.permutation(args.length - 2)[:predictions] + 1 for _ in range(rows)]), 1)
        made = [{
            'input_ids': rng.integers(1000, VOCAB_SIZE, shape).astype(np.int32), 'input_mask': np.ones(shape, np.int32),
            'segment_ids': np.repeat([np.arange(args.length) > args.length // 2], rows, 0).astype(np.int32),
            'position_ids': np.repeat([np.arange(args.length)], rows, 0).astype(np.int32),
            'masked_lm_positions': positions.astype(np.int32),
            'masked_lm_ids': rng.integers(1000, VOCAB_SIZE, positions.shape).astype(np.int32),
            'masked_lm_weights': np.ones(positions.shape, np.float32), 'cls_positions': np.zeros((rows, 1), np.int32),
            'next_sentence_labels': rng.integers(0, 2, (rows, 1)).astype(np.int32),
            'next_sentence_weights': np.ones((rows, 1), np.float32)}]
    while True:
        yield from made


def contents(config, batch):
    """Examples, real tokens and model FLOPs of a batch; the same for every side."""
    import numpy as np

    from bert_jax.model import model as models

    sizes = np.concatenate([np.bincount(row)[1:] for row in batch['input_mask'] if row.any()]).astype(float)
    return {'examples': int((sizes > 0).sum()), 'tokens': int(sizes.sum()), 'work': models.build(config.model).flops({
        'tokens': sizes.sum(), 'squared_tokens': (sizes**2).sum(), 'predictions': batch['masked_lm_weights'].sum()})}


def serve(args, step, given, facts):
    """For each line of standard input: `turn` steps, and a line of what they took."""
    for _ in sys.stdin:
        turn = [next(given) for _ in range(args.turn)]
        start = time.perf_counter()
        step([batch for batch, _ in turn])
        seconds = time.perf_counter() - start
        sums = {name: float(sum(known[name] for _, known in turn)) for name in ('examples', 'tokens', 'work')}
        memory = facts.get('memory', {}) | {'most held by the process': most_held()}
        print(json.dumps({'seconds': seconds, **sums, **facts, 'memory': memory}), flush=True)


def most_held():
    """Bytes, on the GPU where it is used, else resident."""
    if 'torch' in sys.modules and sys.modules['torch'].cuda.is_available():
        return sys.modules['torch'].cuda.max_memory_reserved()
    stats = sys.modules['jax'].local_devices()[0].memory_stats() if 'jax' in sys.modules and 'torch' not in sys.modules else None
    return stats['peak_bytes_in_use'] if stats else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ours(args, config):
    import jax

    from bert_jax import hardware, optimizer, partition, train
    from bert_jax.data.batches import place
    from bert_jax.model import model as models

    stream = batches(args, config)
    first = next(stream)
    mesh, model = partition.make_mesh(config.mesh), models.build(config.model)
    tx, sharding = optimizer.make_optimizer(**config.optimizer), partition.batch_sharding(mesh)
    state = train.make_init(model, tx, {name: value[:1] for name, value in first.items()}, mesh)(0)
    hyper = train.as_hyper(1e-4, models.target_weights(config.model), 0)
    step = train.make_train_step(model, tx, mesh, config.accumulation, state)
    step = step.lower(state, {'text': place(first, sharding)}, hyper).compile()
    memory = {'parameters': sum(x.nbytes for x in jax.tree.leaves(state.params)),
              'optimizer': sum(x.nbytes for x in jax.tree.leaves(state.opt_state)),
              'activations and temporaries': step.memory_analysis().temp_size_in_bytes}

    def run(turn):
        nonlocal state
        for batch in turn:
            state, metrics = step(state, {'text': batch}, hyper)
        jax.block_until_ready((state, metrics))

    peak = hardware.peak_flops()
    serve(args, run, ((place(batch, sharding), contents(config, batch)) for batch in stream),
          {'memory': memory, 'peak_tflops': peak / 1e12 if peak else None})


def matmul(args, config):
    """The machine's best on the model's largest product, [B L, D] x [D, F]; not less than BERT-base's at 16 x 128."""
    import jax

    width, dtype = max(768, config.model.embeddings.hidden_size), config.model.run.dtype
    x = jax.random.normal(jax.random.key(0), (max(2048, args.batch_size * args.length), width), dtype)
    kernel = jax.random.normal(jax.random.key(1), (width, 4 * width), dtype)
    times = 200 if jax.default_backend() == 'gpu' else 8
    product = jax.jit(lambda x, kernel: x @ kernel)
    work = 2 * x.shape[0] * width * 4 * width * times

    def run(_):
        for _ in range(times):
            found = product(x, kernel)
        jax.block_until_ready(found)  # one queue: the last comes last

    known = {'examples': 0, 'tokens': 0, 'work': work / args.turn}
    serve(args, run, iter(lambda: (None, known), None), {'device': jax.devices()[0].device_kind})


def matmul_torch(args, config):
    """The same by PyTorch, which may be faster; on a CPU in float32, for bfloat16 is emulated there."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_float32_matmul_precision('high')
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    width, dtype = max(768, config.model.embeddings.hidden_size), getattr(torch, config.model.run.dtype if device == 'cuda' else 'float32')
    x = torch.randn(max(2048, args.batch_size * args.length), width, device=device).to(dtype)
    kernel, times = torch.randn(width, 4 * width, device=device).to(dtype), 200 if device == 'cuda' else 8

    def run(_):
        for _ in range(times):
            torch.matmul(x, kernel)
        if device == 'cuda':
            torch.cuda.synchronize()

    known = {'examples': 0, 'tokens': 0, 'work': 2 * x.shape[0] * width * 4 * width * times / args.turn}
    serve(args, run, iter(lambda: (None, known), None), {'device': device})


def matmul_peak():
    """FLOP/s of the faster of both products now, for other benchmarks."""
    found = []
    for side in ('matmul', 'matmul_torch'):
        done = subprocess.run([sys.executable, __file__, '--config', 'configs/pretrain.py:base', '--side', side], cwd=ROOT, text=True, check=True,
                              input='turn\n' * 7, stdout=subprocess.PIPE, env=os.environ | {'PYTHONPATH': str(ROOT)})
        turns = [json.loads(line) for line in done.stdout.splitlines()][2:]
        found.append(statistics.median(turn['work'] / turn['seconds'] for turn in turns))
    return max(found)


def peer(args, config):
    if args.side.endswith('kept'):
        from bert_jax import memory

        memory.keep_freed()
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_float32_matmul_precision('high')  # TF32, as in JAX
    torch.manual_seed(0)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    stream = batches(args, config)
    next(stream)  # which sets the vocabulary's size
    model, width = hugging_face(config, device), config.model.embeddings.hidden_size
    adam = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)

    def loss_everywhere(batch):
        answers = torch.where(batch['masked_lm_weights'] > 0, batch['masked_lm_ids'], -100)  # empty places point at [CLS]
        labels = torch.full_like(batch['input_ids'], -100).scatter(1, batch['masked_lm_positions'], answers)
        return model(input_ids=batch['input_ids'], attention_mask=batch['attention_mask'], token_type_ids=batch['segment_ids'],
                     labels=labels, next_sentence_label=batch['next_sentence_labels'][:, 0]).loss

    def loss_masked(batch):
        hidden, pooled = model.bert(input_ids=batch['input_ids'], attention_mask=batch['attention_mask'],
                                    token_type_ids=batch['segment_ids'], return_dict=False)
        at = batch['masked_lm_positions'][..., None].expand(-1, -1, width)
        logits, pair = model.cls(torch.gather(hidden, 1, at), pooled)
        entropy = torch.nn.functional.cross_entropy
        nll = entropy(logits.flatten(0, 1), batch['masked_lm_ids'].flatten(), reduction='none')
        weights = batch['masked_lm_weights'].flatten()
        return (nll * weights).sum() / weights.sum() + entropy(pair, batch['next_sentence_labels'][:, 0])

    loss = loss_masked if 'masked' in args.side else loss_everywhere
    if args.side.startswith('compiled'):
        loss = torch.compile(loss)

    def as_torch(batch):
        found = {name: torch.tensor(value, device=device) for name, value in batch.items()}
        found = {name: value.long() if value.dtype == torch.int32 else value for name, value in found.items()}
        # Without padding no mask, which is what lets SDPA take its fastest kernel.
        return found | {'attention_mask': None if (batch['input_mask'] > 0).all() else found['input_mask']}

    def run(turn):
        for batch in turn:
            with torch.autocast(device, torch.bfloat16, enabled=config.model.run.dtype == 'bfloat16'):
                value = loss(batch)
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            adam.zero_grad()
        value.item()
        if device == 'cuda':
            torch.cuda.synchronize()

    serve(args, run, ((as_torch(batch), contents(config, batch)) for batch in stream), {})


def hugging_face(config, device):
    """BertForPreTraining with SDPA, of the config's sizes."""
    import transformers

    encoder, embeddings = config.model.encoder, config.model.embeddings
    model = transformers.BertForPreTraining._from_config(transformers.BertConfig(
        vocab_size=embeddings.vocab_size, hidden_size=embeddings.hidden_size, num_hidden_layers=encoder.num_layers,
        num_attention_heads=encoder.num_heads, intermediate_size=encoder.mlp_size, hidden_dropout_prob=encoder.dropout_rate,
        attention_probs_dropout_prob=encoder.attention_dropout_rate), attn_implementation='sdpa').train()
    if device == 'cuda':  # as PyTorch's guide advises for tensor cores
        model.resize_token_embeddings(pad_to_multiple_of=64)
    return model.to(device)


if __name__ == '__main__':
    main()
