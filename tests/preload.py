"""What a child process of the tests would otherwise import anew: the fork server does it once."""

from accelerate import Accelerator  # noqa: F401
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel  # noqa: F401
from peft import LoraConfig  # noqa: F401
from torchmetrics.functional.image import structural_similarity_index_measure  # noqa: F401
from torchvision.transforms.functional import gaussian_blur  # noqa: F401
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModel  # noqa: F401

import codiff  # noqa: F401
import moe_diffir  # noqa: F401
import oscar  # noqa: F401
import sodiff  # noqa: F401
