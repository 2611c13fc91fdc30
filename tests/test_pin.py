"""The numbers of a few steps, kept: nothing but what is meant to change them does."""

import json

import numpy as np
import pin
import pytest
from conftest import ROOT

WHEN = ('These numbers may be written anew (python tests/pin.py --write) only when the change is meant to change '
        'numbers: say why in the commit. Otherwise the change is wrong: benchmarks/same_numbers.py --before COMMIT '
        'compares two commits on this machine. A scope that drops draws other masks under another name: tests/pin.py.')


@pytest.mark.parametrize('name', pin.RUNS)
def test_the_numbers_are_what_they_were(name):
    """To 1e-4 of themselves, across processors."""
    kept, found = np.array(json.loads((ROOT / 'tests/pin.json').read_text())[name]), np.array(pin.RUNS[name]())
    assert found.shape == kept.shape and np.isfinite(found).all()
    same = abs(found - kept) <= 1e-4 * abs(kept)
    assert same.all(), f'\n{found.tolist()}\nwhere there was\n{kept.tolist()}\n{WHEN}'
