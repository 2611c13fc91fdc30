"""An LSTM that predicts each token from those before it: its loss, packed rows, real text, the way out."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import call_module, expect_error
from models import B, D, L, V, batch, config, packed_batch, random_params

from bert_jax.model import model as models

SMALL = (
    '--config.phases=((60,64,16),)',
    '--config.model.embeddings.hidden_size=48',
    '--config.model.encoder.hidden_size=64',
    '--config.schedule.peak=1e-2',
    '--config.log_every=20',
    '--config.save_every=20',
    '--config.eval_every=60',
    '--config.eval_examples=64',
    '--config.pipeline=thread',
)


def lstm_lm(**changes):
    c = config('model.embeddings.dropout_rate=0.0', arg='tiny,no_nsp')
    c.encoder = {'name': 'lstm', 'num_layers': 2, 'hidden_size': 24, 'dropout_rate': 0.0} | changes
    c.targets = {'lm': {'vocab_size': V, 'weight': 1.0}}
    return models.build(c)


def losses(model, params, example):
    return model.apply({'params': params}, example, train=False, method='losses')['lm']


def test_the_loss_is_that_of_torch():
    """Cross-entropy of each token from those before it, padding left out, by a loop over examples."""
    model, example = lstm_lm(), batch()
    params = random_params(model, example)
    hidden = model.apply({'params': params}, example, train=False, method='encode').hidden
    head = params['targets_lm']
    logits = (hidden @ head['dense']['kernel'] + head['dense']['bias']) @ params['embeddings']['token'].T + head['bias']
    total, right, count = 0.0, 0, 0
    for row in range(B):
        n = int(example['input_mask'][row].sum())
        scores = torch.tensor(np.asarray(logits[row, :n - 1, :V], np.float64))
        answers = torch.tensor(example['input_ids'][row, 1:n]).long()
        total += torch.nn.functional.cross_entropy(scores, answers, reduction='sum').item()
        right += int((scores.argmax(-1) == answers).sum())
        count += n - 1
    found = losses(model, params, example)
    assert float(found['loss'].count) == float(model.apply({}, example, method='counts')['lm']) == count
    assert float(found['loss'].total) == pytest.approx(total, rel=1e-5) and float(found['accuracy'].total) == right
    empty = example | {'is_real_example': (np.arange(B) < 3).astype(np.int32)}
    assert float(losses(model, params, empty)['loss'].count) == float(example['input_mask'][:3].sum() - 3)


def test_packed_rows_give_the_losses_and_gradients_of_single_examples():
    model, packed = lstm_lm(), packed_batch()
    params = random_params(model, packed)
    single = []
    for row in range(B):
        for number in (1, 2):
            here = packed['input_mask'][row] == number
            one = {
                name: np.zeros((1, L), np.int32) for name in ('input_ids', 'segment_ids', 'position_ids', 'input_mask')
            }
            for name in one:
                one[name][0, :here.sum()] = packed[name][row, here]
            single.append(
                one
                | {'input_mask': (one['input_mask'] > 0).astype(np.int32), 'cls_positions': np.zeros((1, 1), np.int32)}
            )
    apart = {name: np.concatenate([one[name] for one in single]) for name in single[0]}
    (a, to_a), (b, to_b) = (
        jax.value_and_grad(lambda p, e=e: losses(model, p, e)['loss'].total)(params) for e in (packed, apart)
    )
    assert float(a) == pytest.approx(float(b), rel=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3), to_a, to_b)


def test_prediction_gives_what_follows_the_last_token():
    model, example = lstm_lm(), batch()
    params = random_params(model, example)
    logits = model.apply({'params': params}, example, train=False)['lm']['logits']
    assert logits.shape == (B, 128)
    row = int(example['input_mask'][2].sum())
    cut = {name: x[2:3, :row] if x.shape[1:] == (L,) else x[2:3] for name, x in example.items()}
    np.testing.assert_allclose(
        model.apply({'params': params}, cut, train=False)['lm']['logits'][0], logits[2], rtol=1e-4, atol=1e-4
    )


def test_its_flops_are_those_of_its_program():
    """Both directions of the count: an LSTM's products and the head's, forward."""
    model = lstm_lm()
    row = {'tokens': 10.0, 'squared_tokens': 100.0, 'examples': 1.0}
    lstm = 10 * 2 * 4 * 24 * (D + 24) + 10 * 2 * 4 * 24 * (24 + 24)
    assert model.flops(row) == 3 * (lstm + 9 * 2 * (D * V + 24 * D))


@pytest.mark.parametrize('encoder', ['lstm', *(['transformer'] if 'BERT_JAX_LONG_TESTS' in os.environ else [])])
def test_real_text_from_a_command(encoder, store_path, tmp_path):
    """Trains, beats the unigram model where it is an LSTM, resumes, and leaves as a workdir but not as a BERT."""
    small = (
        SMALL if encoder == 'lstm' else [one.replace('encoder.hidden_size=64', 'encoder.num_layers=1') for one in SMALL]
    )
    args = (
        '--config',
        f'configs/uer.py:{encoder},lm',
        f'--config.store={store_path}',
        '--workdir',
        tmp_path / 'w',
        *small,
    )
    done = call_module('pretrain', *args)
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / 'w/results.json').read_text())
    assert scores['held_out/lm/loss'] < scores['held_out/lm/unigram_loss'] or encoder == 'transformer', scores
    log = (tmp_path / 'w/log.jsonl').read_bytes()
    shutil.rmtree(tmp_path / 'w/checkpoints/00000060')
    again = call_module('pretrain', *args)
    assert 'resuming at step 40 of 60' in again.stdout and (tmp_path / 'w/log.jsonl').read_bytes() == log
    expect_error(
        call_module('convert', '--from', tmp_path / 'w', '--to', tmp_path / 'hf', '--format', 'hf'),
        'BERT alone',
        'workdir',
    )
    assert (
        call_module('convert', '--from', tmp_path / 'w', '--to', tmp_path / 'copy', '--format', 'workdir').returncode
        == 0
    )
    (tmp_path / 'train.csv').write_text('text,label\n' + ''.join(f'word {n},{"ab"[n % 2]}\n' for n in range(40)))
    done = call_module(
        'finetune',
        '--config',
        'configs/finetune.py:classification',
        f'--config.init_from={tmp_path / "w"}',
        f'--config.task.train_file={tmp_path / "train.csv"}',
        '--workdir',
        tmp_path / 'fine',
        '--config.max_length=16',
    )
    expect_error(done, 'classification', 'sees=left', 'both sides')


@pytest.mark.parametrize(
    'overrides, words',
    [
        (
            ('--config', 'configs/uer.py:lstm,lm', '--config.examples.masking=token'),
            ('masking=token', 'lm', 'masking=none'),
        ),
        (
            ('--config', 'configs/uer.py:transformer,lm', '--config.model.encoder.sees=both'),
            ('target lm', 'its answers', 'sees=left'),
        ),
        (
            ('--config', 'configs/pretrain.py:tiny', '--config.examples.masking=none'),
            ('masking=none', 'mlm', 'masking=token'),
        ),
        (
            ('--config', 'configs/pretrain.py:tiny', '--config.model.encoder.sees=left'),
            ('target nsp', 'first token', 'both sides'),
        ),
        (('--config', 'configs/pretrain.py:tiny', '--config.model.encoder.sees=right'), ("'right'", 'left', 'prefix')),
        (('--config', 'configs/uer.py:lstm,mlm'), ('lstm,mlm', 'targets: lm')),
        (
            ('--config', 'configs/uer.py:lstm,lm', '--config.model.encoder.hidden_size=0'),
            ('model.encoder.hidden_size=0', '1 or more'),
        ),
    ],
)
def test_what_does_not_go_together(overrides, words, store_path, tmp_path):
    expect_error(
        call_module('pretrain', *overrides, f'--config.store={store_path}', '--workdir', tmp_path / 'w'), *words
    )
    assert not (tmp_path / 'w').exists()


def test_bf16_computes_in_bf16_over_fp32_weights():
    c = config('model.run.dtype=bfloat16', arg='tiny,no_nsp')
    c.encoder = {'name': 'lstm', 'num_layers': 1, 'hidden_size': 24, 'dropout_rate': 0.0}
    c.targets = {'lm': {'vocab_size': V, 'weight': 1.0}}
    model, exact, example = models.build(c), lstm_lm(num_layers=1), batch()
    params = random_params(model, example)
    assert model.apply({'params': params}, example, train=False, method='encode').hidden.dtype == jnp.bfloat16
    both = [
        float(one['loss'].total / one['loss'].count) for one in (losses(m, params, example) for m in (model, exact))
    ]
    assert both[0] == pytest.approx(both[1], rel=1e-2) and both[0] != both[1]
