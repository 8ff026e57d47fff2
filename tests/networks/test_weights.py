"""Pretrained weights and the release's checkpoints: what fits is loaded, what does not is named."""

import json
import logging
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from networks import SimMPNet, build, load_release_state_dict
from networks.maxvit import MaxViTEncoder
from tests.parity import FIXTURES


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Weight files of the scale ``pico``: two that fit, one cut off, and one of another model."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(1)
    state = timm.create_model("maxvit_rmlp_pico_rw_256").state_dict()
    torch.save(state, folder / "pico.pth")
    save_file(state, folder / "pico.safetensors")
    (folder / "cut.pth").write_bytes((folder / "pico.pth").read_bytes()[:5000])
    torch.save({"stem.conv1.weight": torch.zeros(32, 3, 3, 3)}, folder / "foreign.pth")
    return folder


def encoder(path: Path | str, in_channels: int = 3) -> torch.nn.Module:
    return MaxViTEncoder("pico", img_size=96, pretrained=path)


def unet_encoder(path: Path | str, in_channels: int = 3) -> torch.nn.Module:
    """Return the encoder of ``maxvit_unet``; timm calls its stages.0 stages_0."""
    pytest.importorskip("segmentation_models_pytorch", reason="smp is not installed (requirements-baselines.txt)")
    options = dict(num_classes=3, in_channels=in_channels, img_size=64, model_scale="pico", pretrained=path)
    return build("maxvit_unet", **options).net.encoder.model


@pytest.mark.parametrize(
    ("make", "name", "in_channels"),
    [(encoder, "pico.pth", 3), (encoder, "pico.safetensors", 3), *((unet_encoder, "pico.pth", c) for c in (3, 1, 4))],
)
def test_a_weight_file_fills_stem_and_stages(files, make, name, in_channels):
    expected = torch.load(files / "pico.pth")
    if in_channels == 1:
        expected["stem.conv1.weight"] = expected["stem.conv1.weight"].sum(1, keepdim=True)
    elif in_channels == 4:
        expected["stem.conv1.weight"] = expected["stem.conv1.weight"][:, [0, 1, 2, 0]] * (3 / 4)
    found = {name.replace("stages_", "stages."): v for name, v in make(files / name, in_channels).state_dict().items()}
    found = {name: value for name, value in found.items() if name.startswith(("stem.", "stages."))}
    assert found.keys() == {name for name in expected if name.startswith(("stem.", "stages."))}
    torch.testing.assert_close(found, {name: expected[name] for name in found}, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["cut.pth", "foreign.pth", "nowhere.pth"])
@pytest.mark.parametrize("make", [encoder, unet_encoder])
def test_a_file_that_is_cut_off_or_foreign_or_missing_is_refused_in_one_line(files, refused, make, name):
    refused(lambda: make(files / name), name, "--pretrained none")


def test_a_file_of_another_scale_is_refused_with_what_to_download(files, refused):
    words = "pico.pth does not fit maxxvit_rmlp_small_rw_256 ", "https://"
    target = " to pretrained_pth/maxvit/maxxvit_rmlp_small_rw_256_sw-37e217ff.pth"
    refused(lambda: MaxViTEncoder("small", pretrained=files / "pico.pth"), *words, target)


@pytest.mark.parametrize(
    ("network", "download", "words"),
    [
        ("sim_mpnet", "timm.create_model", ["OSError", "pretrained_pth/maxvit"]),
        ("unet", "segmentation_models_pytorch.encoders.hf_hub_download", ["resnet34", "HF_HOME"]),
    ],
)
def test_a_hub_out_of_reach_says_once_what_to_do(monkeypatch, refused, caplog, network, download, words):
    pytest.importorskip(download.split(".")[0])

    def unreachable(*_, **__):
        logging.getLogger("huggingface_hub.utils").warning("Retrying in 8s")
        raise OSError("no route to host")

    monkeypatch.setattr(download, unreachable)
    refused(lambda: build(network, num_classes=3, pretrained="hub"), *words, "--pretrained none")
    assert not caplog.text


def release_state(device: str = "cpu") -> dict[str, torch.Tensor]:
    shapes = json.loads((FIXTURES / "release_state_dict_shapes.json").read_text())
    return {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}


def test_release_fills_the_variant_paper_from_the_names_its_forward_pass_uses_or_lists_all_that_does_not_fit(refused):
    state, small = release_state("meta"), SimMPNet(9)
    del state["DMWLA_2.1.theta.weight"]
    state["unheard.of"] = torch.zeros(1)
    state["out_head1.weight"] = torch.zeros(4, 768, 1, 1)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    words = ("missing: DMWLA_2.1.theta.weight; left over: unheard.of; ", "out_head1.weight (4, 768, 1, 1)")
    refused(lambda: load_release_state_dict(small, state), *words)
    torch.testing.assert_close(small.state_dict(), before, rtol=0, atol=0)
    state = release_state()
    state["stem_1.conv1.weight"] += 1
    state["backbone1.stem.conv1.weight"] += 2
    state["DSGIM.ConvBlock.conv.1.running_var"] += 3
    load_release_state_dict(small, state)
    assert (small.maxvit.stem.conv1.weight == 1).all()
    assert all((s.running_var == 3).all() for s in small.dmwla_encoder.dsgim.norm1.statistics)


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
def test_release_takes_another_number_of_classes():
    state = release_state("meta")
    for i, width in enumerate((768, 384, 192, 96), 1):
        state[f"out_head{i}.weight"], state[f"out_head{i}.bias"] = torch.zeros(4, width, 1, 1), torch.zeros(4)
    for name in [n for n in state if n.startswith("DMWLA_") and "concept" in n]:
        state[name] = torch.zeros(256, 400 if name.endswith("pool") else 4)
    with torch.device("meta"):
        model = SimMPNet(4, variant="release")
    load_release_state_dict(model, state)
