"""What training, testing and prediction rely on, of every network by its name and of every ablation of Sim-MPNet."""

import copy
import inspect
import re

import pytest
import timm
import torch

from networks import NETWORKS, NetworkError, SimMPNet, build, load_release_state_dict, register
from networks.registry import default_weights
from tests.conftest import ROOT
from utils.checkpoint import build_network, load_checkpoint, save_checkpoint
from utils.losses import subset_loss, subset_losses

SMALL = dict(img_size=64, img_size_dmwla=64, feature_dim=16, decoder_feature_dim=16, columns_per_cluster=20)
SIZES = {"sim_mpnet": SMALL | dict(model_scale="pico", warmup_iterations=1), "maxvit_unet": dict(model_scale="pico")}
ABLATIONS = [
    dict(attention="plain"),
    dict(attention="intra_cluster"),
    dict(dsgim="none"),
    dict(dsgim="cosine"),
    dict(dsgim="euclidean"),
    dict(encoders="maxvit"),
    dict(encoders="dmwla"),
    dict(gate="none"),
    dict(loss="last"),
    dict(attention="plain", dsgim="none", encoders="dmwla", loss="last"),
]
CASES = [dict(network=name) for name in NETWORKS] + ABLATIONS


def name_of(options: dict) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items())


def make(network: str = "sim_mpnet", in_channels: int = 1, **options) -> torch.nn.Module:
    """Build a small network of three classes at 64 px, or skip where its library is not installed."""
    torch.manual_seed(0)
    options = {"img_size": 64} | SIZES.get(network, {}) | options
    try:
        return build(network, num_classes=3, in_channels=in_channels, **options)
    except NetworkError as error:
        if "requirements-baselines.txt" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="module", params=CASES, ids=name_of)
def trained(request) -> torch.nn.Module:
    """A network with the gradient of a step, the third where it has a memory, so that its warm-up has ended."""
    model = make(**request.param).to(memory_format=torch.channels_last).train()
    for _ in range(3 if any(model.memory_banks()) else 1):
        model.zero_grad()
        subset_loss(model(torch.rand(2, 1, 64, 64)), torch.randint(3, (2, 64, 64))).backward()
    assert not any(bank.in_warmup for bank in model.memory_banks())
    return model


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(1))


def test_every_parameter_in_use_gets_a_finite_gradient(trained):
    unused = (".phi.weight", ".g.weight") if trained.config.get("attention") == "intra_cluster" else ()
    assert getattr(trained, "leaves_parameters_out", False) == bool(unused)  # DistributedDataParallel has to know
    for name, parameter in trained.named_parameters():
        if name.endswith(unused):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@torch.no_grad()
def test_evaluation_repeats_itself_and_gives_maps_of_the_images_size(trained, images):
    model = trained.eval()
    before = copy.deepcopy(model.state_dict())
    first, second = model(images), model(images)
    assert [tuple(m.shape) for m in first] == [(2, 3, 64, 64)] * len(first)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    several = isinstance(model, SimMPNet) and model.config["loss"] == "subset"
    assert len(first) == (4 if several else 1)
    with pytest.raises(NetworkError, match=r"takes \(B, 1, 64, 64\)"):
        model(torch.rand(1, 1, 96, 96))


@torch.no_grad()
def test_a_checkpoint_rebuilds_the_network_without_flags(trained, images, tmp_path):
    state = {"model": trained.state_dict(), "network": trained.config, "data": {"class_names": ("a", "b")}}
    save_checkpoint(tmp_path / "a.pth", state)
    other = build_network(load_checkpoint(tmp_path / "a.pth"), tmp_path / "a.pth").eval()
    for a, b in zip(trained.eval()(images), other(images), strict=True):
        assert torch.equal(a, b)
    assert other.config == trained.config


@pytest.mark.parametrize("name", NETWORKS)
def test_colour_images_of_another_size_train_in_bf16(name):
    model = make(name, in_channels=3, img_size=96).to(memory_format=torch.channels_last).train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.rand(2, 3, 96, 96))
    assert all(m.shape == (2, 3, 96, 96) for m in logits)
    loss = subset_loss(logits, torch.randint(3, (2, 96, 96)))
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_an_unfit_size_is_answered_with_the_nearest_that_fit(name):
    with pytest.raises(NetworkError, match=r"img_size is 103; it must be a multiple of \d+: the nearest is 96 or 1"):
        make(name, img_size=103)


def test_swin_unetr_says_from_which_size_on():
    with pytest.raises(NetworkError, match=r"img_size is 32.*64 or more"):
        make("swin_unetr", img_size=32)


def test_the_subset_loss_of_one_map_is_the_loss_of_that_map():
    logits, label = torch.randn(2, 3, 8, 8), torch.randint(3, (2, 8, 8))
    loss, cross_entropy, dice = subset_losses([logits], label, 0.3, 0.7)
    assert cross_entropy.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, label).item(), rel=1e-6)
    assert loss.item() == pytest.approx((0.3 * cross_entropy + 0.7 * dice).item(), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(network="resnet"), ["resnet", "sim_mpnet", "unet"]),
        (dict(network="unet", feature_dim=3), ["unet", "feature_dim"]),
        (dict(network="unet", in_channels=2), ["in_channels", "2"]),
        (dict(network="attention_unet", pretrained="hub"), ["attention_unet", "pretrained"]),
        (dict(network="unet", pretrained="a.pth"), ["a.pth", "hub", "none"]),
        (dict(network="maxvit_unet", pretrained="a.pth"), ["a.pth", "download", "--pretrained none"]),
        (dict(network="maxvit_unet", model_scale="huge"), ["huge", "pico"]),
        (dict(attention="none"), ["attention", "plain"]),
        (dict(dsgim="manhattan"), ["dsgim", "manhattan", "cosine", "none"]),
        (dict(encoders="three"), ["encoders", "maxvit"]),
        (dict(gate="shut"), ["gate", "learned", "none"]),
        (dict(loss="first"), ["loss", "last"]),
        (dict(encoders="dmwla", pretrained="a.pth"), ["a.pth", "encoders"]),
    ],
    ids=lambda value: name_of(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_answered_in_one_line(options, words):
    with pytest.raises(NetworkError) as error:
        make(**options)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_weights_out_of_reach_say_what_to_do(monkeypatch):
    encoders = pytest.importorskip("segmentation_models_pytorch.encoders", reason="smp is not installed")

    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(encoders, "hf_hub_download", no_network)
    with pytest.raises(NetworkError, match=r"resnet34.*OSError.*HF_HOME.*--pretrained none"):
        make("unet", pretrained="hub")


def test_the_maxvit_unet_takes_the_weight_file_of_sim_mpnet(tmp_path):
    encoder = timm.create_model("maxvit_rmlp_pico_rw_256")
    torch.save(encoder.state_dict(), tmp_path / "pico.pth")
    model = make("maxvit_unet", in_channels=3, pretrained=tmp_path / "pico.pth")
    own, state = dict(model.named_parameters()), encoder.state_dict()
    found = [name for name in own if name.startswith("net.encoder.model.")]
    assert len(found) > 100
    for name in found:
        theirs = name.removeprefix("net.encoder.model.").replace("stages_", "stages.")
        assert torch.equal(own[name], state[theirs]), name
    (tmp_path / "cut.pth").write_bytes((tmp_path / "pico.pth").read_bytes()[:5000])
    with pytest.raises(NetworkError, match=r"cut\.pth.*--pretrained none"):
        make("maxvit_unet", pretrained=tmp_path / "cut.pth")


def test_every_default_weight_says_where_it_comes_from():
    defaults = {}
    for name in NETWORKS:
        parameters = inspect.signature(NETWORKS[name]).parameters.values()
        defaults[name] = default_weights(name, {p.name: p.default for p in parameters})
    small = "pretrained_pth/maxvit/maxxvit_rmlp_small_rw_256_sw-37e217ff.pth"
    assert {name: str(defaults[name]) for name in ("sim_mpnet", "maxvit_unet", "unet", "attention_unet")} == {
        "sim_mpnet": small,
        "maxvit_unet": small,
        "unet": "hub",
        "attention_unet": "None",
    }
    with pytest.raises(NetworkError, match="scale tiny"):
        default_weights("sim_mpnet", {"model_scale": "tiny", "encoders": "both"})
    assert default_weights("sim_mpnet", {"model_scale": "tiny", "encoders": "dmwla"}) is None


def parts_of(model: torch.nn.Module) -> set[str]:
    """Return the first two levels of the names that a network's tensors have, and those of memories."""
    names = {re.sub(r"^((?:\w+\.){1,2}).*", r"\1", name) for name in model.state_dict()}
    return names | {"bank" for name in model.state_dict() if ".bank." in name}


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        (dict(attention="plain"), {"bank"}),
        (dict(dsgim="none"), {"dmwla_encoder.dsgim."}),
        (dict(encoders="maxvit"), {"gate.", "dmwla_encoder.stages.", "dmwla_encoder.dsgim."}),
        (dict(encoders="dmwla"), {"gate.", "maxvit.stem.", "maxvit.stages."}),
        (dict(gate="none"), {"gate."}),
        (dict(loss="last"), {"heads.1.", "heads.2.", "heads.3."}),
    ],
    ids=lambda value: name_of(value) if isinstance(value, dict) else "",
)
def test_an_ablation_takes_out_what_it_says_and_nothing_else(options, gone):
    whole, ablated = parts_of(make()), parts_of(make(**options))
    assert gone <= whole and not gone & ablated
    others = {name for name in whole - ablated if not name.startswith(tuple(part.split(".")[0] for part in gone))}
    assert not others and ablated <= whole


def test_without_a_memory_a_block_is_what_the_memory_s_warm_up_is(images):
    """So that `plain` is both of the paper's rows, without DMW-LA and without its intra-cluster interaction."""
    plain, whole = make(attention="plain").eval(), make(warmup_iterations=1000).eval()
    plain.load_state_dict(whole.state_dict(), strict=False)
    with torch.no_grad():
        for a, b in zip(plain(images), whole(images), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("options", "reads_others"), [(dict(attention="intra_cluster"), False), ({}, True)])
def test_without_the_global_interaction_a_token_sees_no_other(options, reads_others):
    block = make(**options).train().decoder.dmwla[0]
    x = torch.rand(1, 256, 4, 4)
    block(x)
    block.eval()
    changed = x.clone()
    changed[..., 3, 3] += 1
    with torch.no_grad():
        same = torch.isclose(block(x), block(changed), rtol=0, atol=1e-6).all(1)[0]
    assert not same[3, 3] and same[:3].all() != reads_others


def test_without_a_gate_the_second_encoder_sees_the_image(images):
    gated, ungated = make().eval(), make(gate="none").eval()
    ungated.load_state_dict({name: value for name, value in gated.state_dict().items() if not name.startswith("gate.")})
    sides = []
    for logit in (0.0, 100.0):
        torch.nn.init.zeros_(gated.gate.weight)
        torch.nn.init.constant_(gated.gate.bias, logit)
        with torch.no_grad():
            sides.append(all(torch.equal(a, b) for a, b in zip(gated(images), ungated(images), strict=True)))
    assert sides == [False, True]


def test_the_last_layer_predicts_alone(images):
    whole, last = make().eval(), make(loss="last").eval()
    state = {name.replace("heads.3.", "heads.0."): value for name, value in whole.state_dict().items()}
    kept = {name: value for name, value in state.items() if name in last.state_dict()}
    kept |= {f"heads.0.{leaf}": whole.state_dict()[f"heads.3.{leaf}"] for leaf in ("weight", "bias")}
    last.load_state_dict(kept)
    with torch.no_grad():
        (alone,) = last(images)
        assert torch.equal(alone, whole(images)[-1])


def test_a_release_checkpoint_does_not_fit_an_ablation():
    with pytest.raises(NetworkError, match="left over"):
        load_release_state_dict(make(variant="release", dsgim="none"), make(variant="release").state_dict())


def test_a_name_or_a_builder_that_will_not_do_is_refused():
    with pytest.raises(NetworkError, match="sim_mpnet already"):
        register("sim_mpnet")
    with pytest.raises(NetworkError, match="own lacks in_channels, img_size"):
        register("own")(lambda num_classes: torch.nn.Conv2d(1, num_classes, 1))
    assert "own" not in NETWORKS


@pytest.fixture
def example():
    """The network of ``docs/adding_a_network.md``, registered."""
    text = (ROOT / "docs/adding_a_network.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert len(code.strip().splitlines()) <= 16
    exec(code, {})
    yield "two_convolutions"
    del NETWORKS["two_convolutions"]


def test_the_documented_example_builds(example):
    model = make(example, width=8, img_size=50)
    (logits,) = model(torch.rand(2, 1, 50, 50))
    assert logits.shape == (2, 3, 50, 50)
    assert model.config == {"network": example, "num_classes": 3, "in_channels": 1, "img_size": 50, "width": 8}
