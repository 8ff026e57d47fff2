"""The subset loss and W-LD equal what the release computed, and the loss's gradient a plain transcription's."""

import json

import pytest
import torch
from torch.nn import functional as F

from benchmarks import plain
from tests.parity import FIXTURES, load, synthetic
from utils import losses
from utils.losses import WeightLossDynamic, subset_loss, subset_losses


@pytest.fixture(scope="module")
def release():
    f = load("loss.npz")
    return f, [synthetic(f"loss.logits{i}.input", (2, 4, 16, 16)) for i in range(4)], torch.from_numpy(f["label"])


def test_every_subset_and_the_total_equal_the_release(release):
    f, logits, label = release
    expected = {tuple(map(int, key.split("+"))): value for key, value in json.loads(str(f["subsets"])).items()}
    assert len(expected) == 15
    for subset, terms in expected.items():
        _, cross_entropy, dice = subset_losses([sum(logits[i] for i in subset)], label)
        assert [cross_entropy.item(), dice.item()] == pytest.approx(terms, rel=1e-6)
    assert subset_loss(logits, label).item() == pytest.approx(float(f["total"]), rel=1e-6)


def test_one_map_has_its_weighted_loss_and_half_precision_logits_are_summed_in_float32(release):
    _, logits, label = release
    loss, cross_entropy, dice = subset_losses(logits[:1], label, ce_weight=0.2, dice_weight=0.5)
    assert cross_entropy.item() == pytest.approx(F.cross_entropy(logits[0], label).item(), rel=1e-6)
    assert loss.item() == pytest.approx((0.2 * cross_entropy + 0.5 * dice).item(), rel=1e-6)
    half = [m.bfloat16() for m in logits]
    assert torch.equal(subset_loss(half, label), subset_loss([m.float() for m in half], label))


@pytest.mark.parametrize("shape", [(2, 15, 16), (1, 16, 16), (2, 1, 16, 16)])
def test_labels_of_another_shape_are_refused(release, refused, shape):
    refused(lambda: subset_loss(release[1], torch.zeros(shape, dtype=torch.long)), str(shape), "(B, S, S)")


def value_and_gradient(loss_of, logits, label):
    """In float64; the gradient is that of three times the loss."""
    maps = [m.double().requires_grad_() for m in logits]
    loss = loss_of(maps, label)
    return [loss.detach(), *torch.autograd.grad(3 * loss, maps)]


@pytest.mark.processors
@pytest.mark.parametrize(("scale", "num_maps"), [(1, 4), (60, 4), (1, 2), (1, 1)])
def test_value_and_gradient_are_those_of_the_plain_transcription(scale, num_maps):
    generator = torch.Generator().manual_seed(0)
    logits = [scale * torch.randn(2, 3, 8, 8, generator=generator) for _ in range(num_maps)]
    label = torch.randint(2, (2, 8, 8), generator=generator)  # class 2 is absent
    ours, theirs = (value_and_gradient(loss_of, logits, label) for loss_of in (subset_loss, plain.subset_loss))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_compiled_as_on_a_gpu_it_is_one_graph_with_the_same_value_and_gradient(release, monkeypatch):
    _, logits, label = release
    expected = value_and_gradient(subset_loss, logits, label)
    monkeypatch.setattr(losses, "_sums", torch.compile(losses._sums, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(value_and_gradient(subset_loss, logits, label), expected, rtol=1e-9, atol=1e-12)


def test_where_triton_cannot_build_a_gpu_computes_it_as_it_is(monkeypatch, caplog):
    for there, generation in ((True, 6), (False, 7), (True, 7)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (generation, 0))  # noqa: B023
        monkeypatch.setenv("CC", "cc")
        monkeypatch.setattr(losses, "find_spec", lambda _: there)  # noqa: B023
        monkeypatch.setattr("pathlib.Path.exists", lambda _: True)
        assert (losses._compiled.__wrapped__() is losses._sums) == (not there or generation < 7)
    assert caplog.text.count("python3-dev") == caplog.text.count("Volta") == 1


def test_k_after_each_iteration_equals_the_release():
    f = json.loads((FIXTURES / "wld.json").read_text())
    wld = WeightLossDynamic(start_epoch=0)
    ks = [wld.step(torch.tensor(loss, dtype=torch.float64), epoch=100) for loss in f["losses"]]
    assert ks[0] is None
    assert [int(k) for k in ks[1:]] == f["k"]


@pytest.mark.parametrize(("current", "k"), [(1.0, 50), (1.5, 75), (0.5, 25), (1.6, 50), (0.4, 50), (float("nan"), 50)])
def test_k_follows_the_fall_of_the_loss_within_its_range_and_after_a_resume(current, k):
    before, wld = WeightLossDynamic(), WeightLossDynamic()
    assert all(before.step(torch.tensor(loss), epoch=99) is None for loss in (3.0, 1.0))  # epoch 100 is the first
    wld.load_state_dict(before.state_dict())
    assert wld.step(torch.tensor(current), epoch=100) == k
