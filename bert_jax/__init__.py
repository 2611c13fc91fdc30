"""BERT for JAX: raw text to a pre-trained, fine-tuned encoder.

    model = bert_jax.load('runs/my_bert')
    model('Paris is the [MASK] of France.')
"""

import ctypes
import os
import sys
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


def _keep_freed_memory() -> None:
    """Has glibc keep the memory that JAX frees on CPU.

    Each step frees gigabytes of activations. By default they go back to the kernel, and the next step spends a
    tenth of its time on page faults to have them again.
    """
    if not sys.platform.startswith('linux') or not hasattr(ctypes.CDLL(None), 'mallopt'):
        return
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8  # malloc.h
    for setting, value in ((arena_max, 1), (mmap_max, 0), (trim_threshold, -1), (top_pad, 1 << 26)):
        ctypes.CDLL(None).mallopt(setting, value)


_avoid_wrong_numbers_on_cpu()
_keep_freed_memory()


def load(workdir: str):  # noqa: ANN201 - the annotation would import JAX here
    """Loads a pre-trained or fine-tuned model from its workdir; see `bert_jax.predict.Predictor`."""
    from bert_jax import predict

    return predict.load(workdir)
