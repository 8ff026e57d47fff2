"""Augment the colour, focus and shape of colour images, in addition to the paper's geometric augmentation.

Light, colour and focus vary with the lamp, the stain and the camera, and tissue is soft. All random numbers come from
the given generator. The library imgaug (its fork sindre-imgaug, which supports NumPy 2) is used in this file only.
"""

import numpy as np

from datasets.errors import DataError

SHARE = 0.5  # probability of each change below; each is chosen independently
BRIGHTNESS = 0.15  # brightness is multiplied by 1 +- this: a visible change, with little overexposure
CONTRAST = 0.15  # differences from mid-grey are multiplied by 1 +- this
SATURATION = 0.25  # saturation is multiplied by 1 +- this: the strength of a stain varies more than the light
HUE = 8.0  # largest change of hue, in degrees: pink may become redder or more violet, but not like another tissue
# The next three values are in pixels of an image whose shorter side is 256.
BLUR = 1.2  # largest standard deviation of the blur, as in an image out of focus
ELASTIC = 2.0  # largest standard deviation of the elastic shift along each axis; cells keep their shape
# Half the width over which the elastic shift is averaged. At the largest shift, neighbouring pixels move apart by
# ELASTIC / sqrt(SMOOTHNESS), about 0.4 pixels; by more than one pixel, thin membranes would tear.
SMOOTHNESS = 30.0


def photometric(image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Change brightness, contrast, saturation, hue and focus of a colour image; deform it together with its label.

    image: uint8 (H, W, 3); label: uint8 (H, W). Returns both with the same shapes and types; the label gets no new
    ids. Raises DataError if imgaug is not installed.
    """
    try:
        import imgaug
        from imgaug import augmenters as iaa
    except ImportError as error:
        raise DataError(
            f"--photometric needs imgaug ({error}); run: pip install -r requirements.txt (it lists sindre-imgaug)"
        ) from error
    scale = min(label.shape) / 256
    brightness, contrast, saturation, hue = rng.uniform(-1, 1, 4)
    blur, elastic = rng.uniform(0, 1, 2)
    chosen = rng.random(6) < SHARE
    seed = int(rng.integers(2**31))
    # imgaug gets numbers, not ranges, because its own random numbers depend on earlier calls. It draws only the shifts.
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

    shift, sigma = ELASTIC * elastic * scale, SMOOTHNESS * scale
    # Noise in [-1, 1], averaged over 2 sigma x 2 sigma pixels, has a standard deviation of about 1 / (2 sigma sqrt 3).
    alpha = shift * 2 * sigma * 3**0.5
    # The border is mirrored here, because imgaug cannot mirror image and label in the same way.
    margin = min(int(4 * shift) + 2, min(label.shape) - 1)
    padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), "reflect")
    bend = iaa.ElasticTransformation(alpha=alpha, sigma=sigma, order=1, seed=seed)
    segments = imgaug.SegmentationMapsOnImage(np.pad(label, margin, "reflect"), shape=padded.shape)
    bent, segments = bend(image=padded, segmentation_maps=segments)
    inside = slice(margin, margin + label.shape[0]), slice(margin, margin + label.shape[1])
    return bent[inside], segments.get_arr()[inside].astype(label.dtype)
