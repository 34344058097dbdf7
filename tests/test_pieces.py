"""data.pieces: nothing is lost or made twice; what a script takes from pieces is what photographs hold."""

import os

import numpy as np
import pytest
from PIL import Image

from common import Crops
from data import make_cir, pieces
from data.files import UserError
from data.pictures import read_image
from moe_diffir import CIRPairs, Stage1


def photograph(path, width, height, seed=0, **options):
    """Noise: no two places look alike."""
    path.parent.mkdir(parents=True, exist_ok=True)
    a = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(a).save(path, **options)
    return a


def cut(out, *folders):
    pieces.main(["--data", *map(str, folders), "--out", str(out), "--workers", "2"])


def made(out):
    return {str(f.relative_to(out)): f.stat().st_mtime_ns for f in out.rglob("*.*")}


@pytest.mark.parametrize("width, height", [(1200, 513), (1024, 512), (512, 700), (300, 1100), (90, 60)])
def test_pieces_are_the_whole_photograph(tmp_path, width, height):
    a = photograph(tmp_path / "in" / "deep" / "a.png", width, height)
    cut(tmp_path / "out", tmp_path / "in")
    tops, lefts = pieces.starts(height), pieces.starts(width)
    back, times = np.zeros_like(a), np.zeros(a.shape[:2], int)
    for r, top in enumerate(tops):
        for c, left in enumerate(lefts):
            piece = np.asarray(read_image(tmp_path / "out" / "deep" / f"a_{r}_{c}.webp")[0])
            assert piece.shape == (min(512, height), min(512, width), 3)
            place = slice(top, top + 512), slice(left, left + 512)
            assert np.array_equal(piece, a[place])
            back[place] = piece
            times[place] += 1
    assert np.array_equal(back, a) and times.min() == 1
    assert len(made(tmp_path / "out")) == len(tops) * len(lefts) == -(-width // 512) * -(-height // 512)


def test_every_side_is_covered_evenly():
    for side in range(1, 5000):
        steps = np.diff(pieces.starts(side))
        assert len(steps) == 0 or steps.max() <= 512 and steps.max() - steps.min() <= 1
        assert pieces.starts(side)[-1] + 512 == max(side, 512)


def test_what_is_there_is_not_made_again(tmp_path):
    photograph(tmp_path / "in" / "a.png", 600, 600)
    photograph(tmp_path / "in" / "b.png", 600, 100)
    cut(tmp_path / "out", tmp_path / "in")
    before = made(tmp_path / "out")
    assert len(before) == 6
    cut(tmp_path / "out", tmp_path / "in")
    assert made(tmp_path / "out") == before
    (tmp_path / "out" / "b_0_1.webp").unlink()  # one is missing, one photograph is another
    photograph(tmp_path / "in" / "a.png", 600, 500, seed=1)
    cut(tmp_path / "out", tmp_path / "in")
    after = made(tmp_path / "out")
    assert sorted(after) == ["a_0_0.webp", "a_0_1.webp", "b_0_0.webp", "b_0_1.webp"]
    assert not set(after.values()) & set(before.values())


def test_a_bad_photograph_is_named_and_the_rest_is_done(tmp_path, capfd):
    a = photograph(tmp_path / "in" / "a.png", 100, 100)
    (tmp_path / "in" / "bad.png").write_bytes(b"no picture")
    photograph(tmp_path / "in" / "c.png", 100, 100)
    with pytest.raises(UserError, match="1 of 3 photographs could not be read; the others are done"):
        cut(tmp_path / "out", tmp_path / "in")
    assert str(tmp_path / "in" / "bad.png") in capfd.readouterr().err
    assert set(made(tmp_path / "out")) == {"a_0_0.webp", "c_0_0.webp"}
    assert np.array_equal(read_image(tmp_path / "out" / "a_0_0.webp")[0], a)


def test_names_are_unique_or_refused_before_any_work(tmp_path):
    one, two, out = tmp_path / "one", tmp_path / "two", tmp_path / "out"
    for i, file in enumerate(("one/a.png", "one/a.bmp", "one/a_0.png", "two/a.png", "one/two/two/a.png")):
        photograph(tmp_path / file, 60 + i, 60)
    cut(out, one, two)
    assert len(made(out)) == 5
    assert {read_image(f)[0].width for f in out.rglob("*.webp")} == {60, 61, 62, 63, 64}
    for wrong in ([two, one / "two"], [one, one], [one, tmp_path / "none"], [out]):
        with pytest.raises(UserError):
            cut(out / "more" if wrong != [out] else out, *wrong)
    assert not (out / "more").exists()


def test_pieces_within_the_photographs_folder_are_no_photographs(tmp_path):
    photograph(tmp_path / "a.png", 60, 60)
    for _ in range(2):
        cut(tmp_path / "pieces", tmp_path)
    assert set(made(tmp_path / "pieces")) == {"a_0_0.webp"}


def test_pieces_of_photographs_that_are_gone_are_named(tmp_path, capsys):
    for name in ("a_1.png", "b.png"):
        photograph(tmp_path / "in" / name, 60, 60)
    cut(tmp_path / "out", tmp_path / "in")
    assert not capsys.readouterr().err.count("none of these")
    (tmp_path / "in" / "b.png").unlink()
    cut(tmp_path / "out", tmp_path / "in")
    assert f"{tmp_path / 'out' / 'b_0_0.webp'}: a piece of none of these" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    photograph(tmp_path / "in" / "a.png", 60, 60)
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="cannot be written"):
        cut(tmp_path / "out", tmp_path / "in")


def test_scripts_take_the_photographs_pixels_from_pieces(tmp_path):
    a = photograph(tmp_path / "in" / "a.png", 600, 520)
    Image.fromarray(a[:80, :80]).convert("RGBA").save(tmp_path / "in" / "b.png")
    cut(tmp_path / "out", tmp_path / "in")
    crops = Crops([tmp_path / "out"], 64, seed=0)
    for n in range(10):
        crop = crops.crop(n)
        views = [np.rot90(view, k) for view in (crop, crop[:, ::-1]) for k in range(4)]
        assert any(np.array_equal(a[y:y + 64, x:x + 64], view) for view in views
                   for y, x in np.argwhere((a == view[0, 0]).all(-1)))
    caches = [([tmp_path / "out"], tmp_path / "bench")]
    make_cir.complete(caches, [("jpeg", "5"), ("jpeg", "15")])
    pairs = CIRPairs(make_cir.read(caches, [("jpeg", "5"), ("jpeg", "15")]), Stage1(crop=64), 64, seed=0)
    n, x_lq, x_hq = pairs[0]
    assert x_lq.shape == x_hq.shape == (3, 64, 64) and len(pairs.files) == 5
    assert os.listdir(tmp_path / "bench" / "jpeg" / "5") and 0.02 < (x_lq - x_hq).abs().mean() < 1
