"""A workdir on gs://, against a stand-in for Google Cloud Storage: trained, resumed, fine-tuned from, read."""

import http.server
import json
import os
import socket
import threading

import pytest
from conftest import TINY, call_module
from gcp_storage_emulator.handlers import objects

from bert_jax import paths

os.environ['GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT'] = 'false'  # asks Google what kind of bucket it is; read when imported
with socket.socket() as probe:
    probe.bind(('localhost', 0))
    PORT = probe.getsockname()[1]
URL = f'http://localhost:{PORT}'


@pytest.fixture(scope='module')
def bucket():
    plain = objects.download

    def download(request, response, storage, *args, **kwargs):  # tensorstore asks for the header, as Google sends it
        plain(request, response, storage, *args, **kwargs)
        if response.status < 300:
            found = storage.get_file_obj(request.params['bucket_name'], request.params['object_id'])
            response['x-goog-generation'] = found['generation']

    objects.download = download
    import gcp_storage_emulator.server  # takes `download` when imported

    handle, one_at_a_time = gcp_storage_emulator.server.Router.handle, threading.Lock()

    def in_turn(router, method):  # its tables are plain dictionaries, which two requests must not change at once
        with one_at_a_time:
            handle(router, method)

    gcp_storage_emulator.server.Router.handle = in_turn
    gcp_storage_emulator.server.server.HTTPServer = http.server.ThreadingHTTPServer
    server = gcp_storage_emulator.server.create_server('localhost', PORT, in_memory=True, default_bucket='bucket')
    server.start()
    yield 'gs://bucket'
    server.stop()


def test_a_run_on_a_bucket(bucket, store_path, tmp_path, monkeypatch):
    for name, value in {
        'STORAGE_EMULATOR_HOST': URL,
        'TENSORSTORE_GCS_HTTP_URL': URL,
        'TENSORSTORE_GCS_HTTP_VERSION': '1.1',
        'NO_GCE_CHECK': 'true',
    }.items():
        monkeypatch.setenv(name, value)
    arguments = [
        '--config',
        'configs/pretrain.py:tiny',
        f'--config.store={store_path}',
        *TINY,
        '--config.phases=((10,64,8),)',
        '--config.save_every=8',
        '--workdir',
        f'{bucket}/run',
    ]
    first = call_module('pretrain', *arguments)
    assert first.returncode == 0, first.stderr
    import gcsfs

    files = gcsfs.GCSFileSystem(endpoint_url=URL, token='anon')
    log = files.cat('bucket/run/log.jsonl')
    assert json.loads(log.splitlines()[-1])['step'] == 10 and files.exists('bucket/run/curves.png')
    assert any('tfevents' in name for name in files.ls('bucket/run/tensorboard'))

    files.rm('bucket/run/checkpoints/00000010/manifest.json')        # as if killed while saving
    again = call_module('pretrain', *arguments)
    assert again.returncode == 0 and 'resuming at step 8 of 10' in again.stdout, again.stderr
    assert 'checkpoint 10 in gs://bucket/run/checkpoints is passed over: it was never finished' in again.stderr
    files.invalidate_cache()
    assert files.cat('bucket/run/log.jsonl') == log

    table = tmp_path / 'rows.csv'
    table.write_text('text,label\n' + ''.join(f'word {i},{"even" if i % 2 == 0 else "odd"}\n' for i in range(40)))
    tuned = call_module(
        'finetune',
        '--config',
        'configs/finetune.py:classification',
        f'--config.init_from={bucket}/run',
        f'--config.task.train_file={table}',
        '--config.epochs=1',
        '--config.max_length=16',
        '--config.batch_size=8',
        '--config.evals_per_epoch=1',
        '--workdir',
        f'{bucket}/tuned',
    )
    assert tuned.returncode == 0, tuned.stderr
    said = call_module('predict', '--workdir', f'{bucket}/tuned', 'word 7', '--json')
    assert said.returncode == 0 and json.loads(said.stdout)['label'] in ('even', 'odd'), said.stderr


def test_paths_of_buckets_stay_what_they_are(tmp_path):
    assert str(paths.absolute('gs://bucket/run/x')) == 'gs://bucket/run/x'
    assert str(paths.absolute(os.path.relpath(tmp_path))) == str(tmp_path)
