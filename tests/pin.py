"""Five steps of pre-training and of fine-tuning and one evaluation, from what NumPy draws alone; prints JSON.

    python tests/pin.py                     # what this checkout computes
    python tests/pin.py --write             # and keeps it in tests/pin.json, which test_pin.py compares with

benchmarks/same_numbers.py runs it in two checkouts. So a change that renames or moves what is called here changes this
file in the same commit, and neither sizes nor draws: then the numbers stay.

Parameters are not flax's: each is drawn from its name alone. Dropout's keys are flax's: they come from the path of the
module that drops, so another name of a scope is another draw. Then test_train.py proves that a step is right with the
masks that it drew, running both checkouts with RATE = 0 proves the rest, and the pin is written anew.
"""

import argparse
import json
import pathlib
import sys
import types
import zlib

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import bert_jax  # noqa: F401 - first: it sets the flags that JAX's backend opens with

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from bert_jax import cli, evaluate, optimizer, partition, train
from bert_jax.data import examples, store
from bert_jax.model import model as models
from bert_jax.tasks import packed, tokenized

ROOT = pathlib.Path(__file__).parent.parent
RATE, STEPS, B, L, V = 0.1, 5, 8, 32, 97
WEIGHTS = {'mlm': 1.0, 'nsp': 0.5}
TOKENIZER = types.SimpleNamespace(pad_id=0, cls_id=1, sep_id=2, mask_id=3, vocab_size=V,
                                  word_starts=np.arange(V) % 3 > 0, regular_ids=np.arange(5, V))


def config():
    """BERT of two layers."""
    return cli.load_config(str(ROOT / 'configs/pretrain.py:tiny'), [f'--config.{one}' for one in (
        'model.embeddings.hidden_size=32', 'model.encoder.num_heads=4', 'model.encoder.mlp_size=48',
        f'model.embeddings.max_length={L}', f'model.embeddings.vocab_size={V}', 'model.run.unroll=1',
        f'model.embeddings.dropout_rate={RATE}',
        f'model.encoder.dropout_rate={2 * RATE}', f'model.encoder.attention_dropout_rate={RATE}')])


def stream(packed):
    """Examples of 40 documents of random tokens."""
    rng = np.random.default_rng(0)
    sentences = rng.integers(2, 12, 40)
    lengths = rng.integers(1, 14, sentences.sum())
    split = store.Split(rng.integers(5, V, lengths.sum()).astype(np.uint16), lengths.astype(np.uint16),
                        sentences.astype(np.uint32))
    return examples.Examples(split, TOKENIZER, 3, L, 'next_sentence', 'token', 0.15, (0.8, 0.1), 0.3, packed)


def labelled():
    """61 texts and pairs of three classes."""
    rng = np.random.default_rng(1)
    rows = [(rng.integers(5, V, size).tolist(), int(rng.integers(2, size + 1))) for size in rng.integers(3, 17, 61)]
    return tokenized.collect(rows, {'label_ids': rng.integers(0, 3, 61).astype(np.int32)}, pad_id=0, lengths=(16,))


def parameters(model, example):
    """Each array from its name alone: norms' scales about 1, all else about 0."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), example, train=False))['params']

    def draw(path, leaf):
        name = '/'.join(key.key for key in path)
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        return jnp.asarray(name.endswith('scale') + 0.1 * rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def one_device():
    """The mesh of it."""
    return partition.make_mesh((1, 1, 1), devices=jax.devices()[:1])


def five_steps(model, batches, weights):
    """[loss, norm of the gradient] of each step of AdamW, dropout on."""
    tx = optimizer.make_optimizer('adamw', b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.01, clip_norm=1.0,
                                  bias_correction=False)
    params, mesh = parameters(model, batches[0]), one_device()
    state = train.TrainState(jnp.int32(0), params, tx.init(params))
    step = train.make_train_step(model, tx, mesh, 1, state)
    found = []
    for number, batch in enumerate(batches):
        rate = optimizer.learning_rate(number, peak=3e-3, warmup_share=0.2, num_steps=10)
        state, metrics = step(state, {'text': batch}, train.as_hyper(rate, weights, 11))
        found.append([float(metrics[name].total / metrics[name].count) for name in ('loss', 'gradient_norm')])
    return found


def pretraining(packed):
    """One example a row, or several."""
    batches = [stream(packed).batch(step, B) for step in range(STEPS)]
    assert (batches[0]['input_mask'].max() > 1) == bool(packed)
    return five_steps(models.build(config().model), batches, WEIGHTS)


def classifier():
    """The same network under a head of three classes."""
    described = config().model
    with described.unlocked():
        described.targets = ConfigDict({'classification': {'num_classes': 3, 'dropout_rate': RATE, 'weight': 1.0}})
    return models.build(described)


def fine_tuning():
    """Classes of texts, several a row."""
    data = packed.pack(labelled(), B, 1)
    return five_steps(classifier(), [data.batch(step, B, 5) for step in range(STEPS)], {'classification': 1.0})


def evaluation():
    """Means over 21 held-out examples in batches of 8, and what a classifier says of 61 texts."""
    model, source, mesh = models.build(config().model), stream(0), one_device()
    batches = [source.evaluation_batch(number, B, 21) for number in range(3)]
    found = evaluate.evaluate(evaluate.make_loss_step(model, mesh), parameters(model, batches[0]), batches, mesh)
    model, data = classifier(), labelled()
    params, step = parameters(model, data.make(np.arange(1), 1)), evaluate.make_eval_step(model, mesh)
    outputs, loss = evaluate.predict(lambda batch: step(params, batch), data, B, 'classification')
    return [[found[name] for name in ('mlm/loss', 'mlm/accuracy', 'nsp/loss', 'nsp/accuracy')],
            [loss, *np.asarray(outputs['logits'], np.float64).std(0).tolist()]]


RUNS = {'pretraining': lambda: pretraining(0), 'pretraining_packed': lambda: pretraining(2), 'fine_tuning': fine_tuning,
        'evaluation': evaluation}


def main():
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--write', action='store_true', help='keep the numbers in tests/pin.json')
    write = parser.parse_args().write
    rows = [f'  "{name}": {json.dumps(run())}' for name, run in RUNS.items()]
    text = '{\n' + ',\n'.join(rows).replace('], [', '],\n    [') + '\n}'
    print(text)
    if write:
        (ROOT / 'tests/pin.json').write_text(text + '\n')


if __name__ == '__main__':
    main()
