"""The quickstart's stages in small, on a SentencePiece vocabulary: what launch/quickstart.sh calls, in turn."""

import collections
import shutil
import subprocess
import sys

import pytest
from conftest import LONG, ROOT, TINY

from bert_jax import cli, finetune, prepare, pretrain, report
from bert_jax.data import corpora, stdlib, store


@LONG
def test_the_text_that_every_python_carries():
    documents = list(stdlib.documents())
    assert len(documents) > 300 and sum(map(len, documents)) > 1.5e6
    rows = stdlib.labelled()
    texts, packages = zip(*rows)
    assert len(set(packages)) == stdlib.CLASSES and len(rows) == len(set(rows)) > 1000
    assert min(map(len, texts)) >= stdlib.MIN_CHARACTERS and not any('\n' in text for text in texts)


def test_stdlib_is_a_corpus(vocab, tmp_path, monkeypatch):
    documents = list(stdlib.documents())[:40]
    monkeypatch.setattr(stdlib, 'documents', lambda: iter(documents))
    read = [document for block in corpora.Reader().blocks('stdlib:') for document in corpora.Reader().documents(block)]
    assert len(read) == 40 and all(
        ' '.join(sentences).split() == text.split() for sentences, text in zip(read, documents)
    )


TWO = {package for package, _ in collections.Counter(package for _, package in stdlib.labelled()).most_common(2)}


@pytest.fixture(scope='module')
def run(corpus, sentencepiece_vocab, tmp_path_factory):
    folder = tmp_path_factory.mktemp('quickstart')
    prepare.prepare([str(corpus)], str(sentencepiece_vocab), str(folder / 'store'), corpora.Reader(), 0.15)
    config = cli.load_config(
        'configs/quickstart.py', [*TINY, '--config.phases=((10,64,8),)', f'--config.store={folder}/store']
    )
    pretrain.pretrain(config, str(folder / 'pretrain'))
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(stdlib, 'CLASSES', 2)
    monkeypatch.setattr(sys, 'argv', ['stdlib', '--output', str(folder / 'packages.tsv')])
    stdlib.main()
    monkeypatch.undo()
    assert [tuple(line.split('\t')) for line in (folder / 'packages.tsv').read_text().splitlines()[1:]] == [
        row for row in stdlib.labelled() if row[1] in TWO]
    for scratch, work in ((False, 'finetune'), (True, 'finetune_from_scratch')):
        task = cli.load_config(
            'configs/finetune.py:classification',
            [
                f'--config.init_from={folder}/pretrain',
                f'--config.from_scratch={scratch}',
                '--config.task.label_column=package',
                f'--config.task.train_file={folder}/packages.tsv',
                '--config.task.dev_share=0.2',
                '--config.epochs=1.0',
                '--config.max_length=32',
                '--config.num_lengths=1',
            ],
        )
        finetune.train_task(finetune.Job(task, finetune.read_task(task)), task, str(folder / work))
    return folder


def test_the_report_shows_each_result_beside_what_it_has_to_beat(run, capsys):
    table = '\n'.join(report.table(run))
    for words in (
        'held-out masked-word loss',
        'unigram model',
        'next-sentence',
        'a coin',
        'majority class',
        'without pre-training',
    ):
        assert words in table
    report.fill_masks(run)
    said = capsys.readouterr().out
    assert said.count('stood there') == 3 and said.count('[MASK]') == 3


def test_sentencepiece_serves_everything(run):
    """The store, pre-training, filling a mask, fine-tuning and classifying."""
    from bert_jax import predict

    assert store.load(run / 'store').tokenizer.vocab_size == 1003
    (found,) = predict.load(str(run / 'pretrain'))('The value of the [MASK] is returned.')['masks']
    assert len(found) == 5 and any(guess['token'].startswith('▁') for guess in found)
    (label,) = predict.load(str(run / 'finetune'))(['Return the path of a file.'])
    assert label['label'] in TWO


def test_the_report_of_a_run_that_has_not_finished_is_one_line(tmp_path):
    with pytest.raises(cli.UserError, match='has the run finished'):
        report.table(tmp_path)


@pytest.mark.parametrize(
    'arguments, code, words',
    [(['--help'], 0, '--corpus'), (['--corpse'], 2, 'unknown argument --corpse'), (['--corpus'], 1, '--corpus needs')],
)
def test_the_script_says_what_it_takes(arguments, code, words):
    done = subprocess.run(['bash', 'launch/quickstart.sh', *arguments], cwd=ROOT, text=True, capture_output=True, env={
        'PATH': '/usr/bin:/bin', 'PYTHON': sys.executable})
    assert done.returncode == code and words in done.stdout + done.stderr, done.stderr


PYTHON = '''#!/bin/bash
echo "$@" >> calls
case $2 in
  bert_jax.vocab) mkdir run/vocab ;;
  bert_jax.prepare) mkdir run/store; touch run/store/store.json ;;
  bert_jax.pretrain) [ ! -e fails ] || exit 2; mkdir -p run/pretrain/checkpoints; touch run/pretrain/results.json ;;
esac
'''


def test_the_scripts_own_advice_to_hold_out_more_can_be_followed(tmp_path):
    """The stages themselves are stubs here."""
    (tmp_path / 'launch').mkdir()
    shutil.copy(ROOT / 'launch/quickstart.sh', tmp_path / 'launch')
    (tmp_path / 'launch/environment.sh').write_text('environment() { PATH=$PWD/bin:$PATH; }\n')
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin/python').write_text(PYTHON)
    (tmp_path / 'bin/python').chmod(0o755)

    def run(*arguments):
        (tmp_path / 'calls').write_text('')
        done = subprocess.run(
            ['bash', 'launch/quickstart.sh', '--run', 'run', '--corpus', 'a.txt', *arguments],
            cwd=tmp_path,
            text=True,
            capture_output=True,
        )
        return done, (tmp_path / 'calls').read_text()

    (tmp_path / 'fails').touch()  # too few documents are held out, says pretrain
    done, calls = run()
    assert done.returncode == 2 and '--held_out 0.05' in calls
    done, calls = run('--held_out', '0.2')
    assert 'bert_jax.vocab' not in calls and '--output run/store --held_out 0.2' in calls
    (tmp_path / 'fails').unlink()
    done, calls = run()
    assert done.returncode == 0 and 'bert_jax.prepare' not in calls  # 0.2 is remembered
    done, calls = run('--held_out', '0.3')
    assert (
        done.returncode == 2 and not calls and 'was pre-trained with --held_out 0.2; give another --run' in done.stderr
    )
