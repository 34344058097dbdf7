"""data/make_tiny_sd.py: its encoder against principal components, and the whole recipe in a few steps."""

import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image

from common import PHOTOS, SD, text_tokens, to_tensor
from data import make_tiny_sd as recipe
from data.pictures import read_image


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of the run, tiny-sd made of it, the figures it printed)."""
    folder = tmp_path_factory.mktemp("recipe")
    for name in ("chelsea.png", "flower.jpg"):
        photo = read_image(PHOTOS / "val" / name)[0].crop((0, 0, 256, 256))
        (folder / "photos").mkdir(exist_ok=True), photo.save(folder / "photos" / name)
    data = ["--data", str(folder / "photos"), "--val", str(folder / "photos")]
    steps = ["--s1-steps", "2", "--s2-steps", "3", "--s2-clip-alone", "1", "--s2-crop", "32"]
    recipe.main(["train", *data, "--out", str(folder / "run"), *steps])
    run = str(folder / "run")
    recipe.main(["assemble", run, run, *data[2:], "--to", str(folder / "sd")])
    return folder / "run", folder / "sd"


def test_the_encoder_is_half_whitened_principal_components():
    """Of 8x8 pixels (its hierarchy of three keeps all that 16 components need): uncorrelated latents, their
    variances the square roots of the components', mean square 1."""
    vae = recipe.first_vae(None, [PHOTOS / "train"])
    crops = recipe.Pictures([PHOTOS / "train"], 192, 0)
    x = torch.stack([to_tensor(Image.fromarray(crops.crop(n))) for n in range(150)])
    with torch.no_grad():
        z = vae.encode(x[:40]).latent_dist.mean.transpose(0, 1).flatten(1)
    cov, patches = torch.cov(z), F.unfold(x[:40], 8, stride=8).transpose(0, 1).flatten(1)
    power = torch.linalg.eigvalsh(torch.cov(patches)).flip(0)[:16]
    expected = power.sqrt() / power.sqrt().mean()
    assert torch.allclose(cov.diagonal(), expected, rtol=0.15)
    off = cov / torch.outer(cov.diagonal(), cov.diagonal()).sqrt() - torch.eye(16)
    assert off.abs().max() < 0.3 and z.square().mean().item() == pytest.approx(1, rel=0.1)


def test_captions_say_light_and_colour():
    red_over_black = torch.full((3, 8, 8), -1.0)
    red_over_black[0, :4] = 1
    said = recipe.describe(red_over_black, "a flag")
    assert said == "a flag, dark strong red above, black grey below, black strong red middle, mixed"


def test_the_recipe_makes_a_base(made):
    run, base = made
    sd = SD(base)
    assert sd.cell == 8 and sd.latent_shape(64) == (16, 8, 8)
    assert text_tokens(base, ["a cat"]).shape[:2] == (1, 77)
    assert AutoencoderKL.from_pretrained(base, subfolder="vae").config.norm_num_groups == 1
    assert "dB" in (base / "README.md").read_text()
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["step"]) for r in rows] == [(2, 0), (2, 1), (2, 2), (1, 0), (1, 1)]
    assert "denoise" not in rows[0] and "denoise" in rows[1]  # CLIP alone first


def test_it_goes_on_from_a_base(made, tmp_path):
    """With no step worth the name, what comes out is what went in, tokenizer and all."""
    run, base = made
    photos = str(run.parent / "photos")
    more = ["--base", str(base), "--val", photos]
    still = ["--s2-clip-alone=0", "--s2-steps=1", "--s2-crop=32", "--s2-lr=0", "--s2-lr-adam=0"]
    recipe.main(["train", "--stage", "2", "--data", photos, "--out", str(tmp_path), *more, *still])
    recipe.main(["assemble", str(run), str(tmp_path), *more, "--to", str(tmp_path / "sd")])
    for text in ("a cat", ""):
        assert torch.equal(text_tokens(tmp_path / "sd", [text]), text_tokens(base, [text]))
