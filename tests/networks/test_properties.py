"""What a user of the network relies on, in the variant ``paper`` unless a test says otherwise."""

import copy
import subprocess
import sys

import pytest
import torch
from einops import rearrange
from torch.nn import functional as F

from networks import DMWLA, DSGIM, NetworkError, SimMPNet
from tests.conftest import ROOT
from tests.drawings import noisy, rings
from utils.losses import subset_loss

TINY = dict(model_scale="pico", img_size=64, img_size_dmwla=64, feature_dim=16, decoder_feature_dim=16)


def tiny_network(warmup_iterations: int = 1, **options) -> SimMPNet:
    torch.manual_seed(0)
    return SimMPNet(3, warmup_iterations=warmup_iterations, columns_per_cluster=20, **TINY | options)


def trained_past_warm_up(steps: int = 3) -> SimMPNet:
    model = tiny_network(warmup_iterations=2).train()
    for _ in range(steps):
        model(torch.rand(2, 1, 64, 64))
    return model


@pytest.fixture(scope="module", params=["in warm-up", "steady"])
def network(request) -> SimMPNet:
    model = tiny_network(warmup_iterations=1000) if request.param == "in warm-up" else trained_past_warm_up()
    assert next(model.memory_banks()).in_warmup == (request.param == "in warm-up")
    return model.eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 1, 64, 64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_evaluation_repeats_itself_and_changes_no_buffer(network, images):
    before = copy.deepcopy(network.state_dict())
    first, second = network(images), network(images)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


@torch.no_grad()
def test_an_image_is_predicted_alike_wherever_it_stands_in_a_batch(network, images):
    order = [2, 0, 1]
    for a, b in zip(network(images[order]), network(images), strict=True):
        torch.testing.assert_close(a, b[order], atol=1e-4, rtol=0)
    for a, b in zip(network(images[1:2]), network(images), strict=True):
        torch.testing.assert_close(a, b[1:2], atol=1e-4, rtol=0)


@torch.no_grad()
def test_saved_and_loaded_gives_the_same_logits(network, images, tmp_path):
    torch.save({"network": network.config, "model": network.state_dict()}, tmp_path / "x.pth")
    state = torch.load(tmp_path / "x.pth", weights_only=True)
    other = SimMPNet(**state["network"]).eval()
    other.load_state_dict(state["model"])
    for a, b in zip(network(images), other(images), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("variant", ["paper", "release"])
@pytest.mark.parametrize("in_channels", [1, 3])
def test_every_parameter_gets_a_finite_gradient(variant, in_channels):
    model = tiny_network(warmup_iterations=1, variant=variant, in_channels=in_channels).train()
    x = torch.rand(3, in_channels, 64, 64)
    for _ in range(2):  # past the warm-up
        model(x)
    subset_loss(model(x), torch.randint(0, 3, (3, 64, 64))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_after_training_evaluation_agrees_with_training_mode():
    """Running statistics mixed over DS-GIM's positions once made evaluation useless while training looked fine."""
    torch.manual_seed(0)
    model = tiny_network(warmup_iterations=10).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    label = rings(torch.tensor([[24, 24], [40, 28], [30, 40], [36, 20]]))
    images = noisy(label)
    for step in range(120):
        with torch.set_grad_enabled(step < 60):  # then the running statistics catch up with the weights
            loss = subset_loss(model(images), label)
        if step < 60:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def loss_and_dice() -> tuple[float, float]:
        with torch.no_grad():
            logits = copy.deepcopy(model)(images)
        prediction = torch.stack(logits).sum(0).argmax(1)
        overlap = 2 * ((prediction > 0) & (prediction == label)).sum() / ((prediction > 0).sum() + (label > 0).sum())
        return subset_loss(logits, label).item(), overlap.item()

    train_loss, train_dice = loss_and_dice()
    model.eval()
    eval_loss, eval_dice = loss_and_dice()
    assert train_dice > 0.9
    assert eval_dice == pytest.approx(train_dice, abs=0.02)
    assert eval_loss == pytest.approx(train_loss, rel=0.06)


def test_k_means_at_the_end_of_the_warm_up_leaves_an_ordered_pool():
    torch.manual_seed(0)
    block = DMWLA(6, 8, num_clusters=3, columns_per_cluster=10, warmup_iterations=50).train()
    groups = torch.eye(6)[:3]  # three directions that K-means cannot miss
    for _ in range(50):
        tokens = groups[torch.randint(3, (2, 25))] * 5 + 0.1 * torch.randn(2, 25, 6)
        block(rearrange(tokens, "b (h w) c -> b c h w", h=5))
    assert not block.bank.in_warmup
    assert torch.allclose(block.bank.prototypes.norm(dim=1), torch.ones(3))
    similarity = F.normalize(block.bank.pool, dim=-1) @ block.bank.prototypes.T  # (3, M, 3)
    assert torch.equal(similarity.argmax(-1), torch.arange(3)[:, None].expand(3, 10))


def test_release_overwrites_part_of_the_ordered_pool_once_more():
    x = torch.rand(2, 6, 5, 5)
    for variant, still_in_warm_up in (("paper", False), ("release", True)):
        block = DMWLA(6, 8, num_clusters=3, columns_per_cluster=10, warmup_iterations=3, variant=variant).train()
        for _ in range(3):
            block(x)
        assert block.bank.prototypes.norm() > 0  # K-means has run
        assert block.bank.in_warmup == still_in_warm_up
        ordered = block.bank.pool.clone()
        block(x)
        assert not block.bank.in_warmup
        if still_in_warm_up:
            overwritten = (block.bank.pool != ordered).any(-1).sum()
            assert 0 < overwritten <= 0.67 * 30  # share 0.5 (3 + 1) / 3


def test_release_writes_its_bank_in_evaluation_and_paper_does_not():
    x = torch.rand(2, 6, 5, 5)
    for variant, changes in (("paper", False), ("release", True)):
        block = DMWLA(6, 8, 3, 10, warmup_iterations=1, variant=variant).train()
        block(x)
        block(x)
        before = copy.deepcopy(block.state_dict())
        with torch.no_grad():
            block.eval()(x)
        assert any(not torch.equal(v, before[k]) for k, v in block.state_dict().items()) == changes


@pytest.mark.parametrize("constant", [True, False])
def test_empty_and_tiny_clusters_never_stop_training(constant):
    """Nine positions, more clusters and columns than tokens, and identical tokens, which K-means cannot part."""
    torch.manual_seed(0)
    block = DMWLA(4, 8, num_clusters=7, columns_per_cluster=30, warmup_iterations=3, replaced_columns=40).train()
    for _ in range(6):
        x = torch.ones(1, 4, 3, 3) if constant else torch.randn(1, 4, 3, 3)
        x.requires_grad_()
        block(x).sum().backward()
        assert x.grad.isfinite().all()
    for name, value in block.state_dict().items():
        assert value.isfinite().all(), name


def test_more_images_than_columns():
    block = DMWLA(4, 8, num_clusters=2, columns_per_cluster=2, warmup_iterations=2).train()
    for _ in range(4):
        assert block(torch.randn(9, 4, 2, 2)).isfinite().all()


def test_dsgim_pastes_no_image_onto_another():
    module = DSGIM(8).eval()
    x = torch.randn(2, 8, 4, 4)
    other = torch.cat([x[:1], torch.randn(1, 8, 4, 4)])
    assert torch.allclose(module(x)[0], module(other)[0], atol=1e-6)


def test_dsgim_keeps_statistics_for_each_position():
    module = DSGIM(8, num_positions=3).train()
    module(torch.randn(2, 8, 4, 4), position=1)
    assert [int(s.num_batches_tracked) for s in module.norm1.statistics] == [0, 1, 0]


def test_autocast_keeps_the_memory_in_float32():
    model = tiny_network(warmup_iterations=1).train()
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(torch.rand(2, 1, 64, 64))
        subset_loss(logits, torch.randint(0, 3, (2, 64, 64))).backward()
    for bank in model.memory_banks():
        assert bank.pool.dtype == bank.prototypes.dtype == torch.float32
        assert bank.pool.isfinite().all()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name


def test_kmeans_works_beside_simple_itk():
    pytest.importorskip("SimpleITK")
    code = (
        "import faiss, SimpleITK, torch; from networks.memory_bank import kmeans; torch.manual_seed(0)\n"
        "centroids, nearest = kmeans(torch.tensor([[0., 0], [0, 1], [9, 0], [9, 1]]), 2)\n"
        "assert sorted(centroids.tolist()) == [[0, .5], [9, .5]] and nearest[0] == nearest[1] != nearest[2]"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_autocast_does_not_round_away_the_faint_contrast_of_a_bright_image():
    model, seen = tiny_network().train(), []
    model.maxvit.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    images = 0.9 + 1e-3 * torch.rand(2, 1, 64, 64)  # bfloat16 has steps of 0.004 there
    model(images)
    with torch.autocast("cpu", torch.bfloat16):
        model(images)
    torch.testing.assert_close(seen[1], seen[0])


@pytest.mark.parametrize(("img_size", "img_size_dmwla"), [(96, 64), (64, 96), (32, 32), (160, 128)])
def test_any_multiple_of_32_works(img_size, img_size_dmwla):
    model = tiny_network(img_size=img_size, img_size_dmwla=img_size_dmwla).eval()
    logits = model(torch.rand(1, 1, img_size, img_size))
    assert [tuple(m.shape) for m in logits] == [(1, 3, img_size, img_size)] * 4


@pytest.mark.parametrize("scale", ["nano", "tiny", "small", "base"])
def test_every_scale_runs(scale):
    model = tiny_network(model_scale=scale).eval()
    with torch.no_grad():
        assert all(m.isfinite().all() for m in model(torch.rand(1, 1, 64, 64)))


def test_the_default_is_the_papers_network():
    model = SimMPNet(num_classes=9)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(93.49e6, abs=0.005e6)
    banks = list(model.memory_banks())
    assert [tuple(b.pool.shape) for b in banks] == [(9, 100, 256)] * 12 + [(10, 100, 128)] * 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(model_scale="huge"), ["huge", "pico", "small"]),
        (dict(img_size=100), ["img_size", "100", "96", "128"]),
        (dict(img_size_dmwla=7), ["img_size_dmwla", "7", "32"]),
        (dict(img_size=0), ["img_size", "0", "32"]),
        (dict(variant="ours"), ["ours", "paper", "release"]),
        (dict(warmup_iterations=0), ["warmup_iterations", "0", "1"]),
        (dict(in_channels=2), ["in_channels", "2", "1", "3"]),
    ],
)
def test_an_impossible_network_is_answered_with_what_is_possible(options, words):
    with pytest.raises(NetworkError) as error:
        tiny_network(**options)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(1, 1, 96, 96), (1, 3, 64, 64), (1, 64, 64)])
def test_an_input_that_does_not_fit_says_what_would(shape):
    with pytest.raises(NetworkError, match=r"takes \(B, 1, 64, 64\)"):
        tiny_network()(torch.rand(shape))
