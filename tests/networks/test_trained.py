"""What a short training promises: evaluation agrees with training mode, and ``--amp bf16`` has the Dice of float32."""

import copy

import pytest
import torch

import tests.narrow  # noqa: F401, registers the narrow MaxViT with timm
from networks import SCALES, SimMPNet
from tests.mini import drawing
from tests.networks.conftest import NARROW
from utils.losses import subset_loss


def drawings(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (B, 1, S, S) and labels (B, S, S)."""
    images, labels = zip(*(drawing(1000 * seed + i) for i in range(count)), strict=True)
    return torch.stack(images), torch.stack(labels)


@pytest.fixture(scope="module")
def trained() -> SimMPNet:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCALES, "nano", "maxvit_narrow_test")
        patch.setattr("networks.dmwla_encoder.DEPTHS", (1, 1, 2, 1))
        torch.manual_seed(0)
        model = SimMPNet(3, warmup_iterations=10, **NARROW).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(70):
        images, label = drawings(4, seed=step)
        with torch.set_grad_enabled(step < 50):  # then the running statistics catch up with the weights
            loss = subset_loss(model(images), label)
        if step < 50:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


def dice_and_loss(
    model: torch.nn.Module, images: torch.Tensor, label: torch.Tensor, amp_dtype: torch.dtype | None = None
) -> tuple[float, float]:
    """Return the mean Dice of the two classes in per cent, and the subset loss."""
    with torch.no_grad(), torch.autocast(images.device.type, amp_dtype, enabled=amp_dtype is not None):
        logits = copy.deepcopy(model)(images)  # training mode writes into the copy
    prediction = torch.stack(logits).float().sum(0).argmax(1)
    both = [((prediction == c) & (label == c)).sum() for c in (1, 2)]
    either = [(prediction == c).sum() + (label == c).sum() for c in (1, 2)]
    dice = 100 * sum(2 * b.item() / e.item() for b, e in zip(both, either, strict=True)) / 2
    return dice, subset_loss(logits, label).item()


@pytest.mark.processors
def test_evaluation_agrees_with_training_mode(trained):
    """Running statistics mixed over DS-GIM's positions once made evaluation useless while training looked fine."""
    images, label = drawings(16, seed=10**6)
    train_dice, train_loss = dice_and_loss(trained.train(), images, label)
    eval_dice, eval_loss = dice_and_loss(trained.eval(), images, label)
    assert train_dice > 85
    assert eval_dice == pytest.approx(train_dice, abs=1)
    assert eval_loss == pytest.approx(train_loss, rel=0.05)


@pytest.mark.processors
def test_bf16_has_the_dice_of_float32(trained):
    images, label = drawings(16, seed=10**6)
    expected, _ = dice_and_loss(trained.eval(), images, label)
    assert dice_and_loss(trained.eval(), images, label, torch.bfloat16)[0] == pytest.approx(expected, abs=0.5)


@pytest.mark.gpu
def test_bf16_and_compiled_has_the_dice_of_float32_on_the_gpu(trained):
    images, label = (x.cuda() for x in drawings(16, seed=10**6))
    model = copy.deepcopy(trained).cuda().eval()
    with torch.no_grad():
        expected, _ = dice_and_loss(model, images, label)
        assert dice_and_loss(torch.compile(model), images, label, torch.bfloat16)[0] == pytest.approx(expected, abs=1)
    torch._dynamo.reset()
