import json

import pytest
import torch
from torch.nn import functional as F

from tests.parity import load, synthetic
from utils.losses import subset_loss, subset_terms


@pytest.fixture(scope="module")
def release():
    f = load("loss.npz")
    logits = [synthetic(f"loss.logits{i}.input", (2, 4, 16, 16)) for i in range(4)]
    return f, logits, torch.from_numpy(f["label"])


def test_every_subset_equals_the_release(release):
    f, logits, label = release
    expected = {tuple(map(int, key.split("+"))): value for key, value in json.loads(str(f["subsets"])).items()}
    terms = subset_terms(logits, label)
    assert terms.keys() == expected.keys()
    for subset, (cross_entropy, dice) in terms.items():
        assert [cross_entropy.item(), dice.item()] == pytest.approx(expected[subset], rel=1e-6)


def test_total_equals_the_release(release):
    f, logits, label = release
    assert subset_loss(logits, label).item() == pytest.approx(float(f["total"]), rel=1e-6)


def test_weights_choose_the_terms(release):
    _, logits, label = release
    only_ce = subset_loss(logits[:1], label, ce_weight=1, dice_weight=0)
    assert only_ce.item() == pytest.approx(F.cross_entropy(logits[0], label).item(), rel=1e-6)


def test_a_perfect_prediction_costs_nothing_and_an_absent_class_is_defined():
    label = torch.randint(0, 3, (2, 8, 8))  # class 3 is absent
    logits = 100.0 * F.one_hot(label, 4).permute(0, 3, 1, 2)
    assert subset_loss([logits] * 4, label).item() == pytest.approx(0, abs=1e-5)


def test_half_precision_logits_are_summed_in_float32(release):
    _, logits, label = release
    half = [m.bfloat16() for m in logits]
    assert torch.equal(subset_loss(half, label), subset_loss([m.float() for m in half], label))
