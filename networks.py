"""Pretrained networks: files from a folder or from the hub, every weight of a network, and one clear line if something is wrong.

Then what several rewards use: images for Pillow, CLIP, and a scoring head.

B images, patches of E features.
"""
import contextlib
import hashlib
import inspect
import json
import logging
import pickle
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from process import notify

REWARD_MODEL = "reward model (--reward-model)"  # how error messages call the network of a learned reward


# ---- Files and errors ----

def silence_libraries():
    """Turn off the libraries' warnings and loading bars, which would bury our few lines. Call it before the first loading."""
    import diffusers
    import huggingface_hub
    import transformers
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity(logging.CRITICAL)  # errors are raised, too, and told in our one line
        library.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()  # else it tells of each try


def announce(network, name):
    """Tell the user what is being loaded: it may take minutes, and gigabytes."""
    silence_libraries()
    notify(f"loading {network}: {name}")


class Refused(ValueError):
    """A model is refused; the message says all."""


@contextlib.contextmanager
def one_line_errors(described_as, name):
    """Any error becomes a Refused of one line: how the network is called (with its flag), its name, and the reason."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:  # a dozen types: the hub's own, safetensors' own, ...
        reason = "its files cannot be loaded"
        if isinstance(error, OSError) and not Path(name).exists():
            reason = "it is neither a folder here nor reachable on the hub (no such name, or no network)"
        raise Refused(f"{described_as} {str(name)!r}: {reason}: {short_message(error)}") from error


def from_pretrained(loader, name, described_as, **options):
    """loader.from_pretrained(name, **options), for a hub name or a folder, of what has no weights: a tokenizer, a processor.

    described_as: see one_line_errors, which it raises.
    """
    with one_line_errors(described_as, name):
        return loader.from_pretrained(str(name), **options)


def load_network(loader, name, described_as, unused="", **options):
    """A network of diffusers or transformers, by hub name or folder, with all of its weights. It is in eval mode.

    The libraries leave a weight random if the file lacks it. Here a missing or misshapen weight is refused, and so is one without a
    place in the network. One exception: a file of transformers may hold a larger network that contains this one, as a whole CLIP
    holds a text encoder. unused: pattern of weights that nothing reads, so that they may be missing or left over. options: of
    from_pretrained. Raises ValueError, in one line.
    """
    import diffusers
    of_diffusers, folder = issubclass(loader, diffusers.ModelMixin), Path(name) / options.get("subfolder", "")
    if of_diffusers:
        options |= {"low_cpu_mem_usage": False}  # else wrong shapes could not be told
    if folder.is_dir():
        options |= variant_of(folder)
    with one_line_errors(described_as, name):
        network, info = loader.from_pretrained(str(name), output_loading_info=True, ignore_mismatched_sizes=True, **options)
    parts = {part for part, _ in network.named_children()}
    prefixes = ("", "text_model.", f"{getattr(network, 'base_model_prefix', '')}.")  # of a larger network's names
    harmless = f"position_ids$|{unused}" if unused else "position_ids$"  # a buffer that older versions saved
    unread = [key for key in info["unexpected_keys"] if not re.search(harmless, key)
              and (of_diffusers or any(key.removeprefix(prefix).split(".")[0] in parts for prefix in prefixes)
                   or wrong_names_hint([key]))]
    missing = [key for key in info["missing_keys"] if not re.search(harmless, key)]
    refuse_weights(described_as, name, missing, unread, [key for key, *_ in info["mismatched_keys"]])
    return network.eval()


def variant_of(folder):
    """Which of a folder's files to load, as from_pretrained's options: the full weights if they are there, else another variant."""
    found = {}  # (variant, whether safetensors) of the files that the libraries write
    for path in folder.iterdir():
        match = re.fullmatch(r"(diffusion_pytorch_model|model|pytorch_model)(\.\w+?)?(-\d+-of-\d+)?\.(safetensors|bin)", path.name)
        if match:
            found[(match[2] or "").strip("."), match[4] == "safetensors"] = True
    order = [("", True), ("", False), ("fp16", True), ("fp16", False), *found]
    variant, safe = next((key for key in order if key in found), ("", True))
    return {"variant": variant or None, "use_safetensors": safe}


def refuse_weights(described_as, name, missing=(), unread=(), misshapen=()):
    """Raise ValueError, in one line, if any of these lists of weights' names is not empty."""
    for problem, keys in (("are missing", missing), ("have another shape", misshapen), ("have no place in the network", unread)):
        if keys:
            raise Refused(f"{described_as} {str(name)!r}: {len(keys)} of its weights {problem}, the first is {min(keys)}"
                          + wrong_names_hint([*missing, *unread]))


def wrong_names_hint(keys):
    """What probably happened to a file whose weights have such names, or an empty text."""
    hints = {r"\bbase_layer\b|lora_|\.lora\.": "it was saved with a LoRA attached: fuse_lora() and unload_lora_weights(), and "
                                               "save again",
             r"^module\.": "it was saved from DataParallel: save the network in its .module",
             r"^_orig_mod\.": "it was saved from torch.compile: save the network in its ._orig_mod",
             r"^model\.diffusion_model\.": "it has the layout of a single file: give that file itself"}
    return next((f" ({hint})" for pattern, hint in hints.items() if any(re.search(pattern, key) for key in keys)), "")


def hash_of(value):
    """A hash of what JSON can hold; other values count as their text."""
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()


def fingerprint(network):
    """A text that differs if the network's settings or its weights' names, shapes or values differ.

    Of each weight up to 4,096 values are looked at. They are rounded to half precision, in which a GPU holds some networks and a
    CPU does not. Settings that have the libraries' defaults do not count, since a later version may have more of them.
    """
    digest = hashlib.sha256(json.dumps(own_settings(network), sort_keys=True, default=str).encode())
    for name, weight in sorted(network.state_dict().items()):
        values = weight.detach().flatten()[::max(1, weight.numel() // 4096)][:4096].half().cpu()
        digest.update(f"{name} {tuple(weight.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()


def own_settings(network):
    """The settings of a network of diffusers or transformers that are not the library's defaults, and that change what it computes."""
    def kept(settings):
        return {key: kept(value) if isinstance(value, dict) else value for key, value in settings.items()
                if not key.startswith("_") and key not in ("dtype", "torch_dtype", "transformers_version", "architectures")}

    config = getattr(network, "config", {})
    if hasattr(config, "to_diff_dict"):
        return kept(config.to_diff_dict())
    defaults = {name: one.default for name, one in inspect.signature(type(network).__init__).parameters.items()}
    return kept({key: value for key, value in dict(config).items()
                 if key not in defaults or json.dumps(defaults[key], default=str) != json.dumps(value, default=str)})


def hub_file(name, filename, described_as):
    """The path of one file of a folder, or of a hub repository. Raises ValueError, in one line."""
    from huggingface_hub import hf_hub_download
    try:
        path = Path(name) / filename
        if Path(name).is_dir() and not path.is_file():
            raise FileNotFoundError(f"there is no {filename} in it")
        return path if path.is_file() else hf_hub_download(str(name), filename)
    except Exception as error:
        raise ValueError(f"{described_as} {str(name)!r}: {filename} is neither here nor reachable on the hub: "
                         f"{short_message(error)}") from error


def read_weights(path):
    """A state dict, from a file of safetensors or of torch (weights only). Raises ValueError."""
    try:
        weights = load_file(path) if str(path).endswith(".safetensors") else torch.load(
            path, map_location="cpu", weights_only=True)
    except Exception as error:  # a missing file, safetensors' own, pickle's own
        reason = type_and_message(error)
        if isinstance(error, pickle.UnpicklingError):
            reason = "it is no file of weights, or holds other objects, too: save the state dict alone, best as .safetensors"
        raise ValueError(f"the weights {str(path)!r} cannot be loaded: {reason}") from error
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise ValueError(f"the weights {str(path)!r} are a {type(weights).__name__}, not a state dict")
    return weights


def load_weights(network, weights, prefix, described_as, new_names=None):
    """Put into the network those weights whose published name begins with `prefix`. Returns it in eval mode.

    `new_names` maps patterns of the published names to what the network calls them. Raises ValueError if a weight is missing,
    is left over, or has another shape.
    """
    renamed = {}
    for name, weight in weights.items():
        if name.startswith(prefix) and not name.endswith("position_ids"):  # a buffer that older versions saved
            name = name.removeprefix(prefix)
            for published, ours in (new_names or {}).items():
                name = re.sub(published, ours, name)
            renamed[name] = weight
    try:
        network.load_state_dict(renamed)
    except RuntimeError as error:
        raise ValueError(f"the weights of the {described_as} do not fit: {' '.join(str(error).split())[:200]}"
                         + wrong_names_hint(weights)) from error
    return network.eval()


def type_and_message(error):
    """'KeyError: the first line of its message'."""
    message = str(error).strip().splitlines()
    return f"{type(error).__name__}: {message[0]}" if message else type(error).__name__


def short_message(error):
    """The first line of an error's message, at most 200 characters, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


# ---- What several rewards use: images for Pillow, CLIP, a scoring head ----

def load_clip(model, device, described_as, processor=""):
    """A CLIP's image processor and its network, in fp32, by hub name or folder. The processor may come from another model."""
    announce("CLIP", model)
    from transformers import AutoImageProcessor, CLIPModel
    return (from_pretrained(AutoImageProcessor, processor or model, described_as, backend="pil"),
            load_network(CLIPModel, model, described_as, dtype=torch.float32).to(device))


def to_pil(image):
    """An image (3, H, W), float in [0, 1] or uint8 -> 8-bit RGB image of Pillow, rounded, not truncated."""
    if image.dtype != torch.uint8:
        image = (image.float() * 255).round().clamp(0, 255).byte()
    return Image.fromarray(image.cpu().permute(1, 2, 0).numpy())


def clip_pixels(processor, images):
    """B images, each of Pillow or (3, H, W), uint8 or float in [0, 1] -> CLIP's input (B, 3, 224, 224).

    All become 8-bit images first. A processor takes floats for bytes, and would divide [0, 1] by 255 once more.
    """
    images = [image if isinstance(image, Image.Image) else to_pil(image) for image in images]
    return processor(images, return_tensors="pt").pixel_values


def clip_pixels_with_gradient(processor, images):
    """clip_pixels of images (B, 3, H, W) in [0, 1], with a gradient to them.

    The values are the processor's own. The gradient is that of a bicubic resize, which differs from Pillow's by the rounding to 8 bits.
    """
    exact = clip_pixels(processor, images.detach()).to(images.device)
    shorter, crop = processor.size["shortest_edge"], processor.crop_size
    height, width = (side * shorter // min(images.shape[2:]) for side in images.shape[2:])
    resized = F.interpolate(images, (height, width), mode="bicubic", antialias=True)
    top, left = (height - crop["height"]) // 2, (width - crop["width"]) // 2
    cropped = resized[:, :, top:top + crop["height"], left:left + crop["width"]]
    smooth = normalised(cropped.clamp(0, 1), processor)
    return smooth + (exact - smooth).detach()


def normalised(images, processor):
    """Images (B, 3, H, W) in [0, 1], normalised as the image processor does it."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    return (images - mean) / std


def image_embeddings(clip, pixels):
    """CLIP's input (B, 3, 224, 224) -> its image embeddings (B, E), not normalised. 32 images go through at a time."""
    parts = [clip_embedding(clip.get_image_features(part.to(clip.device, clip.dtype))) for part in pixels.split(32)]
    return torch.cat(parts).float()


def clip_embedding(features):
    """The tensor in what CLIP returns: older versions of transformers return it, newer ones an object that holds it."""
    return features if isinstance(features, torch.Tensor) else features.pooler_output


def scoring_head(width):
    """The MLP of Aesthetic and ImageReward, on `width` features.

    The dropout layers do nothing in eval mode. They are kept because the published weights are numbered with them.
    """
    return nn.Sequential(nn.Linear(width, 1024), nn.Dropout(), nn.Linear(1024, 128), nn.Dropout(), nn.Linear(128, 64),
                         nn.Dropout(), nn.Linear(64, 16), nn.Linear(16, 1))
