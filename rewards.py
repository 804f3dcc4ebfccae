"""Rewards: images and prompts in, numbers out. They know nothing of the policy.

The contract, for every reward here and for your own:

    reward(images, prompts) -> values                or (values, notes)

    images   (B, 3, H, W) float32 in [0, 1], on the policy's device; any B
    prompts  B prompts.Prompt for the rewards of this file; B texts for a function of your own
    values   B numbers, higher is better; anything that torch.as_tensor takes
    notes    B strings, say what a judge answered: logged, and drawn under the pictures

To add one, write the function and name it in `REWARDS`.
"""
import importlib.util
import io
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import hub


class RewardError(Exception):
    """A reward broke the contract or failed; the message says how. The run stops, its state saved."""


def compressibility(images, prompts):
    """Minus the size of the image as a JPEG, in kB of 1,000 bytes (paper, section 5.1). About 0.1 ms for 64 x 64 pixels."""
    return [-jpeg_kilobytes(image) for image in images]


def incompressibility(images, prompts):
    """The size of the image as a JPEG, in kB of 1,000 bytes (paper, section 5.1)."""
    return [jpeg_kilobytes(image) for image in images]


def jpeg_kilobytes(image):
    """Size of one image (3, H, W) in [0, 1] as a JPEG, headers included.

    The recipe, of which each part moves the number: round (not truncate) to 8 bits; Pillow's encoder at quality 95, its
    default 4:2:0 chroma subsampling, default Huffman tables (no optimize), baseline (not progressive).
    """
    file = io.BytesIO()
    to_pil(image).save(file, "JPEG", quality=95)
    return file.tell() / 1000


def to_pil(image):
    """(3, H, W) float in [0, 1], or bytes -> 8-bit RGB picture."""
    if image.dtype != torch.uint8:
        image = (image.float() * 255).round().clamp(0, 255).byte()
    return Image.fromarray(image.cpu().permute(1, 2, 0).numpy())


# ---- Learned rewards: published networks, loaded once, when the reward is asked for. ----

class Aesthetic:
    """LAION's aesthetic predictor, about 1 to 10 (paper, section 5.2): an MLP on CLIP ViT-L/14's normalised image embedding.

    Fetches 1.7 GB of CLIP and 4 MB of MLP, the weights `sac+logos+ava1-l14-linearMSE`; 1.7 GB of memory (fp32).
    model: another CLIP, by hub name or folder; head: the MLP's weights as a file, safetensors or torch's.
    """

    def __init__(self, device, model="", head=""):
        from transformers import AutoImageProcessor, CLIPModel
        model = model or "openai/clip-vit-large-patch14"
        hub.announce("CLIP for the aesthetic reward", model)
        self.processor = hub.from_pretrained(AutoImageProcessor, model, "reward model", backend="pil")
        self.clip = hub.from_pretrained(CLIPModel, model, "reward model").to(device).eval()
        weights = load_weights(head or hub.download("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth", "aesthetic head"))
        width = self.clip.config.projection_dim
        # The published file's names count the dropouts, which learn nothing and are out of use here: eval().
        self.head = nn.Sequential(nn.Linear(width, 1024), nn.Dropout(), nn.Linear(1024, 128), nn.Dropout(), nn.Linear(128, 64),
                                  nn.Dropout(), nn.Linear(64, 16), nn.Linear(16, 1)).to(device).eval()
        try:
            self.head.load_state_dict({name.removeprefix("layers."): weight for name, weight in weights.items()})
        except RuntimeError as error:
            raise ValueError(f"the aesthetic head does not fit {model!r}: {_one_line(error)}") from error

    @torch.no_grad()
    def __call__(self, images, prompts):
        embeddings = image_embeddings(self.clip, preprocess(self.processor, images))
        return self.head(F.normalize(embeddings)).squeeze(1)


class PickScore:
    """PickScore v1 (Kirstain et al. 2023): cosine between a CLIP-H's embeddings of image and prompt, fine-tuned on preferences.

    About 0.2; the published scores are 100 times that. Fetches 3.9 GB; 3.9 GB of memory (fp32).
    model: another CLIP with its processor and tokenizer, by hub name or folder.
    """

    def __init__(self, device, model=""):
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel
        processor, model = model or "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", model or "yuvalkirstain/PickScore_v1"
        hub.announce("PickScore", model)
        self.processor = hub.from_pretrained(AutoImageProcessor, processor, "reward model", backend="pil")
        self.tokenizer = hub.from_pretrained(AutoTokenizer, processor, "reward model")
        self.clip = hub.from_pretrained(CLIPModel, model, "reward model").to(device).eval()

    @torch.no_grad()
    def __call__(self, images, prompts):
        tokens = self.tokenizer([prompt.text for prompt in prompts], padding="max_length", truncation=True, max_length=77,
                                return_tensors="pt").to(self.clip.device)
        texts = pooled(self.clip.get_text_features(**tokens))                # (B, E)
        return F.cosine_similarity(image_embeddings(self.clip, preprocess(self.processor, images)), texts)


def preprocess(processor, images):
    """PIL pictures, or images (3, H, W) of bytes or of floats in [0, 1] -> what CLIP sees: (B, 3, 224, 224).

    All become 8-bit pictures first: a processor takes floats for bytes, and would scale [0, 1] down once more.
    """
    pictures = [image if isinstance(image, Image.Image) else to_pil(image) for image in images]
    return processor(pictures, return_tensors="pt").pixel_values


def image_embeddings(clip, pixels):
    """Pixels (B, 3, 224, 224) -> CLIP's image embeddings (B, E), some at a time."""
    return torch.cat([pooled(clip.get_image_features(part.to(clip.device, clip.dtype))) for part in pixels.split(32)]).float()


def pooled(features):
    """The embeddings in what CLIP returns: a tensor in older versions of transformers, an object that holds them in newer."""
    return features if isinstance(features, torch.Tensor) else features.pooler_output


def load_weights(path):
    """A state dict from a file of safetensors, or of torch, weights only. Raises ValueError."""
    try:
        return load_file(path) if str(path).endswith(".safetensors") else torch.load(
            path, map_location="cpu", weights_only=True)
    except Exception as error:  # a missing file, safetensors' own, pickle's own
        raise ValueError(f"the weights {str(path)!r} cannot be loaded: {_one_line(error)}") from error


LEARNED = {"aesthetic": Aesthetic, "pickscore": PickScore}
REWARDS = {"compressibility": compressibility, "incompressibility": incompressibility, **LEARNED}  # the next reward goes here
DEFAULT_PROMPTS = {"compressibility": "imagenet_animals", "incompressibility": "imagenet_animals"}  # the paper's
UNITS = {"compressibility": (-1, "kB"), "incompressibility": (1, "kB")}  # how a person reads the number: factor, unit


def display(name, value):
    """A reward as a person reads it: '1.72 kB' for a compressibility of -1.72."""
    factor, unit = UNITS.get(name, (1, ""))
    return f"{factor * value:.2f} {unit}" if unit else f"{value:.3g}"


def load_reward(name, device="cpu", **options):
    """The function of a reward in REWARDS, or of 'path/to/file.py:function'. Raises ValueError if neither.

    A learned reward loads its network, on that device, with those options, or raises ValueError if it cannot be had.
    What it returns fulfils the contract in full: (values (B,) float32 on the CPU, list of B notes), or raises RewardError.
    """
    if name in REWARDS:
        return _checked(LEARNED[name](device, **options) if name in LEARNED else REWARDS[name], name)
    path, _, function = name.rpartition(":")
    if not path:
        raise ValueError(f"no reward {name!r}: choose {', '.join(REWARDS)}, or your own as path/to/file.py:function")
    own = _load_function(Path(path), function)
    return _checked(lambda images, prompts: own(images, [prompt.text for prompt in prompts]), name)


def _load_function(path, function):
    if not path.is_file():
        raise ValueError(f"no reward file {str(path)!r}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None:
        raise ValueError(f"the reward file {str(path)!r} is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"the reward file {str(path)!r} cannot be loaded: {_one_line(error)}") from error
    if not callable(getattr(module, function, None)):
        raise ValueError(f"the reward file {str(path)!r} has no function {function!r}")
    return getattr(module, function)


def _checked(reward, name):
    def checked(images, prompts):
        try:
            result = reward(images, prompts)
        except Exception as error:
            raise RewardError(f"the reward {name} failed: {_one_line(error)}") from error
        has_notes = isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], (list, tuple))
        values, notes = result if has_notes else (result, [""] * len(images))
        try:
            values = torch.as_tensor(values).detach().to("cpu", torch.float32)
        except Exception as error:
            raise RewardError(f"the reward {name} returned {type(values).__name__}, not numbers") from error
        if values.shape != (len(images),):
            raise RewardError(f"the reward {name} returned shape {tuple(values.shape)} for {len(images)} images; "
                              f"({len(images)},) was expected")
        if not values.isfinite().all():
            bad = (~values.isfinite()).nonzero()[0].item()
            raise RewardError(f"the reward {name} returned {values[bad].item()} for image {bad} "
                              f"({prompts[bad].text!r})")
        if len(notes) != len(images):
            raise RewardError(f"the reward {name} returned {len(notes)} notes for {len(images)} images")
        return values, [str(note) for note in notes]

    return checked


def _one_line(error):
    message = str(error).strip().splitlines()
    return f"{type(error).__name__}: {message[0]}" if message else type(error).__name__
