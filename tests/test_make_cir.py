"""data/make_cir.py: every codec as asked for, a benchmark made once, and what MoE-DiffIR trains on."""

import io
import json
import re
import shlex
import shutil
import stat
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import moe_diffir
from conftest import CAT
from data import make_cir
from data.files import UserError
from data.make_cir import FFMPEG, LEVELS, RANGE, compress
from data.pictures import read_image

HIDDEN = shutil.ignore_patterns(".*")


@pytest.mark.parametrize("codec", RANGE)
def test_levels_order_quality_and_size(codec):
    image = CAT.crop((100, 60, 228, 156))
    pictures, size = zip(*(compress(image, codec, level) for level in LEVELS[codec]))
    errors = [np.asarray(picture, float) - image for picture in pictures]
    quality = [-10 * np.log10(np.square(e).mean() / 255**2) for e in errors]
    assert quality == sorted(quality) and list(size) == sorted(size) and quality[0] > 18
    assert np.abs(errors[-1].mean((0, 1))).max() < 1.2  # no darkening


@pytest.mark.parametrize("codec", RANGE)
@pytest.mark.parametrize("size", [(33, 47), (64, 21), (17, 16)])
def test_any_size_comes_back(codec, size):
    assert compress(CAT.resize(size), codec, LEVELS[codec][2])[0].size == size


@pytest.mark.parametrize("codec", FFMPEG)
@pytest.mark.parametrize("q", [37, 47])
def test_the_qp_in_the_stream_is_the_one_asked_for(codec, q):
    """Read from its headers: 26 + the picture parameter set's offset + the picture's or slice's."""
    stream = make_cir.encode_video(np.asarray(CAT.crop((0, 0, 128, 96))), codec, str(q))
    trace = [make_cir.ffmpeg(), "-hide_banner", "-v", "trace", "-f", FFMPEG[codec][0],
             "-i", "pipe:0", "-c", "copy", "-bsf:v", "trace_headers", "-f", "null", "-"]
    traced = subprocess.run(trace, input=stream, capture_output=True).stderr.decode(errors="replace")
    found = re.findall(r"(\w*(?:init_qp_minus26|(?:slice|sh|ph)_qp_delta)) +[01]+ = (-?\d+)", traced)
    fields = {name: int(value) for name, value in found}
    assert 26 + sum(fields.values()) == q and len(fields) >= 2, fields
    assert b"x265" not in stream and b"x264" not in stream  # no message with the encoder's settings


def files_in(folder):
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*.png")}


def test_bench_writes_once_what_it_says(photos, tmp_path, capsys):
    out, own = tmp_path / "bench", tmp_path / "photos"
    shutil.copytree(photos, own, ignore=HIDDEN)
    (own / "torn.png").write_bytes((photos / "flower.png").read_bytes()[:300])
    args = ["--data", str(own), "--out", str(out), "--codecs", "jpeg", "vvc:47", "avc:37"]
    with pytest.raises(UserError, match="1 pictures could not be made"):
        make_cir.main(args)
    first, said = files_in(out), capsys.readouterr()
    assert "torn.png: not an image" in said.err
    assert "4 of the paper's 21 tasks, without webp, hevc, vvc:42, vvc:37, c_psnr" in said.out
    tasks = ("original", "jpeg/5", "jpeg/10", "jpeg/15", "vvc/47", "avc/37")
    assert set(first) == {f"{task}/{name}.png" for task in tasks for name in ("cat", "flower")}
    report = json.loads((out / "bench.json").read_text())
    image, buffer = read_image(own / "flower.png")[0], io.BytesIO()
    image.save(buffer, "JPEG", quality=10)
    pixels, bits = image.width * image.height, report["bits_per_pixel"]
    assert bits["jpeg"]["10"]["flower.png"] == pytest.approx(8 * len(buffer.getvalue()) / pixels)
    assert bits["vvc"]["47"]["flower.png"] == pytest.approx(8 * compress(image, "vvc", "47")[1] / pixels)
    made = read_image(out / "jpeg" / "10" / "flower.png")[0]
    assert np.array_equal(made, Image.open(buffer).convert("RGB"))
    assert np.array_equal(read_image(out / "original" / "flower.png")[0], image)
    assert {"pillow", "ffmpeg"} <= set(report["versions"])

    (own / "torn.png").unlink()
    (out / "vvc" / "47" / "flower.png").write_bytes(b"\x89PNG half of one")
    image.save(own / "cat.png")  # another photograph by that name
    make_cir.main([*args, "--codecs", "jpeg:5", "vvc:47"])
    again = files_in(out)
    assert {name for name in first if again[name] != first[name]} == {
        "original/cat.png", "jpeg/5/cat.png", "vvc/47/cat.png", "vvc/47/flower.png"}
    assert np.array_equal(read_image(out / "vvc" / "47" / "flower.png")[0], compress(image, "vvc", "47")[0])
    make_cir.main([*args, "--codecs", "jpeg:5", "vvc:47"])
    assert files_in(out) == again


@pytest.fixture
def ffmpeg_anew():
    """What was found out of FFmpeg is forgotten, before and after."""
    def forget():
        make_cir.missing_for.cache_clear()
        getattr(make_cir.ffmpeg, "cache_clear", lambda: None)()
    forget()
    yield forget
    forget()


@pytest.fixture
def ffmpeg_is(ffmpeg_anew, tmp_path, monkeypatch):
    """ffmpeg_is(script): a program in FFmpeg's place that knows libx265 only."""
    def replace(script):
        exe = tmp_path / "ffmpeg"
        known = "if '-encoders' in sys.argv: print(' libx265 '); sys.exit()"
        exe.write_text(f"#!{sys.executable}\nimport os, sys, time\n{known}\n{script}\n")
        exe.chmod(exe.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr("data.make_cir.ffmpeg", lambda: str(exe))
    return replace


def test_an_encoder_that_fails_on_one_image_or_hangs(photos, tmp_path, ffmpeg_is, monkeypatch, capsys):
    real, out = make_cir.ffmpeg(), tmp_path / "a"
    ffmpeg_is("if '134x92' in sys.argv: sys.exit('no such picture')\n"
              f"os.execv({real!r}, [{real!r}, *sys.argv[1:]])")
    with pytest.raises(UserError, match="1 pictures"):
        make_cir.main(["--data", str(photos), "--out", str(out), "--codecs", "hevc:47", "jpeg:5", "vvc"])
    said = capsys.readouterr()
    assert "hevc:47" in said.err and "cat.png: FFmpeg failed (no such picture)" in said.err
    assert "vvc: skipped" in said.err and "without libvvenc" in said.err
    assert re.search(r"vvc +- +skipped", said.out)
    assert set(files_in(out)) == {"original/cat.png", "original/flower.png", "jpeg/5/cat.png",
                                  "jpeg/5/flower.png", "hevc/47/flower.png"}
    ffmpeg_is("time.sleep(30)")
    monkeypatch.setattr("data.make_cir.CODEC_SECONDS", 0.5)
    with pytest.raises(UserError, match="hung and was stopped after 0.5 s"):
        compress(CAT, "hevc", "47")


def test_without_the_extra_its_codecs_are_named(ffmpeg_anew, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    tasks, missing = make_cir.available(make_cir.parse_tasks(["jpeg", "hevc"]))
    assert {codec for codec, _ in tasks} == {"jpeg"} and "pip install -e '.[codecs]'" in missing["hevc"]
    assert "hevc: skipped" in capsys.readouterr().err


def test_pairs_join_the_benchmark_and_are_trained_on(photos, tmp_path, capsys):
    lq, out = tmp_path / "lq", tmp_path / "bench"
    lq.mkdir()
    for file in photos.glob("*.png"):
        Image.open(file).save(lq / f"{file.stem}.jpg", quality=20)
    args = ["--out", str(out), "--pairs", str(lq), str(photos), "--task", "hific:low"]
    make_cir.main(args)
    assert "1 of the paper's 21 tasks" in capsys.readouterr().out
    made = read_image(out / "hific" / "low" / "flower.png")[0]
    assert np.array_equal(made, read_image(lq / "flower.jpg")[0])
    bits = json.loads((out / "bench.json").read_text())["bits_per_pixel"]["hific"]["low"]
    assert bits == {"cat.png": None, "flower.png": None}

    caches, tasks = make_cir.wanted([photos], out, ["jpeg:5"])
    assert tasks == [("jpeg", "5"), ("hific", "low")]
    versions = make_cir.made(caches, tasks)
    assert "trains on 2 of the paper's 21 tasks" in capsys.readouterr().out
    assert [[task for task, _ in files] for files in versions.values()] == [[0, 1], [0, 1]]
    with pytest.raises(UserError, match="no photograph with a compressed version"):
        make_cir.read(caches, [("vvc", "47")])

    shutil.copy(lq / "cat.jpg", lq / "cat.jpeg")  # which of the two is meant?
    with pytest.raises(UserError, match=r"cat.jpe?g and cat.jpe?g have one name"):
        make_cir.main(args)
    (lq / "cat.jpeg").unlink()

    (own := tmp_path / "own").mkdir()  # another picture of a name that --pairs has brought
    clear = read_image(photos / "cat.png")[0]
    clear.putalpha(0)
    clear.save(own / "flower.png")
    before = {p: p.read_bytes() for p in (out / "original").glob("*.png")}
    with pytest.raises(UserError, match="1 pictures could not be made"):
        make_cir.main(["--data", str(own), "--out", str(out), "--codecs", "jpeg:5"])
    assert "flower.png is there already, by --pairs" in capsys.readouterr().err
    assert all(p.read_bytes() == content for p, content in before.items())
    make_cir.main(["--data", str(own), "--out", str(tmp_path / "new"), "--codecs", "jpeg:5"])
    assert np.asarray(read_image(tmp_path / "new" / "original" / "flower.png")[0]).min() == 255  # on white

    Image.open(lq / "flower.jpg").crop((0, 0, 50, 40)).save(lq / "flower.jpg")
    shutil.copy(lq / "cat.jpg", lq / "extra.jpg")
    says = f"extra (only in {lq}), flower (50 x 40 in {lq}, 107 x 101 in {photos})"
    with pytest.raises(UserError, match=re.escape(says)):
        make_cir.main(args)


def test_several_processes_refuse_to_wait_for_the_benchmark(photos, tmp_path, monkeypatch, refused):
    """One line with the command that makes it; after that they train. A picture that cannot be made is no
    reason to refuse for ever."""
    own, out, names = tmp_path / "my photos", tmp_path / "run", ["jpeg:5", "webp"]
    shutil.copytree(photos, own, ignore=HIDDEN)
    (own / "torn.png").write_bytes(b"\x89PNG")
    cache = own / ".cir-bench"
    monkeypatch.setenv("WORLD_SIZE", "2")
    train = ["train", "--stage", "1", "--out", out, "--data", own, "--codecs", *names]
    said = refused(moe_diffir.main, train)
    assert not out.exists() and not cache.exists()
    command = shlex.split(said.split("train: ", 1)[1])
    assert command[:3] == ["python", "-m", "data.make_cir"]
    with pytest.raises(UserError, match="1 pictures could not be made"):
        make_cir.main(command[3:])
    caches, tasks = make_cir.wanted([own], None, names)
    assert len(make_cir.made(caches, tasks)) == 2
    make_cir.main([*map(str, ("--pairs", photos, photos, "--task", "hific:low", "--out", cache))])
    make_cir.wanted([own], None, names)  # what failed is still known
    shutil.rmtree(cache / "hific")
    made = {str(p.parent.relative_to(cache)) for p in cache.rglob("*.png")}
    assert made == {"original", "jpeg/5", "webp/5", "webp/10", "webp/15"}
    (cache / "webp" / "10" / "flower.png").unlink()
    with pytest.raises(UserError, match="make the benchmark"):
        make_cir.wanted([own], None, names)
    monkeypatch.delenv("WORLD_SIZE")
    make_cir.wanted([own], None, names)
