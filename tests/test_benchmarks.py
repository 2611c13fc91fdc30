"""The benchmark scripts: that they run at their smallest, and that their page has what they found."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from test_tasks import make

LONG = pytest.mark.skipif('BERT_JAX_LONG_TESTS' not in os.environ, reason='minutes; BERT_JAX_LONG_TESTS=1 runs it')


def run(script, *args):
    done = subprocess.run(
        [sys.executable, f'benchmarks/{script}.py', *map(str, args)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=900,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@LONG
@pytest.mark.parametrize(
    'script, args, words',
    [
        (
            'train_step',
            (
                '--config',
                'configs/pretrain.py:tiny',
                '--length',
                '32',
                '--batch_size',
                '2',
                '--sides',
                'ours,eager_masked',
                '--repeats',
                '1',
            ),
            ('of the matmul peak', 'eager_masked'),
        ),
        (
            'finetune',
            ('--folder', 'SST2', '--vocab', 'VOCAB', '--examples', '64', '--layers', '1', '--repeats', '1'),
            ('trainer_padded', 'ours / this'),
        ),
        (
            'predict',
            ('--vocab', 'VOCAB', '--texts', '8', '--layers', '1', '--repeats', '1'),
            ('pipeline_32', 'texts/s'),
        ),
        (
            'prepare',
            (
                '--input',
                'CORPUS',
                '--tokenizer',
                'VOCAB',
                '--megabytes',
                '1',
                '--repeats',
                '1',
                '--peers',
                '--peer_megabytes',
                '1',
            ),
            ('MB/s', 'datasets'),
        ),
        ('pipeline', ('--store', 'STORE', '--batch_size', '2', '--repeats', '1'), ('sequences/s', 'whole_word')),
        ('startup', ('--store', 'STORE', '--repeats', '1'), ('import', 'warm')),
    ],
)
def test_each_runs_and_prints_its_figures(script, args, words, corpus, vocab, store_path, tmp_path):
    make('sst2', tmp_path, 64)
    entries = json.loads((vocab / 'tokenizer.json').read_text())['model']['vocab']
    (tmp_path / 'vocab.txt').write_text('\n'.join(sorted(entries, key=entries.get)) + '\n')
    known = {'SST2': tmp_path, 'VOCAB': tmp_path / 'vocab.txt', 'CORPUS': corpus, 'STORE': store_path}
    found = run(script, *(known.get(arg, arg) for arg in args))
    assert all(word in found for word in words), found


@LONG
def test_the_numbers_of_this_commit_are_its_own():
    found = run('same_numbers', '--before', 'HEAD')
    assert 'largest relative difference' in found and found.count('0.0e+00') == found.count('\n') - 1 == 4, found


def test_the_page_has_what_was_run_and_names_what_was_not(tmp_path):
    (tmp_path / 'prepare.txt').write_text('$ python benchmarks/prepare.py\n10.0 MB/s\ncommit abc\n')
    (tmp_path / 'train_base.txt').write_text('ours 1.5 sequences/s\n')
    (tmp_path / 'train_base.json').write_text(
        json.dumps({'rows': [{'side': 'ours', 'seconds': [1.0, 1.2], 'of_matmul_peak': 0.7}]}) + '\n'
    )
    run('page', '--figures', tmp_path, '--output', tmp_path / 'page.md')
    page = (tmp_path / 'page.md').read_text()
    assert (
        '10.0 MB/s' in page
        and 'ours 1.5 sequences/s' in page
        and '(page.png)' in page
        and (tmp_path / 'page.png').stat().st_size > 5000
    )
    assert page.count('\nNot run.\n') == page.count('\n## ') - 3 and 'no GPU was at hand' in page
    (tmp_path / 'prepare.txt').unlink()                                  # another machine, which ran another one
    (tmp_path / 'pipeline.txt').write_text('5 sequences/s\n')
    run('page', '--figures', tmp_path, '--output', tmp_path / 'page.md')
    page = (tmp_path / 'page.md').read_text()
    assert '10.0 MB/s' in page and '5 sequences/s' in page


def test_results_keep_the_rows_of_other_machines(tmp_path):
    def ended(row, *scores, model='cased'):
        for kind, shift in (('pretrained', 0.0), ('scratch', -0.25)):
            runs = {f'seed{seed}': {'dev/accuracy': score + shift, 'dev/f1': 0.5} for seed, score in enumerate(scores)}
            for name in runs:
                folder = tmp_path / 'runs' / model / row / kind / 'runs' / name
                folder.mkdir(parents=True)
                (folder / 'rates.jsonl').write_text(json.dumps({'step': 120, 'steps_per_second': 2.0}) + '\n')
            (tmp_path / 'runs' / model / row / kind / 'sweep.json').write_text(
                json.dumps({'score': 'dev/accuracy', 'runs': runs})
            )
            (tmp_path / 'runs' / model / row / kind / 'made.json').write_text(json.dumps({'commits': ['abc']}))

    def page():
        run('results', '--data', tmp_path, '--output', tmp_path / 'runs', '--page', tmp_path / 'results.md')
        return (tmp_path / 'results.md').read_text()

    for name, folder in (('sst2', 'SST-2'), ('mrpc', 'MRPC')):
        (tmp_path / 'glue' / folder).mkdir(parents=True)
        make(name, tmp_path / 'glue' / folder)
    ended('sst2', 0.5, 0.75)
    first = page()
    assert '| sst2 | accuracy | 0.625 ± 0.177 (0.500-0.750) | 0.375 ± 0.177 (0.250-0.500) | ' in first
    assert (
        'majority_accuracy 0.500' in first
        and '| 120 steps, 1 min | 2 | abc |' in first
        and '$DATA/glue/SST-2' in first
        and str(tmp_path) not in first
    )
    shutil.rmtree(tmp_path / 'runs')
    ended('mrpc', 0.75, 0.75)
    ended('sst2', 0.25, 0.25, model='mini')
    second = page()
    assert next(line for line in first.splitlines() if line.startswith('| sst2')) in second
    assert 'Not run yet: cola, mrpc, ' in first and 'Not run yet: cola, stsb, ' in second
    assert (
        '| sst2 | accuracy | 0.250 ± 0.000 ' in second
        and '--workdir runs/mini_sst2' in second
        and '--workdir runs/cased_sst2' in second
    )
    assert (
        '| mrpc | accuracy | 0.750 ± 0.000' in second
        and 'configs/finetune.py:mrpc' in second
        and 'configs/finetune.py:sst2' in second
    )
