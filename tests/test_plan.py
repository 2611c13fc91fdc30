"""The plan against a plain Python transcription of create_pretraining_data.py, and what it promises."""

import numpy as np
import pytest
import scipy.stats

from bert_jax.cli import UserError
from bert_jax.data import draws, plan
from bert_jax.data.store import Split


def random_split(rng, documents=30, longest=70, most=25):
    """Documents whose every token is its own number."""
    sizes = rng.integers(1, most, documents)
    lengths = rng.integers(1, longest, sizes.sum())
    return Split(np.arange(lengths.sum()), lengths.astype(np.uint16), sizes.astype(np.uint32))


def transcription(split, seed, epoch, length, short_rate):
    """create_instances_from_document over token lists; draws are looked up where the original rolls dice."""
    key = int(draws.bits64(seed, epoch, length)[0])

    def roll(stream, *counters):
        return draws.bits64(key, stream, *counters)

    documents, first_sentence = [], []
    sentence = token = 0
    for size in split.document_lengths:
        document = []
        first_sentence.append(sentence)
        for _ in range(size):
            n = int(split.sentence_lengths[sentence])
            document.append(list(range(token, token + n)))
            sentence, token = sentence + 1, token + n
        documents.append(document)

    found = []
    for d, document in enumerate(documents):
        most = length - 3
        target = most
        if draws.chance(roll(plan.SHORT, d), short_rate)[0]:
            target = 2 + int(draws.below(roll(plan.SHORT, d, 1), most - 1)[0])
        chunk, size, i = [], 0, 0
        while i < len(document):
            chunk.append(document[i])
            size += len(document[i])
            if i == len(document) - 1 or size >= target:
                at = first_sentence[d] + i - len(chunk) + 1
                a_end = 1
                if len(chunk) >= 2:
                    a_end = 1 + int(draws.below(roll(plan.CUT, at), len(chunk) - 1)[0])
                a = [t for s in chunk[:a_end] for t in s]
                is_random = len(chunk) == 1 or bool(draws.chance(roll(plan.RANDOM, at), 0.5)[0])
                if is_random:
                    other = int(draws.below(roll(plan.OTHER, at), len(documents) - 1)[0])
                    other += other >= d
                    start = int(draws.below(roll(plan.WHERE, at), len(documents[other]))[0])
                    b = []
                    for s in documents[other][start:]:
                        b += s
                        if len(b) >= target - len(a):
                            break
                    i -= len(chunk) - a_end
                else:
                    b = [t for s in chunk[a_end:] for t in s]
                tosses = {'a': 0, 'b': 0}
                while len(a) + len(b) > most:
                    name, longer = ('a', a) if len(a) > len(b) else ('b', b)
                    stream = plan.TRIM_A if name == 'a' else plan.TRIM_B
                    word = int(roll(stream, at, tosses[name] // 64)[0])
                    longer.pop(0 if word >> (tosses[name] % 64) & 1 else -1)
                    tosses[name] += 1
                found.append((tuple(a), tuple(b), int(is_random), len(chunk)))
                chunk, size = [], 0
            i += 1
    return found


def spans(table):
    return [(tuple(range(r['a_start'], r['a_start'] + r['a_length'])),
             tuple(range(r['b_start'], r['b_start'] + r['b_length'])), int(r['label']), int(r['sentences']))
            for r in table]


@pytest.mark.parametrize('seed', range(8))
@pytest.mark.parametrize('length', [16, 33, 128])
def test_equals_the_transcription(seed, length):
    split = random_split(np.random.default_rng(seed), longest=200 if seed % 2 else 30)
    table = plan.plan(split, 'next_sentence', seed, 3, length, short_rate=0.3)
    assert sorted(spans(table)) == sorted(transcription(split, seed, 3, length, 0.3))


def test_is_rebuilt_bit_for_bit_and_drawn_afresh():
    split = random_split(np.random.default_rng(0))
    one, again = (plan.plan(split, 'next_sentence', 1, 2, 64, short_rate=0.1) for _ in range(2))
    assert one.tobytes() == again.tobytes()
    for other in ((2, 2, 64), (1, 3, 64), (1, 2, 65)):
        assert plan.plan(split, 'next_sentence', *other, short_rate=0.1).tobytes() != one.tobytes()


def uncorrelated(a, b):
    """By ranks: five standard deviations at most."""
    return abs(scipy.stats.spearmanr(a, b).statistic) < 5 / np.sqrt(len(a))


@pytest.mark.parametrize('pairing', plan.PAIRINGS)
def test_an_epoch_is_shuffled_and_the_next_one_otherwise(pairing):
    split = random_split(np.random.default_rng(0), documents=900)
    tables = [plan.plan(split, pairing, 0, epoch, 64, short_rate=0.1) for epoch in (0, 1)]
    for table in tables:
        assert len(table) > 3000
        for column in ('a_start', 'a_length'):
            assert uncorrelated(np.arange(len(table)), table[column])       # neither the text's order nor by length,
            assert uncorrelated(table[column][:-1], table[column][1:])      # and neighbours are not neighbours there
    _, one, other = np.intersect1d(*(table['a_start'] for table in tables), return_indices=True)
    assert len(one) > 1000 and uncorrelated(one, other)


def test_the_same_examples_come_in_another_order_in_each_epoch_and_under_each_seed():
    """Where nothing is drawn but the order: whole chunks of twelve sentences, none cut."""
    split = Split(np.arange(120_000), np.full(24_000, 5, np.uint16), np.full(10, 2400, np.uint32))
    tables = [plan.plan(split, 'single', seed, epoch, 62, short_rate=0.0) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    places = [np.argsort(table['a_start']) for table in tables]
    assert all(np.array_equal(np.sort(table['a_start']), np.arange(0, 120_000, 60)) for table in tables)
    assert all(uncorrelated(places[i], places[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_every_token_once_as_a_or_true_b_when_nothing_is_cut():
    """Chunks may overshoot the target by a sentence; with one-token sentences they never do."""
    split = Split(np.arange(5000), np.ones(5000, np.uint16), np.full(10, 500, np.uint32))
    table = plan.plan(split, 'next_sentence', 0, 0, 67, short_rate=0.5)
    used = np.zeros(5000, int)
    for a, b, label, _ in spans(table):
        used[list(a)] += 1
        if not label:
            used[list(b)] += 1
    assert (used == 1).all()


def test_single_covers_every_token_once():
    split = Split(np.arange(5000), np.full(1000, 5, np.uint16), np.full(10, 100, np.uint32))
    table = plan.plan(split, 'single', 0, 0, 62, short_rate=0.0)
    assert sorted(t for a, b, _, _ in spans(table) for t in a + b) == list(range(5000))
    assert not table['b_length'].any() and not table['label'].any()


def test_a_random_b_comes_from_another_document():
    rng = np.random.default_rng(5)
    split = random_split(rng, documents=4)
    owner = np.repeat(np.arange(4), np.diff(split.sentence_starts[split.document_starts]))
    for a, b, label, _ in spans(plan.plan(split, 'next_sentence', 0, 0, 64, short_rate=0.1)):
        assert (owner[a[0]] != owner[b[0]]) == bool(label)


def test_lengths_and_shares(store):
    table = plan.plan(store.train, 'next_sentence', 0, 0, 64, short_rate=0.1)
    lengths = table['a_length'].astype(int) + table['b_length']
    assert lengths.max() == 61 and table['a_length'].min() >= 1 and table['b_length'].min() >= 1
    split = random_split(np.random.default_rng(1), documents=3000)
    table = plan.plan(split, 'next_sentence', 0, 0, 128, short_rate=0.1)
    assert abs(table['label'][table['sentences'] > 1].mean() - 0.5) < 0.01
    assert table['label'][table['sentences'] == 1].all()


def test_what_cannot_be_planned_says_why():
    one = Split(np.arange(9), np.full(3, 3, np.uint16), np.full(1, 3, np.uint32))
    with pytest.raises(UserError, match='at least two documents'):
        plan.plan(one, 'next_sentence', 0, 0, 64, short_rate=0.1)
    assert len(plan.plan(one, 'single', 0, 0, 64, short_rate=0.1)) == 1
    single = Split(np.arange(9), np.full(3, 3, np.uint16), np.full(3, 1, np.uint32))  # every label would be 1
    with pytest.raises(UserError, match='Every document of this side of the store has one sentence.*no_nsp'):
        plan.plan(single, 'next_sentence', 0, 0, 64, short_rate=0.1)
    assert len(plan.plan(single, 'single', 0, 0, 64, short_rate=0.1)) == 3
    none = Split(*(np.zeros(0, np.uint16) for _ in range(3)))
    with pytest.raises(UserError, match='no documents'):
        plan.plan(none, 'single', 0, 0, 64, short_rate=0.1)
    with pytest.raises(UserError, match='too short'):
        plan.plan(one, 'single', 0, 0, 4, short_rate=0.1)
    with pytest.raises(UserError, match="Unknown pairing 'nextsentence'; known: next_sentence, single"):
        plan.plan(one, 'nextsentence', 0, 0, 64, short_rate=0.1)
