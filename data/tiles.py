"""Networks on pictures of any size, in windows: memory no longer grows with the picture."""

from __future__ import annotations

import functools
import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import Whole, device, whole
from data.files import UserError, note

METAL = 768  # pixels a side: for the attention of larger windows Apple's GPUs allow no matrix


def untiled(size: tuple[int, int], cell: int | None = None) -> Whole:
    return whole


def tiling(model: nn.Module, tile: int | None):
    """`untiled`; with --tile its like, (a picture's size, cell) -> Tiles of so many pixels a side."""
    if device().type == "mps" and (tile is None or tile > METAL):
        if tile:
            note(f"--tile {tile}: on this device at most {METAL}; goes on with that")
        tile = METAL
    if tile is None:
        return untiled
    if tile < 4 * model.stride or tile % model.stride:
        raise UserError(f"--tile {tile}: must be a multiple of {model.stride}, at least {4 * model.stride}")
    return lambda size, cell=model.cell: Tiles(model, size, cell, tile)


class Tiles:
    """tiles(network, *maps): the network on maps (pixels, latents) of one picture, in overlapping windows
    that smooth weights blend. GroupNorm would normalise each by its own statistics, in steps of brightness;
    so a mosaic of patches from all over the picture goes through first and sets them for all."""

    def __init__(self, model: nn.Module, size: tuple[int, int], cell: int, tile: int):
        """size: the picture's (width, height), later padded to whole cells; tile: a window's side, pixels."""
        self.cols, self.rows = (math.ceil(n / cell) for n in size)  # from here on all is counted in cells
        self.size = tile // cell  # of a window
        self.step = model.stride // cell  # where windows may begin
        self.norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
        self.device = next(model.parameters()).device

    def __call__(self, network, *maps: Tensor) -> Tensor:
        if max(self.rows, self.cols) <= self.size:
            return network(*(m.to(self.device) for m in maps))
        whole = self.rows, self.cols
        with fixed_norms(self.norms, whole, [len(self.picked(n)) for n in whole]):
            network(*map(self.mosaic, maps))
            return self.windows(network, maps)

    def windows(self, network, maps) -> Tensor:
        out = total = None
        for top in starts(self.rows, self.size, self.step):
            for left in starts(self.cols, self.size, self.step):
                part = network(*(self.cut(m, top, left).to(self.device) for m in maps)).float().cpu()
                if out is None:
                    px = part.shape[2] // min(self.rows, self.size)  # of the output, a cell
                    out = part.new_zeros(*part.shape[:2], self.rows * px, self.cols * px)
                    total = torch.zeros_like(out[:, :1])
                bell = (torch.hann_window(n + 2, periodic=False)[1:-1] for n in part.shape[2:])
                weight = torch.outer(*bell)
                self.cut(out, top, left).add_(part * weight)
                self.cut(total, top, left).add_(weight)
        return out / total

    def cut(self, m: Tensor, top: int, left: int) -> Tensor:
        px = m.shape[2] // self.rows
        return m[..., top * px:(top + self.size) * px, left * px:(left + self.size) * px]

    def picked(self, cells: int) -> Tensor:
        """Evenly spread patches of a side, an eighth of a tile each, that fill a tile; or all of them."""
        if cells <= self.size:
            return torch.arange(cells)
        patch = max(1, self.size // self.step // 8) * self.step
        first = torch.linspace(0, (cells - patch) // self.step, self.size // patch).round().long() * self.step
        return (first[:, None] + torch.arange(patch)).flatten()

    def mosaic(self, m: Tensor) -> Tensor:
        """What stands for the whole map, and is no larger than a tile."""
        px = m.shape[2] // self.rows
        rows, cols = ((px * self.picked(n)[:, None] + torch.arange(px)).flatten()
                      for n in (self.rows, self.cols))
        return m[:, :, rows][..., cols].to(self.device)


def starts(cells: int, size: int, step: int) -> list[int]:
    """First cells of windows of `size` cells that cover 0..cells evenly, overlapping by a quarter or more."""
    last = math.ceil((cells - size) / step)  # in steps, of which all begin at a whole one
    gaps = max(0, math.ceil(last * step / (size - max(step, size // 4))))
    return [round(i * last / gaps) * step for i in range(gaps + 1)] if gaps else [0]


@contextmanager
def fixed_norms(norms: list[nn.GroupNorm], whole: list[int], mosaic: list[int]):
    """Within it every GroupNorm keeps its first call's statistics, as a BatchNorm. That call sees the mosaic,
    of so many rows and columns of cells, for the whole. Zero padding sets a map's border apart from its
    inside, and a small map has more border: each pixel of its inside counts for as many as the whole has."""
    def share(n, of, seen):
        border, weight = n // 16, torch.ones(n)
        weight[border:n - border] = (n * of / seen - 2 * border) / (n - 2 * border)
        return weight / weight.sum()

    def forward(norm, x):
        if norm not in kept:
            sides = x.shape[2:]
            if len(sides) == 1:  # (1, C, L), as in the VAE's attention
                sides = [n * math.isqrt(sides[0] // math.prod(mosaic)) for n in mosaic]
            shares = (share(n, *stretch) for n, *stretch in zip(sides, whole, mosaic))
            weight = torch.outer(*shares).flatten().to(x.device)
            groups = x.float().unflatten(1, (norm.num_groups, -1)).flatten(3)
            mean = (groups * weight).sum(3).mean(2)[0]
            var = ((groups - mean[:, None, None]).square() * weight).sum(3).mean(2)[0]
            kept[norm] = [v.repeat_interleave(groups.shape[2]).to(x.dtype) for v in (mean, var)]
        return F.batch_norm(x, *kept[norm], norm.weight, norm.bias, eps=norm.eps)

    kept: dict[nn.GroupNorm, tuple[Tensor, Tensor]] = {}
    for norm in norms:
        norm.forward = functools.partial(forward, norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward
