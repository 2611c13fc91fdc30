"""Files on a local disk or on gs://, written so that a reader never sees half of one."""

from etils import epath


def is_remote(path: epath.Path) -> bool:
    """True for gs:// and its like: a write is atomic there, but nothing can be appended or renamed in place."""
    return '://' in str(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """The full path; `resolve` alone would take gs://bucket for a local folder."""
    path = epath.Path(path)
    return path if is_remote(path) else path.resolve()


def write_whole(path: epath.Path, text: str) -> None:
    """Writes a file that appears whole or not at all."""
    if is_remote(path):
        path.write_text(text)
    else:
        partial = path.with_name(path.name + '.partial')
        partial.write_text(text)
        partial.replace(path)


def append(path: epath.Path, text: str) -> None:
    """Adds to the end of a file; object stores cannot, so there it is written anew."""
    if is_remote(path):
        path.write_text((path.read_text() if path.exists() else '') + text)
    else:
        with path.open('a') as out:
            out.write(text)
