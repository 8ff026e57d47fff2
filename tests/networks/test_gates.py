"""Every gate starts half open whatever the seed and is observed; in ``stable`` gates and attention read norms."""

import pytest
import torch

from networks import DMWLA
from networks.dmwla import PlainAttention
from networks.gates import ChannelAttention, EncoderGate, Gate, SpatialAttention


@pytest.mark.parametrize("variant", ["paper", "stable", "release"])
def test_the_gates_of_learned_weights_start_half_open_but_in_release(variant, tiny_network):
    for seed in range(3):
        gates = tiny_network(variant=variant, seed=seed).observe(torch.randn(2, 1, 64, 64) * 30).gates
        injections = ("gate_maxvit", "gate_dmwla")
        learned = torch.stack([share.mean() for name, share in gates.items() if not name.startswith(injections)])
        assert len(learned) == 7 and (learned == 0.5).all() == (variant != "release")


def test_every_gate_has_a_name_and_is_seen_once_in_each_pass(tiny_network):
    model = tiny_network()
    assert {gate for _, gate in model.gates()} == {m for m in model.modules() if isinstance(m, Gate)}
    with model.gates_observed() as seen:
        for _ in range(2):
            model(torch.randn(3, 1, 64, 64))
    assert list(seen) == [name for name, _ in model.gates()] and len(seen) == 15
    for name, maps in seen.items():
        sides = {"gate": 2, "gate_spatial_1": 16, "gate_spatial_2": 8, "gate_spatial_3": 4}
        assert [m.shape for m in maps] == [(3, 1, sides.get(name, 1), sides.get(name, 1))] * 2
    assert not any(gate._forward_hooks for _, gate in model.gates())


@pytest.mark.parametrize("variant", ["paper", "stable"])
def test_in_stable_the_size_of_the_features_moves_no_gate_and_does_not_change_what_attention_adds(variant):
    torch.manual_seed(0)
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    for gate in (EncoderGate(16, variant), ChannelAttention(16, variant), SpatialAttention(1, variant)):
        for parameter in gate.double().parameters():
            parameter.data.normal_()
        level = (0,) if isinstance(gate, SpatialAttention) else ()
        same = torch.allclose(gate(x, *level), gate(20 * x + 5, *level), atol=1e-4)
        assert same == (variant == "stable"), type(gate)
    block = DMWLA(16, 32, 2, columns_per_cluster=5, warmup_iterations=1, variant=variant).double()
    block(x)  # the warm-up
    for attention in (PlainAttention(16, 32, variant).double(), block.eval()):
        same = torch.allclose(attention(x) - x, attention(20 * x + 5) - (20 * x + 5), atol=1e-4)
        assert same == (variant == "stable")
    clusters = block.clusters(x)
    assert clusters.shape == (2, 6, 6) and (variant == "paper" or torch.equal(clusters, block.clusters(20 * x + 5)))


def test_stable_has_no_running_statistics_in_ds_gim(tiny_network):
    networks = tiny_network(), tiny_network(variant="stable")
    paper, stable = (dict(network.dmwla_encoder.dsgim.named_buffers()) for network in networks)
    assert "norm1.statistics.0.running_mean" in paper and stable.keys() == {"decay"}
