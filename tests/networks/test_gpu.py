"""What only a GPU can show. Run on one with: .venv/bin/python -m pytest -m gpu"""

import copy

import pytest
import torch

from networks import DMWLA, SimMPNet
from utils.losses import subset_loss

pytestmark = pytest.mark.gpu

SMALL = dict(num_classes=4, model_scale="pico", img_size=128, img_size_dmwla=96, feature_dim=32, decoder_feature_dim=32)


def steady_network() -> SimMPNet:
    torch.manual_seed(0)
    model = SimMPNet(**SMALL, warmup_iterations=2).train()
    for _ in range(2):
        model(torch.rand(2, 1, 128, 128))
    assert not any(bank.in_warmup for bank in model.memory_banks())
    return model


def test_gpu_equals_cpu_in_evaluation():
    model = steady_network().eval()
    x = torch.rand(2, 1, 128, 128)
    with torch.inference_mode():
        expected = model(x)
        actual = copy.deepcopy(model).cuda()(x.cuda())
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16, torch.float16])
def test_a_steady_training_step_never_waits_for_the_gpu(amp_dtype):
    model = steady_network().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x, label = torch.rand(2, 1, 128, 128, device="cuda"), torch.randint(4, (2, 128, 128), device="cuda")

    def step() -> torch.Tensor:
        with torch.autocast("cuda", amp_dtype, enabled=amp_dtype is not None):
            logits = model(x)
        loss = subset_loss(logits, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    step()  # libraries that start may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()
    assert all(bank.pool.dtype == torch.float32 and bank.pool.isfinite().all() for bank in model.memory_banks())


def test_the_warm_up_ends_in_an_ordered_pool_on_the_gpu():
    block = DMWLA(6, 8, num_clusters=3, columns_per_cluster=10, warmup_iterations=3).cuda().train()
    for _ in range(4):
        block(torch.rand(2, 6, 5, 5, device="cuda"))
    assert not block.bank.in_warmup
    torch.testing.assert_close(block.bank.pool.mean(1), block.bank.prototypes)  # what an update leaves
