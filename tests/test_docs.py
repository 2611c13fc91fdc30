"""What the documentation says is run here."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, call_module

ENTRY_POINTS = (
    'vocab',
    'prepare',
    'pretrain',
    'finetune',
    'predict',
    'report',
    'convert',
    'export',
    'features',
    'tasks.glue',
    'compile_check',
)


def blocks(path, language):
    return re.findall(rf'```{language}\n(.*?)```', path.read_text(), re.DOTALL)


def test_a_new_target_from_the_data_side_to_the_config(store_path, tmp_path):
    """The page's own code, then the pre-training it promises."""
    *pieces, config = blocks(ROOT / 'docs/new_target.md', 'python')
    (tmp_path / 'sop.py').write_text(config)
    (tmp_path / 'page.py').write_text(
        '\n'.join([*pieces, 'from bert_jax import cli, pretrain', 'cli.run(pretrain.main)'])
    )
    done = subprocess.run(
        [
            sys.executable,
            tmp_path / 'page.py',
            '--config',
            tmp_path / 'sop.py',
            f'--config.store={store_path}',
            *TINY,
            '--workdir',
            tmp_path / 'work',
        ],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / 'work' / 'results.json').read_text())
    assert {'held_out/sop/loss', 'held_out/sop/accuracy', 'held_out/mlm/loss'} <= results.keys()


@pytest.mark.parametrize('name', ENTRY_POINTS)
def test_help_explains_itself_with_an_example(name):
    done = call_module(name, '--help')
    assert done.returncode == 0
    assert f'python -m bert_jax.{name}' in done.stdout.partition('\n\n')[2]


def test_readme_names_every_file_once_and_no_other():
    """Each under its own folder: a name is not enough, since folders share some."""
    text = (ROOT / 'README.md').read_text()
    map_ = re.search(r'## The map.*?```\n(.*?)```', text, re.DOTALL).group(1)
    named, folders = [], {}
    for line in map_.splitlines():
        indent = len(line) - len(line.lstrip())
        folders = {depth: name for depth, name in folders.items() if depth < indent}
        folder = re.match(r' *([a-z_]+)/', line)
        if folder:
            folders[indent] = folder.group(1)
        within = pathlib.Path(*(folders[depth] for depth in sorted(folders)))
        named += [str(within / name) for name in re.findall(r'(?<![\w./])([a-z0-9_]+\.py)\b', line)]
    there = [
        str(p.relative_to(ROOT)) for part in ('bert_jax', 'configs', 'benchmarks') for p in (ROOT / part).rglob('*.py')
    ]
    assert sorted(named) == sorted(name for name in there if not name.endswith('__init__.py'))


def test_readme_commands_name_modules_configs_and_keys_that_exist():
    from bert_jax import cli

    commands = [' '.join(line.replace('\\\n', ' ').split()) for block in blocks(ROOT / 'README.md', 'bash')
                for line in re.sub(r'\\\n', ' ', block).split('\n') if 'python -m bert_jax' in line]
    assert len(commands) >= 5
    for command in commands:
        module = re.search(r'-m bert_jax\.([\w.]+)', command).group(1)
        assert (ROOT / 'bert_jax' / (module.replace('.', '/') + '.py')).exists(), command
        config = re.search(r'--config (\S+)', command)
        if config:
            overrides = re.findall(r'(--config\.\S+)', command)
            known = [o.split('=')[0] for o in overrides]
            loaded = cli.load_config(str(ROOT / config.group(1)), [])
            for key in known:
                node = loaded
                for part in key.removeprefix('--config.').split('.'):
                    assert part in node, (command, key)
                    node = node[part]


def test_links_lead_somewhere():
    for page in [ROOT / 'README.md', *(ROOT / 'docs').glob('*.md')]:
        for target in re.findall(r'\]\((?!http)([^)#]+)', page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)


def test_configs_say_what_they_are_and_load():
    from bert_jax import cli

    for path in sorted((ROOT / 'configs').glob('*.py')):
        assert '--config configs/' in path.read_text(), path
    for arg in ('tiny', 'mini', 'small', 'medium', 'base', 'large', 'base,no_nsp', 'large,whole_word,bf16'):
        config = cli.load_config(str(ROOT / 'configs/pretrain.py') + ':' + arg, ['--config.seed=3'])
        assert config.seed == 3 and config.model.encoder.mlp_size == 4 * config.model.embeddings.hidden_size
    twice = cli.load_config(
        str(ROOT / 'configs/pretrain.py:tiny'), ['--config.phases=((1,2,3),)', '--config.phases=((4,5,6),)']
    )
    assert twice.phases == ((4, 5, 6),)  # the last word counts
    assert pathlib.Path(ROOT / 'LICENSE').read_text().strip().startswith('Apache License')
