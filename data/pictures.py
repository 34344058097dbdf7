"""Pictures in, out, cropped and tiled, for the scripts (through common.py) and the tools of this folder.

Pixels are float32 (3, H, W) or (B, 3, H, W) in [-1, 1]; files are 8-bit RGB."""

from __future__ import annotations

import functools
import io
import math
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageOps, PngImagePlugin
from torch import Tensor, nn

from data.files import UserError, atomic, each_file, list_images, note

PHOTOS = Path(__file__).resolve().parent / "photos"
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**26  # a long comment is no damage


def rng(*key: int) -> np.random.Generator:
    """Random numbers as a pure function of `key`, e.g. (seed, sample): nothing to save or resume."""
    return np.random.default_rng([int(k) for k in key])


def torch_rng(*key: int) -> torch.Generator:
    """The same for torch, on the CPU."""
    return torch.Generator().manual_seed(int(rng(*key).integers(2**63 - 1)))


def noise_for(samples: Tensor, shape: tuple[int, ...], *key: int) -> Tensor:
    """Standard normal noise (B, *shape), row i a function of (*key, samples[i]), on the samples' device."""
    rows = [torch.randn(shape, generator=torch_rng(*key, n)) for n in samples.tolist()]
    return torch.stack(rows).to(samples.device)


def read_image(path: str | Path, on_white: bool = False) -> tuple[Image.Image, Image.Image | None]:
    """(8-bit sRGB, upright, the alpha channel or None). Whatever goes wrong, the error names the file."""
    try:
        with Image.open(io.BytesIO(Path(path).read_bytes())) as image:
            profile = image.info.get("icc_profile")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I") or image.mode == "F":
                image = eight_bit(image)
            alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
            if alpha:
                image = image.convert("RGBA").convert("RGB")  # the colours themselves, not on any ground
            image = to_srgb(image, profile)
            if alpha and on_white:
                image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
            return image, alpha
    except Exception as error:  # Pillow's decoders raise many kinds
        raise UserError(f"{path}: not an image that can be read ({type(error).__name__}: {error})") from None


def eight_bit(image: Image.Image) -> Image.Image:
    """16-bit and float greys, which Pillow would clip. Integers reach to 65535; floats to 1, or if more than
    a hundredth of the pixels is above that, to 255 or 65535."""
    a, top = np.nan_to_num(np.asarray(image, np.float64), posinf=np.inf), 65535
    if image.mode == "F":
        usual = np.quantile(a, 0.99)
        top = 1 if usual <= 1 else 255 if usual <= 255 else 65535
    return Image.fromarray((a.clip(0, top) * (255 / top) + 0.5).astype(np.uint8))


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB, its numbers meant as sRGB; a profile that cannot be read, or of other channels, is passed over."""
    if profile and image.mode in ("RGB", "L", "CMYK"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            pass
    return image.convert("RGB")



def to_tensor(image: Image.Image) -> Tensor:
    """8-bit RGB -> (3, H, W) in [-1, 1]."""
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5).sub_(1)


def to_image(x: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> 8-bit RGB, rounded."""
    a = x.float().clamp(-1, 1).add_(1).mul_(127.5).round_().byte()
    return Image.fromarray(a.permute(1, 2, 0).cpu().numpy())


def jpeg(image: Image.Image, qf: int) -> Image.Image:
    """The image after JPEG compression at quality factor `qf`, chroma 4:2:0 as libjpeg's default."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(qf))
    return Image.open(buffer).convert("RGB")


def pad_to(x: Tensor, multiple: int) -> Tensor:
    """Pads bottom and right to the next multiple, by reflection, or where a side is too short by its edge."""
    down, right = -x.shape[2] % multiple, -x.shape[3] % multiple
    if right:
        x = F.pad(x, (0, right, 0, 0), "reflect" if right < x.shape[3] else "replicate")
    return F.pad(x, (0, 0, 0, down), "reflect" if down < x.shape[2] else "replicate") if down else x


def restore_files(pairs: list[tuple[Path, Path]], restore) -> None:
    """Every input to its output, restore(image) -> (image, remark); grey stays grey, alpha is put back."""
    def work(file, target):
        image, alpha = read_image(file)
        result, remark = restore(image)
        red, green, blue = (channel.tobytes() for channel in image.split())
        if red == green == blue:
            result = result.convert("L")
        if alpha is not None:
            result.putalpha(alpha)
        atomic(target, lambda tmp: result.save(tmp, "PNG"))
        return f"{result.width} x {result.height}{remark}"
    each_file(pairs, "restore", work)


class Crops(torch.utils.data.Dataset):
    """Sample n of an endless stream of random crops: (size, size, 3) uint8, one of 8 dihedral views.

    Everything about sample n is a function of (seed, n): the photograph (a new permutation each epoch), the
    corner, the view. An unreadable photograph is named once and its successor taken, a small one mirrored."""

    turns = 4  # quarter turns that a view may have; 1: none

    def __init__(self, folders: list[str | Path], size: int, seed: int):
        self.files, self.size, self.seed, self.unreadable = list_images(folders), size, seed, set()
        if not any(self.read(f) is not None for f in self.files):
            raise UserError(f"{folders[0]}: none of the {len(self.files)} training images can be read")

    @functools.lru_cache(maxsize=16)
    def read(self, file: Path) -> np.ndarray | None:
        try:
            a = np.asarray(read_image(file, on_white=True)[0])
        except UserError as error:
            if file not in self.unreadable:
                self.unreadable.add(file)
                note(f"skipped: {error}")
            return None
        return np.pad(a, (*((0, max(0, self.size - n)) for n in a.shape[:2]), (0, 0)), "symmetric")

    @functools.lru_cache(maxsize=2)
    def order(self, epoch: int) -> np.ndarray:
        return rng(self.seed, 0, epoch).permutation(len(self.files))

    def file(self, n: int) -> Path:
        epoch, i = divmod(n, len(self.files))
        while self.read(file := self.files[self.order(epoch)[i % len(self.files)]]) is None:
            i += 1
        return file

    def view(self, photo: np.ndarray, n: int) -> np.ndarray:
        """Sample n's view of its photograph (or of another picture of the same size)."""
        r = rng(self.seed, 1, n)
        y, x = (r.integers(side - self.size + 1) for side in photo.shape[:2])
        a = np.rot90(photo[y:y + self.size, x:x + self.size], r.integers(self.turns))
        return a[:, ::-1] if r.random() < 0.5 else a

    def crop(self, n: int) -> np.ndarray:
        return self.view(self.read(self.file(n)), n)


def leave_ctrl_c_to_the_parent(worker: int) -> None:
    """For a loader's processes, which Ctrl-C, or the parent's end by it, would end with a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = lambda *_: None  # what goes wrong in a sample reaches the parent in another way


# ---------------------------------------------------------------------------------------- tiles


def check_tile(tile: int | None, multiple: int) -> int | None:
    if tile is not None and (tile < 4 * multiple or tile % multiple):
        raise UserError(f"--tile {tile}: must be a multiple of {multiple}, at least {4 * multiple}")
    return tile


class Tiles:
    """tiles(stage, *maps): the network `stage` applied to maps (pictures, latents) of a whole image.

    At once where the image fits one tile, else in overlapping windows, blended by smooth weights: memory no
    longer grows with the image. GroupNorm would normalise each window by its own statistics, in steps of
    brightness; so a mosaic of patches from all over the image goes through first and sets them for all."""

    def __init__(self, networks: nn.Module, x: Tensor, cell: int, tile: int | None, align: int):
        """x's sides are multiples of `cell` pixels. Windows begin at multiples of `align`, as the networks'
        own strides do; the last may be smaller."""
        self.rows, self.cols = (n // cell for n in x.shape[2:])  # from here on all is counted in cells
        self.size, self.step = tile // cell if tile else max(self.rows, self.cols), align // cell
        self.norms = [m for m in networks.modules() if isinstance(m, nn.GroupNorm)]
        self.device = next(networks.parameters()).device

    def __call__(self, stage, *maps: Tensor) -> Tensor:
        if max(self.rows, self.cols) <= self.size:
            return stage(*(m.to(self.device) for m in maps))
        whole = self.rows, self.cols
        with fixed_norms(self.norms, whole, [len(self.picked(n)) for n in whole]):
            stage(*map(self.mosaic, maps))
            return self.windows(stage, maps)

    def windows(self, stage, maps) -> Tensor:
        out = total = None
        for top in starts(self.rows, self.size, self.step):
            for left in starts(self.cols, self.size, self.step):
                part = stage(*(self.cut(m, top, left).to(self.device) for m in maps)).float().cpu()
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
