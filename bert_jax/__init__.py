"""BERT for JAX: raw text to a pre-trained, fine-tuned encoder.

    model = bert_jax.load('runs/my_bert')
    model('Paris is the [MASK] of France.')
"""

import os
from importlib import metadata


def _avoid_wrong_numbers_on_cpu() -> None:
    """Turns off the CPU fusion that makes jaxlib >= 0.10.2 return wrong numbers (jax-ml/jax#39103).

    Must run before JAX opens its backend. Older versions do not know the flag and would abort on it.
    """
    flag = '--xla_cpu_experimental_ynn_fusion_type='
    version = tuple(int(part) for part in metadata.version('jaxlib').split('.')[:3])
    flags = os.environ.get('XLA_FLAGS', '')
    if version >= (0, 10, 2) and flag not in flags:
        os.environ['XLA_FLAGS'] = f'{flags} {flag}'.strip()


_avoid_wrong_numbers_on_cpu()


def load(path: str):  # noqa: ANN201 - the annotation would import JAX here
    """Loads a model from a workdir, Hugging Face folder or name, or TF1 folder; see `bert_jax.predict.Predictor`."""
    from bert_jax import predict

    return predict.load(path)
