"""One process at a time in a folder.

FOLDER/lock.json says whose it is: host, process, command. On a local disk the operating system locks that file, and the
lock ends with its process, however that ends. On gs:// and on disks that several hosts share the file is a lease:
renewed each minute, stale after five. A stale lease is taken over, and so is one's own: that of a dead process of this
host, or of the same BERT_JAX_RUN (the slice that launch/tpu.sh restarts a run on).
"""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import IO, Any

from etils import epath

from bert_jax import cli, paths
from bert_jax.cli import UserError

NAME = paths.LOCK
RENEW_SECONDS, STALE_SECONDS = 60, 300
SETTLE_SECONDS = 1.0  # two that begin at once on gs:// see each other by then
LOCAL = {'ext2', 'ext3', 'ext4', 'xfs', 'btrfs', 'zfs', 'f2fs', 'tmpfs', 'overlay', 'ramfs'}  # kinds of file systems


@contextlib.contextmanager
def hold(folder: epath.PathLike) -> Iterator[None]:
    """Makes the folder this process's own until the end of the block; it is created, and gone again if left empty.

    Raises:
      UserError: another process has it; says whose it is.
    """
    folder = epath.Path(folder)
    mine = {'id': uuid.uuid4().hex, 'host': socket.gethostname(), 'process': os.getpid(),
            'run': os.environ.get('BERT_JAX_RUN', ''), 'command': ' '.join(sys.argv), 'since': time.time()}
    with contextlib.ExitStack() as held:
        if paths.is_remote(folder):
            file: _OnDisk | _Remote = _Remote(folder / NAME)
        else:
            if not folder.exists():
                held.callback(_remove_if_empty, pathlib.Path(folder))
            folder.mkdir(parents=True, exist_ok=True)
            file = held.enter_context(contextlib.closing(_OnDisk(pathlib.Path(folder) / NAME)))
        other = file.read()
        if other and file.is_lease and not _is_over(other, mine):
            raise _in_use(folder, other)
        file.write(mine | {'renewed': time.time()})
        held.callback(file.remove)
        if file.is_lease:
            time.sleep(SETTLE_SECONDS)
            if (other := file.read()).get('id') != mine['id']:
                held.pop_all()
                raise _in_use(folder, other)
            ended = threading.Event()
            threading.Thread(target=_renew, args=(folder, file, mine, ended), daemon=True).start()
            held.callback(ended.set)
        yield


def _remove_if_empty(folder: pathlib.Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


class _OnDisk:
    """The file on a disk, locked as long as it is open; written in place, since the lock is of this file."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path, self.is_lease = path, _kind_of_disk(path.parent) not in LOCAL
        self._file = self._locked()

    def _locked(self) -> IO[str]:
        while True:
            file = open(self._path, 'a+')  # noqa: SIM115 - closed by `close`
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.exists(self._path) and os.path.samestat(os.fstat(file.fileno()), os.stat(self._path)):
                    return file
                file.close()  # removed by who had it, just now
            except BlockingIOError as error:
                raise _in_use(self._path.parent, _parsed(self._path.read_text())) from error
            except OSError:  # a disk without locks
                self.is_lease = True
                return file

    def read(self) -> dict[str, Any]:
        self._file.seek(0)
        return _parsed(self._file.read())

    def write(self, content: dict[str, Any]) -> None:
        self._file.truncate(0)
        self._file.write(json.dumps(content))
        self._file.flush()

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        self._file.close()


class _Remote:
    """The file in a bucket."""

    is_lease = True

    def __init__(self, path: epath.Path) -> None:
        self._path = path

    def read(self) -> dict[str, Any]:
        return _parsed(self._path.read_text()) if self._path.exists() else {}

    def write(self, content: dict[str, Any]) -> None:
        self._path.write_text(json.dumps(content))

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def _parsed(text: str) -> dict[str, Any]:
    """A lock's contents; {} of one that is being written."""
    with contextlib.suppress(ValueError):
        content = json.loads(text)
        return content if isinstance(content, dict) else {}
    return {}


def _is_over(other: dict[str, Any], mine: dict[str, Any]) -> bool:
    """Whether a lease binds nobody any more."""
    if time.time() - other.get('renewed', 0) > STALE_SECONDS or (mine['run'] and other.get('run') == mine['run']):
        return True
    if other.get('host') != mine['host'] or other.get('process') == mine['process']:
        return False
    try:
        os.kill(other['process'], 0)
        return False
    except ProcessLookupError:
        return True
    except PermissionError:
        return False


def _renew(folder: epath.Path, file: _OnDisk | _Remote, mine: dict[str, Any], ended: threading.Event) -> None:
    """Renews the lease until the block has ended; ends the process when another has taken the folder over."""
    while not ended.wait(RENEW_SECONDS):
        try:
            other = file.read()
            if other and other.get('id') != mine['id'] and not ended.is_set():
                print(f'error: {folder}: taken over by process {other.get("process")} on {other.get("host")}, since '
                      'this one could not renew its lease for five minutes.', file=sys.stderr, flush=True)
                os._exit(2)
            file.write(mine | {'renewed': time.time()})
        except Exception as error:  # a network's: the next minute may be better
            cli.note(f'{folder}: its lease could not be renewed ({cli.first_line(error)[:200]}).')


def _in_use(folder: epath.PathLike, other: dict[str, Any]) -> UserError:
    began = datetime.datetime.fromtimestamp(other.get('since', time.time()))
    left = max(1, round((other.get('renewed', time.time()) + STALE_SECONDS - time.time()) / 60))
    return UserError(
        f'{folder}: in use by process {other.get("process", "?")} on {other.get("host", "?")}, since '
        f'{began:%Y-%m-%d %H:%M} ({other.get("command", "?")[:200]}). Two would damage it: wait for that one, or stop '
        f'it. If its machine is gone, the same command works in {left} minutes.')


def _kind_of_disk(folder: pathlib.Path) -> str:
    """The file system's kind that a folder lies on, as the kernel names it; 'ext4' where it says nothing of any."""
    mounts = pathlib.Path('/proc/mounts')
    if not mounts.exists():
        return 'ext4'
    found = [line.split()[1:3] for line in mounts.read_text().splitlines()]
    inside = [(place, kind) for place, kind in found if folder.resolve().is_relative_to(place)]
    return max(inside, key=lambda one: len(one[0]), default=('/', 'ext4'))[1]
