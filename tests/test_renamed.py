"""Config keys of older versions."""

from conftest import ROOT

from bert_jax import cli, renamed


def test_old_names_on_the_command_line_are_the_new_ones():
    for old, new in renamed.PRETRAINING.items():
        value = {'replacement': '(0.5,0.5)', 'pairing': 'single', 'masking': 'whole_word'}.get(old, '1')
        given = [cli.load_config(str(ROOT / 'configs/pretrain.py'), [f'--config.{key}={value}']) for key in (old, new)]
        assert given[0] == given[1] != cli.load_config(str(ROOT / 'configs/pretrain.py'), [])
    assert not cli.load_config(str(ROOT / 'configs/finetune.py'), ['--config.packed=False']).packed  # another one's


def test_a_config_of_an_older_version_says_the_same_by_the_new_names():
    now = cli.load_config(str(ROOT / 'configs/pretrain.py') + ':tiny,packed', []).to_dict()
    old = {key: value for key, value in now.items() if key != 'examples'}
    old |= {name: now['examples'][new.removeprefix('examples.')] for name, new in renamed.PRETRAINING.items()}
    found = renamed.current(old)
    assert found | {'examples': found['examples'] | {'mixture': ()}} == now and renamed.current(now) is now
