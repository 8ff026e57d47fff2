"""What a user of the network relies on, in the variant ``paper`` unless a test says otherwise."""

import copy
import subprocess
import sys

import pytest
import torch
from einops import rearrange
from torch.nn import functional as F

from networks import DMWLA, SCALES, SimMPNet
from networks.maxvit import scale_widths
from tests.conftest import ROOT


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 1, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.processors
@pytest.mark.parametrize(("steps", "warmup_iterations"), [(0, 1000), (3, 2)], ids=["in warm-up", "steady"])
@torch.no_grad()
def test_evaluation_repeats_itself_changes_nothing_and_does_not_depend_on_the_batch(
    tiny_network, double_precision, images, steps, warmup_iterations
):
    model = tiny_network(steps, warmup_iterations)
    assert all(bank.in_warmup == (steps == 0) for bank in model.memory_banks())
    before = copy.deepcopy(model.state_dict())
    whole, order = torch.stack(model(images)), [2, 0, 1]
    assert torch.equal(torch.stack(model(images)), whole)
    torch.testing.assert_close(torch.stack(model(images[order])), whole[:, order])
    torch.testing.assert_close(torch.stack(model(images[1:2])), whole[:, 1:2])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


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


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_release_samples_once_more_after_k_means_and_writes_its_bank_in_evaluation(variant):
    x, release = torch.rand(2, 6, 5, 5), variant == "release"
    block = DMWLA(6, 8, num_clusters=3, columns_per_cluster=10, warmup_iterations=3, variant=variant).train()
    for _ in range(3):
        block(x)
    assert block.bank.prototypes.norm() > 0  # K-means has run
    assert block.bank.in_warmup == release
    ordered = block.bank.pool.clone()
    block(x)
    assert not block.bank.in_warmup
    if release:
        overwritten = (block.bank.pool != ordered).any(-1).sum()
        assert 0 < overwritten <= 0.67 * 30  # share 0.5 (3 + 1) / 3
    before = copy.deepcopy(block.state_dict())
    with torch.no_grad():
        block.eval()(x)
    assert any(not torch.equal(v, before[k]) for k, v in block.state_dict().items()) == release


@pytest.mark.parametrize("constant", [True, False])
def test_empty_and_tiny_clusters_never_stop_training(constant):
    """Nine positions, more clusters and columns than tokens, and identical tokens, which K-means cannot separate."""
    torch.manual_seed(0)
    block = DMWLA(4, 8, num_clusters=7, columns_per_cluster=30, warmup_iterations=3, replaced_columns=40).train()
    for _ in range(6):
        x = torch.ones(1, 4, 3, 3) if constant else torch.randn(1, 4, 3, 3)
        x.requires_grad_()
        block(x).sum().backward()
        assert x.grad.isfinite().all()
    for name, value in block.state_dict().items():
        assert value.isfinite().all(), name


def test_a_warm_up_may_have_more_images_than_the_pool_has_columns():
    block = DMWLA(4, 8, num_clusters=2, columns_per_cluster=2, warmup_iterations=2).train()
    for _ in range(4):
        assert block(torch.randn(9, 4, 2, 2)).isfinite().all()


def test_kmeans_works_beside_simple_itk():
    pytest.importorskip("SimpleITK")
    code = (
        "import faiss, SimpleITK, torch; from networks.memory_bank import kmeans; torch.manual_seed(0)\n"
        "centroids, nearest = kmeans(torch.tensor([[0., 0], [0, 1], [9, 0], [9, 1]]), 2)\n"
        "assert sorted(centroids.tolist()) == [[0, .5], [9, .5]] and nearest[0] == nearest[1] != nearest[2]"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_autocast_does_not_round_away_the_faint_contrast_of_a_bright_image(tiny_network):
    model, seen = tiny_network().train(), []
    model.maxvit.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    images = 0.9 + 1e-3 * torch.rand(2, 1, 64, 64)  # bfloat16 has steps of 0.004 there
    model(images)
    with torch.autocast("cpu", torch.bfloat16):
        model(images)
    torch.testing.assert_close(seen[1], seen[0])


@pytest.mark.parametrize(("img_size", "img_size_dmwla"), [(96, 64), (32, 96)])
def test_any_multiple_of_32_works(tiny_network, img_size, img_size_dmwla):
    model = tiny_network(img_size=img_size, img_size_dmwla=img_size_dmwla)
    logits = model(torch.rand(1, 1, img_size, img_size))
    assert [tuple(m.shape) for m in logits] == [(1, 3, img_size, img_size)] * 4


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_has_the_widths_of_its_backbone(scale):
    with torch.device("meta"):  # shapes only
        model = SimMPNet(3, model_scale=scale)
    assert tuple(head.in_channels for head in reversed(model.heads)) == model.maxvit.widths == scale_widths(scale)


def test_the_default_is_the_papers_network():
    with torch.device("meta"):
        model = SimMPNet(num_classes=9)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(93.49e6, abs=0.005e6)
    banks = list(model.memory_banks())
    assert [tuple(b.pool.shape) for b in banks] == [(9, 100, 256)] * 12 + [(10, 100, 128)] * 4
