"""What people's files really contain, and what happens around them: one kind of fault a test, each with the
right value. Inputs are made here."""

import io
import json
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from data.captions import read_captions
from data.files import UserError, atomic, each_file, list_images, outputs, write_json
from data.pictures import ADOBE_RGB, read_image, restore_files
from data.runs import run_cli

COLOUR = Image.new("RGB", (24, 16), (200, 20, 20))


def saved(folder, name, image=COLOUR, **options):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


# ---- reading


def test_read_image_covers_modes_alpha_and_orientation(tmp_path):
    def read(image, name, **options):
        return read_image(saved(tmp_path, name, image, **options))
    grey16 = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    assert np.array(read(grey16, "16.png")[0])[0, :, 0].tolist() == [0, 100, 255]
    assert read(Image.new("CMYK", (4, 3), (255, 0, 0, 0)), "c.tif")[0].getpixel((0, 0))[0] < 60
    assert read(Image.new("RGB", (4, 3), "red").convert("P"), "p.png")[0].getpixel((0, 0)) == (255, 0, 0)
    rgb, alpha = read(Image.new("RGBA", (4, 3), (0, 0, 0, 51)), "a.png")
    assert rgb.getpixel((0, 0)) == (0, 0, 0) and alpha.getpixel((0, 0)) == 51
    assert read_image(tmp_path / "a.png", on_white=True)[0].getpixel((0, 0)) == (204, 204, 204)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read(Image.new("RGB", (4, 3)), "e.jpg", exif=exif)[0].size == (3, 4)


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P"])
def test_the_colour_under_alpha_stays_and_so_does_alpha(tmp_path, kind):
    image = COLOUR.convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size).point(lambda v: 128 if v > 99 else 32))
    if kind == "P":
        image = Image.fromarray(np.eye(16, 24, dtype=np.uint8))  # index 0 but for a diagonal
        image.putpalette([200, 20, 20] * 2)
        image.info["transparency"] = 0
    rgb, alpha = read_image(saved(tmp_path, "a.png", image.convert(kind) if kind != "P" else image))
    want = COLOUR.convert("L").convert("RGB") if kind == "LA" else COLOUR
    assert np.abs(np.asarray(rgb, int) - np.asarray(want)).max() <= 2
    if kind == "P":
        assert np.array_equal(alpha, np.where(np.asarray(image) == 0, 0, 255))
    else:
        assert set(np.unique(alpha)) == {32, 128}
    on_white, _ = read_image(tmp_path / "a.png", on_white=True)
    assert np.asarray(on_white, int).mean() >= np.asarray(rgb, int).mean()


TO_XYZ = {  # D50
    "Adobe RGB": [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]],
    "Display P3": [[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]],
    "sRGB": [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]}


def profile_of(matrix, gamma: float) -> bytes:
    """A minimal ICC profile (version 2): three primaries, none for grey, and one exponent."""
    def number(v):
        return struct.pack(">i", round(v * 65536))
    tags = {b"wtpt": b"XYZ \0\0\0\0" + b"".join(map(number, (0.9642, 1.0, 0.8249))),
            b"desc": b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + bytes(78), b"cprt": b"text\0\0\0\0x\0"}
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    for i, c in enumerate((b"r", b"g", b"b") if matrix else ()):
        tags[c + b"XYZ"] = b"XYZ \0\0\0\0" + b"".join(number(row[i]) for row in matrix)
        tags[c + b"TRC"] = curve
    tags |= {} if matrix else {b"kTRC": curve}
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content
    space = b"RGB " if matrix else b"GRAY"
    head = struct.pack(">I", start + len(body)) + bytes(4) + b"\x02\x10\0\0mntr" + space + b"XYZ "
    head += bytes(12) + b"acsp"
    head += bytes(28) + b"".join(map(number, (0.9642, 1.0, 0.8249))) + bytes(48)
    return head + struct.pack(">I", len(tags)) + table + body


@pytest.mark.parametrize("name", ["Adobe RGB", "Display P3"])
def test_a_colour_profile_is_converted_to_srgb(tmp_path, name):
    """The numbers that stand for the same colours in a wider space come back as sRGB's, by closed form."""
    inside = np.random.default_rng(0).integers(40, 216, (8, 8, 3)).astype(np.uint8)
    v = inside / 255
    linear = np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)
    wide = linear @ (np.linalg.inv(TO_XYZ[name]) @ np.array(TO_XYZ["sRGB"])).T
    numbers = Image.fromarray((255 * wide.clip(0, 1) ** (1 / 2.2) + 0.5).astype(np.uint8))
    picture = saved(tmp_path, "p.png", numbers, icc_profile=profile_of(TO_XYZ[name], 2.2))
    got = np.asarray(read_image(picture)[0], int)
    assert np.abs(got - inside).mean() < 1.5 and np.abs(np.asarray(numbers, int) - inside).mean() > 4
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    same = saved(tmp_path, "s.png", COLOUR, icc_profile=srgb)
    assert np.abs(np.asarray(read_image(same)[0], int) - np.asarray(COLOUR)).max() <= 1
    broken = saved(tmp_path, "b.png", COLOUR, icc_profile=b"no profile")
    assert np.array_equal(read_image(broken)[0], COLOUR)


@pytest.mark.parametrize("a, expected", [
    (np.linspace(0, 1, 64, dtype=np.float32), 255), (np.linspace(0, 255, 64, dtype=np.float32), 255),
    (np.float32([*np.linspace(0, 1, 639), 1.02]), 255), (np.float32([*np.linspace(0, 1, 639), np.inf]), 255),
    (np.float32([*np.linspace(0, 1, 639), np.nan]), 255),  # one odd pixel changes nothing
    (np.full(64, 255, np.uint16), 1), (np.full(64, 65535, np.uint16), 255),
    (np.float32([*np.linspace(0, 1, 639), -0.02]), 255),
    (np.float32([*np.linspace(0, 1, 639), -np.inf]), 255),
    (np.linspace(0, 60000, 64, dtype=np.float32), 60000 // 257)])
def test_ranges_of_float_and_16_bit_greys_are_known(tmp_path, a, expected):
    rgb = np.asarray(read_image(saved(tmp_path, "a.tif", Image.fromarray(a[None])))[0], int)
    assert rgb.max() == expected and (len(np.unique(rgb)) > 30) == (a.dtype == np.float32)


def tiff(bits: int, kind: int, content: bytes, size=(8, 1), photometric: int = 1) -> bytes:
    """An uncompressed grey TIFF; `kind`: 1 for unsigned integers, 2 signed, 3 floats."""
    tags = {256: size[0], 257: size[1], 258: bits, 259: 1, 262: photometric, 273: 134, 277: 1, 278: size[1],
            279: len(content), 339: kind}
    table = b"".join(struct.pack("<HHII", k, 4, 1, v) for k, v in tags.items())
    return (b"II*\0" + struct.pack("<IH", 8, len(tags)) + table + bytes(4)).ljust(134, b"\0") + content


@pytest.mark.parametrize("content, says", [
    (tiff(32, 3, np.linspace(-1, 1, 8, dtype="<f4").tobytes()), "floats from about -0.98 to 0.98"),
    (tiff(32, 3, np.linspace(0, 4095, 8, dtype="<f4").tobytes()), "floats from about 41 to"),  # of 12 bits?
    (tiff(32, 3, np.full(8, np.nan, "<f4").tobytes()), None),
    (tiff(32, 3, np.ones(8, "<f4").tobytes()), None),
    (tiff(32, 2, np.arange(8, dtype="<i4").tobytes()), "signed or 32-bit"),
    (tiff(32, 1, np.full(8, 2**31, "<u4").tobytes()), "signed or 32-bit"),
    (tiff(16, 2, np.arange(8, dtype="<i2").tobytes()), "signed or 32-bit"),
    (tiff(8, 2, bytes(8)), "signed or 32-bit")])
def test_a_range_that_the_file_does_not_tell_is_refused_in_one_line(tmp_path, content, says):
    (tmp_path / "a.tif").write_bytes(content)
    if says is None:
        assert read_image(tmp_path / "a.tif")[0].size == (8, 1)
    else:
        with pytest.raises(UserError, match=f"a.tif: {says}.*save it with 8 or 16 bits"):
            read_image(tmp_path / "a.tif")


def test_what_the_file_tells_of_its_range_is_taken(tmp_path):
    """12 bits reach to 4095; a TIFF may begin at white; a PGM says where it ends."""
    twelve = b"".join(bytes([v >> 4, (v & 15) << 4 | v >> 8, v & 255]) for v in (0, 2048, 4095, 4095))
    for name, content, want in (
            ("12.tif", tiff(12, 1, twelve), [0, 0, 128, 128, 255, 255, 255, 255]),
            ("white.tif", tiff(16, 1, bytes(14) + b"\xff\xff", photometric=0), [255] * 7 + [0]),
            ("10.pgm", b"P5 3 1 1023 " + bytes([0, 0, 2, 0, 3, 255]), [0, 128, 255])):
        (tmp_path / name).write_bytes(content)
        assert np.asarray(read_image(tmp_path / name)[0])[0, :, 0].tolist() == want, name


def png_chunk(name: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(bits: int, rows: list[bytes], clear: tuple[int, ...]) -> bytes:
    """A PNG, grey or of three channels, with one transparent value."""
    head = struct.pack(">IIBBBBB", 2, len(rows), bits, 2 if len(clear) == 3 else 0, 0, 0, 0)
    chunks = {b"IHDR": head, b"tRNS": struct.pack(f">{len(clear)}H", *clear),
              b"IDAT": zlib.compress(b"".join(b"\0" + row for row in rows)), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks.items())


@pytest.mark.parametrize("content, left", [
    (png(16, [struct.pack(">2H", 22359, 40000)], (22359,)), 87),
    (png(16, [struct.pack(">2H", 1, 2)], (1,)), 0),
    (png(8, [bytes([90, 7])], (90,)), 90), (png(4, [bytes([0x5f])], (5,)), 85), (png(2, [b"\x60"], (1,)), 85),
    (png(1, [b"\x40"], (0,)), 0), (png(8, [bytes([1, 2, 3, 4, 5, 6])], (1, 2, 3)), 1),
    (png(16, [struct.pack(">6H", 22359, 1, 2, 40000, 5, 6)], (22359, 1, 2)), 87)])
def test_a_transparent_value_becomes_alpha_in_every_depth(tmp_path, content, left):
    (tmp_path / "a.png").write_bytes(content)
    rgb, alpha = read_image(tmp_path / "a.png")
    assert np.asarray(alpha).tolist() == [[0, 255]] and rgb.getpixel((0, 0))[0] == left
    assert read_image(tmp_path / "a.png", on_white=True)[0].getpixel((0, 0)) == (255, 255, 255)


def ifd(entries, then: bytes = b"") -> bytes:
    """An EXIF directory of (tag, type, count, value), as no library writes it, and what lies behind."""
    table = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3].ljust(4, b"\0") for entry in entries)
    return struct.pack("<H", len(entries)) + table + bytes(4) + then


def exif(*entries, then: bytes = b"") -> bytes:
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + ifd(sorted(entries), then)


ODD = [(256, 5, 1, b"\x1a"), (257, 9, 1, struct.pack("<i", -3)), (270, 99, 1, b"\xff"),
       (282, 5, 2, b"\xff\xff")]  # a width as a rational, a negative height, no type, an end too early


@pytest.mark.parametrize("odd", [[], ODD[:1], ODD[1:2], ODD])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_picture_is_set_upright_by_one_tag_whatever_the_others_are(tmp_path, kind, odd):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (2, 3, 3)).astype(np.uint8))
    image = image.resize((24, 16))
    a = np.asarray(image, int)
    turned = [a, a[:, ::-1], a[::-1, ::-1], a[::-1], a.swapaxes(0, 1), np.rot90(a, -1),
              a[::-1, ::-1].swapaxes(0, 1), np.rot90(a)]
    for orientation, want in enumerate(turned, 1):
        told = exif(*odd, (0x0112, 3, 1, bytes([orientation, 0])))
        if kind == "TIFF":
            told = Image.Exif()
            told[0x0112] = orientation
        picture = saved(tmp_path, f"{orientation}.{kind.lower()}", image, format=kind, exif=told)
        got = np.asarray(read_image(picture)[0], int)
        assert got.shape == want.shape and np.abs(got - want).mean() < 12, orientation


@pytest.mark.parametrize("space, interop, converted", [
    (65535, b"R03\0", True), (2, None, True), (65535, b"R98\0", False), (1, b"R03\0", False),
    (65535, None, False), (None, b"R03\0", True)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_cameras_say_adobe_rgb_without_a_profile(tmp_path, kind, space, interop, converted):
    own, start = [(0xA001, 3, 1, struct.pack("<H", space))] if space else [], 8 + 18
    if interop:
        own.append((0xA005, 4, 1, struct.pack("<I", start + 6 + 12 * (len(own) + 1))))
    told = exif((34665, 4, 1, struct.pack("<I", start)),
                then=ifd(own, ifd([(1, 2, 4, interop)]) if interop else b""))
    quality = {} if kind == "PNG" else {"quality": 100}
    plain, icc, got = (read_image(saved(tmp_path, f"a.{kind.lower()}", **quality, **more))[0]
                       for more in ({}, {"icc_profile": ADOBE_RGB.read_bytes()}, {"exif": told}))
    assert np.array_equal(got, icc if converted else plain) and not np.array_equal(icc, plain)
    assert ADOBE_RGB.read_bytes() == profile_of(TO_XYZ["Adobe RGB"], 563 / 256)


def test_every_mode_has_its_profile_converted(tmp_path):
    """As RGB has: palettes, with and without alpha; greys by grey profiles; LAB has its own meaning."""
    profile = profile_of(TO_XYZ["Adobe RGB"], 2.2)
    want = np.asarray(read_image(saved(tmp_path, "rgb.png", icc_profile=profile))[0], int)
    assert np.abs(want - np.asarray(COLOUR)).max() > 20
    alpha = Image.linear_gradient("L").resize(COLOUR.size)
    for name, kind in (("p.png", "P"), ("p.tif", "P"), ("rgba.png", "RGBA"), ("rgba.tif", "RGBA"),
                       ("pa.tif", "PA")):
        image = COLOUR.quantize(4) if kind[0] == "P" else COLOUR.convert(kind)
        image = image.convert(kind)
        if kind[-1] == "A":
            image.putalpha(alpha)
        got, own = read_image(saved(tmp_path, name, image, icc_profile=profile))
        assert np.abs(np.asarray(got, int) - want).max() <= 2, name
        assert (own is not None) == (kind[-1] == "A"), name
    linear = profile_of(None, 1.0)
    grey = Image.linear_gradient("L").resize((16, 16))
    one, _ = read_image(saved(tmp_path, "l.png", grey, icc_profile=linear))
    two, _ = read_image(saved(tmp_path, "la.png", grey.convert("LA"), icc_profile=linear))
    assert np.array_equal(one, two) and np.asarray(one).mean() > np.asarray(grey).mean() + 30
    lab = ImageCms.profileToProfile(COLOUR, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"),
                                    outputMode="LAB")
    got = np.asarray(read_image(saved(tmp_path, "lab.tif", lab))[0], int)
    assert np.abs(got - np.asarray(COLOUR)).max() <= 4


def test_every_failure_to_read_names_the_file(tmp_path):
    whole = io.BytesIO()
    Image.effect_noise((64, 48), 40).convert("RGB").save(whole, "AVIF" if "AVIF" in Image.SAVE else "WEBP")
    bomb = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)  # the pixels that a few bytes claim
    bad = {"empty.png": b"", "text.jpg": b"not a picture", "cut.avif": whole.getvalue()[:-200],
           "format.dds": b"DDS " + bytes([124, 0, 0, 0]) + b"\xff" * 200,
           "bomb.png": b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", bomb) + png_chunk(b"IDAT")}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            read_image(tmp_path / name)
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "long " * 10**6, zip=True)
    assert read_image(saved(tmp_path, "long.png", pnginfo=text))[0].size == COLOUR.size
    if os.name == "posix":
        reader, writer = os.pipe()
        os.write(writer, saved(tmp_path, "pipe.png").read_bytes())
        os.close(writer)
        restore_files([(Path(f"/dev/fd/{reader}"), tmp_path / "of a pipe.png")], lambda image: (image, ""))
        assert read_image(tmp_path / "of a pipe.png")[0].size == COLOUR.size
        os.close(reader)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "GIF"])
def test_mutated_files_are_read_or_named(tmp_path, kind):
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {kind}")
    buffer, r, path = io.BytesIO(), np.random.default_rng(0), tmp_path / "x"
    Image.effect_noise((40, 30), 60).convert("RGB").save(buffer, kind)
    for _ in range(60):
        data = bytearray(buffer.getvalue())
        for _ in range(r.integers(1, 9)):
            data[r.integers(len(data))] = r.integers(256)
        path.write_bytes(bytes(data[:r.integers(1, len(data) + 1)] if r.random() < 0.3 else data))
        try:
            assert read_image(path)[0].mode == "RGB"
        except UserError as error:
            assert str(path) in str(error)


# ---- finding and naming


def test_linked_folders_are_searched_and_pipes_are_not(tmp_path):
    saved(tmp_path, "real/a.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "round").symlink_to(tmp_path / "data")
    os.mkfifo(tmp_path / "real" / "b.png")
    assert [p.name for p in list_images([tmp_path / "data"])] == ["a.png"]
    (tmp_path / "real" / "captions.jsonl").write_text('{"file": "a.png", "caption": "a line"}')
    assert [*read_captions([tmp_path / "data"])] == list_images([tmp_path / "data"])


def test_results_within_the_input_are_no_inputs(tmp_path):
    file, _ = saved(tmp_path, "a.png"), saved(tmp_path, "restored/a.png")
    assert outputs([str(tmp_path)], tmp_path / "restored") == [(file, tmp_path / "restored" / "a.png")]


def test_outputs_never_overwrite_an_input_or_another_result(tmp_path):
    a, b = saved(tmp_path, "a.png"), saved(tmp_path, "b.jpg")
    saved(tmp_path, "a.jpg"), saved(tmp_path, "only/d.png")
    for source, out in ((tmp_path / "only", tmp_path / "only"), (a, a)):
        with pytest.raises(UserError, match="overwrite"):
            outputs([str(source)], out)
    pairs = dict(outputs([str(tmp_path)], tmp_path / "out"))
    names = {str(p.relative_to(tmp_path / "out")) for p in pairs.values()}
    assert names == {"a.png.png", "a.jpg.png", "b.png", "only/d.png"}
    assert outputs([str(b)], tmp_path / "c.png") == [(b, tmp_path / "c.png")]
    assert outputs([str(b)], tmp_path) == [(b, tmp_path / "b.png")]  # beside it
    done = saved(tmp_path, "deep/out/e.png").parent
    with pytest.raises(UserError, match="deep: holds nothing but what lies in"):
        outputs([str(done.parent)], done)
    folders = [str(saved(tmp_path, f"{folder}/x.jpg").parent) for folder in ("one", "two")]
    with pytest.raises(UserError, match="another result"):  # the same name in both: before any work
        outputs(folders, tmp_path / "out")


@pytest.mark.parametrize("suffix, name", [(".png", "x.jpg"), (".oscar", "x.bin")])
def test_a_name_with_a_foreign_ending_is_refused(tmp_path, suffix, name):
    with pytest.raises(UserError, match=f"give a name that ends in {suffix}"):
        outputs([str(saved(tmp_path, "a.png"))], tmp_path / name, suffix)


# ---- batches


def test_one_files_failure_of_whatever_kind_ends_that_file(tmp_path, capsys):
    failures = {"a": MemoryError(), "b": RuntimeError("CUDA out of memory"), "c": KeyError("odd"), "d": None,
                "e": UserError("memory.png: not an image")}
    done = []

    def work(file, target, turn):
        if failures[file.name]:
            raise failures[file.name]
        done.append(file.name)
    with pytest.raises(UserError, match="2 of 2 files could not be done$"):  # no others that are
        each_file([(tmp_path / k, tmp_path / "out") for k in "ab"], "restore", work)
    capsys.readouterr()
    with pytest.raises(UserError, match="4 of 5 files could not be done; the others are$"):
        each_file([(tmp_path / k, tmp_path / "out") for k in failures], "restore", work)
    told = capsys.readouterr().err
    assert done == ["d"] and told.count("--tile 512") == 2 and "c: failed (KeyError: 'odd')" in told
    assert "memory.png: not an image" in told


def test_grey_stays_grey_and_long_or_odd_names_are_written(tmp_path):
    grey, name = Image.linear_gradient("L").resize((20, 20)), "n" * 240 + ".png"
    saved(tmp_path, "grey.jpg", grey), saved(tmp_path, name)
    pairs = [(tmp_path / f, tmp_path / "out" / f"{f[:-4]}.png") for f in ("grey.jpg", name)]
    restore_files(pairs, lambda image: (COLOUR.resize(image.size), ""))
    assert Image.open(tmp_path / "out" / "grey.png").mode == "L"
    assert Image.open(tmp_path / "out" / name).mode == "RGB"


def test_a_name_that_the_terminal_cannot_print_is_escaped(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.raises(SystemExit):
        run_cli(lambda: list_images(["\udcff \u2603.png"]))
    terminal.flush()
    assert b"\\udcff \\u2603.png: no such file" in terminal.buffer.getvalue()


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})

    def torn(tmp):
        tmp.write_text("{")
        raise OSError(28, "No space left on device")
    with pytest.raises(UserError, match="No space left"):
        atomic(path, torn)
    assert json.loads(path.read_text()) == {"old": 1} and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_captions_are_utf8_with_or_without_bom_and_lines_end_where_they_end(tmp_path):
    rows = [{"file": "a.png", "caption": "a\u2028b"}, {"file": "b.png", "caption": "Stra\u00dfe"}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    for text in (lines, lines + "\n", "\ufeff" + lines.replace("\n", "\r\n\r\n")):
        (tmp_path / "captions.jsonl").write_bytes(text.encode())
        read = read_captions([tmp_path])
        assert [read[tmp_path / row["file"]]["caption"] for row in rows] == [row["caption"] for row in rows]
