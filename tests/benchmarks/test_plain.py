"""The plain side computes what the oracle and the network compute."""

import pytest
import torch

from benchmarks.measure import past_warm_up
from benchmarks.plain import PlainDMWLA, plain_copy
from networks import DMWLA, SimMPNet
from tests import oracle
from tests.networks.conftest import double_precision  # noqa: F401, a fixture

pytestmark = pytest.mark.usefixtures("double_precision")


@pytest.mark.processors
def test_plain_dmwla_equals_the_oracle_and_the_network():
    torch.manual_seed(0)
    block = DMWLA(6, 8, num_clusters=3, columns_per_cluster=4, replaced_columns=2).train()
    past_warm_up(block)
    plain = plain_copy(block)
    assert type(plain) is PlainDMWLA
    x = torch.randn(2, 6, 5, 5)
    pool, prototypes, phi_k = oracle.updated_memory(block, x)
    expected = oracle.steady_forward(block, x)
    for module in (plain, block):
        torch.testing.assert_close(module(x), expected)
        torch.testing.assert_close(module.bank.pool, pool)
        torch.testing.assert_close(module.bank.prototypes, prototypes)
        torch.testing.assert_close(module.phi_k, phi_k)


@pytest.mark.processors
def test_a_plain_copy_of_a_network_in_warm_up_and_in_use_gives_its_logits():
    torch.manual_seed(0)
    model = SimMPNet(3, model_scale="pico", img_size=64, img_size_dmwla=64).double().eval()
    x = torch.rand(2, 1, 64, 64)
    for _ in ("in warm-up", "in use"):
        plain = plain_copy(model)
        with torch.no_grad():
            for a, b in zip(plain(x), model(x), strict=True):
                torch.testing.assert_close(a, b)
        past_warm_up(model)
