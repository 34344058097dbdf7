"""The commands of all scripts: flags, what is refused and how, files of any kind in, whole files out."""

import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import codiff
import data.runs as runs
from common import PHOTOS
from conftest import CAT, SCRIPTS, train_args
from data import caption, make_cir
from data.files import SHIPPED, UserError, load_tensors, save_tensors
from data.pictures import read_image
from test_runs import full_disk

RESTORERS = ("codiff", "sodiff", "moe_diffir")
PHOTO = PHOTOS / "val" / "chelsea.png"


def use(name: str, source, out, *more) -> list[str]:
    """restore, or compress, from `source` to `out`."""
    command = ["compress", source, out, "--bpp", 0.0313] if name == "oscar" else ["restore", source]
    return [*map(str, (*command, *([] if name == "oscar" else ["-o", out]), *more))]


# ---- flags


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_setting_has_one_flag(name, trained, monkeypatch):
    """The paper's values, flag by flag, are the paper's settings."""
    script, seen, argv = trained(name).script, [], []
    for stage in (script.Stage1, script.Stage2):
        for f in fields(stage):
            value, flag = f.metadata["paper"], stage.flag(f.name)
            if isinstance(value, bool):
                argv.append(flag if value else flag.replace("--", "--no-"))
            else:
                argv.append(f"{flag}={','.join(map(str, value)) if isinstance(value, tuple) else value}")
    monkeypatch.setattr(script, "train", seen.append)
    for words in (argv, ["--paper", "--data", "photos"], []):
        script.main(["train", *words])
    by_flags, by_paper, tiny = ([stage.of(args) for stage in (script.Stage1, script.Stage2)] for args in seen)
    assert by_flags == by_paper == [script.Stage1.paper(), script.Stage2.paper()]
    assert tiny == [script.Stage1(), script.Stage2()]
    assert len(argv) == len({flag.split("=")[0] for flag in argv})


def test_the_weights_that_ship_serve_where_there_is_no_run(tmp_path, monkeypatch):
    def default():
        p = runs.CommandLine()
        p.model_flags("codiff")
        return p.parse_args([]).weights
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    monkeypatch.setattr(runs, "SHIPPED", tmp_path / "weights")
    assert default() == tmp_path / "runs" / "codiff"
    (tmp_path / "weights" / "codiff").mkdir(parents=True)
    assert default() == tmp_path / "weights" / "codiff"
    (tmp_path / "runs" / "codiff" / "model").mkdir(parents=True)
    assert default() == tmp_path / "runs" / "codiff"


# ---- what is refused: one line that names the culprit, exit code 2, before any work

TRAIN = [("", "--s1-lr fast", "--s1-lr: invalid float"), ("", "--no-such-flag"),
         ("", "--paper", "--paper needs --data"), ("", "--seed -1"), ("", "--stage 2", "stage 1 first"),
         ("", "--resume", "{new} holds no run"), ("", "--data {empty}", "{empty}: no images"),
         ("", "--val nowhere", "nowhere: no such file"), ("", "--base no/such-base", "no/such-base"),
         ("", "--base {empty}", "{empty}: no scheduler there"),
         ("", "--s1-batch 0", "--s1-batch 0: must be at least 1"), ("", "--s2-lr nan"),
         ("", "--s1-crop 100", "--s1-crop 100: must be a multiple of"),
         ("", "--out {run}", "--resume it, or --overwrite it"),
         ("", "--out {run} --resume", "stage1.save_every was 2"),
         ("", "--out {run} --resume --overwrite", "not allowed with"),
         ("", "--out {run} --stage 2 --overwrite", "{run} holds the stage 1"),
         ("", "--out {torn} --overwrite", "--overwrite: {torn} holds c"),
         ("", "--out {other}", "its config.json is not a run's"), ("", "--out {photo}", "{photo}"),
         ("codiff", "--s2-T-L 1000", "--s2-T-L 1000: must be at least 0, at most 999"),
         ("codiff", "--s1-qf-min 96"), ("codiff", "--prompt dape", "--prompt dape: choose from cave"),
         ("codiff", "--losses l2,l3", "--losses l3"), ("sodiff", "--s2-qf-min 0"), ("sodiff", "--beta -1"),
         ("sodiff", "--s2-tau-0 1000", "--s2-tau-0 1000: must be at least 0, at most 999"),
         ("sodiff", "--losses l2", "--losses l2: choose from mse"), ("sodiff", "--timestep random"),
         ("sodiff", "--data {torn}", "captions.jsonl, line 1"), ("oscar", "--s2-lambda-repa inf"),
         ("oscar", "--mapping none.json", "none.json"), ("oscar", "--losses mse,lpips", "--losses lpips"),
         ("oscar", "--s1-crop 72", "multiple of 64"),
         ("moe_diffir", "--top-k 8", "--top-k 8: must be at least 1, at most 7"), ("moe_diffir", "--top-k 0"),
         ("moe_diffir", "--experts 0"), ("moe_diffir", "--prompt two", "--prompt two: choose from none"),
         ("moe_diffir", "--s2-sampling 0"),
         ("moe_diffir", "--s2-sampling 2", "--s2-sampling 2: must be from 1 to 1 (--t-star 49"),
         ("moe_diffir", "--t-star 0 --s2-sampling 1001", "--s2-sampling 1001: must be from 2 to 1000"),
         ("moe_diffir", "--t-star 500", "--t-star 500: must be at least 0, at most 499"),
         ("moe_diffir", "--s2-levels 0,4", "--s2-levels 4: must be"), ("moe_diffir", "--cache-latents -1"),
         ("moe_diffir", "--codecs bpg", "--codecs bpg: choose from"), ("moe_diffir", "--s1-width 30"),
         ("moe_diffir", "--dp {empty}", "--dp {empty}: no CLIP"),
         ("moe_diffir", "--clip {empty}", "--clip {empty}: no CLIP")]

USE = [("", "nowhere.jpg", "nowhere.jpg: no such file"), ("", "{empty}", "{empty}: no images"),
       ("", "{text}", "notes.jpg: not an image"),
       ("", "{photo} --weights {empty}", "stage2.safetensors: no such file"),
       ("", "{photo} --tile 100", "--tile 100: must be a multiple"),
       ("", "{photo} --tile 32", "--tile 32: must be"), ("oscar", "{photo} --bpp 0.5", "0.0019, 0.0098"),
       ("oscar", "{photo} --bpp lots", "lots is none of 0.0019"),
       ("moe_diffir", "{photo} --steps 0", "--steps 0"),
       ("moe_diffir", "{photo} --steps 2000", "--steps 2000"),
       ("moe_diffir", "{photo} --fidelity 1.5", "--fidelity 1.5")]

OTHER = [("", "sharpen", "invalid choice: 'sharpen'"), ("", "eval --weights {run} --data nowhere", "nowhere"),
         ("", "figures --weights {empty}", "safetensors: no such file"),
         ("", "trace {text} --weights {run}", "notes.jpg: not an image"),
         ("", "trace {photo} --weights {empty}", "stage2.safetensors: no such file"),
         ("codiff", f"trace {{photo}} --weights {SHIPPED / 'sodiff'}", "not made by codiff.py's stage 2"),
         ("", "profile --base {empty}", "unet/config.json"), ("", "profile --size 0", "--size"),
         ("", "profile --size 0x9", "--size"),
         ("codiff", "eval --weights {run} --qf 0", "--qf: 0: a quality factor is from 1 to 100"),
         ("sodiff", "eval --weights {run} --double 30 ten", "--double: ten: a quality factor"),
         ("codiff", "eval --weights {run} --shift 8", "--shift: invalid choice: 8"),
         ("codiff", "restore {photo} --weights {run} -o x.jpg", "give a name that ends in .png"),
         ("sodiff", "figures --weights {run} --data {torn}", "captions.jsonl, line 1"),
         ("oscar", "compress {photo} {new}.oscar", "--bpp"),
         ("oscar", "eval --weights {run} --anchor BPG", "JPEG"),
         ("oscar", "compress {photo} {photo}/x.oscar --bpp 0.125 --weights {run}", "cannot be written"),
         ("oscar", "compress {photo} x.bin --bpp 0.125 --weights {run}", "give a name that ends in .oscar"),
         ("oscar", "decompress {photo} {new}.png --weights {run}", "not an OSCAR file"),
         ("oscar", "decompress {none}.oscar {new}.png --weights {run}", "none.oscar: empty"),
         ("oscar", "decompress {tmp} {new} --weights {run}", "2 of 2 files"),
         ("oscar", "decompress nowhere {new}.png --weights {run}", "no such file"),
         ("oscar", "decompress {torn} {new} --weights {run}", "nor a folder of .oscar files"),
         ("oscar", "eval --weights {run} --centre 0", "--centre 0: must be at least 1"),
         ("moe_diffir", "eval --weights {run} --task hific:low", "--pairs and --task"),
         ("moe_diffir", "eval --weights {run}" + 2 * " --task a:b --pairs {torn} {torn}",
          "with its own"),
         ("moe_diffir", "eval --weights {run} --steps 1 2", "--steps 2: must be from 1 to 1")]

TOOLS = [(caption, "--data {empty} --out {new}", "no images"),
         (caption, "--data {torn} --out {new} --batch 0", "--batch 0"),
         (caption, "--data {torn} --out {new} --model {empty}", "--model {empty}: cannot be loaded"),
         (make_cir, "--out {new}", "give --data"), (make_cir, "--data {empty} --out {new}", "no images"),
         (make_cir, "--data {torn} --out {new} --codecs vvc:64", "--codecs vvc:64: the level must be from 0"),
         (make_cir, "--data {torn} --out {new} --codecs hific", "--pairs"),
         (make_cir, "--out {new} --pairs {torn} {torn}", "--pairs and --task"),
         (make_cir, "--out {new} --pairs {torn} {torn} --task ../x:low", "--task ../x:low"),
         (make_cir, "--out {new} --pairs {torn} {empty} --task hific:low", "no images")]


def of_scripts(table):
    """(Without a third entry the words themselves are what is said.)"""
    cases = [(name, words, [words, *says][-1]) for only, words, *says in table
             for name in ([only] if only else SCRIPTS)]
    return pytest.mark.parametrize("name, words, says", cases)


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the braces above stand for, but for {run}."""
    for folder in ("empty", "torn", "other"):
        (tmp_path / folder).mkdir()
    CAT.crop((0, 0, 90, 80)).save(tmp_path / "torn" / "cat.png")
    (tmp_path / "torn" / "captions.jsonl").write_text('{"file": "cat.png", "cap')
    (tmp_path / "notes.jpg").write_text("not a picture")
    (tmp_path / "none.oscar").write_bytes(b"")
    (tmp_path / "cut.oscar").write_bytes(b"OS0\1")
    (tmp_path / "other" / "config.json").write_text('{"name": "another program"}')
    monkeypatch.chdir(tmp_path)
    places = {name: tmp_path / name for name in ("empty", "torn", "other", "none", "new")}
    return places | {"tmp": tmp_path, "text": tmp_path / "notes.jpg", "photo": PHOTO}


@of_scripts(TRAIN)
def test_bad_settings_are_refused_before_any_training(name, words, says, trained, photos, names, refused):
    names |= {"run": trained(name).folder}
    args = words.format(**names).split()
    data = ["--data", str(photos)] if name == "moe_diffir" and not {"--paper", "--data"} & {*args} else []
    there = {p for folder in (names["run"], names["torn"]) for p in folder.rglob("*")}
    said = refused(trained(name).script.main, ["train", "--out", names["new"], *data, *args])
    assert says.format(**names) in said and all(p.exists() for p in there)
    assert not any((names["new"] / made).exists() for made in ("last", "model", "log.jsonl"))


@of_scripts(USE)
def test_restoring_says_what_is_wrong(name, words, says, trained, names, refused):
    source, *more = words.format(**names).split()
    args = use(name, source, names["new"], "--weights", trained(name).folder, *more)
    assert says.format(**names) in refused(trained(name).script.main, args)
    assert not names["new"].is_file() and not [*names["new"].glob("*")]


@of_scripts(OTHER)
def test_other_commands_say_what_is_wrong(name, words, says, trained, names, refused):
    names |= {"run": trained(name).folder}
    before = {*names["tmp"].rglob("*")}
    said = refused(trained(name).script.main, words.format(**names).split())
    assert says.format(**names) in said
    assert {p for p in names["tmp"].rglob("*") if p.is_file()} <= before  # nothing half-written


@pytest.mark.parametrize("tool, words, says", TOOLS)
def test_tools_say_what_is_wrong(tool, words, says, names, refused):
    assert says.format(**names) in refused(tool.main, words.format(**names).split())


# ---- damaged and foreign models


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def edited(path: Path, **changes) -> None:
    tensors, header = load_tensors(path)
    save_tensors(path, tensors, **header | changes)


DAMAGES = [
    ("stage2", cut, "stage2.safetensors: not a readable safetensors file"),
    ("stage2", Path.unlink, "stage2.safetensors: no such file"),
    ("stage2", lambda p: edited(p, script="another"), "not made by {}.py's stage 2"),
    ("stage2", lambda p: edited(p, fingerprint="0" * 64), "trained on another base"),
    ("stage2", lambda p: edited(p, **{"stage2.steps": None, "stage2.gone": 1}), "another version"),
    ("stage1", cut, "stage1.safetensors: not a readable safetensors file"),
    ("stage1", lambda p: shutil.copy(p.with_name("stage2.safetensors"), p), "not made by {}.py's stage 1")]


@pytest.mark.parametrize("name", SCRIPTS)
def test_damaged_and_foreign_models_are_refused(name, trained, tmp_path):
    run = trained(name)
    for i, (stage, damage, says) in enumerate(DAMAGES):
        if name == "oscar" and stage == "stage1":
            continue  # its second stage's file holds all
        shutil.copytree(run.folder / "model", tmp_path / str(i) / "model")
        damage(tmp_path / str(i) / "model" / f"{stage}.safetensors")
        with pytest.raises(UserError, match=says.format(name)):
            run.script.load(tmp_path / str(i))


# ---- restoring files


def pictures(folder: Path) -> dict[str, tuple[int, int]]:
    """One picture in many kinds and sizes; {its result's name: its size}."""
    (folder / "deep").mkdir(parents=True)
    CAT.crop((0, 0, 121, 135)).save(folder / "a.jpg", quality=10)
    CAT.crop((0, 0, 7, 5)).save(folder / "deep" / "b.webp")
    CAT.crop((0, 0, 1, 1)).save(folder / "one.png")
    with_alpha = CAT.crop((0, 0, 150, 203)).convert("RGBA")
    with_alpha.putalpha(Image.linear_gradient("L").resize(with_alpha.size))
    with_alpha.save(folder / "alpha.png")
    small = CAT.crop((0, 0, 50, 30))
    small.convert("CMYK").save(folder / "cmyk.tif")
    small.convert("L").save(folder / "grey.png")
    small.convert("P").save(folder / "palette.gif")
    Image.fromarray(np.arange(50 * 30, dtype=np.uint16).reshape(30, 50) * 40).save(folder / "16bit.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    small.save(folder / "turned.jpg", exif=turned)
    Image.new("RGB", (2000, 3), "teal").save(folder / "wide.bmp")
    (folder / "broken.jpg").write_bytes((folder / "a.jpg").read_bytes()[:200])
    return {"a": (121, 135), "deep/b": (7, 5), "one": (1, 1), "alpha": (150, 203), "cmyk": (50, 30),
            "grey": (50, 30), "palette": (50, 30), "16bit": (50, 30), "turned": (30, 50), "wide": (2000, 3)}


@pytest.mark.parametrize("tile", [(), ("--tile", "128")])
@pytest.mark.parametrize("name", RESTORERS)
def test_restore_takes_a_folder_of_any_sizes_and_kinds(name, tile, trained, tmp_path, capsys, monkeypatch):
    run, source, out = trained(name), tmp_path / "in", tmp_path / "out"
    sizes = pictures(source)
    before = {p: p.read_bytes() for p in source.rglob("*") if p.is_file()}
    monkeypatch.setattr(run.script, "load", lambda *_, model=run.model: model)
    with pytest.raises(UserError, match="1 of 11"):
        run.script.main(use(name, source, out, "--weights", run.folder, *tile))
    assert "broken.jpg: not an image" in capsys.readouterr().err
    made = {str(p.relative_to(out)).removesuffix(".png"): Image.open(p) for p in out.rglob("*.png")}
    assert {k: image.size for k, image in made.items()} == sizes
    means = [np.asarray(made[k].convert("L")).mean() for k in ("cmyk", "grey", "palette")]
    assert max(means) - min(means) < 12 and made["grey"].mode == "L"  # the same picture
    alpha = np.asarray(Image.open(source / "alpha.png").getchannel("A"))
    assert np.array_equal(np.asarray(made["alpha"].getchannel("A")), alpha) and made["a"].mode == "RGB"
    assert before == {p: p.read_bytes() for p in source.rglob("*") if p.is_file()}
    if not tile:  # and a second time it is the same
        again = run.script.restore(run.model, read_image(source / "a.jpg")[0])
        assert np.array_equal(made["a"], again[0] if isinstance(again, tuple) else again)


class Written:
    """All that some streams can do, as those of notebooks and of programs with a window."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.usefixtures("no_evaluation")
def test_what_is_printed_may_go_anywhere_and_paths_may_be_text(trained, photos, tmp_path, monkeypatch):
    """`%run codiff.py ...` in a notebook, and what its next cells do."""
    run, stream = trained("codiff"), Written()
    picture = Image.open(photos / "cat.png")
    for args in (use("codiff", photos, tmp_path / "out", "--weights", run.folder),
                 train_args("codiff", tmp_path / "run", photos, "--stage", 1, "--s1-steps", 1)):
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdout", stream), patch.setattr("sys.stderr", stream)
            patch.setattr("sys.argv", ["codiff.py", *args])
            codiff.main()
    assert all(said in stream.text for said in ("cat.png  (133 x 91)", "stage 1 on cpu", "stage1: 100%"))
    again = codiff.restore(codiff.load(str(run.folder)), picture)
    assert np.array_equal(again, Image.open(tmp_path / "out" / "cat.png"))


def test_a_full_disk_leaves_the_old_picture(trained, photos, tmp_path):
    old = tmp_path / "cat.png"
    Image.new("RGB", (4, 4)).save(old)
    before = old.read_bytes()
    with full_disk(10_000), pytest.raises(UserError, match="cat.png: cannot be written"):
        codiff.main(use("codiff", photos / "cat.png", old, "--weights", trained("codiff").folder))
    assert old.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["cat.png"]
