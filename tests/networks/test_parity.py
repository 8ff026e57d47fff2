"""Every array of the parity fixtures: numbers that the authors' release computed on the CPU in float32.

Weights and inputs come from ``parity.tensor_for``; ``tests/fixtures/README.md`` says what each file holds.
The release writes its memory in evaluation, so each array is compared from fresh weights. Our side computes in float64,
so that rounding decides nothing: in float32 one token near the border of two clusters differs on some processors.
"""

import json
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from einops import rearrange

from networks import DMWLA, DSGIM, SimMPNet, load_release_state_dict
from networks.decoder import Decoder
from networks.dsgim import decay_coefficients, select_windows
from networks.release import IGNORED, release_name
from tests.parity import FIXTURES, load, synthetic, tensor_for

pytestmark = [pytest.mark.processors, pytest.mark.usefixtures("double_precision")]


def assert_close(actual: torch.Tensor, expected: np.ndarray, tolerance: float) -> None:
    torch.testing.assert_close(actual.detach().float(), torch.from_numpy(expected), atol=tolerance, rtol=0)


def fill(module: torch.nn.Module, source_of: Callable[[str], str]) -> None:
    """Give the tensors of a module the synthetic values of the release's, whose names ``source_of`` returns."""
    state = module.state_dict()
    for name, own in state.items():
        leaf, source = name.rsplit(".", 1)[-1], source_of(name)
        if leaf == "pool":
            value = synthetic(source, (own.shape[2], own.shape[0] * own.shape[1]))
            state[name] = rearrange(value, "d (k m) -> k m d", m=own.shape[1])
        elif leaf == "prototypes":
            state[name] = synthetic(source, tuple(own.shape[::-1])).T
        elif re.search(r"(theta|phi|g|o)\.weight$|phi_k$", name):  # 1x1 convolutions there
            state[name] = synthetic(source, (*own.shape, 1, 1)).flatten(1)
        elif leaf not in ("replaced_columns", "key_counts"):
            state[name] = synthetic(source, tuple(own.shape)).to(own.dtype)
    module.load_state_dict(state)


def release_dmwla(f, warmup_iterations: int = 2000) -> DMWLA:
    """Build the fixture's block with its synthetic weights."""
    sizes = [int(f[key]) for key in ("ch", "feature_dim", "num_k", "pool_size_per_cluster")]
    block = DMWLA(*sizes, replaced_columns=int(f["k"]), warmup_iterations=warmup_iterations, variant="release")
    fill(block, lambda name: str(f["prefix"]) + ("phi_k.weight" if name == "phi_k" else release_name(name)))
    return block


@pytest.mark.parametrize("training", [True, False])
def test_dmwla_in_the_warm_up_and_in_two_steady_steps_and_their_memory(training):
    dmwla = load("dmwla.npz")
    inputs = [synthetic(f"{dmwla['prefix']}x{step}.input", (2, 24, 9, 8)) for step in (0, 1)]
    assert_close(release_dmwla(dmwla, warmup_iterations=10**6).train(training)(inputs[0]), dmwla["warmup_output"], 1e-5)
    block = release_dmwla(dmwla).train(training)
    for step, x in enumerate(inputs):
        tokens = rearrange(x, "b c h w -> b (h w) c")
        assert torch.equal(block.assign(tokens).flatten(), torch.from_numpy(dmwla[f"assignment{step}"]))
        counts = block.bank.key_counts.clone()
        assert_close(block(x), dmwla[f"output{step}"], 1e-5)
        assert torch.equal(block.bank.key_counts - counts, torch.from_numpy(dmwla[f"key_counts{step}"]))
        assert_close(rearrange(block.bank.pool, "k m d -> d (k m)"), dmwla[f"pool{step}"], 1e-5)
        assert_close(block.bank.prototypes.T, dmwla[f"prototypes{step}"], 1e-5)
        assert_close(block.phi_k[:, :, None, None], dmwla[f"phi_k{step}"], 1e-5)


def test_dmwla_gradients():
    dmwla = load("dmwla.npz")
    block = release_dmwla(dmwla)
    x, coefficients = (synthetic(f"{dmwla['prefix']}{name}.input", (2, 24, 9, 8)) for name in ("x0", "coef"))
    (block(x.requires_grad_()) * coefficients).sum().backward()
    weights = {name: getattr(block, name).weight.grad[:, :, None, None] for name in ("theta", "phi", "g", "o")}
    for name, gradient in ({"x": x.grad} | weights).items():
        expected = dmwla[f"grad_{name}"]
        assert_close(gradient, expected, 1e-6 * np.abs(expected).max())


@torch.no_grad()
def test_dsgim():
    f, x = load("dsgim.npz"), synthetic("dsgim.x.input", (3, 384, 14, 14))
    expected = torch.zeros(3, 4, dtype=torch.bool).scatter_(1, torch.from_numpy(f["selected"]), True)
    assert torch.equal(select_windows(x), expected)
    assert_close(decay_coefficients(), f["decay"], 1e-6)
    assert int(f["gamma_index"]) == 1  # the first position's
    module = DSGIM(384, variant="release").eval()
    fill(module, lambda name: "dsgim." + release_name(f"dmwla_encoder.dsgim.{name}").removeprefix("DSGIM."))
    assert_close(module(x), f["output"], 1e-5)
    assert_close(module(x[1:2]), f["output_single"], 1e-5)
    for parameter in (*module.query.parameters(), *module.key.parameters()):
        parameter *= float(f["strong_factor"])  # tau passes one
    assert_close(module(x), f["strong_output"], 1e-4)


@torch.no_grad()
def test_decoder():
    f = load("decoder.npz")
    c4, c3, c2, c1 = (int(c) for c in f["channels"])
    decoder = Decoder((c1, c2, c3, c4), "release", feature_dim=128, num_clusters=10).eval()
    fill(decoder, lambda name: release_name(f"decoder.{name}"))
    shapes = [(2, 16, 32, 32), (2, 32, 16, 16), (2, 48, 8, 8)]
    skips = [synthetic(f"decoder.skip{2 - i}.input", shape) for i, shape in enumerate(shapes)]
    for i, output in enumerate(decoder([*skips, synthetic("decoder.x.input", (2, 64, 4, 4))])):
        assert_close(output, f[f"output{i}"], 1e-5)


@pytest.mark.parametrize(
    ("prefix", "name", "shape"),
    [
        ("", "network.x.input", (2, 1, 256, 256)),
        pytest.param("single_", "network.x.input", (2, 1, 256, 256), marks=pytest.mark.slow),
        pytest.param("rgb_", "network.rgb.input", (1, 3, 256, 256), marks=pytest.mark.slow),
    ],
    ids=["batch", "single", "colour"],
)
@torch.no_grad()
def test_whole_network(prefix, name, shape):
    f, images = load("network_small256.npz"), synthetic(name, shape)
    shapes = json.loads((FIXTURES / "release_state_dict_shapes.json").read_text())
    weights = {f"module.{n}": torch.from_numpy(tensor_for(n, s)) for n, s in shapes.items() if not IGNORED.match(n)}
    model = SimMPNet(num_classes=9, in_channels=shape[1], variant="release").eval()
    load_release_state_dict(model, weights)
    stride = int(f["stride"])
    for i, output in enumerate(model(images[1:] if prefix == "single_" else images)):
        assert_close(output[..., ::stride, ::stride].contiguous(), f[f"{prefix}logits{i}"], 1e-4)
