"""The house's walls: who may import whom, read from the import statements."""

import ast

from conftest import ROOT

PACKAGE = ROOT / 'bert_jax'
SMALL_ROOMS = {'cli', 'paths', 'metrics', 'optimizer', 'partition', 'checkpoint', 'memory', 'tf_bundle', 'scores',
               'hardware', 'hlo', 'topology', 'distributed', 'renamed'}
ENTRY_POINTS = {'vocab', 'prepare', 'pretrain', 'finetune', 'predict', 'report', 'convert', 'export', 'features', 'compile_check'}


def imports(path):
    """Dotted bert_jax modules a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('bert_jax'):
            found |= {f'{node.module}.{alias.name}' for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith('bert_jax')}
    return {name.removeprefix('bert_jax.') for name in found}


def rooms(path):
    return {name.split('.')[0] for name in imports(path)}


def outside(path):
    """Top-level packages a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names.add((node.module or '').split('.')[0])
        if isinstance(node, ast.Import):
            names |= {alias.name.split('.')[0] for alias in node.names}
    return names


def test_data_and_model_do_not_know_each_other():
    for path in (PACKAGE / 'data').glob('*.py'):
        assert not rooms(path) & ({'model', 'train'} | ENTRY_POINTS), path
    for path in (PACKAGE / 'model').glob('*.py'):
        assert not rooms(path) & ({'data', 'train'} | ENTRY_POINTS), path


def test_train_is_handed_model_and_data():
    assert not rooms(PACKAGE / 'train.py') & ({'model', 'data'} | ENTRY_POINTS)


def test_small_rooms_import_nobody_above():
    for name in SMALL_ROOMS:
        assert rooms(PACKAGE / f'{name}.py') <= SMALL_ROOMS, name


def test_one_room_for_each_heavy_friend():
    for package, allowed in {'orbax': {'checkpoint.py'}, 'tensorflow': {'batches.py'},
                             'tensorflow_datasets': {'corpora.py'},
                             'safetensors': {'tensor_files.py'}, 'torch': {'tensor_files.py'}, 'transformers': set()}.items():
        users = {path.name for path in PACKAGE.rglob('*.py') if package in outside(path)}
        assert users == allowed, package
    specs = {path.name for path in PACKAGE.rglob('*.py') if 'PartitionSpec' in path.read_text()}
    assert specs == {'partition.py'}


def test_no_word_of_machine_paths():
    for path in ROOT.rglob('*'):
        if path.suffix in {'.py', '.md', '.sh', '.toml', '.txt'} and '.venv' not in path.parts and 'runs' not in path.parts:
            assert '/work' + '/' not in path.read_text(), path
