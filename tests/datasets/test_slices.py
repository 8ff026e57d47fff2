"""Training samples: their form, and that chance depends on seed, epoch and index alone."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from datasets import SliceDataset, read_slice


def _open(prepared, **changes):
    arguments = {"split": "train", "num_classes": 4, "img_size": 32, "augment": True, "seed": 5} | changes
    return SliceDataset(prepared / "train_npz", prepared / "lists", **arguments)


def _images(loader):
    return torch.cat([batch["image"] for batch in loader])


def test_a_sample(prepared):
    dataset = _open(prepared)
    assert len(dataset) == 2 * 2 * 3
    sample = dataset[0]
    assert (sample["image"].shape, sample["image"].dtype) == ((1, 32, 32), torch.float32)
    assert (sample["label"].shape, sample["label"].dtype) == ((32, 32), torch.int64)
    assert [dataset[i]["name"] for i in (0, 3)] == ["patient001_frame01_slice000", "patient001_frame09_slice000"]


def test_without_augmentation_a_sample_is_the_slice_resized(prepared):
    dataset = _open(prepared, augment=False, img_size=20)
    image, label = read_slice(dataset.files[4])
    sample = dataset[4]
    # The rows are as many as before; of the columns, the first and the last stay where they are.
    np.testing.assert_allclose(sample["image"][0][:, [0, -1]], image[:, [0, -1]], atol=1e-5)
    np.testing.assert_array_equal(sample["label"][:, [0, -1]], label[:, [0, -1]])


def test_samples_do_not_depend_on_workers_but_on_the_epoch(prepared):
    dataset = _open(prepared)
    alone = DataLoader(dataset, batch_size=4)
    shared = DataLoader(dataset, batch_size=4, num_workers=2, persistent_workers=True)
    by_epoch = []
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        by_epoch.append(_images(alone))
        torch.testing.assert_close(_images(shared), by_epoch[epoch], rtol=0, atol=0)
    assert not torch.equal(*by_epoch)
    dataset.set_epoch(0)
    torch.testing.assert_close(_images(alone), by_epoch[0], rtol=0, atol=0)


def test_samples_depend_on_the_seed_not_on_the_order(prepared):
    first, second, other = _open(prepared), _open(prepared), _open(prepared, seed=6)
    forwards = [first[i]["image"] for i in range(12)]
    backwards = [second[i]["image"] for i in reversed(range(12))][::-1]
    assert all(map(torch.equal, forwards, backwards))
    assert not all(map(torch.equal, forwards, (other[i]["image"] for i in range(12))))
    assert torch.equal(first[-1]["image"], first[11]["image"])


@pytest.mark.parametrize(("num_classes", "word"), [(3, "label id 3"), (2, "--num_classes")])
def test_too_few_classes_are_refused(prepared, refused, num_classes, word):
    dataset = _open(prepared, num_classes=num_classes)
    refused(lambda: [dataset[i] for i in range(12)], "patient001_frame01_slice000.npz", word)


def test_what_is_kept_in_memory_changes_no_sample(prepared):
    read, kept = _open(prepared), _open(prepared)
    assert kept.keep(2**30) == len(kept)
    for epoch in (0, 1):
        for dataset in (read, kept):
            dataset.set_epoch(epoch)
        assert all(torch.equal(read[i]["image"], kept[i]["image"]) for i in range(-1, 12))
        assert all(torch.equal(read[i]["label"], kept[i]["label"]) for i in range(-1, 12))


def test_memory_for_what_is_kept_is_bounded_and_the_rest_is_read(prepared, monkeypatch):
    dataset = _open(prepared)
    image, label = dataset.read(0)
    assert dataset.keep(5 * (image.nbytes + label.nbytes)) == 5
    monkeypatch.setattr(dataset, "read", lambda index: pytest.fail(f"sample {index} was read again"))
    assert dataset[4]["name"] == "patient001_frame09_slice001"
    with pytest.raises(pytest.fail.Exception, match="sample 5"):
        _ = dataset[5]
