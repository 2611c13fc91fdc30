"""The input pipeline: a pure function of the step, made ahead of time, cut by host, placed on the mesh."""

import collections
import concurrent.futures
import contextlib
import functools
import importlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator

import jax
import numpy as np

Batch = dict[str, np.ndarray]
THREADS = 2
AHEAD = 4
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')  # tensorflow reads them when it is imported
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')


@functools.cache
def import_tensorflow() -> threading.Thread:
    """Begins to import tensorflow, which takes seconds, while the caller goes about its work; only once."""
    def load() -> None:
        with contextlib.suppress(ImportError):  # said by who needs it
            importlib.import_module('tensorflow')

    thread = threading.Thread(target=load)
    thread.start()
    return thread


def tf_stream(make: Callable[[int], Batch], start: int, stop: int) -> Iterator[Batch]:
    """`make(step)` for step in start..stop-1, in order, through tf.data: parallel and prefetched.

    The first ones come without it, so that the first step need not wait: tensorflow is imported during the next ones.
    Where the stream ends earlier, or is closed, that import is waited for: a process that ends within it only crashes.
    """
    begun, importing = start, None
    try:
        while start < stop:
            importing = import_tensorflow() if start >= begun + AHEAD else None
            if importing and not importing.is_alive():
                break
            yield make(start)
            start += 1
    finally:
        if importing:
            importing.join()
    if start >= stop:
        return
    import tensorflow as tf  # machines without it use `thread_stream`

    tf.config.set_visible_devices([], 'GPU')
    first = make(start)
    names, types = list(first), [tf.as_dtype(value.dtype) for value in first.values()]

    def load(step: tf.Tensor) -> dict[str, tf.Tensor]:
        arrays = tf.numpy_function(lambda s: [np.ascontiguousarray(v) for v in make(int(s)).values()],
                                   [step], types, stateful=False)
        for array, value in zip(arrays, first.values()):
            array.set_shape(value.shape)
        return dict(zip(names, arrays))

    dataset = tf.data.Dataset.range(start, stop).map(load, num_parallel_calls=THREADS, deterministic=True)
    options = tf.data.Options()
    options.threading.private_threadpool_size = THREADS
    options.autotune.enabled = False  # nothing to tune; and a stream's end would wait for the tuner's next look
    yield from dataset.with_options(options).prefetch(AHEAD).as_numpy_iterator()


def thread_stream(make: Callable[[int], Batch], start: int, stop: int) -> Iterator[Batch]:
    """The same batches from a plain thread pool, without tensorflow."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        steps = iter(range(start, stop))
        waiting = collections.deque(pool.submit(make, step) for step in itertools.islice(steps, AHEAD))
        while waiting:
            yield waiting.popleft().result()
            for step in itertools.islice(steps, 1):
                waiting.append(pool.submit(make, step))


STREAMS = {'tf': tf_stream, 'thread': thread_stream}


def host_rows(sharding: jax.sharding.Sharding, batch_size: int) -> np.ndarray:
    """The rows of a global batch that this host's devices hold, ascending."""
    places = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[place] for place in places]))


def share(batch: Batch, sharding: jax.sharding.Sharding) -> Batch:
    """This host's rows of a batch that every host has whole."""
    rows = host_rows(sharding, len(next(iter(batch.values()))))
    return {name: value[rows] for name, value in batch.items()}


def place(batch: Batch, sharding: jax.sharding.Sharding) -> dict[str, jax.Array]:
    """The host's rows as part of the global arrays on the mesh."""
    devices = sharding.num_devices
    held = len(host_rows(sharding, devices))  # of a batch with a row a device
    return {name: jax.make_array_from_process_local_data(
        sharding, np.asarray(value), (len(value) * devices // held, *value.shape[1:])) for name, value in batch.items()}


def placed_ahead(batches: Iterator[Batch], sharding: jax.sharding.Sharding) -> Iterator[dict[str, jax.Array]]:
    """Places the next batch while the device works on this one."""
    waiting: collections.deque = collections.deque()
    for batch in batches:
        waiting.append(place(batch, sharding))
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting
