"""What a short training promises: evaluation agrees with training mode, and ``--amp bf16`` has the Dice of float32."""

import copy

import pytest
import torch

from networks import SimMPNet
from tests.mini import drawing, trainer
from tests.narrow import narrow_pico  # noqa: F401, a fixture for the whole module
from utils.losses import subset_loss
from utils.metrics import dice_only


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> SimMPNet:
    flags = "--img_size_dmwla 32 --feature_dim 8 --decoder_feature_dim 8 --columns_per_cluster 10 --batch_size 4"
    flags += " --warmup_iterations 10 --base_lr 1e-2 --lr_schedule cosine --max_epochs 6 --eval_interval 6"
    made = trainer(tmp_path_factory.mktemp("run"), *flags.split(), network=SimMPNet, slices=40)
    made.fit()
    return made.model


def dice_and_loss(model: SimMPNet, amp_dtype: torch.dtype | None = None, device: str = "cpu") -> tuple[float, float]:
    """Return the mean Dice of 16 new drawings in per cent, and the subset loss."""
    images, label = (torch.stack(x).to(device) for x in zip(*(drawing(10**6 + i) for i in range(16)), strict=True))
    with torch.no_grad(), torch.autocast(device, amp_dtype, enabled=amp_dtype is not None):
        logits = copy.deepcopy(model)(images)  # training mode writes into the copy
    prediction = torch.stack(logits).float().sum(0).argmax(1)
    return 100 * dice_only(prediction.cpu().numpy(), label.cpu().numpy(), 3).mean(), subset_loss(logits, label).item()


@pytest.mark.processors
def test_evaluation_agrees_with_training_mode_and_in_bf16_with_float32(trained):
    """Running statistics mixed over DS-GIM's positions once made evaluation useless while training looked fine."""
    train_dice, train_loss = dice_and_loss(trained.train())
    eval_dice, eval_loss = dice_and_loss(trained.eval())
    assert train_dice > 85 and eval_dice == pytest.approx(train_dice, abs=2)
    assert eval_loss == pytest.approx(train_loss, rel=0.05)
    assert dice_and_loss(trained, torch.bfloat16)[0] == pytest.approx(eval_dice, abs=0.5)


@pytest.mark.gpu
def test_bf16_and_compiled_has_the_dice_of_float32_on_the_gpu(trained):
    model = copy.deepcopy(trained).cuda().eval()
    with torch.no_grad():
        expected, _ = dice_and_loss(model, device="cuda")
        found, _ = dice_and_loss(torch.compile(model), torch.bfloat16, "cuda")
    torch._dynamo.reset()
    assert found == pytest.approx(expected, abs=1)
