"""CODiff, measured: Table 1 by eval, 2 by profile, 3 to 5 by ablations; Figs. 4 and 7 by figures."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from common import device
from data.files import list_images, note
from data.results.complexity import Parts, empty_latent, print_profile, vae_parts
from data.results.evaluate import finish, jpeg_flags, jpeg_table, jpegs_by_qf, padded
from data.results.figures import panels, principal_components, pyplot, save
from data.results.seeds import (DEFAULT, JPEG_EXERCISE, JPEG_LEAD, JPEG_TABLE, QF_5, TINY_LPIPS, Choice,
                                Claim, restored_and_gains, restored_headline, restored_table)
from data.results.tables import no_flags, text_table

# --------------------------------------------------------------------------------------------- eval

eval_flags = jpeg_flags


def evaluate(script, args) -> None:
    """Table 1."""
    model = script.load(args.weights, args.base)
    files = list_images(args.data)
    results = jpeg_table(script, args, model, files)
    finish(args, files, color_fix=args.color_fix, results=results)


def restored_and_qf(script, model, lq: Image.Image) -> tuple[Image.Image, float | None]:
    return script.restore(model, lq), model.cave and model.cave.qf(lq)


# ------------------------------------------------------------------------------------------ profile

profile_flags = no_flags


def build(script, base, cfg1, cfg2, lora: bool):
    G = script.CODiff(base, cfg2, script.CaVE(cfg1.widths, cfg1.blocks), weights=False)
    return G.add_lora(cfg2.rank) if lora else G


def parts(G, x: Tensor) -> Parts:
    x = x.to(G.sd.vae.dtype)
    z = empty_latent(G.sd, x)
    cave = G.cave
    number = x.shape[2] * x.shape[3] // cave.cell**2  # of tokens
    tokens, c_L = (x.new_zeros(1, number, width) for width in (G.proj.in_features, G.proj.out_features))
    embedding = [cave.m_head, cave.m_down1, cave.m_down2, cave.m_down3, cave.m_body_encoder]
    encoder, decoder = vae_parts(G.sd, x, z)
    return {"CaVE, embedding path": (embedding, lambda: cave.embed(x)),
            "linear map": ([G.proj], lambda: G.proj(tokens)),
            "VAE encoder": encoder, "UNet": ([G.sd.unet], lambda: G.sd.unet(z, G.T_L, c_L)),
            "VAE decoder": decoder}


profile = partial(print_profile, parts=parts)

# ------------------------------------------------------------------------------------------ figures

figure_flags = no_flags
AGAINST = "explicit"
FAR = [1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90]  # QFs of Fig. 4
NEAR = [1, 2, 3, 4, 5, 6]  # of Fig. 7


@torch.inference_mode()
def read_cave(cave, files: list[Path], qfs: list[int], what: str) -> tuple[Tensor, Tensor]:
    """Mean token (len(qfs), len(files), C) and predicted QF (len(qfs), len(files)) of every file's JPEGs."""
    tokens = []
    qf_hat = []
    for jpegs in jpegs_by_qf(files, qfs, what):
        maps = [cave.encode((padded(lq, cave.cell) + 1) / 2)[0] for lq in jpegs]  # (1, C, ., .) each
        tokens.append(torch.cat([m.mean((2, 3)) for m in maps]).cpu())
        qf_hat.append([cave.qf(lq) for lq in jpegs])
    return torch.stack(tokens), torch.tensor(qf_hat)


def trained_caves(script, args) -> dict[str, tuple]:
    """{learning: (stage 1's settings, CaVE)} of the run and, where there is one, the other."""
    runs = {}
    for folder in (args.weights, args.against):
        if folder == args.weights or (folder / "model" / "stage1.safetensors").exists():
            cfg = script.Stage1.read(folder, "codiff")[0]
            runs[cfg.learning] = cfg, script.load_cave(folder).eval().to(device())
    if len(runs) < 2:
        note(f"draws {', '.join(runs)} learning only; to compare: "
             f"codiff.py train --stage 1 --learning explicit --out {args.against}")
    return runs


def figures(script, args) -> None:
    """Fig. 4: CaVE's embeddings by QF in two dimensions (PCA), QFs never trained on ringed in red. Fig. 7:
    mean squared error of the predicted QF at QF 1 to 6. Dual beside explicit learning."""
    files = list_images(args.data)
    runs = trained_caves(script, args)
    fig4, axes = panels(1, len(runs), 5.2 * len(runs), 4)
    fig7, [[bars]] = panels(1, 1, 5, 3)
    rows = []
    for i, (learning, (cfg, cave)) in enumerate(runs.items()):
        tokens, _ = read_cave(cave, files, FAR, f"Fig. 4, {learning}")
        points = principal_components(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])  # (QF, file, 2)
        for qf, own in zip(FAR, points):
            edge = "none" if cfg.qf_min <= qf <= cfg.qf_max else "red"
            color = pyplot().cm.viridis(qf / 95)
            axes[0, i].scatter(*own.T, s=30, color=color, edgecolors=edge, label=f"QF {qf}")
        axes[0, i].set_title(f"{learning} learning")
        _, qf_hat = read_cave(cave, files, NEAR, f"Fig. 7, {learning}")
        error = (qf_hat - torch.tensor(NEAR)[:, None]).square().mean(1).tolist()
        bars.bar([qf + 0.4 * i - 0.2 for qf in NEAR], error, 0.4, label=f"{learning} learning")
        rows.append([learning, *error])
    axes[0, -1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    bars.set(xlabel="quality factor", ylabel="QF prediction, MSE")
    bars.legend()
    save({"fig4": fig4, "fig7": fig7}, args.weights)
    print(text_table(["MSE of the predicted QF at", *map(str, NEAR)], rows))


# --------------------------------------------------------------------------------------------- page

TITLE = "CODiff"
COST = "0.996 G, 9.46 T"
FROZEN = {"1": "nothing",
          "2": "CaVE, the VAE's decoder, of its encoder and the UNet all but LoRA (Fig. 3, Sec. 3.3)"}
COLUMNS = [("JPEG QF 1", "PSNR"), *QF_5]
CONDITION = "JPEG QF 1"
CHOICES = [
    Choice(DEFAULT, "", "CaVE, dual learning, all losses"),
    Choice("learnable", "--prompt learnable", "Table 3"), Choice("empty", "--prompt empty", "Table 3"),
    Choice("explicit", "--learning explicit", "Table 4"),
    Choice("implicit", "--learning implicit", "Table 4"),
    Choice("l2", "--losses l2", "Table 5", 2), Choice("l2-dists", "--losses l2,dists", "Table 5", 2),
    Choice("l2-gan", "--losses l2,gan", "Table 5", 2)]
CLAIMS = [
    Claim("CaVE guides better than a learnable prompt", DEFAULT, "learnable", "LPIPS 0.3426, 0.3471",
          TINY_LPIPS),
    Claim("and better than none", DEFAULT, "empty", "LPIPS 0.3426, 0.3485", TINY_LPIPS),
    Claim("dual learning is better than explicit", DEFAULT, "explicit", "LPIPS 0.3426, 0.3733", TINY_LPIPS),
    Claim("and better than implicit", DEFAULT, "implicit", "LPIPS 0.3426, 0.3436", TINY_LPIPS),
    Claim("DISTS brings back what L2 blurs", "l2-dists", "l2", "LPIPS 0.2109, 0.3976", TINY_LPIPS,
          "JPEG QF 5"),
    Claim("so does the GAN loss", "l2-gan", "l2", "LPIPS 0.3899, 0.3976", TINY_LPIPS, "JPEG QF 5"),
    Claim("and it adds to DISTS", DEFAULT, "l2-dists", "DISTS 0.1147, 0.1229", TINY_LPIPS, "JPEG QF 5")]
EXERCISE = "l2", JPEG_EXERCISE
MORE = {}
EVAL = "--qf 1 5 10 20", "--qf 1 5"
ALSO = {"double": "--double 10 30 --qf 10 30 50 --shift 4"}
PRINTED = {"cost": "profile --paper --size 1024 --no-time", "time": "profile --size 1024",
           "figures": "figures"}


def more_figures(metrics: dict, run: Path | None) -> dict:
    return {}


lead_table = partial(restored_table, columns=JPEG_LEAD)
default_table = partial(restored_and_gains, columns=JPEG_TABLE)
headline = partial(restored_headline, condition="JPEG QF 5")
