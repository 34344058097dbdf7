"""The authors' checkpoints in small: SD 2.1's classes and their LoRA, every weight filled from its name."""

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from fill import fill_state_dict, fill_value


def save_base(folder, prediction: str = "epsilon"):
    """(UNet, VAE), as they are built; a diffusers folder of them, filled."""
    unet = UNet2DConditionModel(block_out_channels=(32, 64, 64, 64), attention_head_dim=(2, 4, 4, 4),
                                cross_attention_dim=1024, use_linear_projection=True)
    vae = AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
                        block_out_channels=(32, 32, 64, 64), latent_channels=4, layers_per_block=2)
    fill_state_dict(unet).save_pretrained(folder / "unet")
    fill_state_dict(vae).save_pretrained(folder / "vae")
    DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                  prediction_type=prediction).save_pretrained(folder / "scheduler")
    return unet, vae


def lora(model, wanted, adapter_of) -> dict:
    """LoRA of the wanted layers, in the release's adapter of each."""
    tensors = {}
    for name, m in model.named_modules():
        if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)) and wanted(name):
            w = m.weight
            for k, shape in {"A": (16, *w.shape[1:]), "B": (w.shape[0], 16, *[1] * (w.dim() - 2))}.items():
                key = f"{name}.lora_{k}.{adapter_of(name)}.weight"
                tensors[key] = 0.5 * fill_value(key, shape)
    return tensors


def unet_lora(unet, changed: float) -> dict:
    """With conv_in's own weights, which the releases train too; here changed by so much."""
    def adapter_of(name):
        if name.startswith(("up_blocks", "conv_out")):
            return "default_decoder"
        return "default_others" if name.startswith("mid_block") else "default_encoder"
    tensors = lora(unet, lambda name: "time_emb" not in name, adapter_of)
    for k in ("weight", "bias"):
        value, key = unet.state_dict()[f"conv_in.{k}"], f"conv_in.base_layer.{k}"
        tensors[key] = value + changed * fill_value(key, value.shape)
    return tensors
