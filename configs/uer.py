"""Encoders and targets other than BERT's (Zhao et al. 2019, UER: An Open-Source Toolkit for Pre-training Models).

    python -m bert_jax.pretrain --config configs/uer.py:lstm,lm --config.store=STORE --workdir W

The argument is an encoder and a target: lstm,lm (an LSTM predicts each token from those before it), transformer,lm (the
same by attention to the left, as GPT).
lstm,lm on 65 MB of English Wikipedia, vocabulary of 8,192: held out 4.85 nats after 31 minutes on one core, where the
unigram model is at 6.85 (docs/log.md). transformer,lm has not been run at this size.
"""

import pathlib

from ml_collections import ConfigDict

from bert_jax import cli

PRETRAIN = pathlib.Path(__file__).with_name('pretrain.py')
ENCODERS, TARGETS = ('lstm', 'transformer'), ('lm',)


def get_config(arg='lstm,lm'):
    encoder, _, target = arg.partition(',')
    if encoder not in ENCODERS or target not in TARGETS:
        raise ValueError(f'unknown {arg!r}; encoders: {", ".join(ENCODERS)}; targets: {", ".join(TARGETS)}')
    c = cli.load_config(f'{PRETRAIN}:tiny,no_nsp,packed', [])
    c.phases = ((3000, 64, 32),)
    c.examples.masking = 'none'
    c.model.embeddings.dropout_rate = 0.0
    c.model.targets = ConfigDict({'lm': {'vocab_size': c.model.embeddings.get_ref('vocab_size'), 'weight': 1.0}})
    if encoder == 'lstm':
        c.model.run.unroll = 1
        c.model.encoder = ConfigDict({'name': 'lstm', 'num_layers': 1, 'hidden_size': 256,  # embeddings have 128
                                      'dropout_rate': 0.0})
    else:
        c.model.encoder.sees = 'left'
    c.schedule.peak = 2e-3
    c.schedule.warmup_share = 0.1
    c.eval_every = c.save_every = 500
    c.eval_examples = 512
    return c
