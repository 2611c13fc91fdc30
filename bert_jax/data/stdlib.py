"""Text that every Python installation carries: the standard library's docstrings and help topics.

    python -m bert_jax.data.stdlib --output labelled.tsv

writes a labelled task made from it: which package a docstring comes from.
"""

import ast
import inspect
import pathlib
import pydoc_data.topics
import sysconfig
from collections import Counter
from collections.abc import Iterator

from bert_jax import cli, paths

SKIPPED = {'test', 'tests', 'idle_test', 'site-packages', '__pycache__', 'lib2to3', 'pydoc_data', 'dist-packages'}
MIN_CHARACTERS = 60
CLASSES = 8


def modules() -> Iterator[tuple[str, list[str]]]:
    """(dotted name, docstrings) of each standard-library module, in name order; nothing is imported."""
    root = pathlib.Path(sysconfig.get_path('stdlib'))
    for path in sorted(root.rglob('*.py')):
        parts = path.relative_to(root).with_suffix('').parts
        if SKIPPED & set(parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding='utf-8'))
        except (SyntaxError, UnicodeDecodeError):
            continue
        texts = [ast.get_docstring(node) for node in ast.walk(tree)
                 if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))]
        texts = [inspect.cleandoc(text) for text in texts if text]
        if texts:
            yield '.'.join(parts), texts


def documents() -> Iterator[str]:
    """One text a module, then one a help topic."""
    for _, texts in modules():
        yield '\n'.join(map(_paragraphs, texts))
    for _, text in sorted(pydoc_data.topics.topics.items()):
        yield _paragraphs(text)


def labelled() -> list[tuple[str, str]]:
    """(docstring, package) for the packages that have most docstrings, in name order."""
    rows = [(' '.join(text.split()), name.partition('.')[0]) for name, texts in modules() for text in texts]
    rows = sorted({(text, package) for text, package in rows if len(text) >= MIN_CHARACTERS})
    kept = {package for package, _ in Counter(package for _, package in rows).most_common(CLASSES)}
    return [(text, package) for text, package in rows if package in kept]


def _paragraphs(text: str) -> str:
    """Hard-wrapped text to one paragraph a line."""
    return '\n'.join(' '.join(p.split()) for p in text.split('\n\n') if p.strip())


def main() -> None:
    """Writes the labelled task."""
    parser = cli.parser(__doc__, prog='python -m bert_jax.data.stdlib')
    parser.add_argument('--output', required=True, metavar='FILE', help='the TSV to write: text, package')
    args = parser.parse_args()
    rows = labelled()
    table = ''.join(f'{text}\t{package}\n' for text, package in [('text', 'package'), *rows])
    output = paths.check_local(args.output, '--output')
    output.parent.mkdir(parents=True, exist_ok=True)
    paths.write_whole(output, table)
    counts = Counter(package for _, package in rows)
    print(f'{args.output}: {len(rows)} docstrings of {len(counts)} packages: '
          + ', '.join(f'{name} {count}' for name, count in counts.most_common()))


if __name__ == '__main__':
    cli.run(main)
