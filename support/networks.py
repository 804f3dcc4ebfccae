"""Pretrained networks of rewards: every weight, or one line that says what is wrong. CLIP, to E features."""
import contextlib
import functools
import logging
import re
import sys
from pathlib import Path
from unittest.mock import patch

import huggingface_hub
import torch
import torch.nn.functional as F
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors.torch import load_file
from torch import nn
HUB_ERRORS = HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled


@functools.cache
def silence_libraries():
    """Silence the libraries' warnings and loading bars, but for one warning: that a prompt is cut off."""
    import diffusers
    import transformers
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity(logging.CRITICAL)  # errors are raised, too: we tell them
        library.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()  # else it tells of each try
    said = logging.getLogger("diffusers.pipelines")
    said.setLevel(logging.WARNING)
    said.propagate = False
    said.addHandler(CutPrompts())


class CutPrompts(logging.Handler):
    """Tells of the first prompt that is cut off, in the library's words."""

    def emit(self, record):
        if "truncated" in record.getMessage():
            print(record.getMessage(), file=sys.stderr)
            self.setLevel(logging.CRITICAL)


@functools.cache
def announce(name):
    """Tell the user once what is being loaded: it may take minutes, and gigabytes."""
    silence_libraries()
    print(f"loading {name}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def one_line_errors(described_as, name):
    """Any error becomes a ValueError of one line: what it is of, its name, and the library's own words.

    The hub's own are the best: that a model is gated, and where to ask for it, or that there is no network.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a dozen types: the hub's own, safetensors' own, ...
        said = error
        while said and not isinstance(said, HUB_ERRORS):
            said = said.__cause__ or said.__context__
        message = " ".join(str(said or error).split())[:2000] or type(error).__name__
        raise ValueError(f"{described_as} {str(name)!r}: {message}") from error


@contextlib.contextmanager
def all_weights_loaded(unused=""):
    """ValueError if transformers leaves a weight random, but for the pattern `unused`. Yields their names."""
    from transformers import modeling_utils
    missing, report = [], modeling_utils.log_state_dict_report

    def listen(loading_info, **options):
        missing.extend(name for name in loading_info.missing_keys if not (unused and re.search(unused, name)))
        report(loading_info=loading_info, **options)

    with patch.object(modeling_utils, "log_state_dict_report", listen):
        yield missing
    if missing:
        raise ValueError(f"{len(missing)} of its weights are missing, the first is {min(missing)}")


def from_pretrained(loader, name, unused="", **options):
    """loader.from_pretrained of a hub name or a folder. A network has all its weights: see above."""
    announce(name)
    with one_line_errors("network", name), all_weights_loaded(unused):
        return loader.from_pretrained(str(name), **options)


def hub_file(name, filename):
    """The path of one file of a folder or of a hub repository."""
    if Path(name).is_dir():
        return Path(name) / filename
    announce(name)
    with one_line_errors("network", name):
        return huggingface_hub.hf_hub_download(str(name), filename)


def read_weights(path):
    """A state dict, from a file of safetensors or of torch (weights only)."""
    with one_line_errors("the weights", path):
        if str(path).endswith(".safetensors"):
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)


def load_weights(network, weights, prefix, new_names=None):
    """The network, in eval mode, with exactly the weights whose published name begins with `prefix`."""
    renamed = {}
    with one_line_errors("the weights do not fit a", type(network).__name__):
        for name, weight in weights.items():
            if name.startswith(prefix) and not name.endswith("position_ids"):  # a buffer of older versions
                name = name.removeprefix(prefix)
                for published, ours in (new_names or {}).items():  # patterns, one after the other
                    name = re.sub(published, ours, name)
                renamed[name] = weight
        network.load_state_dict(renamed)
    return network.eval()


def load_clip(model, device, processor=""):
    """A CLIP's image processor, which may come from another model, and its network, in fp32."""
    from transformers import AutoImageProcessor, CLIPModel
    return (from_pretrained(AutoImageProcessor, processor or model, backend="pil"),
            from_pretrained(CLIPModel, model, dtype=torch.float32).to(device))


def clip_pixels(processor, images):
    """B images (3, H, W), uint8 or float in [0, 1] -> CLIP's input (B, 3, 224, 224)."""
    # A processor takes floats for bytes, too, and would divide [0, 1] by 255 once more.
    images = [image if image.dtype == torch.uint8 else (image.float() * 255).round().clamp(0, 255).byte()
              for image in images]
    return processor([image.cpu() for image in images], return_tensors="pt").pixel_values


def clip_pixels_with_gradient(processor, images):
    """clip_pixels of images (B, 3, H, W) in [0, 1], with the gradient of a bicubic resize to them."""
    exact = clip_pixels(processor, images.detach()).to(images.device)
    shorter, crop = processor.size["shortest_edge"], processor.crop_size["height"]
    height, width = (side * shorter // min(images.shape[2:]) for side in images.shape[2:])
    resized = F.interpolate(images, (height, width), mode="bicubic", antialias=True)
    top, left = (height - crop) // 2, (width - crop) // 2
    smooth = normalised(resized[:, :, top:top + crop, left:left + crop].clamp(0, 1), processor)
    return smooth + (exact - smooth).detach()  # Pillow's resize differs by the rounding to 8 bits


def normalised(images, processor):
    """Images (B, 3, H, W) in [0, 1], normalised as the image processor does it."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1)
                 for values in (processor.image_mean, processor.image_std))
    return (images - mean) / std


def image_embeddings(clip, pixels):
    """CLIP's input (B, 3, 224, 224) -> its image embeddings (B, E), not normalised."""
    parts = [clip.get_image_features(part.to(clip.device, clip.dtype)) for part in pixels.split(32)]
    return torch.cat([part.pooler_output for part in parts]).float()


def scoring_head(width):
    """The MLP of Aesthetic and ImageReward, on `width` features."""
    # Dropout does nothing in eval mode, but the published weights are numbered with it.
    return nn.Sequential(nn.Linear(width, 1024), nn.Dropout(), nn.Linear(1024, 128), nn.Dropout(),
                         nn.Linear(128, 64), nn.Dropout(), nn.Linear(64, 16), nn.Linear(16, 1))
