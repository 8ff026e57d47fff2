"""What ``--compile`` promises: one graph without a break for every step after the warm-up."""

import pytest
import torch

from benchmarks.measure import past_warm_up
from networks import DMWLA, DSGIM, PrototypeMemoryBank, SimMPNet
from tests.networks.conftest import NARROW
from utils.losses import subset_losses


def assert_one_graph(model: torch.nn.Module, images: torch.Tensor, label: torch.Tensor) -> None:
    """Take three training steps in one graph without a break, traced once, that write the memory."""
    banks = [module for module in model.modules() if isinstance(module, PrototypeMemoryBank)]
    past_warm_up(model)
    assert not any(bank.in_warmup for bank in banks)

    def losses(images, label):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        return subset_losses(logits, label)

    step = torch.compile(losses, backend="eager", dynamic=False, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            before = [bank.pool.clone() for bank in banks]
            step(images, label)[0].backward()
            assert not any(torch.equal(bank.pool, pool) for bank, pool in zip(banks, before, strict=True))
    torch._dynamo.reset()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_steady_steps_of_the_papers_blocks_are_one_graph_without_a_break():
    class Blocks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = torch.nn.Conv2d(1, 16, 8, 8)
            self.narrow, self.wide = DMWLA(16, 32, 3, 20), DMWLA(16, 8, 3, 20)
            self.dsgim = DSGIM(16)
            self.head = torch.nn.Conv2d(16, 3, 1)

        def forward(self, x):
            x = self.dsgim(self.wide(self.narrow(self.stem(x))))
            return [torch.nn.functional.interpolate(self.head(x), scale_factor=8)] * 4

    torch.manual_seed(0)
    assert_one_graph(Blocks().train(), *random_batch())


@pytest.mark.slow
def test_steady_steps_of_the_network_are_one_graph_without_a_break(narrow):
    torch.manual_seed(0)
    assert_one_graph(SimMPNet(3, **NARROW).train(), *random_batch())


def random_batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(2, 1, 64, 64), torch.randint(3, (2, 64, 64))
