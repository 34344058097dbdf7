"""SODiff, measured: Table 1 by eval, Fig. 3 by figures, Tables 2 to 4 by ablations; beside these, in eval and
figures, how well e_img is aligned and what the time predictor says."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from common import PHOTOS, jpeg, text_tokens
from data.captions import read_captions
from data.files import UserError, list_images, note, read_json
from data.pictures import read_image
from data.results.complexity import Parts, empty_latent, print_profile, vae_parts
from data.results.evaluate import finish, jpeg_flags, jpeg_table, jpegs_by_qf, padded
from data.results.figures import panels, principal_components, save
from data.results.seeds import (DEFAULT, JPEG_LEAD, JPEG_TABLE, QF_5, TINY_LPIPS, Choice, Claim,
                                restored_and_gains, restored_headline, restored_table)
from data.results.tables import no_flags, text_table

# --------------------------------------------------------------------------------------------- eval

eval_flags = jpeg_flags


def evaluate(script, args) -> None:
    """Table 1; then alignment with captions, if there are any, and the predictor."""
    model = script.load(args.weights, args.base)
    files = list_images(args.data)
    results = jpeg_table(script, args, model, files)
    aligned = report_alignment(model, read_captions(args.data))
    predicted = report_predictions(model, files) if model.predictor else {}
    finish(args, files, results=results, alignment=aligned, predictor=predicted)


def restored_and_qf(script, model, lq: Image.Image) -> tuple[Image.Image, float | None]:
    return script.restore(model, lq)[:2]


@torch.inference_mode()
def prompts(model, images: list[Image.Image]) -> Tensor:
    """e_img (N, 77, D_text) of pictures."""
    dtype = model.T_align.queries.dtype
    x = (padded(image, model.cell).to(dtype) for image in images)
    return torch.cat([model.T_align(model.E_down(x_lq)) for x_lq in x]).float().cpu()


def alignment(e_img: Tensor, e_text: Tensor) -> tuple[float, float, float]:
    """Mean cosine of each e_img (N, 77, D) with its own caption's e_text, and with the N - 1 others'; the own
    one's mean rank among them, 1 being the nearest."""
    e_img, e_text = (F.normalize(e.flatten(1), dim=1) for e in (e_img, e_text))  # (N, 77 D)
    cosines = e_img @ e_text.T  # (N, N)
    n = len(cosines)
    own = cosines.diagonal()
    rank = (cosines >= own[:, None]).sum(1).float().mean().item()
    return own.mean().item(), ((cosines.sum() - cosines.trace()) / (n * (n - 1))).item(), rank


def captioned(captions: dict[Path, dict], limit: int = 64) -> tuple[list[Image.Image], list[str]]:
    """(pictures' central 256x256 pixels, captions), no caption twice: what alignment is measured on."""
    from torchvision.transforms.functional import center_crop
    images: dict[str, Image.Image] = {}
    for file, row in captions.items():
        if row["caption"] and row["caption"] not in images and len(images) < limit:
            try:
                image = read_image(file)[0]
            except UserError:  # has been named
                continue
            images[row["caption"]] = center_crop(image, [min(256, image.height), min(256, image.width)])
    return list(images.values()), list(images)


def report_alignment(model, captions: dict[Path, dict]) -> dict:
    """Prints and returns the cosines at three QFs, if there are two different captions to compare."""
    images, texts = captioned(captions)
    if len(texts) < 2:
        return {}
    e_text = text_tokens(model.base, texts)
    compressed = {f"QF {qf}": [jpeg(image, qf) for image in images] for qf in (5, 20, 80)}
    rows = {name: alignment(prompts(model, jpegs), e_text) for name, jpegs in compressed.items()}
    print(f"\ncosine of e_img, {len(texts)} photographs\n"
          + text_table(["", "own e_text", "others'", "own's rank"], [[k, *v] for k, v in rows.items()]))
    return rows


@torch.inference_mode()
def predictions(model, files: list[Path], qfs: list[int]) -> tuple[Tensor, Tensor]:
    """Predicted QF and timestep (len(qfs), len(files)) of every file's JPEGs."""
    out = []
    for jpegs in jpegs_by_qf(files, qfs, "predicted QF"):
        seen = (model.condition(padded(lq, model.cell))[1:] for lq in jpegs)
        out.append([(qf_hat.item(), tau.item()) for qf_hat, tau in seen])
    return torch.tensor(out).unbind(-1)


def report_predictions(model, files: list[Path]) -> dict:
    """Prints and returns mean predicted QF and tau by true QF, and their rank correlations with it."""
    from torchmetrics.functional import spearman_corrcoef
    qfs = [5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95]
    qf_hat, tau = predictions(model, files, qfs)
    true = torch.tensor(qfs, dtype=torch.float32)[:, None].expand_as(qf_hat).flatten()
    rho = {name: spearman_corrcoef(v.flatten(), true).item() for name, v in (("QF", qf_hat), ("tau", tau))}
    averages = {"predicted QF": qf_hat.mean(1).tolist(), "timestep": tau.mean(1).tolist()}
    rows = [[k, *(f"{v:.1f}" for v in vs)] for k, vs in averages.items()]
    print("\n" + text_table(["true QF", *map(str, qfs)], rows))
    print(f"rank correlation with the true QF ({len(true)} JPEGs): "
          f"predicted QF {rho['QF']:.3f}, timestep {rho['tau']:.3f}")
    return {"true QF": qfs, **averages, "rank correlation": rho}


# ------------------------------------------------------------------------------------------ profile

profile_flags = no_flags


def build(script, base, cfg1, cfg2, lora: bool):
    text = read_json(Path(base) / "text_encoder" / "config.json")
    saipe = script.SAIPE(cfg1, text["max_position_embeddings"], text["hidden_size"])
    G = script.SODiff(base, saipe.E_down, saipe.T_align, cfg2, weights=False)
    return G.add_lora(cfg2.rank) if lora else G


def parts(G, x: Tensor) -> Parts:
    x = x.to(G.sd.vae.dtype)
    z = empty_latent(G.sd, x)
    f_mid = x.new_zeros(1, G.E_down.head[1].out_channels, x.shape[2] // 4, x.shape[3] // 4)
    e_img = x.new_zeros(1, *G.T_align.queries.shape[1:])
    encoder, decoder = vae_parts(G.sd, x, z)
    return {"SAIPE: E_down": ([G.E_down], lambda: G.E_down(x)),
            "SAIPE: T_align": ([G.T_align], lambda: G.T_align(f_mid)),
            "time predictor": ([G.predictor], lambda: G.predictor(x)), "VAE encoder": encoder,
            "UNet": ([G.sd.unet], lambda: G.sd.unet(z, x.new_zeros(1), e_img)), "VAE decoder": decoder}


profile = partial(print_profile, parts=parts)

# ------------------------------------------------------------------------------------------ figures

AGAINST = "no-align"


def figure_flags(p, script) -> None:
    p.set_defaults(data=None)  # of both figures their own


def draw_fig3(runs: dict, images: list[Image.Image], e_text: Tensor):
    """e_img and e_text in two dimensions, a panel a run."""
    qfs = (5, 10, 20, 40, 80)
    n = len(images)
    rows = []
    figure, axes = panels(1, len(runs), 5.2 * len(runs), 4.4)
    for ax, (name, model) in zip(axes[0], runs.items()):
        jpegs = [[jpeg(image, qf) for image in images] for qf in qfs]
        e_img = torch.stack([prompts(model, of_qf) for of_qf in jpegs])  # (QF, N, 77, D_text)
        xy = principal_components(torch.cat([e_text.flatten(1), e_img.flatten(0, 1).flatten(1)]))
        text_xy = xy[:n]                               # (N, 2)
        img_xy = xy[n:].unflatten(0, (len(qfs), n))    # (QF, N, 2)
        ax.scatter(*img_xy.flatten(0, 1).T, s=16, color="tab:blue", alpha=0.6, label="e_img (QF 5 to 80)")
        ax.scatter(*text_xy.T, s=28, color="tab:red", label="e_text")
        for pair in torch.stack([text_xy, img_xy.mean(0)], 1):
            ax.plot(*pair.T, color="grey", linewidth=0.5)
        ax.set(title=name, xlabel="first principal component", ylabel="second")
        size = e_img.flatten(2).norm(dim=2).mean() / e_text.flatten(1).norm(dim=1).mean()
        rows.append([name, *alignment(e_img.mean(0), e_text), size.item()])
    axes[0, -1].legend(fontsize=8)
    print(text_table(["", "cosine, own e_text", "others'", "own's rank", "|e_img| / |e_text|"], rows))
    return figure


def draw_predictions(model, files: list[Path]):
    qfs = [1, 2, 3, 4, *range(5, 96, 5)]
    figure, axes = panels(1, 2, 10, 3.8)
    for ax, v, name in zip(axes[0], predictions(model, files, qfs), ("predicted QF", "predicted timestep")):
        ax.plot(qfs, v, color="tab:blue", alpha=0.25, linewidth=0.7)
        ax.plot(qfs, v.mean(1), color="tab:blue", label=f"mean of {len(files)} photographs")
        ax.set(xlabel="true QF", ylabel=name)
    axes[0, 0].plot([0, 95], [0, 95], color="grey", linestyle=":", label="exact")
    axes[0, 0].legend(fontsize=8)
    return figure


def figures(script, args) -> None:
    """Fig. 3: e_img and e_text in two dimensions (PCA; the paper takes UMAP), aligned and, from a second run,
    not. And predicted QF and timestep against the true QF."""
    model = script.load(args.weights)
    drawn = {}
    images, texts = captioned(read_captions(args.data or [PHOTOS]))
    if len(texts) < 2:
        note("no Fig. 3: it needs at least two photographs with captions (captions.jsonl beside them)")
    else:
        runs = {"aligned (stage 1)": model}
        if (args.against / "model" / "stage2.safetensors").exists():
            runs["not aligned"] = script.load(args.against)
        else:
            note("draws the aligned e_img only; to compare: "
                 f"sodiff.py train --lambda-align 0 --out {args.against}")
        drawn["fig3"] = draw_fig3(runs, images, text_tokens(model.base, texts))
    if model.predictor is not None:
        drawn["timestep"] = draw_predictions(model, list_images(args.data or [PHOTOS / "val"])[:64])
    save(drawn, args.weights)


# --------------------------------------------------------------------------------------------- page

TITLE = "SODiff"
COST = "0.980 G, 8.94 T"
FROZEN = {"1": "nothing of SAIPE (Sec. 3.1)",
          "2": "SAIPE, the VAE, of the UNet all but LoRA (Sec. 4.1)"}
COLUMNS = QF_5
CONDITION = "JPEG QF 5"
CHOICES = [
    Choice(DEFAULT, "", "SAIPE, timestep predictor, all losses"),
    Choice("no-align", "--lambda-align 0", "Table 2"),
    Choice("fixed-t", "--timestep fixed", "Table 3", 2),
    Choice("no-L_qf", "--beta 0", "Table 3", 2), Choice("no-L_EA", "--losses mse,gan", "Table 4", 2),
    Choice("no-L_G", "--losses mse,ea", "Table 4", 2)]
CLAIMS = [
    Claim("alignment with text guides better", DEFAULT, "no-align", "DISTS 0.0862, 0.1261", TINY_LPIPS),
    Claim("a predicted timestep is better than a fixed one", DEFAULT, "fixed-t", "LPIPS 0.3124, 0.3779",
          TINY_LPIPS),
    Claim("learning QF helps it", DEFAULT, "no-L_qf", "LPIPS 0.3124, 0.3270", TINY_LPIPS),
    Claim("L_EA keeps edges", DEFAULT, "no-L_EA", "DISTS 0.1558, 0.2475", TINY_LPIPS),
    Claim("the GAN loss adds texture", DEFAULT, "no-L_G", "MUSIQ 69.6, 58.1", TINY_LPIPS)]
EXERCISE = "fixed-t", {f"JPEG QF {qf}": ["PSNR", "SSIM", TINY_LPIPS, "detail"] for qf in (5, 10, 20)}
MORE = {"true QF": {"predicted QF": "predicted QF", "timestep": "timestep"},
        "rank correlation with the true QF": {"": "rank correlation"}}
EVAL = "--qf 5 10 20", "--qf 5"
ALSO = {}
PRINTED = {"cost": "profile --paper --size 1024 --no-time", "time": "profile --size 1024"}


def more_figures(metrics: dict, run: Path | None) -> dict:
    says = metrics["predictor"]
    if not says:
        return {}
    by_qf = {name: dict(zip(map(str, says["true QF"]), says[name])) for name in ("predicted QF", "timestep")}
    return by_qf | {"rank correlation": says["rank correlation"]}


lead_table = partial(restored_table, columns=JPEG_LEAD)
default_table = partial(restored_and_gains, columns=JPEG_TABLE)
headline = partial(restored_headline, condition="JPEG QF 5")
