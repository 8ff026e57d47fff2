import json

import pytest
import torch

from tests.parity import FIXTURES
from utils.wld import WeightLossDynamic


def test_k_after_each_iteration_equals_the_release():
    f = json.loads((FIXTURES / "wld.json").read_text())
    wld = WeightLossDynamic(start_epoch=0)
    ks = [wld.step(torch.tensor(loss, dtype=torch.float64), epoch=100) for loss in f["losses"]]
    assert ks[0] is None
    assert [int(k) for k in ks[1:]] == f["k"]


@pytest.mark.parametrize(("current", "k"), [(1.0, 50), (1.5, 75), (0.5, 25), (1.6, 50), (0.4, 50), (float("nan"), 50)])
def test_k_follows_the_fall_of_the_loss_within_its_range(current, k):
    wld = WeightLossDynamic()
    assert wld.step(torch.tensor(1.0), epoch=99) is None
    assert wld.step(torch.tensor(current), epoch=100) == k


def test_before_the_start_epoch_k_stays():
    wld = WeightLossDynamic(start_epoch=100)
    assert all(wld.step(torch.tensor(float(loss)), epoch=99) is None for loss in range(5))


def test_state_goes_on_where_it_was():
    one, other = WeightLossDynamic(0), WeightLossDynamic(0)
    one.step(torch.tensor(2.0), 1)
    other.load_state_dict(one.state_dict())
    assert one.step(torch.tensor(1.8), 2) == other.step(torch.tensor(1.8), 2)
