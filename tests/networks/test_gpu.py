"""What only a GPU can show. Run on one with: .venv/bin/python -m pytest -m gpu"""

import copy

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from networks import DMWLA, SimMPNet
from tests.mini import around, assert_same, trainer
from tests.test_distributed import TORCHRUN, output_of
from utils.checkpoint import load_checkpoint
from utils.cli import random_state

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("full_precision")]

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
    torch.testing.assert_close([logits.cpu() for logits in actual], expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16, torch.float16])
def test_every_attention_has_a_fused_kernel(amp_dtype):
    model = steady_network().cuda()
    fused = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    with sdpa_kernel(fused), torch.autocast("cuda", amp_dtype, enabled=amp_dtype is not None):
        logits = model(torch.rand(2, 1, 128, 128, device="cuda"))  # fails where there is none
        sum(m.float().sum() for m in logits).backward()


def test_the_warm_up_ends_in_an_ordered_pool_on_the_gpu():
    block = DMWLA(6, 8, num_clusters=3, columns_per_cluster=10, warmup_iterations=3).cuda().train()
    for _ in range(4):
        block(torch.rand(2, 6, 5, 5, device="cuda"))
    assert not block.bank.in_warmup
    torch.testing.assert_close(block.bank.pool.mean(1), block.bank.prototypes)  # what an update leaves


@pytest.mark.parametrize("amp", ["none", "tf32", "bf16", "fp16"])
def test_an_iteration_of_the_training_loop_never_waits_for_the_gpu(tmp_path, amp):
    made = trainer(tmp_path, "--amp", amp, "--deterministic", "0", "--max_epochs", "9", network=SimMPNet, device="cuda")
    made.model.train()
    batches = [batch for _ in range(3) for batch in made.loader]
    for batch in batches[:4]:  # past the warm-up
        made.train_step(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        made.train_step(batches[4])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    made.watch.check()
    assert all(bank.pool.dtype == torch.float32 and bank.pool.isfinite().all() for bank in made.model.memory_banks())


def test_a_deterministic_run_trains_on_the_gpu_and_goes_on_from_its_own_state(tmp_path):
    trainer(tmp_path / "whole", network=SimMPNet, device="cuda").fit()
    trainer(tmp_path / "halves", "--max_epochs", "1", network=SimMPNet, device="cuda").fit()
    resumed = trainer(tmp_path / "halves", "--max_epochs", "2", "--resume", "auto", network=SimMPNet, device="cuda")
    assert_same(load_checkpoint(tmp_path / "halves/last.pth")["random"], [random_state(resumed.device)])
    resumed.fit()
    whole, halves = (load_checkpoint(tmp_path / name / "last.pth") for name in ("whole", "halves"))
    assert halves["history"][-1]["train_loss"] == pytest.approx(whole["history"][-1]["train_loss"], rel=1e-3)


def test_memory_of_the_gpu_stays_as_it_is(tmp_path):
    made = trainer(tmp_path, "--max_epochs", "20", "--deterministic", "0", slices=200, device="cuda")
    allocated = []
    around(made, "close_epoch", after=lambda: allocated.append(torch.cuda.memory_allocated()))
    made.fit()
    assert made.iteration == 2000 and allocated[-1] <= allocated[2]


def test_gpu_memory_that_is_out_is_one_line(tmp_path):
    made = trainer(tmp_path, device="cuda")
    made.losses = lambda image, label: torch.empty(2**50, device="cuda")
    with pytest.raises(ValueError, match=r"the GPU's memory is full .allocating .*--accumulate"):
        made.fit()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_together(tmp_path):
    output_of([*TORCHRUN, "tests/two_ranks.py", tmp_path, 2, "cuda"])
    for step in torch.load(tmp_path / "steps.pth", weights_only=True)["steps"]:
        assert len(set(step["banks"])) == 1
