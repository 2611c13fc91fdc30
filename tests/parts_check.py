"""Three steps of an LSTM language model and of a student of two teachers on meshes of 8 devices; prints JSON."""

import json

import jax
import jax.numpy as jnp
import models
import numpy as np
import test_relations

from bert_jax import optimizer, partition, train
from bert_jax.cli import UserError
from bert_jax.model import model as model_parts

ONE = {'one device': ((1, 1, 1), 1)}
LM = ONE | {'data and fsdp, micro-batches': ((2, 2, 1), 2)}
TEACHERS = ONE | {'all axes, micro-batches': ((2, 2, 2), 2)}


def build():
    c = models.config('model.embeddings.dropout_rate=0.0', arg='tiny,no_nsp')
    c.encoder = {'name': 'lstm', 'num_layers': 2, 'hidden_size': 24, 'dropout_rate': 0.0}
    c.targets = {'lm': {'vocab_size': models.V, 'weight': 1.0}}
    return model_parts.build(c)


def run(shape, accumulation):
    model, example = build(), models.packed_batch()
    params = models.random_params(model, example)
    tx = optimizer.make_optimizer(
        'adamw', b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.01, clip_norm=1.0, bias_correction=True
    )
    mesh = partition.make_mesh(shape, devices=jax.devices()[:np.prod(shape)])
    state = train.TrainState(jnp.int32(0), params, tx.init(params))
    state = jax.device_put(state, partition.state_shardings(state, mesh))
    step = train.make_train_step(model, tx, mesh, accumulation, state)
    numbers = []
    for _ in range(3):
        state, metrics = step(state, {'text': example}, train.as_hyper(1e-2, {'lm': 1.0}, 0))
        numbers += [float(metrics[name].total / metrics[name].count) for name in ('loss', 'gradient_norm')]
    return numbers + sizes(state)


def taught(shape, accumulation):
    parts = {'one': models.batch(), 'two': models.batch(np.random.default_rng(5))}
    found, state, _ = test_relations.run(parts, accumulation, shape)
    return [step[name] for step in found for name in ('loss', 'gradient_norm', 'one/relations/loss')] + sizes(state)


def sizes(state):
    return [float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(state.params)]


def main():
    found = {'lm': {name: run(*case) for name, case in LM.items()},
             'teachers': {name: taught(*case) for name, case in TEACHERS.items()}}
    try:
        run((4, 1, 2), 1)
    except UserError as error:
        found['refused'] = str(error)
    print(json.dumps(found))


if __name__ == '__main__':
    main()
