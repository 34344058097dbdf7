"""Pictures as people's files hold them: what can go wrong in reading one goes wrong here, and names the file.

Read as 8-bit sRGB, upright, alpha apart; written as PNG."""

from __future__ import annotations

import io
import re
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, PngImagePlugin

from data import quality
from data.files import UserError, atomic, each_file

PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**26  # a long comment is no damage
ADOBE_RGB = Path(__file__).with_name("adobe-rgb.icc")  # made in tests/test_files.py
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,  # by EXIF's orientation
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270,
         7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}


def read_image(path: str | Path, on_white: bool = False) -> tuple[Image.Image, Image.Image | None]:
    """(8-bit sRGB, upright, the alpha channel or None). Whatever goes wrong, the error names the file."""
    try:
        with Image.open(io.BytesIO(Path(path).read_bytes())) as image:
            bits = re.search(r"[LB];(\d+)", str(image.tile))  # a channel's, in the file
            image.load()
            turn, camera = told_by_exif(image)
            alpha = alpha_of(image, int(bits[1]) if bits else 8)
            image = to_srgb(plain(image), image.info.get("icc_profile") or camera)
            if turn is not None:
                image, alpha = image.transpose(turn), alpha and alpha.transpose(turn)
            if alpha and on_white:
                image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
            return image, alpha
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # Pillow's decoders raise many kinds
        raise UserError(f"{path}: not an image that can be read ({type(error).__name__}: {error})") from None


def told_by_exif(image: Image.Image) -> tuple[Image.Transpose | None, bytes | None]:
    """(The turn that sets it upright, its colours' profile): from single tags, as others may be damaged."""
    turn = profile = None
    with suppress(Exception):
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    with suppress(Exception):  # cameras have no profile for Adobe RGB, but colour space 2, or none and R03
        space = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.ColorSpace)
        name = image.getexif().get_ifd(ExifTags.IFD.Interop).get(ExifTags.Interop.InteropIndex)
        if space == 2 or space != 1 and str(name).startswith("R03"):
            profile = ADOBE_RGB.read_bytes()
    return turn, profile


def alpha_of(image: Image.Image, bits: int) -> Image.Image | None:
    """The alpha channel, or None. Where one value is transparent, it is given in the file's own `bits`, of
    which Pillow makes 8, but for greys of 16."""
    if not image.has_transparency_data:
        return None
    clear = image.info.pop("transparency", None)
    if image.mode in ("L", "RGB", "I;16") and clear is not None:
        if image.mode != "I;16":
            clear = np.multiply(clear, 255) // (2**bits - 1) if bits < 8 else np.right_shift(clear, bits - 8)
        same = (np.asarray(image).reshape(image.height, image.width, -1) == clear).all(2)
        return Image.fromarray(np.where(same, 0, 255).astype(np.uint8))
    if clear is not None:
        image = image.copy()
        image.info["transparency"] = clear
    return image.convert("RGBA").getchannel("A")


def plain(image: Image.Image) -> Image.Image:
    """The colours themselves, not on any ground, in 8 bits: RGB, L, CMYK or LAB."""
    top = top_of(image)
    if top:
        a = np.nan_to_num(np.asarray(image, np.float64), posinf=np.inf, neginf=0)
        a = (a.clip(0, top) * (255 / top) + 0.5).astype(np.uint8)
        return Image.fromarray(255 - a if tag(image, "PhotometricInterpretation", 1) == 0 else a)
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert(image.mode.upper())
    kind = "L" if image.mode in ("1", "LA") else image.mode
    return image.convert(kind if kind in ("L", "CMYK", "LAB") else "RGB")


def tag(image: Image.Image, name: str, default: int) -> int:
    """A number that a TIFF tells of its samples."""
    value = getattr(image, "tag_v2", {}).get(ExifTags.Base[name], default)
    return value[0] if isinstance(value, tuple) else value


def top_of(image: Image.Image) -> float | None:
    """The number that stands for white, which Pillow does not know above 8 bits; None: 8 bits. Unsigned
    integers of 9 to 16 bits reach to the largest there is; floats to 1, 255 or 65535, if all but a hundredth
    of the pixels say so. A file that leaves it open is refused, as any guess may be black."""
    integers = image.mode.startswith("I")
    if tag(image, "SampleFormat", 1) == 2 or image.mode == "I" and image.format != "PPM":
        raise UserError("signed or 32-bit integers, whose range the file does not tell; save it with 8 or "
                        "16 bits")
    if integers:  # (of a PPM Pillow makes 16 bits)
        return 2 ** tag(image, "BitsPerSample", 16) - 1
    if image.mode != "F":
        return None
    a = np.asarray(image)
    a = a[np.isfinite(a)]
    low, usual = np.quantile(a, [0.01, 0.99]) if a.size else (0, 0)
    tops = [top for top, least in ((1, 0), (255, 32), (65535, 8192)) if least <= usual <= 1.05 * top]
    if not tops or low < -0.05 * tops[0]:
        raise UserError(f"floats from about {low:.3g} to {usual:.3g}, whose range the file does not tell; "
                        "save it with 8 or 16 bits, or from 0 to 1")
    return tops[0]


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB, its numbers meant as sRGB; a profile that cannot be read, or of other channels, is passed over."""
    if profile or image.mode == "LAB":
        try:
            lab = image.mode == "LAB"
            source = ImageCms.createProfile("LAB") if lab else ImageCms.ImageCmsProfile(io.BytesIO(profile))
            return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            pass
    return image.convert("RGB")


def restore_files(pairs: list[tuple[Path, Path]], restore, tiled: bool = False) -> None:
    """Every input to its output, restore(image) -> (image, remark); grey stays grey, alpha is put back."""
    remarks = []

    def work(file, target, turn):
        image, alpha = read_image(file)
        with turn:
            result, remark = restore(image)
        red, green, blue = (channel.tobytes() for channel in image.split())
        if red == green == blue:
            result = result.convert("L")
        if alpha is not None:
            result.putalpha(alpha)
        size = write_png(target, result)
        remarks.append(remark)
        return size + remark
    try:
        each_file(pairs, "restore", work, at_once(pairs, tiled))
    finally:
        quality.summarise(remarks)


def at_once(pairs: list[tuple[Path, Path]], tiled: bool) -> int:
    """How many pictures the networks take at a time: two on a CPU, whose cores one does not fill, if they are
    small; not in windows, for which networks are changed from call to call."""
    def pixels(file: Path) -> int:
        if file.is_file():  # a pipe can be read but once
            with suppress(Exception), Image.open(file) as image:
                return image.width * image.height
        return 0
    return 1 if tiled or torch.accelerator.is_available() or max(pixels(f) for f, _ in pairs) > 2**20 else 2


def write_png(target: Path, image: Image.Image) -> str:
    """In a quarter of the usual time: of a photograph longer matches than runs save nothing."""
    atomic(target, lambda tmp: image.save(tmp, "PNG", compress_level=1, compress_type=zlib.Z_RLE))
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
