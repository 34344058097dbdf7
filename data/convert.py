"""The authors' released checkpoints into a run's folder, once; then `--weights` takes it like any other.

    python -m data.convert codiff cave.pth codiff.pkl --out runs/official      # their README links the files
    python -m data.convert oscar oscar.pkl --out runs/official-oscar           # jinpeig/OSCAR on the hub
    python codiff.py restore photo.jpg -o photo.png --weights runs/official
    python -m data.convert half runs/codiff --out data/weights/codiff          # a run in half precision
    python -m data.convert daclip daclip_ViT-B-32.pt --out runs/daclip         # Algolzw/daclip-uir links it
    python moe_diffir.py train --paper --dp runs/daclip --data pieces/DF2K

CODiff and OSCAR need the base they were trained on, SD 2.1-base or SD 2.1. DA-CLIP's controller becomes a
CLIP of transformers, for MoE-DiffIR's prior. Nothing in a file is executed."""

from __future__ import annotations

import math
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import codiff
import oscar
from common import SD21_BASE, Settings, load_trained, trained
from data.files import UserError, atomic, note, read_json, read_model, save_tensors, write_json
from data.quality import RECORD
from data.runs import CommandLine, run_cli


def load_pickle(path: Path) -> dict:
    """A torch checkpoint of tensors, numbers and plain containers; anything else is refused, not executed."""
    number = np.float64().__reduce__()[0]  # makes NumPy's numbers, such as a learning rate of open_clip's
    numbers = [(number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]  # NumPy 1, NumPy 2
    try:
        with torch.serialization.safe_globals([*numbers, np.dtype, np.dtypes.Float64DType]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # torch raises many kinds for a damaged, foreign or unsafe file
        why = str(error).split("WeightsUnpickler error: ")[-1].split("\n")[0][:120] or type(error).__name__
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            why = f"it holds {code[1]}, which is no tensor"
            why += "; Lightning checkpoints, MoE-DiffIR's too, have no converter" * ("lightning" in why)
        raise UserError(f"{path}: not a checkpoint that loads safely ({why})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a checkpoint, but a {type(content).__name__}")
    return content


def tensors_of(release: dict, key: str, source: Path) -> dict[str, Tensor]:
    """release[key], if that is a dictionary of tensors."""
    if key not in release:
        raise UserError(f"{source}: not the authors' checkpoint ({key} is missing)")
    part = release[key]
    if not isinstance(part, dict) or not all(isinstance(v, Tensor) for v in part.values()):
        raise UserError(f"{source}: not the authors' checkpoint ({key} does not hold tensors by name)")
    return part


def lora_of(part: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """LoRA, and conv_in's own weights, which the releases train too, under the names they have here. LoRA's
    scale is alpha / rank = 8 / 16 there (lora_alpha stayed at its default) and 1 here: B is halved."""
    ours = {}
    for key, v in part.items():
        if ".lora_" in key or ".base_layer." in key:
            name = prefix + re.sub(r"(lora_[AB])\.\w+\.", r"\1.default.", key)  # one adapter for their three
            ours[name] = v.float() / 2 if ".lora_B." in key else v.float()
    return ours


def convert_codiff(cave_pth: Path, codiff_pkl: Path, base: str | None, out: Path) -> None:
    """CaVE's decoder adds 1 in every block there, and only training needs it: it becomes zeros."""
    base = base or SD21_BASE
    cfg1 = codiff.Stage1.paper()
    cfg2 = codiff.Stage2.paper()
    cave = codiff.CaVE(cfg1.widths, cfg1.blocks)
    release = load_pickle(codiff_pkl)
    released_cave = tensors_of({"CaVE": load_pickle(cave_pth)}, "CaVE", cave_pth)
    of_cave = {k: v for k, v in released_cave.items() if k in cave.state_dict()}
    for k, v in cave.state_dict().items():
        if k.startswith(("m_body_decoder", "m_up", "m_tail")):
            of_cave[k] = torch.zeros_like(v)
    keys = ("state_dict_unet", "state_dict_vae", "proj")
    unet, vae, proj = (tensors_of(release, key, codiff_pkl) for key in keys)
    G = codiff.CODiff(base, cfg2, load_trained(cave, of_cave, cave_pth)).add_lora(cfg2.rank)
    tensors = {k: v for k, v in trained(G).items() if k.startswith("cave.")}  # BatchNorm's statistics
    tensors |= lora_of(unet, "sd.unet.") | lora_of(vae, "sd.vae.")
    tensors |= {f"proj.{k}": v.float() for k, v in proj.items()}
    load_trained(G, tensors, codiff_pkl)
    write_run(out, "codiff", base, [cfg1, cfg2], {1: of_cave, 2: tensors}, fingerprint=G.sd.fingerprint)
    note("CaVE's decoder is left out (zeros): restoring needs none, and what it reconstructs means nothing")


def convert_oscar(oscar_pkl: Path, base: str | None, out: Path) -> None:
    """As released: hard-coded timesteps, true channel norms (which files then carry, quantised)."""
    base = base or oscar.SD21
    cfg1 = oscar.Stage1.paper()
    cfg2 = oscar.Stage2.paper()
    release = load_pickle(oscar_pkl)
    keys = ("hyper_encoders", "state_dict_unet")
    hyper_encoders, unet = (tensors_of(release, key, oscar_pkl) for key in keys)
    if not isinstance(release.get("embeddings"), Tensor):
        raise UserError(f"{oscar_pkl}: not the authors' checkpoint (embeddings is missing)")
    if any(k.endswith("backbone.4.attn.in_proj_weight") for k in hyper_encoders):
        raise UserError(f"{oscar_pkl}: the authors' first release, whose encoders could not reach the two "
                        "lowest bit-rates; take their current one")
    G = oscar.OSCAR(base, cfg1).add_lora(cfg2.rank)
    expected = trained(G)
    tensors = {k: v for k, v in expected.items() if k.endswith(".energy")} | lora_of(unet, "sd.unet.")
    tensors["prompt"] = release["embeddings"].float()
    for k, v in hyper_encoders.items():
        if "._codebook." in k:
            k = k.replace("._codebook", "")
            v = v.squeeze(0)  # (1, V, ...) -> (V, ...): one of one codebooks
        k = "hyper_encoders." + re.sub(r"(conv_[ab]\.\d)\.conv\.", r"\1.0.layers.", k)
        if k in expected:
            tensors[k] = v.float()
    load_trained(G, tensors, oscar_pkl)
    write_run(out, "oscar", base, [cfg1, cfg2], {2: tensors}, t=oscar.RELEASED_T, true_norms=True,
              fingerprint=G.sd.fingerprint)


CLIP_NAMES = {  # open_clip's -> transformers'; DA-CLIP's controller has `transformer.transformer.resblocks`
    r"^conv1": "embeddings.patch_embedding", r"^class_embedding": "embeddings.class_embedding",
    r"^positional_embedding": "embeddings.position_embedding.weight", r"^ln_pre": "pre_layrnorm",
    r"^ln_post": "post_layernorm", r"^(transformer\.)+resblocks": "encoder.layers",
    r"\.ln_(\d)": r".layer_norm\1", r"\.attn": ".self_attn", r"\.c_fc": ".fc1", r"\.c_proj": ".fc2"}


def convert_daclip(daclip_pt: Path, base: str | None, out: Path) -> None:
    """DA-CLIP's controller, a plain ViT with exact GELU and heads of 64, as a CLIPVisionModel. Left out: the
    projection, and `zero_modules`, which lead to DA-CLIP's other image encoder."""
    from transformers import CLIPVisionConfig, CLIPVisionModel
    release, ours = load_pickle(daclip_pt), {}
    part = release.get("state_dict")  # beside the optimizer's
    for k, v in (part if isinstance(part, dict) else release).items():
        before, _, k = str(k).partition("visual_control.")
        if before.startswith("structcond_stage_model."):
            raise UserError(f"{daclip_pt}: MoE-DiffIR's checkpoint, which has no converter; give DA-CLIP's")
        if before in ("", "module.") and isinstance(v, Tensor) and k != "proj" and "zero_modules" not in k:
            for theirs, name in CLIP_NAMES.items():
                k = re.sub(theirs, name, k)
            names = [k.replace("in_proj_", f"{n}_proj.") for n in "qkv"] if "in_proj_" in k else [k]
            ours |= zip(names, v.float().chunk(len(names)))  # in_proj: (3 width, ..)
    conv, positions = (ours.get(f"embeddings.{k}_embedding.weight") for k in ("patch", "position"))
    fc1 = [v for k, v in ours.items() if k.endswith("fc1.weight")]  # (4 width, width) a block
    if getattr(conv, "ndim", 0) != 4 or len(conv) % 64 or positions is None or not fc1:
        raise UserError(f"{daclip_pt}: not DA-CLIP's controller (visual_control, a whole ViT, is missing)")
    width, _, patch, _ = conv.shape
    net = CLIPVisionModel(CLIPVisionConfig(
        hidden_size=width, intermediate_size=len(fc1[0]), num_hidden_layers=len(fc1), hidden_act="gelu",
        num_attention_heads=width // 64, patch_size=patch, image_size=patch * math.isqrt(len(positions) - 1)))
    load_trained(getattr(net, "vision_model", net), ours, daclip_pt)  # transformers 4 has it inside
    atomic(out, net.save_pretrained)


def write_run(out: Path, script: str, base, settings: list[Settings], results: dict[int, dict],
              **more) -> None:
    """What a run leaves: config.json, and a file of tensors a stage, with the settings in its header."""
    config = {"script": script, "base": str(base)}
    for cfg in settings:
        config |= {f"stage{cfg.number}.{k}": v for k, v in asdict(cfg).items()}
    for number, tensors in results.items():
        header = config | more | {"stage": f"stage{number}"}
        save_tensors(out / "model" / f"stage{number}.safetensors", tensors, **header)
    write_json(out / "config.json", config | {"seed": 0})


def convert_half(run: Path, base: str | None, out: Path) -> None:
    """What restoring needs of a run (OSCAR: stage 2 alone), in half precision and nothing else."""
    script = read_json(run / "config.json").get("script", "")
    for stage in (2,) if script == "oscar" else (1, 2):
        tensors, header = read_model(run, script, stage)
        half = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
        save_tensors(out / "model" / f"stage{stage}.safetensors", half, **header)
    if (run / RECORD).exists():
        write_json(out / RECORD, read_json(run / RECORD))


RELEASES = {"codiff": (convert_codiff, ["cave.pth", "codiff.pkl"]), "oscar": (convert_oscar, ["oscar.pkl"]),
            "half": (convert_half, ["RUN"]), "daclip": (convert_daclip, ["daclip_ViT-B-32.pt"])}


def main(argv: list[str] | None = None) -> None:
    p = CommandLine("convert.py", description="released checkpoints into folders that the scripts read")
    p.add_argument("kind", choices=list(RELEASES), help="whose release; half: of a run")
    p.add_argument("files", nargs="+", type=Path,
                   help="cave.pth codiff.pkl; oscar.pkl; a run's folder; daclip_ViT-B-32.pt")
    p.add_argument("--out", type=Path, required=True, help="the folder to write")
    p.add_argument("--base", help="diffusers folder or hub id (default: the paper's)")
    args = p.parse_args(argv)
    convert, names = RELEASES[args.kind]
    if len(args.files) != len(names):
        p.error(f"{args.kind} takes {' and '.join(names)}")
    if args.out.is_file() or any(args.out.glob("*" if args.kind == "daclip" else "config.json")):
        raise UserError(f"--out {args.out}: holds a run or other files; name another folder")
    convert(*args.files, args.base, args.out)
    script, flag = ("moe_diffir.py train", "--dp") if args.kind == "daclip" else ("the script", "--weights")
    print(f"{args.out}: written; {script} takes it by {flag} {args.out}")


if __name__ == "__main__":
    run_cli(main)
