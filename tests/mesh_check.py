"""Runs in a process with 8 virtual devices: the same ten steps on several meshes; prints JSON."""

import functools
import json
import re
import sys
from unittest import mock

import bert_jax  # noqa: F401 - first: it sets the flags that JAX's backend opens with

sys.path.insert(0, 'tests')
import flax.linen as nn
import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
from ml_collections import ConfigDict

from bert_jax import evaluate, optimizer, partition, train
from bert_jax.data import batches
from bert_jax.model import model as model_parts
from bert_jax.tasks import packed, tokenized

STEPS = 10
SETTINGS = {'b1': 0.9, 'b2': 0.999, 'eps': 1e-6, 'weight_decay': 0.01, 'clip_norm': 1.0, 'bias_correction': True}


def run(shape, accumulation):
    devices = jax.devices()[:int(np.prod(shape))]
    if len(shape) == 4:  # slices are TPUs': here they are only the mesh's first axis
        mesh = jax.sharding.Mesh(np.reshape(devices, shape), partition.AXES)
    else:
        mesh = partition.make_mesh(shape, devices=devices)
    model = models.build('model.embeddings.dropout_rate=0.0', 'model.run.unroll=1')
    tx = optimizer.make_optimizer('adamw', **SETTINGS)
    made = [global_batch(i) for i in range(STEPS)]
    params = models.random_params(model, made[0], scale=0.05)
    state = train.TrainState(jnp.zeros([], jnp.int32), params, tx.init(params))
    state = jax.device_put(state, partition.state_shardings(state, mesh))
    before = flat(state.params)
    step = train.make_train_step(model, tx, mesh, accumulation, state)
    hyper = train.as_hyper(1e-3, {'mlm': 1.0, 'nsp': 1.0}, 0)
    sharding, losses = partition.batch_sharding(mesh), []
    first = batches.place(made[0], sharding)
    step = step.lower(state, {'text': first}, hyper).compile()
    text = step.as_text()
    per_device = {name: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
                  for name, tree in (('params', state.params), ('opt_state', state.opt_state))}
    for batch in made:
        state, metrics = step(state, {'text': batches.place(batch, sharding)}, hyper)
        losses.append(
            [float(metrics[k].total / metrics[k].count) for k in ('loss', 'mlm/loss', 'nsp/loss', 'mlm/accuracy')]
        )
    gathers = re.findall(r'f32\[([\d,]*)\][^=]* all-gather', text)
    return {
        'losses': losses,
        'updates': flat(state.params) - before,
        'per_device': per_device,
        'reductions': reductions(text),
        'gathers': gathers,
    }


def temporaries():
    """Bytes of a step under fsdp, of which gathered kernels would be more than half, and of all those kernels."""
    model = models.build(
        'model.run.unroll=1',
        'model.encoder.num_layers=16',
        'model.embeddings.hidden_size=64',
        'model.encoder.mlp_size=512',
    )
    tx, mesh = optimizer.make_optimizer('adamw', **SETTINGS), partition.make_mesh((1, 8, 1))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((8, *x.shape[1:]), x.dtype), global_batch(0))
    state = train.state_shapes(model, tx, batch)
    step = train.make_train_step(model, tx, mesh, 1, state).lower(
        state, {'text': batch}, train.as_hyper(1e-3, {'mlm': 1.0, 'nsp': 1.0}, 0)
    )
    return step.compile().memory_analysis().temp_size_in_bytes, 16 * (4 * 64 * 64 + 2 * 64 * 512) * 4


def flat(params):
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(params)])


def global_batch(i):
    """32 rows; the shards of every mesh hold unequal numbers of masks, some none at all."""
    parts = [models.batch(np.random.default_rng((i, j))) for j in range(4)]
    batch = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    batch['masked_lm_weights'][4:9] = 0
    return batch


def reductions(text):
    """(elements of each all-reduce or reduce-scatter inside a loop body, and outside)."""
    bodies = set(re.findall(r'body=%?([\w.\-]+)', text))
    inside, outside, name = [], [], ''
    for line in text.split('\n'):
        head = re.match(r'(?:ENTRY )?%?([\w.\-]+) .*\{$', line)
        if head:
            name = head.group(1)
        reduced = re.search(r' = (.*) (?:all-reduce|reduce-scatter)(?:-start)?\(', line)
        if reduced:
            sizes = [int(np.prod([int(n) for n in dims.split(',') if n] or [1]))
                     for dims in re.findall(r'f32\[([\d,]*)\]', reduced.group(1))]
            (inside if name in bodies else outside).extend(sizes)
    return {'inside': inside, 'outside': outside}


def dropout_rows():
    """A number of each of 32 equal rows under dropout, on 8 devices, whole and in micro-batches, in two training steps.

    The steps are train_step's own, which fold their number in; only the gradient is left out, which costs the most.
    """
    mesh = partition.make_mesh((8, 1, 1))
    model = models.build('model.embeddings.dropout_rate=0.3', 'model.run.unroll=1')
    one = {k: np.repeat(v[:1], 32, 0) for k, v in global_batch(0).items()}
    params, tx, found = models.random_params(model, one), optax.identity(), {}

    def forward_only(function, has_aux):
        return lambda params, *args: (jax.tree.map(jnp.zeros_like, params), function(params, *args)[1])

    def record(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if context.module.path == ('targets_nsp', 'dense'):
            jax.debug.callback(lambda x: seen.append(np.asarray(x)), out[..., 0])
        return out

    for accumulation in (1, 4):
        seen = []
        with mock.patch.object(jax, 'grad', forward_only), nn.intercept_methods(record):
            state = train.TrainState(jnp.int32(0), params, tx.init(params))
            step = jax.jit(functools.partial(
                train.train_step, model=model, tx=tx, mesh=mesh, accumulation=accumulation))
            for _ in range(2):
                batch = batches.place(one, partition.batch_sharding(mesh))
                state, _ = step(state, {'text': batch}, train.as_hyper(1e-3, {'mlm': 1.0, 'nsp': 1.0}, 0))
        jax.effects_barrier()
        values = np.concatenate([np.ravel(x) for x in seen])
        found[str(accumulation)] = [len(values), len(np.unique(values))]
    return found


def evaluation(what, devices, batch_size):
    """Logits and loss of 29 examples in the order of the data; what a row of padding adds would show."""
    mesh = partition.make_mesh((devices, 1, 1), devices=jax.devices()[:devices])
    rng = np.random.default_rng(0)
    rows = [(rng.integers(5, models.V, size).tolist(), int(size)) for size in rng.integers(3, 14, 29)]
    of_rows = {'label_ids': rng.integers(0, 3, 29).astype(np.int32)}
    of_tokens = {'label_ids': rng.integers(0, 3, sum(size for _, size in rows)).astype(np.int32)}
    target, labels = (
        ('tagging', {'labels': {}, 'token_labels': of_tokens})
        if what == 'tags'
        else ('classification', {'labels': of_rows})
    )
    data = tokenized.collect(rows, **labels, pad_id=0, lengths=(6, 8, 14))
    data = packed.pack(data, batch_size, devices) if what == 'packed' else data
    config = models.config()
    config.targets = ConfigDict({target: {'num_classes': 3, 'dropout_rate': 0.0, 'weight': 1.0}})
    model = model_parts.build(config)
    params = models.random_params(model, data.make(np.arange(1), 1))
    step, sharding = evaluate.make_eval_step(model, mesh), partition.batch_sharding(mesh)
    outputs, loss = evaluate.predict(
        lambda batch: step(params, batches.place(batch, sharding)), data, batch_size, target
    )
    return [*np.concatenate([np.ravel(one) for one in outputs['logits']]).tolist(), loss]


CASES = {'1 device': ((1, 1, 1), 1), '8 data': ((8, 1, 1), 1), '2 data x 4 fsdp': ((2, 4, 1), 1),
         '2 data x 2 fsdp x 2 tensor': ((2, 2, 2), 1), '1 device, accumulation 4': ((1, 1, 1), 4),
         '8 data, accumulation 4': ((8, 1, 1), 4), '2 slice x 2 fsdp x 2 tensor, accumulation 4': ((2, 1, 2, 2), 4)}


def main():
    results = {name: run(*case) for name, case in CASES.items()}
    reference = results['1 device']
    for result in results.values():
        result['update_error'] = float(
            np.linalg.norm(result['updates'] - reference['updates']) / np.linalg.norm(reference['updates'])
        )
    for result in results.values():
        del result['updates']
    evaluations = {'classes': [evaluation('classes', *case) for case in ((1, 4), (1, 29), (2, 6), (8, 8), (8, 32))],
                   **{what: [evaluation(what, *case) for case in ((1, 4), (8, 16))] for what in ('packed', 'tags')}}
    print(
        json.dumps(
            results
            | {
                'dropout_rows': dropout_rows(),
                'temporaries': temporaries(),
                'evaluations': evaluations,
                'count': int(
                    sum(
                        np.size(x)
                        for x in jax.tree.leaves(
                            jax.eval_shape(
                                lambda: models.build().init(
                                    jax.random.key(0), jax.tree.map(jnp.asarray, global_batch(0)), train=False
                                )
                            )
                        )
                    )
                    or 0
                ),
            }
        )
    )


if __name__ == '__main__':
    main()
