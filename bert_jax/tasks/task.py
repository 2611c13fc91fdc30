"""What a fine-tuning task is."""

import dataclasses
import hashlib
from typing import Any


@dataclasses.dataclass(frozen=True)
class Task:
    """Labelled examples, and how they are scored.

    Attributes:
      kind: a KINDS name: which target learns it, how it is encoded, decoded and scored.
      splits: examples of 'train', 'dev', ..., 'test', ...; a name that begins with dev is scored, one that begins
        with test is predicted. Test splits may be empty or missing.
      labels: the names of classes or tags; () where there are none.
      best: the score, on the first dev split, that chooses a checkpoint.
      settings: of the kind (max_query_length, document_context, ...).
      submission: split -> GLUE's name for its file of predictions.
      notes: on what was left out, in words.
    """

    kind: str
    splits: dict[str, list[Any]]
    labels: tuple[str, ...] = ()
    best: str = 'accuracy'
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    submission: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


PLACE = ('id', 'where')  # of an example: not what it says


def identity(task: Task) -> dict[str, Any]:
    """What a run on this task is about: a hash of each split that is learned from or scored, and the label names.

    Two files of the same examples in the same order have one identity, wherever they lie.
    """
    def digest(rows: list[Any]) -> str:
        found = hashlib.sha256()
        for row in rows:
            fields = [getattr(row, field.name) for field in dataclasses.fields(row) if field.name not in PLACE]
            found.update(repr(fields).encode(errors='surrogatepass'))
        return found.hexdigest()[:16]

    hashes = {split: digest(rows) for split, rows in task.splits.items() if rows and not split.startswith('test')}
    return hashes | {'labels': list(task.labels)}
