"""Makes imagereward.safetensors and .json: a tiny random ImageReward and its scores.

The scores are by the package image-reward (1.5). It needs an old transformers, so run this in an environment
of its own:

    pip install --no-deps image-reward==1.5 transformers==4.30.2 tokenizers==0.13.3 huggingface-hub==0.16.4
    pip install torch safetensors numpy pyyaml regex requests filelock fsspec packaging tqdm pillow
    python oracles/imagereward.py

The networks are the package's own med.py, vit.py and MLP. The package imports timm, fairscale, clip and
torchvision. Only timm's PatchEmbed is used here: a convolution, written out below.
"""
import json
import sys
from pathlib import Path
from types import ModuleType

import torch
import transformers.modeling_utils  # noqa: F401, before what it would look for is stubbed
from safetensors.torch import save_file
from torch import nn

HERE = Path(__file__).resolve().parent


class PatchEmbed(nn.Module):
    """timm's: an image to a row of patches."""

    def __init__(self, img_size, patch_size, in_chans, embed_dim):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
        self.num_patches = (img_size // patch_size) ** 2

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class Anything(ModuleType):
    """A module in which every name is there and does nothing."""
    PatchEmbed = PatchEmbed

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name)

    def __call__(self, *args, **kwargs):
        return None


for name in ("timm", "timm.models", "timm.models.vision_transformer", "timm.models.registry",
             "timm.models.layers", "timm.models.helpers", "timm.models.hub",
             "fairscale", "fairscale.nn", "fairscale.nn.checkpoint",
             "fairscale.nn.checkpoint.checkpoint_activations",
             "torchvision", "torchvision.transforms", "clip"):
    sys.modules[name] = Anything(name)
sys.modules["ImageReward"] = ModuleType("ImageReward")  # its __init__ would import its training
sys.modules["ImageReward"].__path__ = [str(Path(entry) / "ImageReward") for entry in sys.path
                                       if (Path(entry) / "ImageReward" / "ImageReward.py").exists()]
from ImageReward.ImageReward import MLP, ImageReward  # noqa: E402
from ImageReward.models.BLIP.med import BertConfig, BertModel  # noqa: E402
from ImageReward.models.BLIP.vit import VisionTransformer  # noqa: E402

torch.manual_seed(0)
model = ImageReward.__new__(ImageReward)
nn.Module.__init__(model)
model.device, model.mean, model.std = "cpu", 0.16717362830052426, 1.0333394966054072
model.blip = nn.Module()
model.blip.visual_encoder = VisionTransformer(img_size=32, patch_size=16, embed_dim=64, depth=2, num_heads=1)
model.blip.text_encoder = BertModel(BertConfig(
    vocab_size=60, hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=96,
    max_position_embeddings=40, encoder_width=64, add_cross_attention=True), add_pooling_layer=False)
model.mlp = MLP(64)
with torch.no_grad():  # the untrained networks' scores would hardly differ
    for name, weight in model.named_parameters():
        weight.add_(
            torch.randn(weight.shape) * (0.2 if weight.dim() == 1 else 0.5 / weight[0].numel() ** 0.5))
model.half().float().eval()  # what is saved below is what scores

pixels = torch.randn(3, 3, 32, 32)
tokens = torch.randint(1, 60, (3, 35))
mask = (torch.arange(35) < torch.tensor([[35], [7], [4]])).long()
with torch.no_grad():
    scores = model.score_gard(tokens * mask, mask, pixels).squeeze(1)
save_file({**{name: weight.half().contiguous() if weight.is_floating_point() else weight.contiguous()
              for name, weight in model.state_dict().items()},
           "pixels": pixels, "tokens": tokens * mask, "mask": mask}, HERE / "imagereward.safetensors")
(HERE / "imagereward.json").write_text(
    json.dumps({"made_by": "image-reward 1.5", "scores": scores.tolist()}) + "\n")
