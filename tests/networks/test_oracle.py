"""The network and the plain side of the benchmarks equal ``tests/oracle.py`` on random shapes and empty clusters."""

import copy
from unittest.mock import patch

import pytest
import torch
from einops import rearrange
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from benchmarks.plain import PlainDMWLA, plain_copy
from networks import DMWLA, DSGIM, dmwla
from tests import oracle

pytestmark = [pytest.mark.processors, pytest.mark.usefixtures("double_precision")]

INTRA_CLUSTER = st.sampled_from([dmwla._attend_by_cluster, dmwla._attend_to_own])  # a CPU's way, a GPU's way
VARIANTS = st.sampled_from(["paper", "release"])
OFTEN = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LARGEST = dict(batch=3, channels=10, height=6, width=6, feature_dim=10, num_clusters=6, columns_per_cluster=8)
SMALLEST = dict.fromkeys(LARGEST, 1) | {"feature_dim": 2}  # at d = 1 every cosine is 1 or -1: clusters tie
SIZES = st.fixed_dictionaries(
    {name: st.integers(SMALLEST[name], largest) for name, largest in LARGEST.items()}
    | {"replaced_columns": st.integers(0, 12)}
)
HALVES = st.tuples(*[st.integers(1, 3)] * 3)  # batch, and half of height and width


def block_and_input(sizes: dict, variant: str, seed: int, warmup_iterations: int = 1, steps_done: int = 2) -> tuple:
    """Return a block with a random memory, past its warm-up unless told otherwise, and an input."""
    torch.manual_seed(seed)
    of_block = {name: size for name, size in sizes.items() if name not in ("batch", "height", "width")}
    block = DMWLA(**of_block, warmup_iterations=warmup_iterations, variant=variant)
    block.bank.pool.normal_()
    block.bank.prototypes.normal_()
    block.phi_k.add_(torch.randn_like(block.phi_k), alpha=0.1)
    block.load_state_dict(block.state_dict() | {"bank.warmup_counter": torch.tensor(steps_done)})
    return block, torch.randn(sizes["batch"], sizes["channels"], sizes["height"], sizes["width"])


@settings(OFTEN, max_examples=40)
@given(SIZES, VARIANTS, INTRA_CLUSTER, st.integers(0, 10**6))
def test_a_steady_step_and_its_gradients(sizes, variant, attend, seed):
    block, x = block_and_input(sizes, variant, seed)
    plain = copy.deepcopy(block)
    x.requires_grad_()
    coefficients = torch.randn(x.shape)

    torch.manual_seed(seed)
    with patch("networks.dmwla._attend_by_cluster", attend):
        output = block.train()(x)
    gradients = torch.autograd.grad((output * coefficients).sum(), [x, *block.parameters()])
    expected = oracle.steady_forward(plain, x)
    expected_gradients = torch.autograd.grad((expected * coefficients).sum(), [x, *plain.parameters()])
    torch.manual_seed(seed)
    pool, prototypes, phi_k = oracle.updated_memory(plain, x)

    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients, expected_gradients)
    torch.testing.assert_close(block.bank.pool, pool)
    torch.testing.assert_close(block.bank.prototypes, prototypes)
    torch.testing.assert_close(block.phi_k, phi_k)


@settings(OFTEN, max_examples=15)
@given(SIZES, st.integers(0, 10**6))
def test_blocks_are_updated_together_as_each_alone(sizes, seed):
    """As one bank, as on a GPU, where no shape depends on values; blocks may differ in tokens, clusters and widths."""
    others = ({}, {"num_clusters": 2, "channels": 3, "height": 9}, {"feature_dim": 3})
    alone = [block_and_input(sizes | other, "paper", seed + i) for i, other in enumerate(others)]
    together = copy.deepcopy(alone)
    torch.manual_seed(seed)
    for block, x in alone:
        block.train()(x)
    torch.manual_seed(seed)
    alike = [[0, 1], [2]] if sizes["feature_dim"] != 3 else [[0, 1, 2]]
    with patch("networks.memory_update._groups", lambda _: alike), patch("torch.compiler.is_compiling", lambda: True):
        dmwla.write_memories([(block, rearrange(x, "b c h w -> b (h w) c")) for block, x in together])
    for (block, _), (other, _) in zip(alone, together, strict=True):
        torch.testing.assert_close(other.state_dict(), block.state_dict())


@pytest.mark.parametrize("attend", [dmwla._attend_by_cluster, dmwla._attend_to_own])
def test_a_token_reads_no_foreign_column_however_large_the_values(attend):
    sizes = dict(batch=1, channels=4, height=3, width=3, feature_dim=6, num_clusters=3, columns_per_cluster=5)
    block, x = block_and_input(sizes | {"replaced_columns": 2}, "paper", seed=1)
    block.bank.pool[1] *= 1e6
    with patch("networks.dmwla._attend_by_cluster", attend):
        torch.testing.assert_close(block.eval()(100 * x), oracle.steady_forward(block, 100 * x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_logits_in_half_precision_reach_no_foreign_column(dtype):
    torch.manual_seed(0)
    query, key, cluster = 200 * torch.randn(1, 64, 8), 200 * torch.randn(4, 5, 8), torch.randint(4, (1, 64))
    own = torch.arange(4.0).view(4, 1, 1).expand(4, 5, 8)  # every column of cluster p holds p
    read = dmwla._attend_to_own(query.to(dtype), key.to(dtype), own.to(dtype), cluster)
    torch.testing.assert_close(read.float(), cluster[..., None].expand(-1, -1, 8).float(), rtol=0, atol=0.02)


def test_without_decay_the_place_in_a_batch_does_not_count_for_dsgim():
    x = torch.randn(1, 8, 4, 4, dtype=torch.float64).expand(2, -1, -1, -1)
    first, second = DSGIM(8, variant="release", similarities="euclidean").double().eval()(x)
    torch.testing.assert_close(second, first)


@settings(OFTEN, max_examples=15)
@given(SIZES, st.integers(0, 10**6))
def test_the_order_that_k_means_gives_the_pool(sizes, seed):
    block, _ = block_and_input(sizes, "paper", seed)
    num_clusters, size, feature_dim = block.bank.pool.shape
    centroids = torch.randn(num_clusters, feature_dim)
    nearest = torch.randint(num_clusters, (num_clusters * size,))  # random, so often with an empty cluster
    expected_draws = torch.get_rng_state()
    expected = oracle.ordered_pool(block.bank.pool, centroids, nearest)
    torch.set_rng_state(expected_draws)
    with patch("networks.memory_bank.kmeans", return_value=(centroids, nearest)):
        block.bank.order()
    torch.testing.assert_close(block.bank.pool, expected)
    torch.testing.assert_close(block.bank.prototypes, torch.stack([c / c.norm() for c in centroids]))


@settings(OFTEN, max_examples=15)
@given(SIZES, VARIANTS, st.integers(0, 10**6), st.integers(3, 40))
def test_a_warm_up_step(sizes, variant, seed, warmup_iterations):
    block, x = block_and_input(sizes, variant, seed, warmup_iterations, steps_done=warmup_iterations // 2)
    plain = copy.deepcopy(block)

    torch.manual_seed(seed)
    output = block.train()(x)
    torch.manual_seed(seed)
    pool = oracle.sampled_pool(plain, x, warmup_iterations)

    torch.testing.assert_close(output, oracle.warm_up_forward(plain, x))
    torch.testing.assert_close(block.bank.pool, pool)
    assert block.bank.warmup_counter == warmup_iterations // 2 + 1


@settings(OFTEN, max_examples=15)
@given(VARIANTS, HALVES, st.integers(0, 5), st.booleans(), st.sampled_from([0.3, 4.0]), st.integers(0, 10**6))
def test_dsgim(variant, halves, position, biased, strength, seed):
    batch, half_height, half_width = halves
    assume(half_height * half_width > 1)  # windows of one token resemble themselves alike: the choice is a tie
    torch.manual_seed(seed)
    module = DSGIM(8, variant=variant).eval()
    for linear in (module.query, module.key):
        torch.nn.init.normal_(linear.weight, std=strength)
        if not biased:  # in release a decayed token then scores exactly zero against every other
            torch.nn.init.zeros_(linear.bias)
    for norm in (*module.norm1.statistics, *module.norm2.statistics):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    x = torch.randn(batch, 8, 2 * half_height, 2 * half_width)
    with torch.no_grad():
        torch.testing.assert_close(module(x, position), oracle.dsgim_forward(module, x, position))


def test_a_plain_step_is_that_of_the_oracle():
    sizes = dict(batch=2, channels=6, height=5, width=5, feature_dim=8, num_clusters=3, columns_per_cluster=4)
    block, x = block_and_input(sizes | {"replaced_columns": 2}, "paper", seed=0)
    plain = plain_copy(block).train()
    assert type(plain) is PlainDMWLA
    torch.testing.assert_close(plain(x), oracle.steady_forward(block, x))
    torch.testing.assert_close((plain.bank.pool, plain.bank.prototypes, plain.phi_k), oracle.updated_memory(block, x))


@pytest.mark.parametrize("steps", [0, 3])
def test_a_plain_copy_of_a_network_in_warm_up_and_in_use_gives_its_logits(steps, tiny_network):
    model, x = tiny_network(steps, warmup_iterations=2), torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(plain_copy(model)(x), model(x))
