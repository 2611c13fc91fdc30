"""How long a run takes to its first step, and with what: import, data, restore, compile, first step."""

import functools
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax

COMPILING = '/jax/core/compile/'  # JAX's own events: tracing, lowering, compiling or finding in the cache


class Startup:
    """A clock that began with the process.

    Attributes:
      parts: name -> seconds.
    """

    def __init__(self) -> None:
        self.parts: dict[str, float] = {'import' if jax.process_count() == 1 else 'import and joining': _age()}
        self._last, self._compiling, self._running = time.monotonic(), 0.0, True
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, seconds: float, **_: Any) -> None:
        if self._running and event.startswith(COMPILING):
            self._compiling += seconds

    def done(self, part: str) -> None:
        """What was done since the last call was `part`; compiling is kept apart."""
        now = time.monotonic()
        spent = now - self._last
        self.parts[part] = self.parts.get(part, 0.0) + max(0.0, spent - self._compiling)
        self.parts['compile'] = self.parts.get('compile', 0.0) + min(spent, self._compiling)
        self._last, self._compiling = now, 0.0

    def first(self, step: Callable) -> Callable:
        """A step whose first call is waited for, and which then says what it all took."""
        @functools.wraps(step)
        def timed(*args: Any) -> Any:
            result = step(*args)
            if self._running:
                jax.block_until_ready(result)
                self.done('first step')
                self._running = False
                print(self, flush=True)
            return result

        return timed

    def __str__(self) -> str:
        """One line for people."""
        parts = ', '.join(f'{name} {seconds:.1f}' for name, seconds in self.parts.items())
        return f'first step after {sum(self.parts.values()):.1f} s: {parts}'


def _age() -> float:
    """Seconds since this process began; 0 where the system does not say."""
    stat, uptime = pathlib.Path('/proc/self/stat'), pathlib.Path('/proc/uptime')
    if not (stat.exists() and uptime.exists()):
        return 0.0
    began = int(stat.read_text().rpartition(')')[2].split()[19]) / os.sysconf('SC_CLK_TCK')
    return float(uptime.read_text().split()[0]) - began
