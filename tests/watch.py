"""What happens inside a model: what its dropout drops, and which branch its choices by platform take."""

import contextlib

import flax.linen as nn
import jax
import numpy as np

from bert_jax.model.layers import Dropout


@contextlib.contextmanager
def forced(monkeypatch, branch, taken=None):
    """Within it choices by platform take their `cpu` branch, or the `default` of all others; `taken` counts them."""
    def choose(*args, default, **of_platforms):
        if taken is not None:
            taken.append(branch)
        return (of_platforms['cpu'] if branch == 'cpu' else default)(*args)

    with monkeypatch.context() as patch:
        patch.setattr(jax.lax, 'platform_dependent', choose)
        yield


@contextlib.contextmanager
def dropout():
    """Yields {path of a dropout: [(what came in, what came out, rate) of each call]}, filled while the model runs."""
    sites = {}

    def record(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if isinstance(context.module, Dropout):
            path, rate = '/'.join(context.module.path), context.module.rate
            jax.debug.callback(lambda a, b: sites.setdefault(path, []).append(
                (np.asarray(a), np.asarray(b), rate)), args[0], out)
        return out

    with nn.intercept_methods(record):
        yield sites
    jax.effects_barrier()


SITES = {'embeddings/dropout': 'embeddings', 'encoder/layers/attention/Dropout_0': 'probabilities',
         'encoder/layers/Dropout_0': 'attention', 'encoder/layers/Dropout_1': 'mlp'}  # as plain.encode calls them


def factors(sites, names=SITES):
    """What `dropout` yields as `plain` wants it: 0 where an entry was dropped, else 1 / (1 - rate)."""
    return {name: [(out != 0) / (1 - rate) for _, out, rate in sites[path]] for path, name in names.items()}
