"""The command line's manners: one-line errors with exit code 2, clean --help, config files with overrides."""

import argparse
import contextlib
import difflib
import functools
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from bert_jax import renamed

RESTART = 75  # exit code: nothing is wrong, the same command resumes (EX_TEMPFAIL)


class UserError(Exception):
    """Something the user can put right: what is wrong, where, and what would be right, in one line."""


class Stopped(Exception):
    """The run was told to stop, and has saved where it is."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not in a registry or a table, nearest known names first."""
    known = sorted(map(str, known))
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    rest = [k for k in known if k not in near]
    return UserError(f'Unknown {kind} {name!r}; known: {", ".join(near + rest)}.')


def first_line(error: Exception) -> str:
    """What an error of a library says first, its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def last_line(error: Exception) -> str:
    """What it says last."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def choose(kind: str, registry: dict[str, Any], name: str) -> Any:
    """`registry[name]`, or an error that lists the choices."""
    if name not in registry:
        raise unknown(kind, name, registry)
    return registry[name]


BELOW_ONE = math.nextafter(1, 0)
RANGES = {'seed': (0, 2**32 - 1), 'log_every': (1, math.inf), 'keep_checkpoints': (1, math.inf),  # of every config
          'accumulation': (1, math.inf), 'schedule.peak': (0, math.inf), 'schedule.warmup_share': (0, 1),
          'optimizer.b1': (0, BELOW_ONE), 'optimizer.b2': (0, BELOW_ONE), 'optimizer.eps': (1e-37, math.inf),
          'optimizer.weight_decay': (0, math.inf), 'optimizer.clip_norm': (0, math.inf)}


def check_ranges(config: ConfigDict, ranges: dict[str, tuple[float, float]]) -> None:
    """Refuses numbers of a config, by their keys, that are outside [lowest, highest]."""
    for key, (lowest, highest) in ranges.items():
        check_range(key, functools.reduce(lambda node, part: node[part], key.split('.'), config), lowest, highest)


def check_range(key: str, value: float, lowest: float, highest: float) -> None:
    """Refuses a config's number that is outside [lowest, highest]."""
    if not lowest <= value <= highest or math.isinf(value):
        expected = f'{lowest:g} or more' if highest == math.inf else f'{lowest:g} to {highest:g}'
        expected = f'{lowest:g} or more, and less than 1,' if highest == BELOW_ONE else expected
        raise UserError(f'--config.{key}={value}: {expected} is expected.')


def parser(doc: str, **kwargs: Any) -> argparse.ArgumentParser:
    """An argument parser whose help is the module's docstring."""
    program = f'python -m bert_jax.{os.path.basename(sys.argv[0]).removesuffix(".py")}'
    return argparse.ArgumentParser(
        prog=kwargs.pop('prog', program), description=doc, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)


def parse_with_config(
    arguments: argparse.ArgumentParser, argv: list[str] | None = None
) -> tuple[argparse.Namespace, ConfigDict]:
    """Parses `--config FILE[:ARG]` and its `--config.key=value` overrides, and the other arguments."""
    group = arguments.add_argument_group('config')
    group.add_argument('--config', metavar='FILE[:ARG]', required=True,
                       help='a Python file with get_config(arg), for example configs/pretrain.py:tiny')
    group.add_argument('--config.KEY', metavar='VALUE', dest='_', help='overrides one value of it')
    argv = sys.argv[1:] if argv is None else argv
    overrides = [a for a in argv if a.startswith('--config.')]
    args = arguments.parse_args([a for a in argv if a not in overrides])
    return args, load_config(args.config, overrides)


def load_config(path: str, overrides: list[str]) -> ConfigDict:
    """Evaluates a config file and applies overrides; an unknown key names its nearest neighbours."""
    file = path.split(':')[0]
    if not os.path.exists(file):
        raise UserError(f'Config file {file} does not exist.')
    config = _evaluate(path, [])
    known = _keys(config)
    for override in overrides:
        key, separator, _ = override.removeprefix('--config.').partition('=')
        if not separator:
            raise UserError(f'Override {override} has no value; write {override}=VALUE.')
        if renamed.override(key, known) not in known:
            raise unknown('config key', key, known)
    values = {renamed.override(key.removeprefix('--config.'), known): value  # the last of each key
              for key, _, value in (override.partition('=') for override in overrides)}
    return _evaluate(path, [f'--config.{key}={value}' for key, value in values.items()])


def _evaluate(path: str, overrides: list[str]) -> ConfigDict:
    values, argv = flags.FlagValues(), ['bert_jax', f'--config={path}', *overrides]
    holder = config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=argv)
    try:
        values(argv)
        return values[holder.name].value
    except Exception as error:  # whatever the config file itself raises, too
        raise UserError(f'Config {path}: {last_line(error)}') from error


def _keys(config: ConfigDict, prefix: str = '') -> list[str]:
    names = []
    for key, value in config.items(preserve_field_references=True):
        if isinstance(value, ConfigDict):
            names += _keys(value, f'{prefix}{key}.')
        names.append(f'{prefix}{key}')
    return names


def note(text: str) -> None:
    """Something worth knowing that stops nothing, on stderr: what a command prints may be another's input."""
    print(f'note: {" ".join(text.split())}', file=sys.stderr)


def progress(items: Iterable | None = None, **kwargs: Any) -> tqdm:
    """A tqdm bar on a terminal, a plain line every half minute elsewhere; tqdm's keywords."""
    if sys.stderr.isatty():
        return tqdm(items, dynamic_ncols=True, **kwargs)
    return tqdm(items, file=_Lines(), ascii=True, ncols=100, mininterval=30, **kwargs)


class _Lines:
    """A stderr on which each state of a progress bar is a line of its own."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(text.strip() + '\n')

    def flush(self) -> None:
        sys.stderr.flush()


def run(main: Callable[[], None]) -> None:
    """Runs an entry point; a UserError becomes one line on stderr and exit code 2."""
    with exit_on_user_error():
        main()


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turns a UserError into one line on stderr and exit code 2, Stopped into code 75, an interrupt into 130."""
    try:
        yield
    except UserError as error:
        message = ' '.join(str(error).split())
        print(f'error: {message}', file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(RESTART)
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        sys.exit(130)

