"""Pixels are torchvision's, bit for bit, and every shape of picture has some."""

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.scoring import preprocess
from mmalign.scoring.preprocess import Preprocess, pil_short_side_crop


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "size", [(320, 200), (150, 260), (224, 224), (225, 224), (224, 300), (100, 61), (1023, 517), (7, 400)]
)
def test_clip_pixels_are_torchvisions(size):
    from torchvision import transforms as T

    ours = Preprocess()
    steps = [
        T.Resize(224, T.InterpolationMode.BICUBIC),
        T.CenterCrop(224),
        T.ToTensor(),
        T.Normalize(ours.mean, ours.std),
    ]
    picture = noise(*size)
    assert torch.equal(ours(picture), T.Compose(steps)(picture))


@pytest.mark.parametrize("size", [(320, 200), (150, 260), (90, 2000), (3000, 30)])
def test_a_sliver_is_resized_where_it_is_kept_alone(monkeypatch, size):
    whole = np.asarray(pil_short_side_crop(noise(*size), 64)).astype(int)
    monkeypatch.setattr(preprocess, "MAX_PIXELS", 0)
    kept = np.asarray(pil_short_side_crop(noise(*size), 64)).astype(int)
    assert np.abs(whole - kept).max() <= 1  # a level of 256, at most
    assert (whole == kept).mean() > 0.99


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (100_000, 1), (1, 1_000_000), (5500, 3700)])
@pytest.mark.parametrize("pre", [Preprocess(), Preprocess(resize="long-side-pad", interpolation="bicubic-tensor")])
def test_every_shape_has_pixels(pre, size):
    pixels = pre(Image.new("RGB", size, "white"))
    assert pixels.shape == (3, 224, 224)
    white = (1 - torch.tensor(pre.mean)) / torch.tensor(pre.std)
    torch.testing.assert_close(pixels.amax((1, 2)), white, atol=1e-3, rtol=0)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_modes_become_rgb_first(mode):
    picture = noise(90, 70).convert(mode)
    assert torch.equal(Preprocess()(picture), Preprocess()(picture.convert("RGB")))


def test_the_tensor_path_stands_in_for_pillow():
    picture = Image.fromarray(np.linspace(60, 190, 300 * 260 * 3).reshape(260, 300, 3).astype(np.uint8))
    tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    torch.testing.assert_close(Preprocess().tensor(tensor), Preprocess()(picture), atol=0.02, rtol=0)
