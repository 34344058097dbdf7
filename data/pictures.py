"""Pictures as people's files hold them: what can go wrong in reading one goes wrong here, and names the file.

Read as 8-bit sRGB, upright, alpha apart; written as PNG."""

from __future__ import annotations

import io
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from data.files import UserError, atomic, each_file

PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**26  # a long comment is no damage


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


def restore_files(pairs: list[tuple[Path, Path]], restore, tiled: bool = False) -> None:
    """Every input to its output, restore(image) -> (image, remark); grey stays grey, alpha is put back."""
    def work(file, target, turn):
        image, alpha = read_image(file)
        with turn:
            result, remark = restore(image)
        red, green, blue = (channel.tobytes() for channel in image.split())
        if red == green == blue:
            result = result.convert("L")
        if alpha is not None:
            result.putalpha(alpha)
        return write_png(target, result) + remark
    each_file(pairs, "restore", work, at_once(pairs, tiled))


def at_once(pairs: list[tuple[Path, Path]], tiled: bool) -> int:
    """How many pictures the networks take at a time: two on a CPU, whose cores one does not fill, if they are
    small; not in windows, for which networks are changed from call to call."""
    def pixels(file: Path) -> int:
        with suppress(Exception), Image.open(file) as image:
            return image.width * image.height
        return 0
    return 1 if tiled or torch.accelerator.is_available() or max(pixels(f) for f, _ in pairs) > 2**20 else 2


def write_png(target: Path, image: Image.Image) -> str:
    """Level 1 takes a quarter of the usual time, and a tenth more space."""
    atomic(target, lambda tmp: image.save(tmp, "PNG", compress_level=1))
    return f"{image.width} x {image.height}"


def compress_files(pairs: list[tuple[Path, Path]], compress, tiled: bool = False) -> None:
    """Every image to its file, compress(image) -> bytes; transparency is composited on white."""
    def work(file, target, turn):
        image, alpha = read_image(file, on_white=True)
        with turn:
            data = named(file, compress, image)
        atomic(target, lambda tmp: tmp.write_bytes(data))
        bpp = 8 * len(data) / (image.width * image.height)
        dropped = ", alpha dropped: composited on white" if alpha is not None else ""
        return f"{image.width} x {image.height}, {len(data)} bytes, {bpp:.4f} bpp{dropped}"
    each_file(pairs, "compress", work, at_once(pairs, tiled))


def decompress_files(pairs: list[tuple[Path, Path]], decompress) -> None:
    """Every file to its image, decompress(bytes) -> image."""
    def work(file, target, turn):
        with open(file, "rb") as f:
            data = f.read(2**23)  # no file of ours is longer
        with turn:
            image = named(file, decompress, data)
        return write_png(target, image)
    each_file(pairs, "decompress", work)


def named(file: Path, work, content):
    """work(content); what is wrong with it, is wrong with the file."""
    try:
        return work(content)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
