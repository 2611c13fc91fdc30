"""Config keys that older versions called otherwise: old commands and old workdirs keep working."""

from typing import Any

EXAMPLES = {key: f'examples.{key}' for key in ('pairing', 'masking', 'mask_rate', 'replacement', 'short_rate')}
PRETRAINING = {**EXAMPLES, 'packed': 'examples.pack_lengths'}  # fine-tuning has another `packed`
RUN = {'model.dtype': 'model.run.dtype', 'model.encoder.attention': 'model.run.kernel',
       'model.encoder.unroll': 'model.run.unroll', 'model.encoder.remat': 'model.run.remat'}
ADDED = {'examples.name': 'documents', 'examples.mixture': []}  # what there was no choice of


def override(key: str, known: list[str]) -> str:
    """A key of the command line by its present name; as it is when it has no other."""
    new = (PRETRAINING | RUN).get(key, key)
    return new if key not in known and new in known else key


def current(described: dict[str, Any]) -> dict[str, Any]:
    """A run's config (config.json) by the present names."""
    if 'model' in described and 'run' not in described['model']:
        described = described | {'model': _model(described['model'])}
    if 'phases' not in described or 'examples' in described:
        return described
    found = {key: value for key, value in described.items() if key not in PRETRAINING}
    moved = {new: described[old] for old, new in PRETRAINING.items() if old in described}
    return found | {'examples': {key.removeprefix('examples.'): value for key, value in (ADDED | moved).items()}}


def _model(model: dict[str, Any]) -> dict[str, Any]:
    """A config's `model`: how it is computed was told among what is computed, and what is read by `layer_outputs`."""
    encoder = {'sees': 'both'} | model['encoder']
    encoder.pop('layer_outputs', None)
    run = {'dtype': model['dtype'], 'kernel': encoder.pop('attention', 'xla'),
           'unroll': encoder.pop('unroll', encoder['num_layers']), 'remat': encoder.pop('remat', 'none')}
    return {key: value for key, value in model.items() if key != 'dtype'} | {'encoder': encoder, 'run': run}
