"""A MaxViT of 16 channels in every stage, so that a whole Sim-MPNet has 60,000 parameters and a step takes a moment."""

import pytest
import timm
from timm.models.maxxvit import MaxxVit, MaxxVitCfg

from networks import maxvit


@timm.models.register_model
def maxvit_narrow_test(img_size: int = 64, num_classes: int = 0, **_) -> MaxxVit:
    cfg = MaxxVitCfg(embed_dim=(16,) * 4, depths=(1,) * 4, block_type=("C",) * 4, stem_width=8)
    return MaxxVit(cfg, img_size=img_size, num_classes=num_classes)


@pytest.fixture(scope="module", autouse=True)
def narrow_pico():
    """Let the scale ``pico`` mean the narrow MaxViT in a module that imports this fixture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(maxvit.SCALES, "pico", "maxvit_narrow_test")
        yield
