"""Every array of the parity fixtures: numbers that the authors' release computed on the CPU in float32.

Weights and inputs come from ``synthetic_weights.tensor_for``; ``tests/fixtures/README.md`` says what each file holds.
The release writes its memory in evaluation, so each array is compared from fresh weights. Our side computes in float64,
so that rounding decides nothing: in float32 one token near the border of two clusters differs on some processors.
"""

import json

import numpy as np
import pytest
import torch
from einops import rearrange

from networks import DMWLA, DSGIM, SimMPNet, load_release_state_dict
from networks.decoder import Decoder
from networks.release import release_name
from tests.parity import FIXTURES, load, synthetic
from tests.synthetic_weights import state_dict_for

pytestmark = [pytest.mark.processors, pytest.mark.usefixtures("double_precision")]


def assert_close(actual: torch.Tensor, expected: np.ndarray, tolerance: float) -> None:
    torch.testing.assert_close(actual.detach().float(), torch.from_numpy(expected), atol=tolerance, rtol=0)


def pool_as_release(bank) -> torch.Tensor:
    return rearrange(bank.pool, "k m d -> d (k m)")


@pytest.fixture(scope="module")
def dmwla():
    return load("dmwla.npz")


def release_dmwla(f, warmup_iterations: int = 2000) -> DMWLA:
    """Build the fixture's block with its synthetic weights."""
    c, d, num_k, size = (int(f[key]) for key in ("ch", "feature_dim", "num_k", "pool_size_per_cluster"))
    prefix = str(f["prefix"])
    block = DMWLA(
        c, d, num_k, size, replaced_columns=int(f["k"]), warmup_iterations=warmup_iterations, variant="release"
    )
    state = block.state_dict()
    for name in ("theta.weight", "phi.weight", "g.weight", "o.weight"):
        state[name] = synthetic(prefix + name, (*state[name].shape, 1, 1)).flatten(1)
    state["phi_k"] = synthetic(prefix + "phi_k.weight", (d, c, 1, 1)).flatten(1)
    pool = synthetic(prefix + "concept_pool", (d, num_k * size))
    state["bank.pool"] = rearrange(pool, "d (k m) -> k m d", k=num_k)
    state["bank.prototypes"] = synthetic(prefix + "concept_proto", (d, num_k)).T
    state["bank.warmup_counter"] = torch.tensor(2001)
    block.load_state_dict(state)
    return block


def test_dmwla_plain_attention_of_the_warm_up(dmwla):
    block = release_dmwla(dmwla, warmup_iterations=10**6)
    x = synthetic(str(dmwla["prefix"]) + "x0.input", (2, 24, 9, 8))
    assert_close(block(x), dmwla["warmup_output"], 1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_dmwla_two_steady_steps_and_their_memory(dmwla, training):
    block = release_dmwla(dmwla).train(training)
    for step in (0, 1):
        x = synthetic(str(dmwla["prefix"]) + f"x{step}.input", (2, 24, 9, 8))
        tokens = rearrange(x, "b c h w -> b (h w) c")
        assert torch.equal(block.assign(tokens).flatten(), torch.from_numpy(dmwla[f"assignment{step}"]))
        counts = block.bank.key_counts.clone()
        assert_close(block(x), dmwla[f"output{step}"], 1e-5)
        assert torch.equal(block.bank.key_counts - counts, torch.from_numpy(dmwla[f"key_counts{step}"]))
        assert_close(pool_as_release(block.bank), dmwla[f"pool{step}"], 1e-5)
        assert_close(block.bank.prototypes.T, dmwla[f"prototypes{step}"], 1e-5)
        assert_close(block.phi_k[:, :, None, None], dmwla[f"phi_k{step}"], 1e-5)


def test_dmwla_gradients(dmwla):
    block = release_dmwla(dmwla)
    prefix = str(dmwla["prefix"])
    x = synthetic(prefix + "x0.input", (2, 24, 9, 8)).requires_grad_()
    (block(x) * synthetic(prefix + "coef.input", (2, 24, 9, 8))).sum().backward()
    gradients = {"x": x.grad} | {
        name: getattr(block, name).weight.grad[:, :, None, None] for name in ("theta", "phi", "g", "o")
    }
    for name, gradient in gradients.items():
        expected = dmwla[f"grad_{name}"]
        assert_close(gradient, expected, 1e-6 * np.abs(expected).max())


@pytest.fixture(scope="module")
def dsgim():
    return load("dsgim.npz")


def release_dsgim(strength: float = 1.0) -> DSGIM:
    module = DSGIM(384, variant="release").eval()
    state = {}
    for name, own in module.state_dict().items():
        source = release_name(f"dmwla_encoder.dsgim.{name}").removeprefix("DSGIM.")
        state[name] = synthetic(f"dsgim.{source}", tuple(own.shape)).to(own.dtype)
        if name.startswith(("query.", "key.")):
            state[name] = state[name] * strength
    module.load_state_dict(state)
    return module


def test_dsgim_of_a_batch_and_of_one_image(dsgim):
    x = synthetic("dsgim.x.input", (3, 384, 14, 14))
    module = release_dsgim()
    with torch.inference_mode():
        assert_close(module(x), dsgim["output"], 1e-5)
        assert_close(module(x[1:2]), dsgim["output_single"], 1e-5)


def test_dsgim_where_tau_passes_one(dsgim):
    x = synthetic("dsgim.x.input", (3, 384, 14, 14))
    module = release_dsgim(float(dsgim["strong_factor"]))
    with torch.inference_mode():
        assert_close(module(x), dsgim["strong_output"], 1e-4)


def test_dsgim_selected_windows_and_decay(dsgim):
    from networks.dsgim import decay_coefficients, select_windows

    selected = select_windows(synthetic("dsgim.x.input", (3, 384, 14, 14)))
    expected = torch.zeros(3, 4, dtype=torch.bool).scatter_(1, torch.from_numpy(dsgim["selected"]), True)
    assert torch.equal(selected, expected)
    assert_close(decay_coefficients(), dsgim["decay"], 1e-6)
    assert int(dsgim["gamma_index"]) == 1  # the first position's


def test_decoder():
    f = load("decoder.npz")
    c4, c3, c2, c1 = (int(c) for c in f["channels"])
    decoder = Decoder((c1, c2, c3, c4), "release", feature_dim=128, num_clusters=10).eval()
    state = decoder.state_dict()
    for name, own in state.items():
        if name.endswith(("replaced_columns", "key_counts")):
            continue
        source = release_name(f"decoder.{name}")
        if name.endswith("bank.pool"):
            pool = synthetic(source, (own.shape[2], own.shape[0] * own.shape[1]))
            state[name] = rearrange(pool, "d (k m) -> k m d", m=own.shape[1])
        elif name.endswith("bank.prototypes"):
            state[name] = synthetic(source, tuple(own.shape[::-1])).T
        elif name.startswith("dmwla") and own.ndim == 2:
            state[name] = synthetic(source, (*own.shape, 1, 1)).flatten(1)
        else:
            state[name] = synthetic(source, tuple(own.shape)).to(own.dtype)
    decoder.load_state_dict(state)
    shapes = [(2, 16, 32, 32), (2, 32, 16, 16), (2, 48, 8, 8)]
    skips = [synthetic(f"decoder.skip{2 - i}.input", shape) for i, shape in enumerate(shapes)]
    deepest = synthetic("decoder.x.input", (2, 64, 4, 4))
    with torch.inference_mode():
        outputs = decoder([*skips, deepest])
    for i, output in enumerate(outputs):
        assert_close(output, f[f"output{i}"], 1e-5)


@pytest.fixture(scope="module")
def release_weights():
    shapes = json.loads((FIXTURES / "release_state_dict_shapes.json").read_text())
    return {name: torch.from_numpy(value) for name, value in state_dict_for(shapes).items()}


@pytest.mark.parametrize("in_channels", [1, 3])
def test_whole_network(release_weights, in_channels):
    f = load("network_small256.npz")
    stride = int(f["stride"])
    model = SimMPNet(num_classes=9, in_channels=in_channels, variant="release").eval()
    if in_channels == 3:
        cases = {"rgb_": synthetic("network.rgb.input", (1, 3, 256, 256))}
    else:
        x = synthetic("network.x.input", (2, 1, 256, 256))
        cases = {"": x, "single_": x[1:2]}
    for prefix, images in cases.items():
        load_release_state_dict(model, {f"module.{name}": value for name, value in release_weights.items()})
        with torch.inference_mode():
            logits = model(images)
        for i, output in enumerate(logits):
            assert_close(output[..., ::stride, ::stride].contiguous(), f[f"{prefix}logits{i}"], 1e-4)
