"""How pictures are sized for a model that counts in patches."""

import pytest
from PIL import Image

from mmalign.records import UserError
from mmalign.scoring.frames import fit


@pytest.mark.parametrize("size", [(64, 32), (1920, 1080), (300, 17), (448, 448)])
def test_fit_keeps_to_the_grid_and_the_bounds(size):
    fitted = fit(Image.new("RGB", size), (100352, 200704))
    assert fitted.width % 28 == fitted.height % 28 == 0
    assert 100352 <= fitted.width * fitted.height <= 200704


def test_fit_refuses_a_strip():
    with pytest.raises(UserError, match="strip: cannot be shown"):
        fit(Image.new("RGB", (1000, 2)), (100352, 200704), "strip")
