"""What utils.inspection shows is what the network does, and looking changes nothing."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.measure import past_warm_up
from datasets import DATASETS, Volume, write_volume
from networks import DMWLA, SimMPNet, build
from networks.dsgim import select_windows
from utils.checkpoint import save_checkpoint
from utils.errors import RunError
from utils.inspection import (
    cosine_similarity,
    inspect,
    save_cluster_maps,
    save_gate,
    save_memory_use,
    save_prototype_similarity,
    save_windows,
)

SIZE = 64
HISTORY = [
    {"epoch": e, "k": 50 - e, "k_decoder": 50, "cluster_use": e / 9, "gate": 1 / e, "val_dice": 0.5}
    for e in range(1, 9)
]


@pytest.fixture(scope="module")
def model() -> SimMPNet:
    torch.manual_seed(0)
    small = dict(feature_dim=16, decoder_feature_dim=16, decoder_num_clusters=5, columns_per_cluster=10)
    model = SimMPNet(4, img_size=SIZE, img_size_dmwla=SIZE, model_scale="pico", **small)
    past_warm_up(model)
    with torch.no_grad():
        model.train()(torch.rand(2, 1, SIZE, SIZE))  # so that keys have come to the clusters
    return model.eval()


def save(path: Path, model: SimMPNet, history: list[dict]) -> Path:
    info = DATASETS["acdc"]
    data = {"dataset": "acdc", "class_names": info.class_names, "preprocessing": info.preprocessing.to_dict()}
    state = {"model": model.state_dict(), "network": model.config, "data": data, "history": history}
    save_checkpoint(path, state)
    return path


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_a_token_s_cluster_is_that_of_the_prototype_it_resembles():
    block = DMWLA(channels=4, feature_dim=4, num_clusters=3, columns_per_cluster=5)
    with torch.no_grad():
        block.theta.weight.copy_(torch.eye(4))
        block.bank.prototypes.copy_(torch.tensor([[0, 2.0, 0, 0], [9, 0, 0, 0], [0, 0, 0, 1.0]]))
    x = torch.zeros(1, 4, 4, 6)
    x[:, 0, :, :3] = 0.1  # like prototype 1, whatever the lengths
    x[:, 1, :, 3:] = 5.0  # like prototype 0
    expected = torch.tensor([1, 1, 1, 0, 0, 0]).expand(1, 4, 6)
    torch.testing.assert_close(block.clusters(x), expected)


def test_observing_shows_every_block_and_changes_nothing(model):
    before = copy.deepcopy(model.state_dict())
    image = torch.rand(2, 1, SIZE, SIZE)
    seen = []
    handle = model.dmwla_encoder.dsgim.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    clusters, windows, gate = model.observe(image)
    handle.remove()
    names = [name for name, _ in model.memory_blocks()]
    assert list(clusters) == names and len(names) == 16
    assert names[:5] == ["encoder 1.1", "encoder 1.2", "encoder 2.1", "encoder 2.2", "encoder 3.1"]
    assert names[-4:] == ["decoder 4", "decoder 3", "decoder 2", "decoder 1"]
    sides = {"encoder 1": 16, "encoder 2": 8, "encoder 3": 4, "encoder 4": 2, "decoder 1": 16, "decoder 4": 2}
    for name, side in sides.items():
        assert all(c.shape == (2, side, side) for block, c in clusters.items() if block.startswith(name))
    assert all(c.min() >= 0 and c.max() < (5 if "decoder" in name else 4) for name, c in clusters.items())
    assert max(len(c.unique()) for c in clusters.values()) > 1
    assert gate.shape == (2, 1, 2, 2) and 0 < gate.min() < gate.max() < 1
    assert windows.shape == (2, 6, 4) and (windows.sum(-1) == 2).all()
    torch.testing.assert_close(windows, torch.stack([select_windows(x) for x in seen], 1))
    assert not any(module._forward_pre_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_cluster_map_lies_on_the_image_in_its_colours(tmp_path):
    image = np.zeros((30, 60))
    left_right = np.repeat([[0, 1]], 2, axis=0)
    save_cluster_maps(tmp_path / "a.png", image, {"block": left_right}, {"block": 3})
    a = pixels(tmp_path / "a.png")
    half = a[:, a.shape[1] // 2 :]  # the panel of the block
    middle, centre = half.shape[0] // 2, half.shape[1] // 2
    left, right = half[middle, centre - 40], half[middle, centre + 40]
    assert left.argmax() == 0 and right.argmax() == 1  # red, then green


def test_windows_that_are_not_selected_are_dimmed(tmp_path):
    selected = np.array([[[True, False], [False, True]]])
    save_windows(tmp_path / "w.png", np.linspace(0.99, 1, 64 * 64).reshape(64, 64) + np.eye(64)[::-1] * -1, selected)
    picture = pixels(tmp_path / "w.png").mean(-1)
    height, width = picture.shape
    quarters = [picture[y, x] for y in (height * 2 // 5, height * 3 // 4) for x in (width // 4, width * 3 // 4)]
    bright = np.array(quarters) > 150
    np.testing.assert_array_equal(bright, selected.ravel())


def test_similarity_of_prototypes_is_their_cosine():
    vectors = np.array([[1.0, 0], [2, 2], [0, 0]])
    expected = np.array([[1, np.sqrt(0.5), 0], [np.sqrt(0.5), 1, 0], [0, 0, 0]])
    np.testing.assert_allclose(cosine_similarity(vectors), expected, atol=1e-12)


COUNTS = {"a": np.array([3, 1]), "b": np.array([0, 0, 0])}
VECTORS = np.array([[1.0, 0], [2, 2], [0, 0]])
IMAGE, GATE = np.zeros((32, 32)), np.eye(32)


@pytest.mark.parametrize(
    ("draw", "base", "others"),
    [
        (save_memory_use, (HISTORY, COUNTS), [([], COUNTS), (HISTORY, COUNTS | {"a": np.array([4, 0])})]),
        (save_prototype_similarity, ({"a": VECTORS},), [({"a": -VECTORS * [[1], [-1], [1]]},)]),
        (save_gate, (IMAGE, GATE, HISTORY), [(IMAGE, 0 * GATE, HISTORY), (GATE, GATE, HISTORY), (IMAGE, GATE, [])]),
    ],
)
def test_every_input_of_a_picture_shows(draw, base, others, tmp_path):
    draw(tmp_path / "base.png", *base)
    for arguments in others:
        draw(tmp_path / "other.png", *arguments)
        assert not np.array_equal(pixels(tmp_path / "base.png"), pixels(tmp_path / "other.png"))


def test_the_command_writes_every_picture_and_the_same_for_tensorboard(model, tmp_path, run_script):
    """Of a volume whose rows and columns are reversed to draw it upright."""
    checkpoint = save(tmp_path / "run" / "best.pth", model, HISTORY)
    image = np.random.default_rng(0).random((3, 80, 70), np.float32)
    volume = Volume("case", image, np.zeros((3, 80, 70), np.uint8), affine=np.diag([1.5, 1.5, 8.0, 1.0]))
    write_volume(tmp_path / "case.npy.h5", volume)
    folder = tmp_path / "run" / "inspection"
    (folder / "events").mkdir(parents=True)
    (folder / "events" / "events.out.tfevents.1.host").write_text("of an earlier look")
    flags = "--checkpoint", checkpoint, "--input", tmp_path / "case.npy.h5", "--slice", 1
    done = run_script("utils/inspection.py", *flags)
    assert done.status == 0, done.error
    names = {"memory_use", "k", "prototypes", "clusters", "windows", "gate"}
    assert {path.stem for path in folder.glob("*.png")} == names
    assert all(pixels(path).std() > 0 for path in folder.glob("*.png"))
    (events,) = (folder / "events").iterdir()
    content = events.read_bytes()
    course = ("memory/k", "memory/k_decoder", "memory/cluster_use", "memory/gate")
    assert all(name.encode() in content for name in (*names, *course))


def test_without_an_image_or_in_warm_up_there_is_less_to_see(model, tmp_path, run_script):
    done = run_script("utils/inspection.py", "--checkpoint", save(tmp_path / "best.pth", model, []))
    assert done.status == 0, done.error
    assert {path.stem for path in (tmp_path / "inspection").glob("*.png")} == {"memory_use", "prototypes"}

    young = SimMPNet(**model.config)
    checkpoint = save(tmp_path / "young" / "best.pth", young, HISTORY)
    done = run_script("utils/inspection.py", "--checkpoint", checkpoint, "--output", tmp_path / "out")
    assert done.status == 0 and "warm-up" in done.error
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == {"k"}


def volume_of(image: np.ndarray, affine: np.ndarray | None = None) -> Volume:
    """Return a volume of one slice (S, S)."""
    return Volume("case", image[None], affine=affine)


@pytest.mark.parametrize(
    ("ablation", "blocks", "pictures"),
    [
        (dict(attention="plain"), 0, {"windows", "gate"}),
        (dict(encoders="maxvit"), 4, {"memory_use", "k", "prototypes", "clusters"}),
    ],
    ids=["plain", "maxvit"],
)
def test_an_ablation_shows_what_is_left(model, tmp_path, ablation, blocks, pictures):
    ablated = SimMPNet(**model.config | ablation)
    past_warm_up(ablated)
    history = [row if blocks else {"epoch": row["epoch"]} for row in HISTORY]
    assert len(list(ablated.memory_blocks())) == blocks
    paths = inspect(ablated, history, tmp_path, volume_of(np.random.default_rng(0).random((SIZE, SIZE), np.float32)))
    assert {path.stem for path in paths} == pictures == {path.stem for path in tmp_path.glob("*.png")}


def test_without_memory_and_windows_there_is_nothing_to_see(model, tmp_path):
    ablated = SimMPNet(**model.config | {"attention": "plain", "dsgim": "none", "gate": "none"})
    with pytest.raises(RunError, match="neither windows nor a gate"):
        inspect(ablated, HISTORY, tmp_path, volume_of(np.zeros((SIZE, SIZE), np.float32)))
    with pytest.raises(RunError, match="--input"):
        inspect(ablated, HISTORY, tmp_path)


def test_pictures_are_drawn_upright(model, tmp_path, monkeypatch):
    drawn = []
    for name in ("save_cluster_maps", "save_windows", "save_gate"):
        monkeypatch.setattr(f"utils.inspection.{name}", lambda path, *what: drawn.append(what))
    monkeypatch.setattr("utils.inspection._write_events", lambda *_: None)
    image = np.random.default_rng(0).random((SIZE, SIZE), np.float32)
    for y in (-1.0, 1.0):  # rows run to the back, or to the front
        inspect(model, [], tmp_path, volume_of(image, np.diag([-1.0, y, 1.0, 1.0])))
    (whole, maps, _), (_, windows), (_, gate, _), (turned, turned_maps, _), (_, turned_windows), (_, turned_gate, _) = (
        drawn
    )
    np.testing.assert_array_equal(turned, whole[::-1])
    assert all(np.array_equal(turned_maps[name], maps[name][::-1]) for name in maps)
    np.testing.assert_array_equal(turned_windows, windows[:, ::-1])
    np.testing.assert_array_equal(turned_gate, gate[::-1])


def test_what_cannot_be_inspected_is_said_in_one_line(model, tmp_path, run_script):
    checkpoint = save(tmp_path / "best.pth", model, [])
    baseline = save(
        tmp_path / "baseline.pth", build("maxvit_unet", num_classes=4, img_size=SIZE, model_scale="pico"), []
    )
    write_volume(
        tmp_path / "case.npy.h5", Volume("case", np.ones((3, 8, 8), np.float32), np.zeros((3, 8, 8), np.uint8))
    )
    for flags, words in (
        (("--checkpoint", "model.onnx"), ("model.onnx", "best.pth")),
        (("--checkpoint", baseline), ("baseline.pth", "maxvit_unet", "no memory")),
        (("--checkpoint", checkpoint, "--input", tmp_path / "case.npy.h5", "--slice", 3), ("--slice 3", "has 3")),
        (("--checkpoint", checkpoint, "--input", tmp_path / "no.nii.gz"), ("no.nii.gz",)),
    ):
        done = run_script("utils/inspection.py", *flags)
        assert done.status == 1 and len(done.error.strip().splitlines()) == 1, done.error
        assert all(word in done.error for word in words), done.error
    assert not (tmp_path / "inspection").exists()
