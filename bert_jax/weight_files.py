"""Files of weights in a Hugging Face folder: model.safetensors, pytorch_model.bin, and both in shards with an index."""

import pathlib
import pickle
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors

from bert_jax import cli, paths
from bert_jax.cli import UserError

FLOATS = {'F64', 'F32', 'F16', 'BF16'}  # safetensors' names
TORCH_FLOATS = {'float64', 'float32', 'float16', 'bfloat16'}
Readers = dict[str, Callable[[str], np.ndarray]]  # a tensor's name -> what reads it


def open_folder(folder: pathlib.Path) -> Readers:
    """The names of all tensors, each with the function that reads it.

    Raises:
      UserError: no weights, files that are missing or damaged or no weights, tensors of integers or 8-bit floats, an
        index that does not fit its shards.
    """
    index = next((file for file in (folder / 'model.safetensors.index.json', folder / 'pytorch_model.bin.index.json')
                  if file.exists()), None)
    if (folder / 'model.safetensors').exists():
        return _open_file(folder / 'model.safetensors')
    if index:
        return _open_shards(folder, index)
    if (folder / 'pytorch_model.bin').exists():
        return _open_file(folder / 'pytorch_model.bin')
    raise UserError(f'{folder}: no weights there; expected model.safetensors, pytorch_model.bin, '
                    'or one of them in shards with an index.')


def _open_shards(folder: pathlib.Path, index: pathlib.Path) -> Readers:
    content = paths.read_json(index)
    shard_of = content.get('weight_map') if isinstance(content, dict) else None
    if not isinstance(shard_of, dict) or not all(isinstance(name, str) for name in shard_of.values()):
        raise UserError(f'{index}: no weight_map of tensors to files.')
    readers, home = {}, {}
    for name in sorted(set(shard_of.values())):
        if pathlib.PurePath(name).name != name:
            raise UserError(f'{index}: names the shard {name!r}, which is not a file of that folder.')
        if not (folder / name).exists():
            raise UserError(f'{folder / name}: this shard is missing; {index.name} names it.')
        for tensor, read in _open_file(folder / name).items():
            if tensor in home:
                raise UserError(f'{folder}: {tensor} is in two shards, {home[tensor]} and {name}.')
            readers[tensor], home[tensor] = read, name
    for tensor, name in shard_of.items():
        if home.get(tensor) != name:
            raise UserError(f'{folder}: {index.name} says that {tensor} is in {name}; it is in '
                            f'{home.get(tensor, "no shard")}.')
    return readers


def _open_file(file: pathlib.Path) -> Readers:
    paths.check_no_pointer(file)
    return (_open_safetensors if file.suffix == '.safetensors' else _open_pickle)(file)


def _open_safetensors(file: pathlib.Path) -> Readers:
    def get(name: str) -> np.ndarray:
        with safetensors.safe_open(file, 'numpy') as opened:  # anew each time: what was read leaves memory again
            _check_float(file, name, opened.get_slice(name).get_dtype(), FLOATS)
            return opened.get_tensor(name)

    try:
        with safetensors.safe_open(file, 'numpy') as opened:
            return dict.fromkeys(opened.keys(), get)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f'{file}: damaged or cut short ({error}).') from error


def _open_pickle(file: pathlib.Path) -> Readers:
    """The tensors of a pytorch_model.bin; nothing in it can run."""
    try:
        import torch
    except ImportError as error:
        raise UserError(f'{file}: reading it needs PyTorch (pip install torch --index-url '
                        'https://download.pytorch.org/whl/cpu); model.safetensors does not.') from error
    try:
        state = torch.load(file, map_location='cpu', weights_only=True, mmap=_is_plain_zip(file))
    except pickle.UnpicklingError as error:
        raise UserError(f'{file}: refused, it holds more than tensors and would run code '
                        f'({cli.first_line(error)[:150]}).') from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise UserError(f'{file}: damaged or cut short ({cli.first_line(error)[:150]}).') from error

    def get(name: str) -> np.ndarray:
        tensor = state[name]
        _check_float(file, name, str(tensor.dtype).removeprefix('torch.'), TORCH_FLOATS)
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()

    return dict.fromkeys(state, get)


def _is_plain_zip(file: pathlib.Path) -> bool:
    """Whether its tensors lie in it as they are; not in files of PyTorch before 1.6, nor in ones packed once more."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())


def _check_float(file: pathlib.Path, name: str, dtype: Any, known: set[str]) -> None:
    if dtype not in known:
        raise UserError(f'{file}: {name} is {dtype}; float32, float16, bfloat16 and float64 are read, quantized '
                        'weights are not.')
