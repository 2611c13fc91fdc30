"""Files of tensors as others keep them: safetensors and PyTorch's pickles, whole or in shards; no code in them runs."""

import functools
import pathlib
import pickle
import re
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from bert_jax import cli, paths
from bert_jax.cli import UserError

NAMES = ('model.safetensors', 'pytorch_model.bin')  # whole, or NAME.index.json and shards; the first there is read
SHARD = re.compile(r'[\w.-]{1,200}\.(safetensors|bin)')  # a file of the same folder
FLOATS = {'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16', 'F64': 'float64'}  # safetensors' names -> NumPy's


class Stored(NamedTuple):
    """One array in a file.

    Attributes:
      dtype: NumPy's name of it; another one where it is no float, and cannot be read.
      shape: its shape.
      read: gives the array.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def open_folder(folder: pathlib.Path) -> dict[str, Stored]:
    """All tensors of a folder by their names.

    Raises:
      UserError: no weights there; a file that is damaged, a Git LFS pointer, or would run code; shards that are
        missing, elsewhere, or not those of their index.
    """
    for name in NAMES:
        if (folder / name).exists():
            return _open(folder / name)
        if (folder / f'{name}.index.json').exists():
            return _open_shards(folder / f'{name}.index.json')
    raise UserError(f'{folder}: no weights there; expected {" or ".join(NAMES)}, or shards with their index.')


def save(arrays: dict[str, np.ndarray], file: pathlib.Path) -> None:
    """Writes a safetensors file."""
    try:
        safetensors.numpy.save_file(arrays, file, metadata={'format': 'pt'})
    except safetensors.SafetensorError as error:
        raise UserError(f'{file.name}: could not be written ({error}).') from error


def _open_shards(index: pathlib.Path) -> dict[str, Stored]:
    shards = paths.read_json(index)
    shards = shards.get('weight_map') if isinstance(shards, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise UserError(f'{index}: a "weight_map" of tensors and their shards is expected.')
    for shard in shards.values():
        if not SHARD.fullmatch(str(shard)):
            raise UserError(f'{index}: {shard!r} is not the name of a file in the same folder (.safetensors or .bin).')
    found, where = {}, {}
    for shard in sorted(set(shards.values())):
        file = index.parent / shard
        if not file.exists():
            raise UserError(f'{file}: this shard is missing; {index.name} names it.')
        for name, stored in _open(file).items():
            if name in where:
                raise UserError(f'{index}: {name} is in two shards, {where[name]} and {shard}.')
            found[name], where[name] = stored, shard
    for name, shard in shards.items():
        if where.get(name) != shard:
            raise UserError(f'{index}: {shard} is named as the shard of {name}, which is in {where.get(name, "none")}.')
    return found


def _open(file: pathlib.Path) -> dict[str, Stored]:
    paths.refuse_pointer(file)
    return (_open_safetensors if file.suffix == '.safetensors' else _open_pickle)(file)


def _open_safetensors(file: pathlib.Path) -> dict[str, Stored]:
    def read(name: str) -> np.ndarray:
        with safetensors.safe_open(file, 'numpy') as opened:  # anew each time: what was read leaves memory again
            return opened.get_tensor(name)

    try:
        with safetensors.safe_open(file, 'numpy') as opened:
            views = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
            return {name: Stored(FLOATS.get(view.get_dtype(), view.get_dtype()), tuple(view.get_shape()),
                                 functools.partial(read, name)) for name, view in views.items()}
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f'{file}: damaged or cut short ({cli.first_line(error)[:150]}).') from error


def _open_pickle(file: pathlib.Path) -> dict[str, Stored]:
    """The tensors of a pytorch_model.bin."""
    try:
        import torch
    except ImportError as error:
        raise UserError(f'{file}: reading it needs PyTorch (pip install torch --index-url '
                        'https://download.pytorch.org/whl/cpu); model.safetensors does not.') from error
    try:
        state = torch.load(file, map_location='cpu', weights_only=True, mmap=_is_mappable(file))
    except pickle.UnpicklingError as error:
        raise UserError(f'{file}: refused, it holds more than tensors and would run code '
                        f'({cli.first_line(error)[:150]}).') from error
    except (RuntimeError, OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f'{file}: damaged or cut short ({cli.first_line(error)[:150]}).') from error
    named = state.items() if isinstance(state, dict) else ()
    tensors = {name: x for name, x in named if isinstance(name, str) and isinstance(x, torch.Tensor)}
    if not tensors:
        keys = f' with {", ".join(repr(key) for key, _ in list(named)[:5])}' if named else ''
        raise UserError(f'{file}: names and their tensors are expected, it holds a {type(state).__name__}{keys}.')

    def read(name: str) -> np.ndarray:
        tensor = tensors[name].detach().contiguous()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    def dtype(tensor: torch.Tensor) -> str:
        plain = tensor.layout == torch.strided and tensor.device.type == 'cpu'
        return str(tensor.dtype).removeprefix('torch.') if plain else f'{tensor.layout} on {tensor.device}'

    return {name: Stored(dtype(tensor), tuple(tensor.shape), functools.partial(read, name))
            for name, tensor in tensors.items()}


def _is_mappable(file: pathlib.Path) -> bool:
    """Whether a pickle's tensors lie in it as they do in memory: not when compressed, nor before PyTorch 1.6."""
    with file.open('rb') as content:
        start = content.read(4)
    if start[:1] == b'\x80':  # a pickle, which is what was written before
        return False
    if start[:2] != b'PK':
        raise UserError(f'{file}: not a file of PyTorch.')
    with zipfile.ZipFile(file) as archive:
        return all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
