"""The quickstart's pre-training: BERT-tiny on about half a million tokens, a few minutes on two cores.

    python -m bert_jax.pretrain --config configs/quickstart.py --config.store=STORE --workdir W

Without dropout: a model this small, trained this briefly, has nothing to forget.
"""

import pathlib

from bert_jax import cli

PRETRAIN = pathlib.Path(__file__).with_name('pretrain.py')


def get_config():
    c = cli.load_config(f'{PRETRAIN}:tiny', [])
    c.phases = ((1500, 128, 32), (150, 512, 16))
    c.model.embeddings.dropout_rate = 0.0
    c.schedule.peak = 1e-3  # at 2e-3 it stays at the unigram model
    c.schedule.warmup_share = 0.1
    c.log_every = 50
    c.eval_every = c.save_every = 500
    c.eval_examples = 512
    return c
