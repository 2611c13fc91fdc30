"""Several labelled examples in a row: outputs, losses and gradients as of a row each, nothing lost, little padding."""

import itertools

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from bert_jax import evaluate, partition
from bert_jax.data import packing
from bert_jax.metrics import Mean
from bert_jax.model import model as model_parts
from bert_jax.tasks import packed, tokenized

TARGETS = {'classification': ({'num_classes': 3}, lambda n, rng: rng.integers(0, 3, n).astype(np.int32)),
           'multilabel': ({'num_classes': 4}, lambda n, rng: rng.integers(0, 2, (n, 4)).astype(np.float32)),
           'regression': ({}, lambda n, rng: rng.normal(size=n).astype(np.float32)),
           'multiple_choice': ({'num_choices': 3},
                               lambda n, rng: np.eye(3, dtype=np.int32)[rng.integers(0, 2, n // 3)].ravel())}


def examples(kind, count=29):
    """Texts and pairs of many lengths; every third question lacks its last choice."""
    rng, group = np.random.default_rng(0), 3 if kind == 'multiple_choice' else 1
    rows = [(rng.integers(5, models.V, size).tolist(), int(rng.integers(2, size + 1)))
            for size in rng.integers(3, 15, count * group)]
    labels = {'label_ids': TARGETS[kind][1](count * group, rng)}
    if group > 1:
        labels['is_real_example'] = np.where(np.arange(count * group) % 9 == 8, 0, 1).astype(np.int32)
    return tokenized.collect(rows, labels, pad_id=0, lengths=(16,), group=group)


def build(kind):
    config = models.config('model.embeddings.dropout_rate=0.0')
    config.targets = ConfigDict({kind: {**TARGETS[kind][0], 'dropout_rate': 0.0, 'weight': 1.0}})
    return model_parts.build(config)


@pytest.mark.parametrize('kind, multiple', [(kind, 4 if kind == 'multiple_choice' else 1) for kind in TARGETS])
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
    for one, other in zip(
        jax.tree.leaves(gradient(together.make(numbers, 8))), jax.tree.leaves(gradient(apart.make(numbers, 8)))
    ):
        np.testing.assert_allclose(one, other, atol=1e-5 * max(1, float(jnp.abs(other).max())))


@pytest.mark.parametrize('multiple', [1, 8])
def test_every_example_once_an_epoch_in_one_shape_with_little_padding(multiple):
    sizes = np.clip(np.random.default_rng(0).geometric(0.1, 3000) + 3, 4, 60)
    rows = [(np.full(size, number % 60 + 5).tolist(), int(size)) for number, size in enumerate(sizes)]
    data = packed.pack(
        tokenized.collect(rows, {'label_ids': np.arange(3000).astype(np.int32)}, pad_id=0, lengths=(64,)), 32, multiple
    )
    for epoch in (0, 1):
        batches = [data.batch(epoch * data.steps(32) + step, 32, seed=3) for step in range(data.steps(32))]
        assert (
            len({batch['input_ids'].shape for batch in batches}) == 1
            and batches[0]['input_ids'].shape[0] % multiple == 0
        )
        labels = np.concatenate([batch['label_ids'][batch['is_real_example'] > 0] for batch in batches])
        assert sorted(labels) == list(range(3000))
        least = (
            0.9 if multiple == 1 else 0.75
        )  # real tokens; eight devices have a row each, as long as the longest text
        assert np.mean([batch['input_mask'] > 0 for batch in batches[:-1]]) > least
        tokens = [(batch['input_mask'] > 0).sum() for batch in batches[:-1]]
        assert max(tokens) < 1.03 * min(tokens)
    assert not np.array_equal(data.batch(0, 32, 3)['label_ids'], data.batch(data.steps(32), 32, 3)['label_ids'])
    numbers = np.concatenate([found for found, _ in data.evaluation_batches(32)])
    assert sorted(numbers[numbers >= 0]) == list(range(3000))


def texts(count, seed=0):
    """Texts of many lengths, the numbers of the rows as their labels."""
    rng = np.random.default_rng(seed)
    rows = [(np.full(size, number % 60 + 5).tolist(), 3) for number, size in enumerate(rng.integers(4, 41, count))]
    return tokenized.collect(rows, {'label_ids': np.arange(count).astype(np.int32)}, pad_id=0, lengths=(16, 32, 48))


@pytest.mark.parametrize('make', [texts, lambda count: packed.pack(texts(count), 8, 1)], ids=['apart', 'packed'])
def test_an_epoch_is_shuffled_and_the_next_one_otherwise(make):
    """Examples in no order of the file, batches in none of their lengths, though like lengths go together."""
    data = make(1003)
    epochs = [data.epoch(*which) for which in ((0, 8, 3), (1, 8, 3), (0, 8, 4))]
    bound = 5 / np.sqrt(1000 / 8)

    def correlation(a, b):
        return abs(scipy.stats.spearmanr(a, b).statistic)

    for order in epochs:
        assert sorted(order) == list(range(1003))
        assert correlation(np.arange(1003), order) < 5 / np.sqrt(1003)
        tokens = data.longest[order[:1000]].reshape(-1, 8).sum(1)
        assert correlation(np.arange(125), tokens) < bound and correlation(tokens[:-1], tokens[1:]) < bound
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert correlation(np.argsort(epochs[a]), np.argsort(epochs[b])) < 5 / np.sqrt(1003)
    batches = [order[:1000].reshape(-1, 8) for order in epochs]
    assert all(np.ptp(one, axis=1).mean() > 0.6 * 1003 for one in batches)  # 7/9 of it between the ends of eight
    pairs = [{frozenset(pair) for one in each for pair in itertools.combinations(one.tolist(), 2)} for each in batches]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert len(pairs[a] & pairs[b]) < 0.2 * len(pairs[a])  # others share a batch than before
    for step in (0, 125, 126, 140):  # 126 batches an epoch, the last of three examples
        epoch, number = divmod(step, 126)
        labels = data.batch(step, 8, 3)
        found = labels['label_ids'][labels['is_real_example'] > 0]
        assert sorted(found) == sorted(epochs[epoch][8 * number:8 * number + 8])


def test_examples_of_like_length_share_a_batch_that_is_no_longer_than_it_must_be():
    data = texts(1024)
    spread = [np.ptp(data.longest[part]) for part in data.epoch(0, 8, 3).reshape(-1, 8)]
    assert np.mean(spread) < 3  # 37 lengths over 32 batches
    for number, part in enumerate(data.epoch(0, 8, 3).reshape(-1, 8)):
        length = data.batch(number, 8, 3)['input_ids'].shape[1]
        assert length == next(one for one in (16, 32, 48) if one >= data.longest[part].max())


def test_a_batch_of_groups_against_a_plain_loop():
    """Two rows an example, filled up with an example that is none."""
    rng, sizes = np.random.default_rng(0), [5, 9, 3, 7, 16, 4]
    rows, tags = [(rng.integers(5, 60, size).tolist(), 1 + size // 2) for size in sizes], rng.integers(0, 3, sum(sizes))
    labels = rng.normal(size=(6, 2)).astype(np.float32)
    data = tokenized.collect(rows, {'label_ids': labels}, pad_id=4, lengths=(8, 12, 16), group=2,
                           token_labels={'tags': tags.astype(np.int32)})
    assert len(data) == 3 and data.longest.tolist() == [9, 7, 16]
    for examples, length in (([1, 0], 12), ([1], 8), ([2, 1], 16)):
        made = data.make(np.array(examples), 3)
        expected = {name: np.zeros((6, length), np.int32) for name in (
            'input_ids', 'input_mask', 'segment_ids', 'tags', 'position_ids')}
        expected['input_ids'] += 4
        expected['tags'] -= 1
        expected['position_ids'] += np.arange(length)
        expected |= {'cls_positions': np.zeros((6, 1)), 'label_ids': np.zeros((6, 2)), 'is_real_example': np.zeros(6)}
        for place, row in enumerate(2 * example + side for example in examples for side in (0, 1)):
            ids, first = rows[row]
            for at, token in enumerate(ids):
                expected['input_ids'][place, at], expected['input_mask'][place, at] = token, 1
                expected['segment_ids'][place, at] = at >= first
                expected['tags'][place, at] = tags[sum(sizes[:row]) + at]
            expected['label_ids'][place], expected['is_real_example'][place] = labels[row], 1
        assert made.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(made[name], array, err_msg=name)
            assert made[name].dtype == (np.float32 if name == 'label_ids' else np.int32)


@pytest.mark.parametrize('batch_size', [4, 5, 13, 20])
@pytest.mark.parametrize('together', [False, True])
def test_predictions_are_of_every_example_once_in_its_place(batch_size, together):
    """Thirteen examples, which no batch size but thirteen divides; the loss is the mean over them all."""
    apart = texts(13)
    data = packed.pack(apart, batch_size, 1) if together else apart

    def apply(batch):
        labels, real = jnp.asarray(batch['label_ids']), jnp.asarray(batch['is_real_example'])
        return {'t': {'logits': labels * 10}}, {'t': {'loss': Mean.of(labels**2, real)}}

    outputs, loss = evaluate.predict(apply, data, batch_size, 't')
    assert outputs['logits'].tolist() == [10 * label for label in range(13)]
    assert loss == pytest.approx(np.mean(np.arange(13) ** 2))


def test_predictions_of_tokens_are_cut_to_their_rows():
    rows = [(list(range(5, 5 + size)), size) for size in (9, 4, 6, 5, 12)]
    ids = np.array([token for row, _ in rows for token in row], np.int32)
    data = tokenized.collect(rows, {}, pad_id=0, lengths=(8, 16), token_labels={'label_ids': ids})
    outputs, _ = evaluate.predict(lambda batch: ({'t': {'logits': batch['label_ids'] + 1}}, {}), data, 2, 't')
    assert [one.tolist() for one in outputs['logits']] == [[token + 1 for token in row] for row, _ in rows]


@pytest.mark.parametrize('kind', TARGETS)
def test_evaluated_in_rows_of_given_lengths_it_is_the_same(kind):
    apart, model = examples(kind, 200), build(kind)
    params = models.random_params(model, apart.make(np.arange(1), 1))
    step = evaluate.make_eval_step(model, partition.make_mesh((-1, 1, 1)))
    together = packed.pack_into(apart, (8, 16, 32, 48), 4)
    found = [
        evaluate.predict(lambda batch: step(params, batch), data, 4, kind)[0]['logits'] for data in (apart, together)
    ]
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
