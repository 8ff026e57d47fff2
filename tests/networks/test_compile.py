"""What ``--compile`` promises: one graph without a break for every step after the warm-up."""

import pytest
import torch
from torch import nn

from benchmarks.measure import past_warm_up
from networks import DMWLA, PrototypeMemoryBank, SimMPNet
from tests.networks.conftest import NARROW
from utils.losses import subset_losses


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["block", "network"])
def test_steady_steps_are_one_graph_traced_once_that_writes_the_memory(whole, narrow):
    torch.manual_seed(0)
    model = (SimMPNet(3, **NARROW) if whole else nn.Sequential(nn.Conv2d(1, 3, 8, 8), DMWLA(3, 8, 3, 20))).train()
    images, label = torch.rand(2, 1, 64, 64), torch.randint(3, (2, 64, 64) if whole else (2, 8, 8))
    banks = [module for module in model.modules() if isinstance(module, PrototypeMemoryBank)]
    past_warm_up(model)
    assert not any(bank.in_warmup for bank in banks)

    def losses(images, label):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        return subset_losses(logits if whole else [logits], label)

    step = torch.compile(losses, backend="eager", dynamic=False, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            before = [bank.pool.clone() for bank in banks]
            step(images, label)[0].backward()
            assert not any(torch.equal(bank.pool, pool) for bank, pool in zip(banks, before, strict=True))
    torch._dynamo.reset()
    assert all(p.grad.isfinite().all() for p in model.parameters())
