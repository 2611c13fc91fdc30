"""Many processes, one program: how they find each other, agree, and stop together.

A process is told of the others by --coordinator, --num_processes and --process_id, or by JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES and JAX_PROCESS_ID; `--coordinator auto` asks the TPU's metadata, Slurm or Open MPI. Process 0 is the
coordinator, alone prints and writes logs. When a process or its machine dies, the others end within HEARTBEAT_SECONDS;
when one lives but does not go on (a disk or a network that hangs), all end within STALL_SECONDS.

Exit codes: 0 finished; 1 a fault in the program; 2 something the user can put right; 75 stopped on request (SIGTERM, a
preemption notice) with a checkpoint saved, or another process is gone: give the same command again.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from bert_jax import cli
from bert_jax.cli import UserError

JOIN_SECONDS = 300       # for all processes to appear
HEARTBEAT_SECONDS = 60   # a process that is silent for so long is taken for dead
STALL_SECONDS = 1800     # to the first step and between two, with the evaluation and checkpoint there may be between
GONE = re.compile('gloo|nccl|heartbeat|coordination|connection|unavailable|socket|aborted|incarnation|deadline|'
                  'remote process|barrier', re.IGNORECASE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--coordinator and its like."""
    group = parser.add_argument_group('many processes', 'one process a host; see docs/pods.md')
    group.add_argument('--coordinator', metavar='HOST:PORT', default=os.environ.get('JAX_COORDINATOR_ADDRESS', ''),
                       help='where process 0 listens; auto: from the TPU, Slurm or Open MPI (default: one process)')
    group.add_argument('--num_processes', type=int, metavar='N', default=os.environ.get('JAX_NUM_PROCESSES'))
    group.add_argument('--process_id', type=int, metavar='I', default=os.environ.get('JAX_PROCESS_ID'))
    group.add_argument('--join_seconds', type=int, metavar='S', default=JOIN_SECONDS,
                       help=f'how long to wait for the others at the start (default: {JOIN_SECONDS})')
    group.add_argument('--heartbeat_seconds', type=int, metavar='S', default=HEARTBEAT_SECONDS,
                       help=f'a process silent for so long is taken for dead (default: {HEARTBEAT_SECONDS})')
    group.add_argument('--stall_seconds', type=int, metavar='S', default=STALL_SECONDS,
                       help=f'all end when nothing has come for so long, a step say (default: {STALL_SECONDS})')


def join(args: argparse.Namespace) -> None:
    """Waits until all processes are there. Before JAX opens its backend; does nothing for one process.

    Raises:
      UserError: an address, number or id that cannot be, nobody at the address, processes missing.
    """
    if not args.coordinator:
        if args.num_processes not in (None, 1) or args.process_id not in (None, 0):
            raise UserError('--num_processes and --process_id need --coordinator HOST:PORT, or auto.')
        return
    known = {}
    if args.coordinator != 'auto':
        known = _check_address(args)
    late = threading.Timer(args.join_seconds, _too_late, (args,))
    late.daemon = True
    late.start()  # JAX itself would abort with a stack of C++
    try:
        jax.distributed.initialize(**known, initialization_timeout=args.join_seconds + 30,
                                   heartbeat_timeout_seconds=args.heartbeat_seconds)
    except (RuntimeError, ValueError) as error:
        if 'coordinator_address should be defined' in str(error):
            raise UserError('--coordinator auto: no TPU slice, Slurm or Open MPI is found here; give HOST:PORT, '
                            '--num_processes N and --process_id I.') from error
        if 'Failed to start RPC server' in str(error):
            raise UserError(f'--coordinator {args.coordinator}: cannot listen there; is the port taken, by an earlier '
                            'run say?') from error
        if GONE.search(str(error)):  # the others have not noticed yet that this process had gone
            _say_and_exit(f'--coordinator {args.coordinator}: {cli.first_line(error)[:200]}. Give the same command '
                          'again.', cli.RESTART)
        raise UserError(f'--coordinator {args.coordinator}: {cli.first_line(error)}') from error
    late.cancel()
    threading.Thread(target=_watch, args=(args.stall_seconds,), daemon=True).start()
    if jax.process_index():
        sys.stdout = open(os.devnull, 'w')  # noqa: SIM115 - as long as the process lives


def _too_late(args: argparse.Namespace) -> None:
    address = args.coordinator
    with contextlib.suppress(ImportError, AttributeError):
        from jax._src.distributed import global_state  # what `auto` has found; nothing public says it

        address = global_state.coordinator_address or address
    _say_and_exit(f'Not all processes came together within {args.join_seconds} s (coordinator {address}): is the same '
                  'command running on every host, each with a --process_id of its own?', 2)


def _check_address(args: argparse.Namespace) -> dict[str, str | int]:
    host, _, port = args.coordinator.rpartition(':')
    if not host or not port.isdigit():
        raise UserError(f'--coordinator {args.coordinator}: HOST:PORT is expected, or auto.')
    if args.num_processes is None or args.process_id is None:
        raise UserError('--coordinator HOST:PORT needs --num_processes N and --process_id I.')
    if not 0 <= args.process_id < args.num_processes:
        raise UserError(f'--process_id {args.process_id}: 0 to {args.num_processes - 1} are expected, of '
                        f'--num_processes {args.num_processes}.')
    if args.process_id:
        _wait_for(host, int(port), args.join_seconds)
    return {'coordinator_address': args.coordinator, 'num_processes': args.num_processes,
            'process_id': args.process_id}


def _wait_for(host: str, port: int, seconds: float) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=2).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(f'No coordinator answers at {host}:{port} ({error.strerror or error}; tried for '
                                f'{seconds} s): is process 0 running there, and is the port open?') from error
        time.sleep(0.3)


def meet(name: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agree(facts: Mapping[str, str]) -> None:
    """Refuses to go on when the processes do not say the same of any fact; all of them raise the same error.

    Raises:
      UserError: names each fact that differs, and two processes that disagree.
    """
    if jax.process_count() == 1:
        return
    everyone = [json.loads(text) for text in _gather(json.dumps(dict(facts)))]
    different = []
    for name in sorted(set().union(*everyone)):
        said = [one.get(name, 'nothing') for one in everyone]
        other = next((i for i, one in enumerate(said) if one != said[0]), None)
        if other is not None:
            different.append(f'{name} is {said[0]} on process 0, {said[other]} on process {other}')
    if different:
        raise UserError(f'The processes do not agree: {"; ".join(different)}.')


def _gather(text: str) -> list[str]:
    """What every process says, in their order."""
    mine = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(mine)))
    padded = np.pad(mine, (0, int(sizes.max()) - len(mine)))
    return [bytes(row[:size]).decode() for row, size in zip(multihost_utils.process_allgather(padded), sizes)]


def stop_notice() -> Callable[[int], bool]:
    """step -> whether to save and stop now: at the same step on all processes, once any of them was told to.

    Told by SIGTERM, or by the notice that the cloud gives before it takes a machine away.
    """
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point
    told = []

    def listen(*_: Any) -> None:
        told.append(True)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends it at once

    if threading.current_thread() is threading.main_thread():  # Python allows no other to listen
        signal.signal(signal.SIGTERM, listen)
    return lambda step: bool(told)


_last_sign = [0.0]  # when this process last went on


def _watch(seconds: float) -> None:
    """Ends the process when there was no progress for so long, from joining to the end.

    A process whose main thread hangs still has a heartbeat, so the others would wait for it without end.
    """
    _last_sign[0] = time.monotonic()
    while time.monotonic() - _last_sign[0] <= seconds:
        time.sleep(min(seconds / 10, 10))
    _say_and_exit(f'no progress for {seconds:g} s (--stall_seconds): a process hangs, here or elsewhere. Give '
                  'the same command again on all of them: it resumes.', cli.RESTART)


def watched(batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches, each a sign of progress of this process."""
    for batch in batches:
        _last_sign[0] = time.monotonic()
        yield batch
    _last_sign[0] = time.monotonic()


def others_are_gone(error: Exception) -> bool:
    """Whether an error is that of a broken connection to other processes."""
    return jax.process_count() > 1 and bool(GONE.search(str(error)))


@contextlib.contextmanager
def exit_when_others_are_gone() -> Iterator[None]:
    """Of many processes: a broken connection is one line and exit code 75, a UserError code 2, any other error code 1.

    At once: on the usual way out JAX would wait five minutes for the others, who wait for this one.
    """
    try:
        yield
    except cli.Stopped:  # all stop together
        raise
    except Exception as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, UserError):
            _say_and_exit(' '.join(str(error).split()), 2)
        if isinstance(error, (ValueError, RuntimeError)) and others_are_gone(error):
            _say_and_exit(f'another process is gone ({cli.first_line(error)[:200]}). Give the same command again on '
                          'all of them: it resumes.', cli.RESTART)
        traceback.print_exc()
        _say_and_exit(f'{type(error).__name__} (above); the other processes end with this one.', 1)


def _say_and_exit(message: str, code: int) -> None:
    """At once: the usual way out would wait for the missing."""
    sys.stdout.flush()
    print(f'error: {message}', file=sys.stderr, flush=True)
    os._exit(code)
