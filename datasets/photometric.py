"""The augmentation that is usual for colour images, beside the specification's geometric one, which the paper lacks.

Light, colour and focus vary with lamp, stain and camera; tissue is soft. All is drawn from the generator handed in, and
imgaug (the fork sindre-imgaug, for NumPy 2) does the work, in this file only.
"""

import numpy as np

from datasets.errors import DataError

SHARE = 0.5
"""Probability of each of the changes below, drawn one by one, so that few samples have all and few have none."""

BRIGHTNESS = 0.15
"""Gain of the light, 1 +- this: a lamp or an exposure that is clearly another, with little burnt out."""
CONTRAST = 0.15
"""Gain about mid-grey, 1 +- this."""
SATURATION = 0.25
"""Gain of the saturation, 1 +- this: the strength of a stain varies more than the light."""
HUE = 8.0
"""Largest turn of the hue, in degrees: pink may become redder or more violet, nucleus and cytoplasm stay apart."""
BLUR = 1.2
"""Largest standard deviation of the blur, in pixels of an image whose shorter side is 256: a bad focus."""
ELASTIC = 2.0
"""Largest standard deviation of the elastic shift along each axis, in pixels as for BLUR: cells keep their form."""
SMOOTHNESS = 30.0
"""Half the width over which the elastic shift is averaged, in pixels as for BLUR. Neighbours move apart by
ELASTIC / sqrt(SMOOTHNESS), 0.4 pixels, where the shift is largest; above one pixel thin membranes would tear."""


def photometric(image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Vary brightness, contrast, saturation, hue and focus of a colour image, and bend it and its label alike.

    image: uint8 (H, W, 3); label: uint8 (H, W). Returns both in the same form; the label has no id that it had not
    before. Raises DataError where imgaug is not installed.
    """
    imgaug, iaa = _imgaug()
    scale = min(label.shape) / 256
    brightness, contrast, saturation, hue = rng.uniform(-1, 1, 4)
    blur, elastic = rng.uniform(0, 1, 2)
    chosen = rng.random(6) < SHARE
    seed = int(rng.integers(2**31))
    # Numbers, not ranges: imgaug's own draws depend on what was drawn before. Only the field of shifts is its own.
    changes = (
        iaa.Multiply(1 + BRIGHTNESS * brightness),
        iaa.LinearContrast(1 + CONTRAST * contrast),
        iaa.MultiplySaturation(1 + SATURATION * saturation),
        iaa.AddToHue(round(HUE * hue * 255 / 360)),
        iaa.GaussianBlur(BLUR * blur * scale),
    )
    for change, wanted in zip(changes, chosen[:5], strict=True):
        if wanted:
            image = change(image=image)
    if not chosen[5]:
        return image, label
    return _bend(imgaug, iaa, image, label, ELASTIC * elastic * scale, SMOOTHNESS * scale, seed)


def _bend(
    imgaug, iaa, image: np.ndarray, label: np.ndarray, shift: float, sigma: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    # Averaged over 2 sigma x 2 sigma pixels, noise in [-1, 1] keeps about 1 / (2 sigma sqrt 3) of it as deviation.
    alpha = shift * 2 * sigma * 3**0.5
    # What comes in from outside is the mirrored border; imgaug has no way to say so for image and label alike.
    margin = min(int(4 * shift) + 2, min(label.shape) - 1)
    padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), "reflect")
    bend = iaa.ElasticTransformation(alpha=alpha, sigma=sigma, order=1, seed=seed)
    segments = imgaug.SegmentationMapsOnImage(np.pad(label, margin, "reflect"), shape=padded.shape)
    bent, segments = bend(image=padded, segmentation_maps=segments)
    inside = slice(margin, margin + label.shape[0]), slice(margin, margin + label.shape[1])
    return bent[inside], segments.get_arr()[inside].astype(label.dtype)


def _imgaug():
    try:
        import imgaug
        import imgaug.augmenters
    except ImportError as error:
        raise DataError(
            f"the photometric augmentation needs imgaug ({error}): pip install -r requirements.txt (sindre-imgaug)"
        ) from error
    return imgaug, imgaug.augmenters
