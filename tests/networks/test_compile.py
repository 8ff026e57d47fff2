"""What ``--compile`` and ``--amp bf16`` promise: one graph for every step after the warm-up, and the same Dice."""

import copy

import pytest
import torch

from benchmarks.measure import past_warm_up
from networks import DMWLA, DSGIM, PrototypeMemoryBank, SimMPNet
from tests.drawings import noisy, rings
from utils.losses import subset_loss, subset_losses

SMALL = dict(model_scale="pico", img_size=64, img_size_dmwla=64, feature_dim=16, decoder_feature_dim=16)


def drawings(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noisy discs in rings, images (B, 1, S, S) and labels (B, S, S)."""
    generator = torch.Generator().manual_seed(seed)
    label = rings(22 + 20 * torch.rand(count, 2, generator=generator))
    return noisy(label, generator), label


@pytest.fixture(scope="module")
def trained() -> SimMPNet:
    torch.manual_seed(0)
    model = SimMPNet(3, warmup_iterations=10, columns_per_cluster=20, **SMALL).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(90):
        images, label = drawings(8, seed=step)
        with torch.set_grad_enabled(step < 70):  # then the running statistics catch up with the weights
            loss = subset_loss(model(images), label)
        if step < 70:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def dice(model, images: torch.Tensor, label: torch.Tensor, amp_dtype: torch.dtype | None = None) -> float:
    """Return the mean Dice of the two classes in per cent."""
    with torch.inference_mode(), torch.autocast(images.device.type, amp_dtype, enabled=amp_dtype is not None):
        prediction = torch.stack(model(images)).float().sum(0).argmax(1)
    both = [((prediction == c) & (label == c)).sum() for c in (1, 2)]
    either = [(prediction == c).sum() + (label == c).sum() for c in (1, 2)]
    return 100 * sum(2 * b.item() / e.item() for b, e in zip(both, either, strict=True)) / 2


def assert_one_graph(model: torch.nn.Module, images: torch.Tensor, label: torch.Tensor) -> None:
    """Take three training steps in one graph without a break, traced once, that write the memory."""
    banks = [module for module in model.modules() if isinstance(module, PrototypeMemoryBank)]
    past_warm_up(model)

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
    assert_one_graph(Blocks().train(), *drawings(2, seed=0))


@pytest.mark.slow
def test_steady_steps_of_the_network_are_one_graph_without_a_break():
    torch.manual_seed(0)
    assert_one_graph(SimMPNet(3, columns_per_cluster=20, **SMALL).train(), *drawings(2, seed=0))


def test_bf16_has_the_dice_of_float32(trained):
    images, label = drawings(64, seed=10**6)
    expected = dice(trained, images, label)
    assert expected > 90
    assert dice(trained, images, label, torch.bfloat16) == pytest.approx(expected, abs=0.2)


@pytest.mark.slow
def test_bf16_and_compiled_has_the_dice_of_float32(trained):
    """Traced only: kernels take a CPU minutes to compile, and are tested on the GPU below."""
    images, label = drawings(64, seed=10**6)
    compiled = torch.compile(trained, backend="aot_eager")
    assert dice(compiled, images, label, torch.bfloat16) == pytest.approx(dice(trained, images, label), abs=0.2)
    torch._dynamo.reset()


@pytest.mark.gpu
def test_bf16_and_compiled_has_the_dice_of_float32_on_the_gpu(trained):
    images, label = (x.cuda() for x in drawings(64, seed=10**6))
    model = copy.deepcopy(trained).cuda()
    expected = dice(model, images, label)
    compiled = torch.compile(model)
    assert dice(compiled, images, label, torch.bfloat16) == pytest.approx(expected, abs=0.2)
    torch._dynamo.reset()
