"""Pretrained networks of rewards: files, every weight, one clear line if something is wrong; CLIP.

B images, patches of E features.
"""
import contextlib
import logging
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

REWARD_MODEL = "reward model (--reward-model)"  # how error messages call the network of a learned reward


# ---- Files and errors ----

def silence_libraries():
    """Turn off the libraries' warnings and loading bars, which would bury our few lines.

    One warning is let through, once: that a text encoder cuts a prompt off.
    """
    import diffusers
    import huggingface_hub
    import transformers
    for library in (diffusers, transformers):
        # Errors are raised, too, and told in our one line
        library.utils.logging.set_verbosity(logging.CRITICAL)
        library.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()  # else it tells of each try
    said = logging.getLogger("diffusers.pipelines")
    if not said.handlers:
        said.setLevel(logging.WARNING)
        said.propagate = False
        said.addHandler(CutPrompts())


class CutPrompts(logging.Handler):
    """Tells of the first prompt that is cut off, in the library's words."""
    told = False

    def emit(self, record):
        if "truncated" in record.getMessage() and not self.told:
            self.told = True
            print(record.getMessage(), file=sys.stderr)


def announce(network, name):
    """Tell the user what is being loaded: it may take minutes, and gigabytes."""
    silence_libraries()
    print(f"loading {network}: {name}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def one_line_errors(described_as, name):
    """Any error becomes a ValueError of one line: which network, its name, the library's own words."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a dozen types: the hub's own, safetensors' own, ...
        message = " ".join(str(error).split()) or type(error).__name__
        if message.startswith(f"{described_as} {str(name)!r}: "):
            raise
        raise ValueError(f"{described_as} {str(name)!r}: {message}") from error


def from_pretrained(loader, name, described_as, **options):
    """loader.from_pretrained(name, **options), for a hub name or a folder; see one_line_errors."""
    with one_line_errors(described_as, name):
        return loader.from_pretrained(str(name), **options)


def load_network(loader, name, described_as, unused="", **options):
    """A network of transformers, by hub name or folder, with all of its weights. It is in eval mode.

    The library leaves a weight random if the file lacks it; here that is a ValueError. unused: pattern of
    weights that nothing reads, so that they may be missing. options: of from_pretrained.
    """
    with one_line_errors(described_as, name):
        network, info = loader.from_pretrained(str(name), output_loading_info=True, **options)
        refuse_weights([key for key in info["missing_keys"] if not (unused and re.search(unused, key))])
    return network.eval()


@contextlib.contextmanager
def all_weights_loaded():
    """The context in which diffusers loads a pipeline. ValueError if transformers leaves a weight random."""
    class Listener(logging.Handler):
        def emit(self, record):
            table = re.sub(r"\x1b\[[0-9;]*m", "", record.getMessage())  # on a terminal it has colours
            missing.extend(re.findall(r"^(.+?) *\| *MISSING", table, re.MULTILINE))

    missing, listener, logger = [], Listener(), logging.getLogger("transformers.modeling_utils")
    level, propagates = logger.level, logger.propagate
    logger.setLevel(logging.WARNING)  # at ERROR, which a user's environment may set, there is no record
    logger.propagate = False
    logger.addHandler(listener)
    try:
        yield
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)
        logger.propagate = propagates
    refuse_weights(missing)


def refuse_weights(missing):
    """Raise ValueError if this list of weights' names is not empty."""
    if missing:
        # Transformers tells layers together
        raise ValueError(f"{len(missing)} of its weights are missing, the first is {min(missing)}")


def hub_file(name, filename, described_as):
    """The path of one file of a folder, or of a hub repository. ValueError, in one line."""
    from huggingface_hub import hf_hub_download
    if Path(name).is_dir():
        return Path(name) / filename
    with one_line_errors(described_as, name):
        return hf_hub_download(str(name), filename)


def read_weights(path):
    """A state dict, from a file of safetensors or of torch (weights only)."""
    with one_line_errors("the weights", path):
        weights = load_file(path) if str(path).endswith(".safetensors") else torch.load(
            path, map_location="cpu", weights_only=True)
        if not isinstance(weights, dict):
            raise ValueError(f"a {type(weights).__name__}, not a state dict")
    return weights


def load_weights(network, weights, prefix, described_as, new_names=None):
    """Put into the network those weights whose published name begins with `prefix`. Returns it in eval mode.

    `new_names` maps patterns of the published names to what the network calls them. Raises ValueError if a
    weight is missing, is left over, or has another shape.
    """
    renamed = {}
    for name, weight in weights.items():
        # A buffer that older versions saved
        if name.startswith(prefix) and not name.endswith("position_ids"):
            name = name.removeprefix(prefix)
            for published, ours in (new_names or {}).items():
                name = re.sub(published, ours, name)
            renamed[name] = weight
    try:
        network.load_state_dict(renamed)
    except RuntimeError as error:
        raise ValueError(f"the weights of the {described_as} do not fit: {' '.join(str(error).split())[:200]}") from error
    return network.eval()


# ---- What several rewards use: CLIP, a scoring head ----

def load_clip(model, device, described_as, processor=""):
    """A CLIP's image processor, which may come from another model, and its network, in fp32."""
    announce("CLIP", model)
    from transformers import AutoImageProcessor, CLIPModel
    return (from_pretrained(AutoImageProcessor, processor or model, described_as, backend="pil"),
            load_network(CLIPModel, model, described_as, dtype=torch.float32).to(device))


def clip_pixels(processor, images):
    """B images (3, H, W), uint8 or float in [0, 1] -> CLIP's input (B, 3, 224, 224).

    All become 8-bit images first. A processor takes floats for bytes, and would divide [0, 1] by 255 once
    more.
    """
    images = [image if image.dtype == torch.uint8 else (image.float() * 255).round().clamp(0, 255).byte()
              for image in images]
    return processor([image.cpu() for image in images], return_tensors="pt").pixel_values


def clip_pixels_with_gradient(processor, images):
    """clip_pixels of images (B, 3, H, W) in [0, 1], with a gradient to them.

    The values are the processor's own. The gradient is that of a bicubic resize, which differs from Pillow's
    by the rounding to 8 bits.
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
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1)
                 for values in (processor.image_mean, processor.image_std))
    return (images - mean) / std


def image_embeddings(clip, pixels):
    """CLIP's input (B, 3, 224, 224) -> its image embeddings (B, E), not normalised."""
    parts = [clip_embedding(clip.get_image_features(part.to(clip.device, clip.dtype)))
             for part in pixels.split(32)]
    return torch.cat(parts).float()


def clip_embedding(features):
    """The tensor in what CLIP returns: in newer versions of transformers an object that holds it."""
    return features if isinstance(features, torch.Tensor) else features.pooler_output


def scoring_head(width):
    """The MLP of Aesthetic and ImageReward, on `width` features.

    The dropout layers do nothing in eval mode. They are kept because the published weights are numbered with
    them.
    """
    return nn.Sequential(nn.Linear(width, 1024), nn.Dropout(), nn.Linear(1024, 128), nn.Dropout(),
                         nn.Linear(128, 64),
                         nn.Dropout(), nn.Linear(64, 16), nn.Linear(16, 1))
