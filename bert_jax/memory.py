"""What the process does with freed memory."""

import ctypes
import sys


def keep_freed() -> None:
    """Has glibc keep the memory that JAX frees on CPU: for training; what runs once does without.

    Each step frees gigabytes of activations. By default they go back to the kernel, and the next step spends a
    tenth of its time on page faults to have them again. Must be called before JAX opens its backend, whose threads
    would have pools of their own by then.
    """
    if not sys.platform.startswith('linux') or not hasattr(ctypes.CDLL(None), 'mallopt'):
        return
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8  # malloc.h
    for setting, value in ((arena_max, 1), (mmap_max, 0), (trim_threshold, -1), (top_pad, 1 << 26)):
        ctypes.CDLL(None).mallopt(setting, value)
