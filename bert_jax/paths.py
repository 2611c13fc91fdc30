"""Files on a local disk or on gs://, written so that a reader never sees half of one."""

import contextlib
import errno
import importlib.util
import json
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import google_crc32c
from etils import epath
from etils.epath import gpath

from bert_jax.cli import UserError

LOCK = 'lock.json'  # see lock.py


def _keep_no_listings() -> None:
    """A bucket is listed anew each time: tensorstore writes to it too, and what fsspec remembers may be gone."""
    with contextlib.suppress(ImportError):
        import fsspec.config

        fsspec.config.conf.setdefault('gcs', {})['use_listings_cache'] = False


_keep_no_listings()
gpath._is_tf_installed = lambda: False  # one client for all, gcsfs, whether TensorFlow is there or not


def is_remote(path: epath.Path) -> bool:
    """True for gs:// and its like: a write is atomic there, but nothing can be appended or renamed in place.

    Raises:
      UserError: the client for gs:// is missing.
    """
    if str(path).startswith('gs://') and importlib.util.find_spec('gcsfs') is None:
        raise UserError(f'{path}: pip install gcsfs, for workdirs on gs://.')
    return '://' in str(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """The full path; `resolve` alone would take gs://bucket for a local folder."""
    path = epath.Path(path)
    return path if is_remote(path) else path.resolve()


def write_whole(path: epath.Path, content: str | bytes) -> None:
    """Writes a file that appears whole or not at all."""
    content = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        path.write_bytes(content)
    else:
        partial = path.with_name(path.name + '.partial')
        partial.write_bytes(content)
        partial.replace(path)


def read_json(file: epath.Path) -> Any:
    """A JSON file's contents."""
    try:
        return json.loads(file.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as error:
        if file.exists():
            refuse_pointer(file)
        raise UserError(f'{file}: damaged, not to be read as JSON ({error}).') from error


def refuse_pointer(file: epath.Path) -> None:
    """Refuses the few lines that Git leaves in place of a large file where Git LFS did not fetch it."""
    try:
        with file.open('rb') as content:
            start = content.read(40)
    except OSError as error:
        raise UserError(f'{file}: cannot be read ({error.strerror or error}).') from error
    if start.startswith(b'version https://git-lfs.github.com/spec/'):
        raise UserError(f'{file}: a Git LFS pointer, not the file itself; `git lfs pull` in its folder fetches it.')


def write_json(file: epath.Path, content: Any) -> None:
    """Writes a JSON file that appears whole or not at all."""
    write_whole(file, json.dumps(content, indent=2, ensure_ascii=False) + '\n')


def append(path: epath.Path, content: str | bytes) -> None:
    """Adds to the end of a file; object stores cannot, so there it is written anew.

    Raises:
      UserError: it cannot be written, on a full disk for example.
    """
    content = content.encode() if isinstance(content, str) else content
    try:
        if is_remote(path):
            path.write_bytes((path.read_bytes() if path.exists() else b'') + content)
        else:
            with path.open('ab') as out:
                out.write(content)
    except OSError as error:
        raise UserError(f'{path}: cannot be written ({error.strerror or error}). Put that right (a full disk?) and '
                        'give the same command again: it resumes from the last checkpoint.') from error


def check_new(path: str, option: str) -> pathlib.Path:
    """The local folder that is to be written; refuses one that holds something."""
    folder = check_local(path, option)
    if not is_free(folder):
        raise UserError(f'{folder}: not an empty folder; give another {option}.')
    return folder


def is_free(folder: epath.PathLike) -> bool:
    """Whether a folder is not there yet, or holds nothing (but a lock)."""
    folder = epath.Path(folder)
    return not folder.exists() or (folder.is_dir() and all(path.name == LOCK for path in folder.iterdir()))


def refuse_empty(path: str, option: str) -> None:
    """Refuses '', which would be the current folder."""
    if not path.strip():
        raise UserError(f"{option} '': a path is expected.")


def check_local(path: str, option: str) -> pathlib.Path:
    """`path` as a local one; refuses '', and gs:// and its like, of which pathlib would make a folder named `gs:`."""
    refuse_empty(path, option)
    if '://' in path:
        raise UserError(f'{option} {path}: a local path is expected; copy what is there to the bucket afterwards.')
    return pathlib.Path(path)


@contextlib.contextmanager
def whole_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new local folder to fill, which takes the name `folder` when all went well, and is gone when not."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix=f'.{folder.name}.'))
        try:
            partial = beside / folder.name
            partial.mkdir()
            yield partial
            if folder.exists():
                folder.rmdir()
            shutil.move(partial, folder)
        finally:
            _remove(beside)
    except OSError as error:
        raise UserError(f'{folder}: could not be written ({error.strerror or error}).') from error


def _remove(folder: pathlib.Path) -> None:
    """Removes a folder in which the threads of a failed write may still be at work for a moment."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)
        if not folder.exists():
            return


def masked_crc(content: bytes) -> int:
    """The CRC-32C of a part of a TensorFlow file, as TensorFlow writes it there."""
    crc = google_crc32c.value(content)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def disk_error(path: str | os.PathLike, error: OSError) -> UserError:
    """What to tell the user when a write failed."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(f'{path}: no space left on the disk; free some and run the same command again.')
    return UserError(f'{path}: cannot be written ({error.strerror}).')
