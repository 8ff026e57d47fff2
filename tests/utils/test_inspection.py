"""What utils.inspection shows is what the network does, and looking changes nothing."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.measure import past_warm_up
from datasets import Volume, write_volume
from networks import DMWLA, SimMPNet, build
from networks.dsgim import select_windows
from tests.comparison_runs import save_network
from tests.narrow import narrow_pico  # noqa: F401, a fixture
from tests.test_scripts import assert_one_line
from utils import inspection
from utils.inspection import inspect

SIZE = 64
IMAGE = np.random.default_rng(0).random((1, SIZE, SIZE), np.float32)


@pytest.fixture(scope="module")
def model(narrow_pico) -> SimMPNet:  # noqa: F811
    torch.manual_seed(0)
    small = dict(feature_dim=16, decoder_feature_dim=16, decoder_num_clusters=5, columns_per_cluster=10)
    model = SimMPNet(4, img_size=SIZE, img_size_dmwla=SIZE, model_scale="pico", **small)
    past_warm_up(model)
    with torch.no_grad():
        model.train()(torch.rand(2, 1, SIZE, SIZE))  # so that the clusters have keys
    return model.eval()


def test_a_token_s_cluster_is_that_of_the_prototype_it_resembles():
    block = DMWLA(channels=4, feature_dim=4, num_clusters=3, columns_per_cluster=5)
    with torch.no_grad():
        block.theta.weight.copy_(torch.eye(4))
        block.bank.prototypes.copy_(torch.tensor([[0, 2.0, 0, 0], [9, 0, 0, 0], [0, 0, 0, 1.0]]))
    x = torch.zeros(1, 4, 4, 6)
    x[:, 0, :, :3] = 0.1  # like prototype 1, whatever the lengths
    x[:, 1, :, 3:] = 5.0  # like prototype 0
    torch.testing.assert_close(block.clusters(x), torch.tensor([1, 1, 1, 0, 0, 0]).expand(1, 4, 6))


def test_observing_shows_every_block_and_changes_nothing(model):
    before = copy.deepcopy(model.state_dict())
    seen = []
    handle = model.dmwla_encoder.dsgim.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    clusters, windows, gates = model.observe(torch.rand(2, 1, SIZE, SIZE))
    handle.remove()
    assert list(clusters) == [name for name, _ in model.memory_blocks()]
    sides = {"encoder 1": 16, "encoder 2": 8, "encoder 3": 4, "encoder 4": 2, "decoder 1": 16, "decoder 4": 2}
    for name, side in sides.items():
        assert all(c.shape == (2, side, side) for block, c in clusters.items() if block.startswith(name))
    assert all(c.min() >= 0 and c.max() < (5 if "decoder" in name else 4) for name, c in clusters.items())
    assert max(len(c.unique()) for c in clusters.values()) > 1
    assert gates["gate"].shape == (2, 1, 2, 2) and all(g.min() > 0 and g.max() < 1 for g in gates.values())
    assert windows.shape == (2, 6, 4) and (windows.sum(-1) == 2).all()
    torch.testing.assert_close(windows, torch.stack([select_windows(x) for x in seen], 1))
    assert not any(module._forward_pre_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_command_writes_every_picture(model, tmp_path, run_script):
    """Of a volume whose rows and columns are reversed to draw it upright."""
    checkpoint = save_network(tmp_path / "run" / "best.pth", model)
    image = np.random.default_rng(0).random((3, 80, 70), np.float32)
    volume = Volume("case", image, np.zeros((3, 80, 70), np.uint8), affine=np.diag([1.5, 1.5, 8.0, 1.0]))
    write_volume(tmp_path / "case.npy.h5", volume)
    np.savez(tmp_path / "one_slice001.npz", image=image[1])
    folder = tmp_path / "run" / "inspection" / "case_slice1"
    flags = "--checkpoint", checkpoint, "--input", tmp_path / "case.npy.h5", "--slice", 1
    run_script("utils/inspection.py", *flags).succeeded()
    run_script("utils/inspection.py", *flags[:3], tmp_path / "one_slice001.npz").succeeded()
    assert (folder.parent / "one_slice001" / "clusters.png").is_file()
    assert {p.stem for p in folder.glob("*.png")} == {"memory_use", "prototypes", "clusters", "windows", "gates"}
    assert inspect(model).keys() == {"memory_use", "prototypes"}  # without an image
    for path in folder.glob("*.png"):
        with Image.open(path) as picture:
            assert np.asarray(picture).std() > 0


@pytest.mark.parametrize(
    ("ablation", "in_use", "pictures"),
    [
        (dict(attention="plain"), True, {"windows", "gates"}),
        (dict(encoders="maxvit"), True, {"memory_use", "prototypes", "clusters", "gates"}),
        (dict(encoders="maxvit"), False, {"gates"}),
    ],
    ids=["plain", "maxvit", "warm-up"],
)
def test_what_there_is_is_drawn(model, ablation, in_use, pictures):
    ablated = SimMPNet(**model.config | ablation)
    if in_use:
        past_warm_up(ablated)
    assert inspect(ablated, Volume("case", IMAGE)).keys() == pictures


def test_pictures_are_drawn_upright(model, monkeypatch):
    drawn = []
    for name in ("draw_clusters", "draw_windows", "draw_gates_of_image"):
        monkeypatch.setattr(inspection, name, lambda *what: drawn.append(what))
    for y in (-1.0, 1.0):  # rows run to the back, or to the front
        inspect(model, Volume("case", IMAGE, affine=np.diag([-1.0, y, 1.0, 1.0])))
    for (whole, overlay, *_), (turned, turned_overlay, *_) in zip(drawn[:3], drawn[3:], strict=True):
        np.testing.assert_array_equal(turned, whole[::-1])
        maps, turned_maps = (x if isinstance(x, dict) else {"": x} for x in (overlay, turned_overlay))
        for name, seen in maps.items():  # (..., rows, columns)
            np.testing.assert_array_equal(np.asarray(turned_maps[name]), np.flip(seen, -2))


def test_what_cannot_be_inspected_is_said_in_one_line(model, tmp_path, run_script):
    checkpoint, case = save_network(tmp_path / "best.pth", model), tmp_path / "case.npy.h5"
    baseline = build("maxvit_unet", num_classes=4, img_size=SIZE, model_scale="nano")
    baseline = save_network(tmp_path / "baseline.pth", baseline)
    plain = save_network(tmp_path / "plain.pth", SimMPNet(**model.config | {"attention": "plain"}))
    write_volume(case, Volume("case", np.ones((3, 8, 8), np.float32), np.zeros((3, 8, 8), np.uint8)))
    for flags, words in (
        (("--checkpoint", "model.onnx"), ("model.onnx", "best.pth")),
        (("--checkpoint", baseline), ("baseline.pth", "maxvit_unet", "no memory")),
        (("--checkpoint", plain), ("--input",)),
        (("--checkpoint", checkpoint, "--input", case, "--slice", 3), ("--slice 3", "has 3")),
        (("--checkpoint", checkpoint, "--input", tmp_path / "no.nii.gz"), ("no.nii.gz",)),
    ):
        assert_one_line(run_script("utils/inspection.py", *flags), *words)
    assert not (tmp_path / "inspection").exists()
