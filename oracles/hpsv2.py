"""Makes hpsv2.safetensors and .json: a tiny random CLIP and its scores.

The weights have open_clip's names, as in HPS v2's checkpoint.

    pip install --no-deps hpsv2==1.2.0 && python oracles/hpsv2.py

The network is the package's own (hpsv2/src/open_clip/model.py). Its other imports, torchvision and timm, are
stubbed.
"""
import json
import sys
from pathlib import Path
from types import ModuleType

import torch
import transformers  # noqa: F401, before what it would look for is stubbed
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent


def package(name, *folders):
    """An empty package instead of the real one, whose __init__ imports more than is needed here."""
    sys.modules[name] = ModuleType(name)
    places = [Path(entry, *folders) for entry in sys.path]
    sys.modules[name].__path__ = [str(place) for place in places if (place / "model.py").exists()]


for name in ("torchvision", "torchvision.ops", "torchvision.ops.misc"):
    sys.modules[name] = ModuleType(name)
sys.modules["torchvision.ops.misc"].FrozenBatchNorm2d = None
package("open_clip", "hpsv2", "src", "open_clip")
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg  # noqa: E402

torch.manual_seed(0)
clip = CLIP(24, CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=8, image_size=32),
            CLIPTextCfg(context_length=16, vocab_size=60, width=32, heads=2, layers=2))
with torch.no_grad():
    for weight in clip.parameters():
        weight.add_(0.1 * torch.randn(weight.shape))
clip.half().float().eval()  # what is saved below is what scores

pixels, tokens = torch.randn(3, 3, 32, 32), torch.randint(1, 59, (3, 16))
for row, end in zip(tokens, (15, 6, 3)):
    row[end], row[end + 1:] = 59, 0  # the end of the text has the highest id, padding is 0
with torch.no_grad():
    images, texts = clip.encode_image(pixels, normalize=True), clip.encode_text(tokens, normalize=True)
    scores = torch.diagonal(images @ texts.T)
save_file({**{name: weight.half().contiguous() for name, weight in clip.state_dict().items()},
           "pixels": pixels, "tokens": tokens}, HERE / "hpsv2.safetensors")
(HERE / "hpsv2.json").write_text(json.dumps({"made_by": "hpsv2 1.2.0", "scores": scores.tolist()}) + "\n")
