"""data/tiles.py: windows of a picture agree with the whole."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from common import whole
from data.tiles import Tiles, fixed_norms, starts, tiling, untiled


@pytest.mark.parametrize("cells, size", [(5, 16), (16, 16), (17, 16), (29, 16), (30, 16), (31, 16), (128, 16),
                                         (9, 4), (157, 8)])
def test_windows_cover_everything_and_overlap(cells, size):
    firsts = starts(cells, size, 1)
    covered = {i for first in firsts for i in range(first, first + size)}
    assert covered >= set(range(cells)) and max(firsts) == max(0, cells - size)
    assert all(0 < b - a <= size - size // 4 for a, b in zip(firsts, firsts[1:]))


@pytest.mark.parametrize("cells, size, step", [(65, 64, 8), (127, 64, 8), (130, 64, 8), (1000, 72, 8),
                                               (33, 32, 8), (49, 16, 4)])
def test_windows_begin_where_the_networks_strides_do(cells, size, step):
    firsts = starts(cells, size, step)
    assert firsts[0] == 0 and all(first % step == 0 for first in firsts)
    assert all(step <= b - a <= size - size // 4 + step for a, b in zip(firsts, firsts[1:]))
    assert cells <= firsts[-1] + size < cells + step  # the last one is cut by less than a stride


def tiles_of(network, x, tile, stride=8):
    model = torch.nn.Sequential(network)
    model.stride = stride
    return Tiles(model, (x.shape[3], x.shape[2]), 8, tile)


def test_tiling_a_pointwise_network_is_exact_at_every_scale():
    network, x = torch.nn.Conv2d(3, 3, 1), torch.randn(1, 3, 8 * 21, 8 * 5)

    def both_stages(tiles):
        z = tiles(lambda x: F.avg_pool2d(network(x), 4), x)
        return tiles(lambda z, x: F.interpolate(z, scale_factor=4) * network(x), z, x)
    with torch.no_grad():
        parts = tiles_of(network, x, 64, 16)
        assert torch.allclose(both_stages(whole), both_stages(parts), atol=1e-5)
        assert torch.equal(whole.mosaic(x), x)
        mosaic = parts.mosaic(x)
    assert mosaic.shape == (1, 3, 64, 40)
    assert set(mosaic[0, 0].flatten().tolist()) <= set(x[0, 0].flatten().tolist())  # the image's own patches
    assert torch.equal(mosaic[0, :, :16], x[0, :, :16])
    assert torch.equal(mosaic[0, :, -16:], x[0, :, -24:-8])  # patches begin at whole strides as well


@pytest.mark.parametrize("height, width, tile", [(296, 168, 128), (40, 344, 192), (320, 320, 288)])
def test_tiles_of_any_size_meet_a_network_with_strides(height, width, tile):
    """A network whose output hangs on its grid: windows that begin elsewhere would not agree with the whole.
    Its maps are smaller than a cell, and one is flat, as in the VAE's attention."""
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = torch.nn.ModuleList(torch.nn.GroupNorm(2, 4) for _ in range(3))

        def forward(self, x):
            z = self.norms[0](F.avg_pool2d(x, 8))
            z = z + self.norms[1](z.flatten(2)).view_as(z)
            small = self.norms[2](F.max_pool2d(z, 2, ceil_mode=True))
            return z + F.interpolate(small, scale_factor=2)[..., :z.shape[2], :z.shape[3]]

    torch.manual_seed(0)
    network, x = Network(), torch.randn(1, 4, height // 8, width // 8)
    x = x.repeat_interleave(8, 2).repeat_interleave(8, 3)
    with torch.no_grad():
        plain = network(x)
        parts, astray = (tiles_of(network, x, tile, stride)(network, x) for stride in (16, 8))
    assert parts.shape == plain.shape
    error, without_grid = ((p - plain).abs().mean() / plain.std() for p in (parts, astray))
    assert error < 0.06 and error < 0.6 * without_grid  # what is left: statistics of a sample


def test_fixed_norms_keep_the_first_calls_statistics():
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(4, 8)
    x, y = torch.randn(1, 8, 32, 32) * 3 + 1, torch.randn(1, 8, 16, 16)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    plain = norm(x), norm(y)
    with torch.no_grad(), fixed_norms([norm], [4, 4], [4, 4]):
        assert torch.allclose(norm(x), plain[0], atol=1e-5)
        assert torch.allclose(norm(x.flatten(2)[..., :100]), plain[0].flatten(2)[..., :100], atol=1e-5)
        assert not torch.allclose(norm(y), plain[1], atol=1e-2)
    assert torch.equal(norm(y), plain[1])


def test_fixed_norms_give_the_border_a_large_maps_share():
    """A map whose border is 1 and inside 0: the statistics must be those of the larger map."""
    norm = torch.nn.GroupNorm(1, 1)
    small, large = torch.ones(1, 1, 32, 32), torch.ones(1, 1, 128, 64)
    small[..., 2:-2, 2:-2] = large[..., 2:-2, 2:-2] = 0
    with fixed_norms([norm], [16, 8], [4, 4]):
        got = norm(small)
    assert torch.allclose(got.unique(), F.group_norm(large, 1).unique(), atol=1e-4)


def test_without_tile_the_whole_picture_is_seen_at_once():
    assert tiling(SimpleNamespace(stride=32), None) is untiled and untiled((9, 9)) is whole
