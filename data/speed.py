"""Fast where people run it: precision, layout and kernels for the device at hand. No method is told here: all
of it computes the same, where it pays. (What CUDA gains by it is predicted, not measured.)"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from data.files import first_line, note

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
chosen: torch.dtype | None = None  # by --precision
compiled: bool | None = None       # by --compile; None: where it pays back
PAYS_BACK = 1000                   # steps of training: compiling takes minutes, a step then gains some 0.3 s
BACKEND = "inductor"
KERNELS = contextlib.ExitStack()   # keeps the order of attention's kernels until the program ends


def choose(args) -> None:
    """Takes --precision and --compile of a command that has them. What the device has not is not taken."""
    global chosen, compiled
    chosen = None
    compiled = getattr(args, "compile", None)
    if compiled and getattr(args, "tile", None):
        note("--compile: not with --tile, which fixes norms from call to call; goes on without it")
        compiled = False
    if name := getattr(args, "precision", None):
        own = dtype()
        chosen = PRECISIONS[name]
        if chosen not in (own, torch.float32):
            note(f"--precision {name}: not in this device's hardware; goes on with {name_of(own)}")
            chosen = own


def name_of(kind: torch.dtype) -> str:
    return next(name for name, value in PRECISIONS.items() if value is kind)


def dtype() -> torch.dtype:
    """Of inference, and in training autocast's: bf16 on CUDA; float16 where a GPU only emulates it (before
    Ampere: a T4 says that it has it); float32 elsewhere. In float32 everywhere, since float16 would overflow
    or round them to 0: the step to z_hat (`SD.x0` divides by a small sqrt(alpha_bar)), norms and softmax,
    FAVOR+ and timesteps of SODiff, hyper-encoders of OSCAR, all losses, CaVE's training."""
    if chosen or not torch.cuda.is_available():
        return chosen or torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


@contextlib.contextmanager
def autocast():
    """For what uses a stage's networks after its loop: `for_training` has put weights in half precision."""
    on = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.autocast(on, dtype(), enabled=dtype() is not torch.float32):
        yield


# ------------------------------------------------------------------------------------- inference


class ChunkedAttention:
    """The VAE's attention, one head of 512 channels: softmax(q k^T / sqrt(d)) v, for 4096 queries at a time.
    Fast kernels have no head so wide, and on Apple's GPUs no matrix may have 16,384 x 16,384 entries."""

    def __call__(self, attn: nn.Module, x: Tensor, *_, **__) -> Tensor:
        tokens = attn.group_norm(x.flatten(2)).transpose(1, 2)  # (B, h w, C)
        q = attn.to_q(tokens) * attn.scale                      # before the product: float16 ends at 65,504
        k = attn.to_k(tokens).transpose(1, 2)                   # (B, C, h w)
        v = attn.to_v(tokens)                                   # as q
        out = torch.cat([(part @ k).softmax(-1) @ v for part in q.split(4096, 1)], 1)
        return x + attn.to_out[0](out).transpose(1, 2).reshape(x.shape)


def merged(conv: nn.Conv2d) -> nn.ConvTranspose2d:
    """Nearest upsampling by 2 and then this 3x3 convolution, as one transposed 4x4 convolution of stride 2:
    the three taps of a new pixel fall on two old ones, so that 4 of 9 products do."""
    def along(w: Tensor, dim: int) -> Tensor:
        a, b, c = w.unbind(dim)
        return torch.stack([c, b + c, a + b, a], dim)  # an old pixel's share of the four new ones that see it
    up = nn.ConvTranspose2d(conv.in_channels, conv.out_channels, 4, 2, 1)
    up.weight.data = along(along(conv.weight.detach(), 2), 3).transpose(0, 1).contiguous()  # (in, out, 4, 4)
    up.bias.data = conv.bias.detach()
    return up


def for_inference(model: nn.Module, on: str) -> None:
    """Rewrites the VAEs in `model` for a device of type `on`; on CUDA also says how it runs."""
    from diffusers import AutoencoderKL
    for vae in (m for m in model.modules() if isinstance(m, AutoencoderKL)):
        for block in vae.decoder.up_blocks:
            if block.upsamplers:
                block.upsamplers = nn.ModuleList(merged(up.conv) for up in block.upsamplers)
        for part in (vae.encoder, vae.decoder) if on != "cpu" else ():
            part.mid_block.attentions[0].set_processor(ChunkedAttention())
    if on == "cuda" and torch.cuda.get_device_capability() == (9, 0):  # Hopper, where cuDNN's is the fastest
        from torch.nn.attention import SDPBackend as Kernel
        from torch.nn.attention import sdpa_kernel
        order = [Kernel.CUDNN_ATTENTION, Kernel.FLASH_ATTENTION, Kernel.EFFICIENT_ATTENTION, Kernel.MATH]
        KERNELS.enter_context(sdpa_kernel(order, set_priority=True))
    torch.backends.cudnn.benchmark = False  # pictures come in all sizes
    if compiled:
        compile_networks([model], on)


# -------------------------------------------------------------------------------------- training


def for_training(modules, on: torch.device, kind: torch.dtype) -> None:
    """Puts modules on a device, before optimizers are made. `kind`: autocast's, which copies each weight to
    it in every pass. Of UNets and VAEs, weights that no step changes are kept as such copies: the same
    numbers, half the memory; and once where two networks have them, as G and D of one base."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    kept: dict[str, Tensor] = {}
    for module in modules:
        # CUDA's convolutions want it; a CPU's are no faster, and abort in SODiff
        module.to(on, memory_format=torch.channels_last if on.type == "cuda" else torch.preserve_format)
        for network in (m for m in module.modules() if isinstance(m, (AutoencoderKL, UNet2DConditionModel))):
            for name, layer in network.named_modules():
                if isinstance(layer, (nn.Conv2d, nn.Linear)) and not layer.weight.requires_grad:
                    weight = layer.weight.data.to(kind)
                    same = kept.setdefault(name.removesuffix(".base_layer"), weight)
                    layer.weight.data = same if torch.equal(same, weight) else weight
    torch.backends.cudnn.benchmark = True  # finds the fastest convolutions; crops are all of one size


def compile_networks(modules: list[nn.Module], on: str) -> None:
    """UNets, the VAE's encoder and decoder as one graph each; names of weights stay. Where that does not work
    (say there is no C compiler), it is said, and they run as they are."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.autoencoders.vae import Decoder, Encoder
    try:
        with torch._dynamo.config.patch(suppress_errors=False):
            torch.compile(lambda x: 2 * x + 1, backend=BACKEND)(torch.ones(8, device=on))
    except Exception as error:
        note(f"--compile: does not work here ({first_line(error)[:150]}); goes on without it")
        return
    torch._functorch.config.donated_buffer = False  # the ledger goes back through a graph several times
    torch._dynamo.config.suppress_errors = True     # a network that cannot be compiled runs as it is
    for m in (m for module in modules for m in module.modules()):
        if isinstance(m, (UNet2DConditionModel, Encoder, Decoder)):
            m.compile(dynamic=False, backend=BACKEND)


def compile_for(steps: int, modules: list[nn.Module], on: str) -> None:
    """`compile_networks` for so many more steps of training, where they pay it back or it is asked for."""
    if compiled or compiled is None and on == "cuda" and steps >= PAYS_BACK:
        compile_networks(modules, on)
