"""The house's walls: who may import whom, read from the import statements."""

import ast

from conftest import ROOT

PACKAGE = ROOT / 'bert_jax'
SMALL_ROOMS = {
    'cli',
    'paths',
    'metrics',
    'optimizer',
    'partition',
    'checkpoint',
    'memory',
    'hardware',
    'distributed',
    'renamed',
}
ENTRY_POINTS = {
    'vocab',
    'prepare',
    'pretrain',
    'finetune',
    'predict',
    'report',
    'convert',
    'export',
    'features',
    'compile_check',
}
ROOMS = {'data': set(), 'tasks': {'data'}, 'model': set(),   # a folder -> the folders that it may import
         'formats': {'data', 'model', 'tasks'}, 'tpu': {'data', 'model'}}
BESIDE = {'formats': {'workdir', 'checkpoint'}, 'tpu': {'train'}}  # what else these may know


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


def test_folders_know_only_what_is_below_them():
    for folder, below in ROOMS.items():
        for path in (PACKAGE / folder).glob('*.py'):
            if path.relative_to(PACKAGE).as_posix() == 'data/glue.py':  # an old command's name
                continue
            strange = rooms(path) - below - {folder} - SMALL_ROOMS - BESIDE.get(folder, set())
            assert not strange, (path, strange)
    assert {path.parent.name for path in PACKAGE.glob('*/__init__.py')} == ROOMS.keys()


def test_train_is_handed_model_and_data():
    assert rooms(PACKAGE / 'train.py') <= SMALL_ROOMS


def test_only_entry_points_and_run_know_everybody():
    """Who trains: train.py is imported by those that assemble a run."""
    users = {path.stem for path in PACKAGE.glob('*.py') if 'train' in rooms(path)}
    assert users <= ENTRY_POINTS | {'run', 'sweep'}, users


def test_small_rooms_import_nobody_above():
    for name in SMALL_ROOMS:
        assert rooms(PACKAGE / f'{name}.py') <= SMALL_ROOMS, name


def test_one_room_for_each_heavy_friend():
    for package, allowed in {
        'orbax': {'checkpoint.py'},
        'tensorflow': {'batches.py'},
        'tensorflow_datasets': {'corpora.py'},
        'safetensors': {'tensor_files.py'},
        'torch': {'tensor_files.py'},
        'transformers': set(),
    }.items():
        users = {path.name for path in PACKAGE.rglob('*.py') if package in outside(path)}
        assert users == allowed, package
    specs = {path.name for path in PACKAGE.rglob('*.py') if 'PartitionSpec' in path.read_text()}
    assert specs == {'partition.py'}


def test_no_word_of_machine_paths():
    for path in ROOT.rglob('*'):
        if (
            path.suffix in {'.py', '.md', '.sh', '.toml', '.txt'}
            and '.venv' not in path.parts
            and 'runs' not in path.parts
        ):
            assert '/work' + '/' not in path.read_text(), path
