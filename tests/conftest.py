"""Small real text that every Python carries, and what the tests make of it."""

import contextlib
import importlib
import inspect
import io
import os
import pathlib
import pydoc_data.topics
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable

import filelock
import numpy as np
import pytest

# Small models for seconds: what counts is how long they compile, here a fifth as long.
# The long tests run what users run.
if 'BERT_JAX_LONG_TESTS' not in os.environ:
    quick = '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false'
    os.environ['XLA_FLAGS'] = f'{quick} {os.environ.get("XLA_FLAGS", "")}'

import bert_jax  # noqa: F401 - first: it sets the flags that JAX's backend opens with

ROOT = pathlib.Path(__file__).parent.parent
LONG = pytest.mark.skipif(
    'BERT_JAX_LONG_TESTS' not in os.environ,
    reason='slow, and others guard the most of it; BERT_JAX_LONG_TESTS=1 runs it',
)
os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
os.environ['JAX_PLATFORMS'] = os.environ.get('BERT_JAX_TEST_PLATFORM', 'cpu')  # cuda: the tests that need a GPU
# The same few programs are compiled by many short processes here: compile each once.
os.environ['JAX_COMPILATION_CACHE_DIR'] = str(pathlib.Path(tempfile.gettempdir()) / 'bert_jax_tests_xla')
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
os.environ['JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES'] = 'none'


RNG = np.random.default_rng(0)
BEGINNING = RNG.bit_generator.state


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """Every test draws the same from RNG, whatever ran before it."""
    RNG.bit_generator.state = BEGINNING


def write_corpus(path: pathlib.Path, topics: int = 90) -> pathlib.Path:
    """One help topic a document, one sentence a line."""
    from bert_jax.data import corpora

    documents = [text for _, text in sorted(pydoc_data.topics.topics.items())][:topics]
    paragraphs = [' '.join(p.split()) for text in documents for p in [text]]
    path.write_text('\n\n'.join('\n'.join(corpora.split_sentences(p)) for p in paragraphs) + '\n')
    return path


def run_module(name: str, *args: str, env: dict | None = None, **kwargs) -> subprocess.CompletedProcess:
    """Runs `python -m bert_jax.NAME` as a user would, in a process of its own."""
    return subprocess.run(
        [sys.executable, '-m', f'bert_jax.{name}', *map(str, args)], cwd=ROOT, text=True, capture_output=True,
        env=os.environ | {'PYTHONPATH': str(ROOT)} | (env or {}), timeout=600, **kwargs)


def call_module(name: str, *args: str) -> subprocess.CompletedProcess:
    """Runs `python -m bert_jax.NAME` in this process, without the seconds that a start takes."""
    from bert_jax import cli

    module, argv, stdout, stderr, code = (
        importlib.import_module(f'bert_jax.{name}'),
        sys.argv,
        io.StringIO(),
        io.StringIO(),
        0,
    )
    assert "if __name__ == '__main__':\n    cli.run(main)" in inspect.getsource(module)  # or -m would do nothing
    sys.argv = [module.__file__, *map(str, args)]
    try:
        with contextlib.chdir(ROOT), contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            cli.run(module.main)
    except SystemExit as end:
        code = end.code or 0
    except Exception:
        stderr.write(traceback.format_exc())
        code = 1
    finally:
        sys.argv = argv
    return subprocess.CompletedProcess(args, code, stdout.getvalue(), stderr.getvalue())


def expect_error(result: subprocess.CompletedProcess, *words: str) -> None:
    """One line on stderr that says `words`, exit code 2, no traceback."""
    lines = [line for line in result.stderr.splitlines() if line.startswith('error: ')]
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1 and 'Traceback' not in result.stderr, result.stderr
    for word in words:
        assert word in lines[0], (word, lines[0])


def made_once(
    tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[pathlib.Path], None]
) -> pathlib.Path:
    """What `make` writes at a path, made by the first of the test processes that needs it; tests only read it."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if 'PYTEST_XDIST_WORKER' in os.environ else folder
    with filelock.FileLock(folder / f'{name}.lock'):
        if not (folder / f'{name}.made').exists():
            make(folder / name)
            (folder / f'{name}.made').touch()
    return folder / name


def run_once(tmp_path_factory: pytest.TempPathFactory, name: str, module: str, *args: str) -> pathlib.Path:
    """`made_once` by a command, to which the path is given last."""
    def make(path: pathlib.Path) -> None:
        result = run_module(module, *args, path)
        assert result.returncode == 0, result.stderr

    return made_once(tmp_path_factory, name, make)


@pytest.fixture(scope='session')
def corpus(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return made_once(tmp_path_factory, 'topics.txt', write_corpus)


@pytest.fixture(scope='session')
def vocab(corpus: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A WordPiece vocabulary of 1,000 entries, a number that no hardware likes."""
    return run_once(
        tmp_path_factory, 'wordpiece', 'vocab', '--input', corpus, '--vocab_size', '1003', '--lowercase', '--output'
    )


@pytest.fixture(scope='session')
def sentencepiece_vocab(corpus: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return run_once(
        tmp_path_factory,
        'sentencepiece',
        'vocab',
        '--input',
        corpus,
        '--vocab_size',
        '1003',
        '--kind',
        'sentencepiece',
        '--output',
    )


@pytest.fixture(scope='session')
def store_path(corpus: pathlib.Path, vocab: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    from bert_jax import prepare
    from bert_jax.data import corpora

    return made_once(tmp_path_factory, 'store', lambda path: prepare.prepare(
        [str(corpus)], str(vocab), str(path), corpora.Reader(), held_out=0.15))


@pytest.fixture(scope='session')
def store(store_path: pathlib.Path):
    from bert_jax.data import store as stores

    return stores.load(store_path)


AS_IN_THE_PAPER = {
    'pairing': 'next_sentence',
    'masking': 'token',
    'mask_rate': 0.15,
    'replacement': (0.8, 0.1),
    'short_rate': 0.1,
    'pack_lengths': 0,
}  # of examples
TINY = ['--config.phases=((6,64,8),(4,96,8))', '--config.model.encoder.num_layers=2',
        '--config.model.embeddings.hidden_size=32', '--config.model.encoder.num_heads=2',
        '--config.model.embeddings.max_length=128', '--config.schedule.warmup_share=0.2',
        '--config.schedule.peak=1e-3', '--config.log_every=2', '--config.save_every=2', '--config.eval_every=4',
        '--config.eval_examples=12', '--config.eval_batch_size=8', '--config.pipeline=thread']


@pytest.fixture(scope='session')
def pretrained(store_path: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The workdir of a very small pre-trained model."""
    return run_once(
        tmp_path_factory,
        'pretrained',
        'pretrain',
        '--config',
        'configs/pretrain.py:tiny',
        f'--config.store={store_path}',
        *TINY,
        '--workdir',
    )
