"""Several labelled examples in a row: the same outputs, losses and gradients as a row each, nothing lost, little padding."""

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from bert_jax import evaluate, partition
from bert_jax.data import encoded, packed, packing
from bert_jax.model import model as model_parts

RNG = np.random.default_rng(0)
TARGETS = {'classification': ({'num_classes': 3}, lambda n: RNG.integers(0, 3, n).astype(np.int32)),
           'multilabel': ({'num_classes': 4}, lambda n: RNG.integers(0, 2, (n, 4)).astype(np.float32)),
           'regression': ({}, lambda n: RNG.normal(size=n).astype(np.float32)),
           'multiple_choice': ({'num_choices': 3}, lambda n: np.eye(3, dtype=np.int32)[RNG.integers(0, 2, n // 3)].ravel())}


def examples(kind, count=29):
    """Texts and pairs of many lengths; every third question lacks its last choice."""
    group = 3 if kind == 'multiple_choice' else 1
    rows = [(RNG.integers(5, models.V, size).tolist(), int(RNG.integers(2, size + 1))) for size in RNG.integers(3, 15, count * group)]
    labels = {'label_ids': TARGETS[kind][1](count * group)}
    if group > 1:
        labels['is_real_example'] = np.where(np.arange(count * group) % 9 == 8, 0, 1).astype(np.int32)
    return encoded.collect(rows, labels, pad_id=0, lengths=(16,), group=group)


def build(kind):
    config = models.config('model.embeddings.dropout_rate=0.0')
    config.targets = ConfigDict({kind: {**TARGETS[kind][0], 'dropout_rate': 0.0, 'weight': 1.0}})
    return model_parts.build(config)


@pytest.mark.parametrize('kind, multiple', [*((kind, 1) for kind in TARGETS), ('multiple_choice', 4)])
def test_a_packed_batch_is_the_batch(kind, multiple):
    apart, model = examples(kind), build(kind)
    together = packed.pack(apart, 8, multiple)
    params = models.random_params(model, apart.make(np.arange(1), 1))
    step = evaluate.make_eval_step(model, partition.make_mesh((-1, 1, 1)))
    found = [evaluate.predict(lambda batch: step(params, batch), data, 8, kind) for data in (apart, together)]
    np.testing.assert_allclose(found[1][0]['logits'], found[0][0]['logits'], atol=2e-5)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5)

    def gradient(batch):
        def loss(params):
            mean = model.apply({'params': params}, batch, train=False, method='losses')[kind]['loss']
            return mean.total / mean.count
        return jax.grad(loss)(params)

    numbers = np.array([3, 17, 5, 28, 11, 0, 9, 22])
    for one, other in zip(jax.tree.leaves(gradient(together.make(numbers, 8))), jax.tree.leaves(gradient(apart.make(numbers, 8)))):
        np.testing.assert_allclose(one, other, atol=1e-5 * max(1, float(jnp.abs(other).max())))


@pytest.mark.parametrize('multiple', [1, 8])
def test_every_example_once_an_epoch_in_one_shape_with_little_padding(multiple):
    sizes = np.clip(RNG.geometric(0.1, 3000) + 3, 4, 60)
    rows = [(np.full(size, number % 60 + 5).tolist(), int(size)) for number, size in enumerate(sizes)]
    data = packed.pack(encoded.collect(rows, {'label_ids': np.arange(3000).astype(np.int32)}, pad_id=0, lengths=(64,)), 32, multiple)
    for epoch in (0, 1):
        batches = [data.batch(epoch * data.steps(32) + step, 32, seed=3) for step in range(data.steps(32))]
        assert len({batch['input_ids'].shape for batch in batches}) == 1 and batches[0]['input_ids'].shape[0] % multiple == 0
        labels = np.concatenate([batch['label_ids'][batch['is_real_example'] > 0] for batch in batches])
        assert sorted(labels) == list(range(3000))
        least = 0.9 if multiple == 1 else 0.75  # real tokens; eight devices have a row each, as long as the longest text
        assert np.mean([batch['input_mask'] > 0 for batch in batches[:-1]]) > least
        tokens = [(batch['input_mask'] > 0).sum() for batch in batches[:-1]]
        assert max(tokens) < 1.1 * min(tokens)
    assert not np.array_equal(data.batch(0, 32, 3)['label_ids'], data.batch(data.steps(32), 32, 3)['label_ids'])
    numbers = np.concatenate([found for found, _ in data.evaluation_batches(32)])
    assert sorted(numbers[numbers >= 0]) == list(range(3000))


@pytest.mark.parametrize('kind', TARGETS)
def test_evaluated_in_rows_of_given_lengths_it_is_the_same(kind):
    apart, model = examples(kind, 200), build(kind)
    params = models.random_params(model, apart.make(np.arange(1), 1))
    step = evaluate.make_eval_step(model, partition.make_mesh((-1, 1, 1)))
    together = packed.pack_into(apart, (8, 16, 32, 48), 4)
    found = [evaluate.predict(lambda batch: step(params, batch), data, 4, kind)[0]['logits'] for data in (apart, together)]
    np.testing.assert_allclose(found[1], found[0], atol=2e-5)
    batches = [batch for _, batch in together.evaluation_batches(4)]
    assert len({batch['input_ids'].shape for batch in batches}) == 1 and together.row_length in (16, 32, 48)
    assert np.mean([batch['input_mask'] > 0 for batch in batches]) > 1.3 * np.mean(
        [batch['input_mask'] > 0 for _, batch in apart.evaluation_batches(4)])


def test_choices_too_long_together_for_any_given_length_have_a_row_all_the_same():
    together = packed.pack_into(examples('multiple_choice'), (8, 16), 4)
    assert together.row_length in (32, 48) and together.sizes.max() > 16
    numbers = np.concatenate([found for found, _ in together.evaluation_batches(4)])
    assert sorted(numbers[numbers >= 0]) == list(range(29))


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=40), length=st.integers(20, 60), most=st.integers(1, 9))
def test_rows_hold_what_fits_and_all_of_it(sizes, length, most):
    rows = packing.fill(sizes, length, most)
    assert sorted(number for row in rows for number in row) == list(range(len(sizes)))
    assert all(sum(sizes[number] for number in row) <= length and len(row) <= most for row in rows)
