"""Pretrained weights and the release's checkpoints: what fits is loaded, what does not is named."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from networks import NetworkError, SimMPNet, load_release_state_dict, pretrained_file
from networks.maxvit import MaxViTEncoder
from tests.parity import FIXTURES


@pytest.fixture(scope="module")
def imagenet_model():
    torch.manual_seed(1)
    return timm.create_model("maxvit_rmlp_pico_rw_256")


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_a_weight_file_fills_the_encoder_at_any_size(imagenet_model, tmp_path, ending):
    path = tmp_path / f"weights{ending}"
    state = imagenet_model.state_dict()
    if ending == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    encoder = MaxViTEncoder("pico", img_size=96, pretrained=path)
    for name, value in encoder.state_dict().items():
        if not name.startswith("injection"):
            assert torch.equal(value, state[name]), name


def message_of(call, *args, **kwargs) -> str:
    with pytest.raises(NetworkError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_file_says_what_to_download_and_where_to_put_it():
    path = pretrained_file("small")
    message = message_of(MaxViTEncoder, "small", pretrained="nowhere.pth")
    assert path.as_posix() == "pretrained_pth/maxvit/maxxvit_rmlp_small_rw_256_sw-37e217ff.pth"
    assert "nowhere.pth" in message and str(path) in message and "https://" in message


def test_a_file_of_another_scale_is_refused(imagenet_model, tmp_path):
    torch.save(imagenet_model.state_dict(), tmp_path / "pico.pth")
    message = message_of(MaxViTEncoder, "nano", pretrained=tmp_path / "pico.pth")
    assert "pico.pth" in message and "maxxvit_rmlp_nano_rw_256" in message


def test_a_file_cut_off_is_refused(imagenet_model, tmp_path):
    torch.save(imagenet_model.state_dict(), tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:5000])
    assert "cut.pth" in message_of(MaxViTEncoder, "pico", pretrained=tmp_path / "cut.pth")


def test_a_hub_out_of_reach_says_what_to_do(monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", no_network)
    message = message_of(MaxViTEncoder, "small", pretrained="hub")
    assert "pretrained_pth/maxvit" in message and "--pretrained none" in message


def release_state() -> dict[str, torch.Tensor]:
    shapes = json.loads((FIXTURES / "release_state_dict_shapes.json").read_text())
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def small() -> SimMPNet:
    return SimMPNet(9, variant="release")


def test_release_missing_left_over_and_unfit_tensors_are_all_listed(small):
    state = release_state()
    del state["DMWLA_2.1.theta.weight"]
    state["unheard.of"] = torch.zeros(1)
    state["out_head1.weight"] = torch.zeros(4, 768, 1, 1)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    message = message_of(load_release_state_dict, small, state)
    for name in ("DMWLA_2.1.theta.weight", "unheard.of", "out_head1.weight (4, 768, 1, 1)"):
        assert name in message
    for name, value in small.state_dict().items():
        assert torch.equal(value, before[name])


def test_release_backbone_is_taken_from_the_names_its_forward_pass_uses(small):
    state = release_state()
    state["stem_1.conv1.weight"] += 1
    state["backbone1.stem.conv1.weight"] += 2
    load_release_state_dict(small, state)
    assert (small.maxvit.stem.conv1.weight == 1).all()


def test_release_takes_another_number_of_classes():
    state = release_state()
    for i, width in enumerate((768, 384, 192, 96), 1):
        state[f"out_head{i}.weight"], state[f"out_head{i}.bias"] = torch.zeros(4, width, 1, 1), torch.zeros(4)
    for name in [n for n in state if n.startswith("DMWLA_") and "concept" in n]:
        state[name] = torch.zeros(256, 400 if name.endswith("pool") else 4)
    load_release_state_dict(SimMPNet(4, variant="release"), state)


def test_release_can_start_a_network_of_the_variant_paper():
    model = SimMPNet(9, variant="paper")
    state = release_state()
    state["DSGIM.ConvBlock.conv.1.running_var"] += 3
    load_release_state_dict(model, state)
    assert all((s.running_var == 3).all() for s in model.dmwla_encoder.dsgim.norm1.statistics)
