"""A phantom: random volumes that resemble ACDC, for trying everything without real data.

Each volume shows a left ventricle inside a shell of myocardium and a right ventricle next to it, in random pose and
size, among other ellipsoids of the same brightness. Blood is equally bright in both ventricles and in the other
ellipsoids, so brightness alone identifies no organ. Texture, a bias field, blur and noise are added. Files, class
names and lists are as for ACDC. Each patient has one or two frames; in the second frame the ventricles are contracted.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from scipy import ndimage

from datasets.acdc import CLASS_NAMES
from datasets.info import DatasetInfo
from datasets.lists import write_lists
from datasets.preparation import RawCase, prepare_volumes
from datasets.preprocessing import to_unit
from datasets.volumes import Volume

NUM_PATIENTS = (16, 4, 6)  # for training, validation and test
SPACING = (8.0, 1.5, 1.5)  # of the voxels (z, y, x), in mm
_BLOOD, _MUSCLE, _TISSUE = 0.75, 0.28, 0.5  # brightness

INFO = DatasetInfo(
    name="phantom",
    class_names=CLASS_NAMES,
    folder="data/phantom",
    list_dir="data/phantom/lists",
    how_to_get="make it: python prepare_data.py phantom",
    train_script=(  # needs no download and takes minutes on a CPU
        "train_acdc.py --model_scale pico --variant stable --pretrained none --img_size 96 --img_size_dmwla 64 "
        "--warmup_iterations 60 --batch_size 8 --max_epochs 12 --base_lr 1e-3 --lr_schedule cosine "
        "--output_dir runs/phantom"
    ),
)


def write_phantom(
    out: str | Path, num_patients: Sequence[int] = NUM_PATIENTS, seed: int = 2222, jobs: int = 1
) -> list[str]:
    """Write ``out/train_npz``, ``out/test_vol_h5`` and ``out/lists/{train,val,trainval,test}.txt``.

    num_patients: how many for training, validation and test; jobs: number of processes. A patient depends only on the
    seed and its number. Existing files are replaced, so that two seeds never mix. Returns the names of the volumes.
    """
    patients = {number: f"patient{number:03d}" for number in range(1, sum(num_patients) + 1)}
    cases = [
        RawCase(f"{name}_frame{frame:02d}", ())
        for patient, name in patients.items()
        for frame in (1, 8)[: 1 + int(np.random.default_rng((seed, patient)).integers(2))]
    ]
    prepare_volumes(partial(make_volume, seed), cases, out, jobs, overwrite=True)
    names, train, val = list(patients.values()), num_patients[0], sum(num_patients[:2])
    parts = {"train": names[:train], "val": names[train:val], "test": names[val:], "trainval": names[:val]}
    write_lists(Path(out) / "lists", parts)
    return [case.name for case in cases]


def make_volume(seed: int, case: RawCase) -> Volume:
    """Return the Volume of one case: 7 to 9 slices of about 96 x 104 pixels, intensities in [0, 1]."""
    patient, contracted = int(case.name[7:].partition("_")[0]), not case.name.endswith("frame01")
    anatomy = np.random.default_rng((seed, patient, 1))
    shape = tuple(int(anatomy.integers(low, high)) for low, high in ((7, 10), (88, 105), (96, 113)))
    label, brightness = _draw_heart(shape, anatomy, contracted)
    image = to_unit(_scan(brightness, np.random.default_rng((seed, patient, 2, contracted))))
    return Volume(case.name, image, label, SPACING, np.diag([*SPACING[::-1], 1.0]), CLASS_NAMES)


def _draw_heart(shape: tuple[int, ...], rng: np.random.Generator, contracted: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return (label uint8, brightness float64), both (D, H, W)."""
    grid = np.stack(np.meshgrid(*(np.arange(size, dtype=float) for size in shape), indexing="ij"))  # (3, D, H, W)
    middle = (np.array(shape) - 1) / 2
    brightness = np.full(shape, _TISSUE)
    left = middle + rng.uniform(-1, 1, 3) * (0.6, 10, 10)
    for _ in range(rng.integers(5, 9)):
        # The ellipsoid is too far from the left ventricle to be mistaken for the right one.
        angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(36, 62)
        centre = [rng.uniform(0, shape[0]), left[1] + distance * np.sin(angle), left[2] + distance * np.cos(angle)]
        radii = np.array([rng.uniform(2, 6), *rng.uniform(4, 13, 2)])
        brightness[_ellipsoid(grid, centre, radii, rng.uniform(0, np.pi))] = rng.choice([_BLOOD, _MUSCLE])

    radius, depth = rng.uniform(10, 15), shape[0] * rng.uniform(0.42, 0.52)
    wall, stretch, turn = rng.uniform(4.5, 6.5), rng.uniform(0.88, 1.12), rng.uniform(0, np.pi)
    side = rng.uniform(-0.6, 0.6)  # direction of the right ventricle, radians from the -x axis
    right_radii = np.array([depth * rng.uniform(0.75, 0.95), rng.uniform(15, 21), rng.uniform(9, 13)])
    if contracted:
        squeeze = rng.uniform(0.65, 0.8)
        radius, wall, right_radii = radius * squeeze, wall * 1.3, right_radii * (1, 0.88, 0.8)

    inner = np.array([depth, radius * stretch, radius / stretch])
    outer = inner + np.array([0.6, wall, wall])
    reach = radius + wall + 0.45 * right_radii[2]
    right = left + np.array([0, np.sin(side), -np.cos(side)]) * reach
    label = np.zeros(shape, np.uint8)
    # In this order the muscle covers a part of the right ventricle, which becomes a crescent.
    for index, ellipsoid in enumerate(((right, right_radii, -side), (left, outer, turn), (left, inner, turn)), 1):
        label[_ellipsoid(grid, *ellipsoid)] = index
    rim = _ellipsoid(grid, right, right_radii + np.array([0.4, 2.5, 2.5]), -side) & (label == 0)
    brightness[rim] = _MUSCLE + 0.1
    return label, np.choose(label, [brightness, _BLOOD, _MUSCLE, _BLOOD])


def _ellipsoid(grid: np.ndarray, centre: np.ndarray, radii: np.ndarray, angle: float) -> np.ndarray:
    """Return the mask of an ellipsoid turned by ``angle`` (radians) in the slice plane; lengths are in voxels."""
    z, y, x = grid - np.reshape(centre, (3, 1, 1, 1))
    along_y, along_x = np.cos(angle) * y - np.sin(angle) * x, np.sin(angle) * y + np.cos(angle) * x
    return (z / radii[0]) ** 2 + (along_y / radii[1]) ** 2 + (along_x / radii[2]) ** 2 <= 1


def _scan(brightness: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a simulated scan with partial volume effect, texture, bias field and noise, float64 (D, H, W)."""
    blurred = ndimage.gaussian_filter(brightness, (0.3, 0.9, 0.9))
    texture = _smooth_noise(brightness.shape, (0.5, 1.5, 1.5), rng) * rng.uniform(0.03, 0.06)
    shade = 1 + _smooth_noise(brightness.shape, (4, 25, 25), rng) * rng.uniform(0.08, 0.16)
    noise = rng.normal(0, rng.uniform(0.03, 0.06), brightness.shape)
    return np.clip((blurred + texture) * shade + noise, 0, None)


def _smooth_noise(shape: tuple[int, ...], sigma: tuple[float, ...], rng: np.random.Generator) -> np.ndarray:
    """Return noise blurred by ``sigma`` (voxels), with zero mean and unit variance."""
    noise = ndimage.gaussian_filter(rng.normal(size=shape), sigma)
    return (noise - noise.mean()) / noise.std()
