"""Config keys that older versions called otherwise: old commands and old workdirs keep working."""

from typing import Any

EXAMPLES = {key: f'examples.{key}' for key in ('pairing', 'masking', 'mask_rate', 'replacement', 'short_rate')}
PRETRAINING = {**EXAMPLES, 'packed': 'examples.pack_lengths'}  # fine-tuning has another `packed`
ADDED = {'examples.name': 'documents', 'examples.mixture': []}  # what there was no choice of


def override(key: str, known: list[str]) -> str:
    """A key of the command line by its present name; as it is when it has no other."""
    new = PRETRAINING.get(key, key)
    return new if key not in known and new in known else key


def current(described: dict[str, Any]) -> dict[str, Any]:
    """A run's config (config.json) by the present names."""
    if 'phases' not in described or 'examples' in described:
        return described
    found = {key: value for key, value in described.items() if key not in PRETRAINING}
    moved = {new: described[old] for old, new in PRETRAINING.items() if old in described}
    return found | {'examples': {key.removeprefix('examples.'): value for key, value in (ADDED | moved).items()}}
