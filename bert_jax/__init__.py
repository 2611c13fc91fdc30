"""BERT for JAX: raw text to a pre-trained, fine-tuned encoder.

    model = bert_jax.load('runs/my_bert')
    model('Paris is the [MASK] of France.')
"""

import hashlib
import os
import pathlib
import re
import sys
import warnings
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
        bridge = sys.modules.get('jax._src.xla_bridge')
        if bridge and bridge.backends_are_initialized():
            warnings.warn('JAX has opened its backend before `import bert_jax`, which comes too late to turn off a '
                          'fusion that gives wrong numbers on CPU: import bert_jax first.', stacklevel=3)


def _threads_for_virtual_devices() -> None:
    """Gives XLA four threads a virtual device (NPROC; --xla_force_host_platform_device_count).

    On CPU a collective holds a thread until all devices have come to it, and devices may come to two that do not depend
    on each other in different orders: with a thread a device they wait for each other until XLA aborts the process.
    """
    count = re.search(r'--xla_force_host_platform_device_count=(\d+)', os.environ.get('XLA_FLAGS', ''))
    if count:
        os.environ.setdefault('NPROC', str(4 * int(count.group(1))))


def _keep_compiled_programs() -> None:
    """Compiles a program once for all runs on this kind of processor; JAX_COMPILATION_CACHE_DIR moves them."""
    processor = pathlib.Path('/proc/cpuinfo')
    about = processor.read_text().splitlines() if processor.exists() else []
    features = next((line for line in about if line.startswith(('flags', 'Features'))), '')
    kind = hashlib.sha256(features.encode()).hexdigest()[:8]
    home = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache')
    os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(home / 'bert_jax' / f'xla-{kind}'))


_avoid_wrong_numbers_on_cpu()
_threads_for_virtual_devices()
_keep_compiled_programs()


def load(path: str):  # noqa: ANN201 - the annotation would import JAX here
    """Loads a model from a workdir, Hugging Face folder or name, or TF1 folder; see `bert_jax.predict.Predictor`."""
    from bert_jax import predict

    return predict.load(path)
