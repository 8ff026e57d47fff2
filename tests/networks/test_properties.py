"""What a user of the network relies on, in the variant ``paper`` unless a test says otherwise."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from benchmarks.measure import past_warm_up
from networks import DMWLA, SCALES, PrototypeMemoryBank, SimMPNet
from networks.maxvit import scale_widths
from networks.memory_bank import kmeans
from tests.networks.conftest import NARROW
from utils.losses import subset_losses


@pytest.mark.processors
@pytest.mark.parametrize(("steps", "warmup_iterations"), [(0, 1000), (3, 2)], ids=["in warm-up", "steady"])
@torch.no_grad()
def test_evaluation_repeats_itself_and_changes_nothing(tiny_network, double_precision, steps, warmup_iterations):
    """Nor does it depend on the batch."""
    model, images = tiny_network(steps, warmup_iterations), torch.rand(3, 1, 64, 64)
    assert all(bank.in_warmup == (steps == 0) for bank in model.memory_banks())
    before = copy.deepcopy(model.state_dict())
    whole, order = torch.stack(model(images)), [2, 0, 1]
    assert torch.equal(torch.stack(model(images)), whole)
    torch.testing.assert_close(torch.stack(model(images[order])), whole[:, order])
    torch.testing.assert_close(torch.stack(model(images[1:2])), whole[:, 1:2])
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_release_samples_once_more_after_k_means(variant):
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
        assert 0 < (block.bank.pool != ordered).any(-1).sum() <= 0.67 * 30  # share 0.5 (3 + 1) / 3


def test_an_average_of_the_weights_reads_its_memory_and_what_would_spoil_a_memory_is_refused(refused):
    block, x = DMWLA(6, 8, num_clusters=3, columns_per_cluster=10, warmup_iterations=2).train(), torch.rand(2, 6, 5, 5)
    block(x)
    average = AveragedModel(block, avg_fn=lambda _, new, __: new)  # a copy, made in the warm-up
    for _ in range(2):
        block(x)
        average.update_parameters(block)
    torch.testing.assert_close(average.eval()(x), copy.deepcopy(block).eval()(x))
    assert not block.bank.in_warmup and not average.module.bank.in_warmup
    with pytest.raises(RuntimeError):
        block.bank.sample(torch.rand(1, 25, 4))  # of another width
    block._is_replica = True  # as DataParallel marks the copies that it makes
    refused(lambda: block(x), "DistributedDataParallel")
    assert block.eval()(x).isfinite().all()


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize(("images", "num_clusters", "columns"), [(1, 7, 30), (9, 2, 2)])
def test_empty_and_tiny_clusters_never_stop_training(constant, images, num_clusters, columns):
    """Fewer tokens than clusters and columns, fewer columns than images, and tokens that K-means cannot separate."""
    torch.manual_seed(0)
    block = DMWLA(4, 8, num_clusters, columns, warmup_iterations=3, replaced_columns=40).train()
    for _ in range(6):
        x = torch.ones(images, 4, 3, 3) if constant else torch.randn(images, 4, 3, 3)
        x.requires_grad_()
        block(x).sum().backward()
        assert x.grad.isfinite().all()
    for name, value in block.state_dict().items():
        assert value.isfinite().all(), name


def test_kmeans_works_beside_simple_itk():
    pytest.importorskip("SimpleITK")  # where it is imported, faiss.Kmeans fails
    centroids, nearest = kmeans(torch.tensor([[0.0, 0], [0, 1], [9, 0], [9, 1]]), 2)
    assert sorted(centroids.tolist()) == [[0, 0.5], [9, 0.5]] and nearest[0] == nearest[1] != nearest[2]


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
    logits = tiny_network(img_size=img_size, img_size_dmwla=img_size_dmwla)(torch.rand(1, 1, img_size, img_size))
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
    assert [tuple(b.pool.shape) for b in model.memory_banks()] == [(9, 100, 256)] * 12 + [(10, 100, 128)] * 4


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
