"""The Colab notebook from its first cell to its last, in a fresh environment.

As on Colab, jax and the other large libraries are there already (those of the tests); with
BERT_JAX_LONG_TESTS=1 nothing is.
"""

import json
import os
import re
import subprocess
import sys
import sysconfig

import nbclient
import nbformat
import peers
from conftest import ROOT

from bert_jax.tasks import glue

NOTEBOOK = ROOT / 'launch' / 'colab.ipynb'


def fill(source, values):
    """The form's fields as a user would set them."""
    def field(found):
        name = found.group(1)
        return f'{name} = {values[name]!r}' if name in values else found.group(0)

    return re.sub(r'^(\w+) = .*# @param.*$', field, source, flags=re.MULTILINE)


def test_install_fine_tune_predict_export(tmp_path, monkeypatch):
    subprocess.run([sys.executable, '-m', 'venv', tmp_path / 'fresh'], check=True)
    python = tmp_path / 'fresh' / 'bin' / 'python'
    if os.environ.get('BERT_JAX_LONG_TESTS'):
        subprocess.run([python, '-m', 'pip', 'install', '--quiet', 'ipykernel'], check=True, stderr=subprocess.DEVNULL)
    else:
        site = next((tmp_path / 'fresh' / 'lib').glob('python*/site-packages'))
        (site / 'colab.pth').write_text(sysconfig.get_path('purelib') + '\n')
    kernel = tmp_path / 'jupyter' / 'kernels' / 'fresh'
    kernel.mkdir(parents=True)
    (kernel / 'kernel.json').write_text(
        json.dumps(
            {
                'argv': [str(python), '-m', 'ipykernel_launcher', '-f', '{connection_file}'],
                'display_name': 'fresh',
                'language': 'python',
            }
        )
    )
    monkeypatch.setenv('JUPYTER_PATH', str(tmp_path / 'jupyter'))
    monkeypatch.setenv('PATH', f'{python.parent}:{os.environ["PATH"]}')
    monkeypatch.delenv('PYTHONPATH', raising=False)

    peers.save(peers.model('BertForPreTraining'), tmp_path / 'hf')
    table = tmp_path / 'my table.csv'
    table.write_text('text,label\n' + ''.join(f'w{i} w{i % 7},{"even" if i % 2 == 0 else "odd"}\n' for i in range(60)))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    values = {
        'SOURCE': str(ROOT),
        'DRIVE': False,
        'TABLE': str(table),
        'INIT_FROM': str(tmp_path / 'hf'),
        'EPOCHS': 1.0,
        'BATCH_SIZE': 8,
        'MAX_LENGTH': 32,
    }
    for cell in notebook.cells:
        cell.source = fill(cell.source, values).replace('--lengths 32,64,128', '--lengths 16')
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name='fresh', resources={'metadata': {'path': str(tmp_path)}}
    ).execute()

    said = ''.join(str(output) for cell in notebook.cells for output in cell.get('outputs', ()))
    assert "'image/png'" in said and "'label': " in said, said
    run = tmp_path / 'bert_jax' / 'runs' / 'my_first_bert'
    assert (run / 'results.json').exists(), said
    assert (run.parent / 'my_first_bert_hf' / 'model.safetensors').exists(), said
    assert (run.parent / 'my_first_bert_programs' / 'example.py').exists(), said


def test_every_task_of_the_form_is_a_task():
    offered = re.search(r'TASK_NAME = .*# @param \[(.*)\]', NOTEBOOK.read_text()).group(1)
    assert set(re.findall(r'\\"([\w ]+)\\"', offered)) == {'own table', *glue.LAYOUTS}
