"""The plain side computes what the oracle and the network compute."""

import pytest
import torch

from benchmarks.measure import past_warm_up
from benchmarks.plain import PlainDMWLA, plain_copy
from networks import DMWLA
from tests import oracle
from tests.networks.conftest import double_precision, narrow, tiny_network  # noqa: F401, fixtures

pytestmark = [pytest.mark.processors, pytest.mark.usefixtures("double_precision")]


def test_a_plain_step_is_that_of_the_oracle():
    torch.manual_seed(0)
    block = DMWLA(6, 8, num_clusters=3, columns_per_cluster=4, replaced_columns=2)
    past_warm_up(block)
    plain, x = plain_copy(block).train(), torch.randn(2, 6, 5, 5)
    assert type(plain) is PlainDMWLA
    torch.testing.assert_close(plain(x), oracle.steady_forward(block, x))
    written = plain.bank.pool, plain.bank.prototypes, plain.phi_k
    torch.testing.assert_close(written, oracle.updated_memory(block, x))


@pytest.mark.parametrize("steps", [0, 3])
def test_a_plain_copy_of_a_network_in_warm_up_and_in_use_gives_its_logits(steps, tiny_network):  # noqa: F811
    model, x = tiny_network(steps, warmup_iterations=2), torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(plain_copy(model)(x), model(x))
