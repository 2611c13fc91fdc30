"""Classifying texts with a model of BERT-base's size, beside the transformers pipeline.

    python benchmarks/predict.py --vocab vocab.txt

The texts are first sentences of Python's own docstrings. Both sides load the same Hugging Face folder with random weights, fp32, all
cores, and take turns over all texts; the first turn compiles and does not count. The peer runs with each of three batch sizes.
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
SIDES = ('ours', 'pipeline_1', 'pipeline_8', 'pipeline_32')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--vocab', required=True)
    parser.add_argument('--texts', type=int, default=256)
    parser.add_argument('--layers', type=int, default=12)
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--side', nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        serve(*args.side)
        return
    with tempfile.TemporaryDirectory() as folder:
        work = prepare(args, pathlib.Path(folder))
        processes = {side: subprocess.Popen([sys.executable, __file__, *sys.argv[1:], '--side', side, folder], text=True,
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT,
                                            env=os.environ | {'PYTHONPATH': str(ROOT)}) for side in SIDES}
        rates, expected = {side: [] for side in SIDES}, {}
        for turn in range(args.repeats + 1):
            for side, process in processes.items():
                process.stdin.write('turn\n')
                process.stdin.flush()
                seconds, scores = json.loads(process.stdout.readline())
                if turn:
                    rates[side].append(len(scores) / seconds)
                expected.setdefault('scores', scores)
                assert max(abs(a - b) for a, b in zip(expected['scores'], scores)) < 1e-4, side
        for process in processes.values():
            process.communicate()
    peak = train_step.matmul_peak()
    print(f'matmul peak measured: {peak / 1e12:.3f} TFLOP/s; {", ".join(train_step.versions())}')
    for side, found in rates.items():
        ratios = sorted(ours / other for ours, other in zip(rates['ours'], found))
        print(f'{side:<16}{statistics.median(found):8.1f} texts/s ({min(found):.1f}-{max(found):.1f}, n = {len(found)}); '
              f'{statistics.median(found) * work / peak:.0%} of the matmul peak, real tokens alone; '
              f'ours / this: {statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})')


def prepare(args, folder):
    """The model and the texts; returns the FLOPs that a text takes."""
    import inspect
    import pkgutil
    import pydoc
    import shutil

    import transformers

    from bert_jax.model.transformer import Transformer

    config = transformers.BertConfig(num_hidden_layers=args.layers, num_labels=2, vocab_size=len(pathlib.Path(args.vocab).read_text().splitlines()))
    transformers.BertForSequenceClassification(config).save_pretrained(folder / 'hf')
    shutil.copy(args.vocab, folder / 'hf' / 'vocab.txt')
    (folder / 'hf' / 'tokenizer_config.json').write_text('{"do_lower_case": true, "tokenizer_class": "BertTokenizer"}')
    texts = []
    for module in pkgutil.iter_modules():
        if len(texts) < args.texts and module.name in sys.stdlib_module_names and not module.name.startswith(('_', 'antigravity', 'this', 'idlelib')):
            for _, value in inspect.getmembers(pydoc.locate(module.name), callable):
                text = inspect.getdoc(value)
                if text and len(text) > 20:
                    texts.append(' '.join(text.split('\n\n')[0].split()))
    texts = texts[:args.texts]
    (folder / 'texts.json').write_text(json.dumps(texts))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / 'hf')
    sizes = [len(ids) for ids in tokenizer(texts, truncation=True, max_length=512)['input_ids']]
    encoder = Transformer(config.num_hidden_layers, config.num_attention_heads, config.intermediate_size, 'gelu', 0, 0, 'both', None)
    return encoder.flops(config.hidden_size, {
        'tokens': statistics.mean(sizes), 'squared_tokens': statistics.mean(size**2 for size in sizes)})


def serve(side, folder):
    texts = json.loads((pathlib.Path(folder) / 'texts.json').read_text())
    if side == 'ours':
        import bert_jax

        model = bert_jax.load(f'{folder}/hf')
        call = lambda: [next(iter(one['scores'].values())) for one in model(texts)]  # noqa: E731
    else:
        import torch
        import transformers

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        model = transformers.pipeline('text-classification', f'{folder}/hf', batch_size=int(side.split('_')[1]), top_k=None)
        call = lambda: [next(label['score'] for label in one if label['label'] == 'LABEL_0') for one in model(texts, truncation=True)]  # noqa: E731
    for _ in sys.stdin:
        start = time.perf_counter()
        scores = call()
        print(json.dumps([time.perf_counter() - start, scores]), flush=True)


if __name__ == '__main__':
    main()
