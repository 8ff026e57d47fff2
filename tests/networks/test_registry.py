"""What training, testing and prediction rely on, for every network by its name and every ablation of Sim-MPNet."""

import copy
import re

import pytest
import torch

from networks import DMWLA, NETWORKS, NetworkError, SimMPNet, build, default_weights, register
from networks.registry import Baseline
from tests.networks.conftest import NARROW
from utils.arguments import network_defaults
from utils.checkpoint import build_network
from utils.losses import subset_loss

pytestmark = pytest.mark.usefixtures("narrow")

SIZES = {"sim_mpnet": NARROW | dict(warmup_iterations=1), "maxvit_unet": dict(model_scale="pico")}
ABLATIONS = [
    dict(word.split("=") for word in row.split())
    for row in (
        "attention=plain", "attention=intra_cluster", "dsgim=none", "dsgim=cosine", "dsgim=euclidean",
        "encoders=maxvit", "encoders=dmwla", "gate=none", "loss=last",
        "attention=plain dsgim=none encoders=dmwla loss=last", "variant=release", "variant=stable",
    )
]  # fmt: skip
CASES = [dict(network=name) for name in NETWORKS] + ABLATIONS


def name_of(options: object) -> str | None:
    return " ".join(f"{name}={value}" for name, value in options.items()) if isinstance(options, dict) else None


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


@pytest.mark.parametrize("options", CASES, ids=name_of)
def test_a_network_trains_in_bf16_and_predicts_and_its_config_rebuilds_it(refused, options):
    model = make(in_channels=4, **options).to(memory_format=torch.channels_last).train()
    for _ in range(4 if any(model.memory_banks()) else 1):  # the last step is past the warm-up
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(torch.rand(2, 4, 64, 64))
    loss = subset_loss(logits, torch.randint(3, (2, 64, 64)))
    loss.backward()
    assert loss.isfinite()
    for bank in model.memory_banks():
        assert not bank.in_warmup and bank.pool.dtype == bank.prototypes.dtype == torch.float32
        assert bank.pool.isfinite().all()
    unused = (".phi.weight", ".g.weight") if options.get("attention") == "intra_cluster" else ()
    assert getattr(model, "leaves_parameters_out", False) == bool(unused)  # DistributedDataParallel must know
    for name, parameter in model.named_parameters():
        if name.endswith(unused):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name

    before, images = copy.deepcopy(model.state_dict()), torch.rand(2, 4, 64, 64)
    with torch.device("meta"):
        other = build(**model.config)
    assert other.config == model.config
    assert {name: v.shape for name, v in other.state_dict().items()} == {name: v.shape for name, v in before.items()}
    with torch.no_grad():
        first, second = model.eval()(images), model(images)
    assert [tuple(m.shape) for m in first] == [(2, 3, 64, 64)] * len(first)
    if options.get("variant") != "release":  # its evaluation writes the memory
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(first) == (4 if isinstance(model, SimMPNet) and model.config["loss"] == "subset" else 1)
    for shape in ((1, 4, 96, 96), (1, 1, 64, 64), (4, 64, 64)):
        refused(lambda shape=shape: model(torch.rand(shape)), "takes (B, 4, 64, 64)")


@pytest.mark.parametrize("name", NETWORKS)
def test_a_wrong_size_is_answered_with_the_nearest_right_ones(refused, name):
    refused(lambda: make(name, img_size=103), "img_size is 103; it must be a multiple of ", ": the nearest is 96 or 1")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(network="resnet"), ["resnet", "sim_mpnet", "unet"]),
        (dict(network="unet", feature_dim=3), ["unet", "feature_dim"]),
        (dict(network="unet", in_channels=0), ["in_channels", "0"]),
        (dict(network="attention_unet", pretrained="hub"), ["attention_unet", "pretrained"]),
        (dict(network="unet", pretrained="a.pth"), ["a.pth", "hub", "none"]),
        (dict(network="maxvit_unet", model_scale="huge"), ["huge", "pico"]),
        (dict(network="swin_unetr", img_size=32), ["img_size is 32", "64 or more"]),
        (dict(dsgim="manhattan"), ["dsgim", "manhattan", "cosine", "none"]),
        (dict(encoders="dmwla", pretrained="a.pth"), ["a.pth", "encoders"]),
        (dict(model_scale="huge"), ["huge", "pico", "small"]),
        (dict(img_size_dmwla=7), ["img_size_dmwla", "7", "32"]),
        (dict(img_size=0), ["img_size", "0", "32"]),
        (dict(variant="ours"), ["ours", "paper", "release"]),
        (dict(warmup_iterations=0), ["warmup_iterations", "0", "1"]),
    ],
    ids=name_of,
)
def test_a_wrong_argument_is_answered_in_one_line(refused, options, words):
    refused(lambda: make(**options), *words)


def test_every_default_weight_says_where_it_comes_from(refused):
    small = "pretrained_pth/maxvit/maxxvit_rmlp_small_rw_256_sw-37e217ff.pth"
    for name, expected in (("sim_mpnet", small), ("maxvit_unet", small), ("unet", "hub"), ("attention_unet", None)):
        assert str(default_weights(name, network_defaults(name))) == str(expected)
    refused(lambda: default_weights("sim_mpnet", {"model_scale": "tiny", "encoders": "both"}), "scale tiny")
    assert default_weights("sim_mpnet", {"model_scale": "tiny", "encoders": "dmwla"}) is None


def parts_of(model: torch.nn.Module) -> set[str]:
    """Return the first two levels of the names of a network's tensors, and ``bank`` for a memory."""
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
    ids=name_of,
)
def test_an_ablation_takes_out_what_it_says_and_nothing_else(options, gone):
    with torch.device("meta"):
        whole, ablated = parts_of(make()), parts_of(make(**options))
    assert gone <= whole and not gone & ablated
    others = {name for name in whole - ablated if not name.startswith(tuple(part.split(".")[0] for part in gone))}
    assert not others and ablated <= whole


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Return whether the last maps of two networks are equal, bit by bit."""
    images = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return torch.equal(a.eval()(images)[-1], b.eval()(images)[-1])


def test_without_a_memory_a_block_does_what_it_does_in_the_warm_up():
    """So ``plain`` is both of the paper's rows: without DMW-LA, and without its intra-cluster interaction."""
    plain, whole = make(attention="plain"), make(warmup_iterations=1000)
    plain.load_state_dict(whole.state_dict(), strict=False)
    assert same(plain, whole)


@pytest.mark.parametrize(("options", "reads_others"), [(dict(attention="intra_cluster"), False), ({}, True)])
def test_without_the_global_interaction_a_token_sees_no_other(options, reads_others):
    block = make(**options).double().train().decoder.dmwla[0]
    x = torch.rand(1, 16, 4, 4, dtype=torch.float64)
    block(x)
    block.eval()
    changed = x.clone()
    changed[..., 3, 3] += 1
    with torch.no_grad():
        equal = torch.isclose(block(x), block(changed), rtol=0, atol=1e-12).all(1)[0]
    assert not equal[3, 3] and equal[:3].all() != reads_others


def test_without_a_gate_the_second_encoder_sees_the_image():
    gated, ungated = make(), make(gate="none")
    ungated.load_state_dict({name: value for name, value in gated.state_dict().items() if not name.startswith("gate.")})
    torch.nn.init.zeros_(gated.gate.weight)
    for logit, is_open in ((0.0, False), (100.0, True)):
        torch.nn.init.constant_(gated.gate.bias, logit)
        assert same(gated, ungated) == is_open


def test_the_finest_map_alone_can_predict_for_a_network_that_was_trained_with_it_or_with_all(tmp_path, refused):
    whole, last = make(), make(loss="last")
    state = {name: value for name, value in whole.state_dict().items() if not re.match(r"heads\.[012]", name)}
    last.load_state_dict({name.replace("heads.3.", "heads.0."): value for name, value in state.items()})
    assert same(last, whole)
    whole, images = whole.to(memory_format=torch.channels_last), torch.rand(2, 1, 64, 64)
    assert len(whole.train()(images)) == len(make(prediction="last").train()(images)) == 4
    state = {"model": whole.state_dict(), "network": whole.config, "data": {"class_names": ["a", "b"]}}
    finest = build_network(state, tmp_path, prediction="last").eval()
    assert len(finest(images)) == 1 and same(finest, whole) and len(whole.eval()(images)) == 4
    other = make("maxvit_unet")
    state |= {"model": other.state_dict(), "network": other.config}
    refused(lambda: build_network(state, tmp_path, prediction="last"), "one map: leave it out")


def test_the_memory_of_a_network_of_ones_own_is_found():
    block = DMWLA(4, 8, num_clusters=2)
    assert list(Baseline(torch.nn.Sequential(block), {}).memory_banks()) == [block.bank]


def test_a_name_in_use_or_a_builder_without_its_arguments_is_refused(refused):
    refused(lambda: register("sim_mpnet"), "sim_mpnet already")
    lacking = "own lacks in_channels, img_size"
    refused(lambda: register("own")(lambda num_classes: torch.nn.Conv2d(1, num_classes, 1)), lacking)
    assert "own" not in NETWORKS
