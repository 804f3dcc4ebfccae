"""Pretrained networks: where they come from, which ones are accepted, and how they turn texts and latents into tensors.

First the policy's pipeline: loading it, encoding prompts, decoding latents. Differences between architectures are handled there.
Then networks that several rewards use. Then what all networks need: files from a folder or from the hub, and one clear line
when something goes wrong.

B images or prompts, latents of (C, H, W), prompts of L tokens and E features.
"""
import re
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
REWARD_MODEL = "reward model (--reward-model)"  # how error messages call the network of a learned reward
PIPELINE_PARTS = ("model_index.json", "unet", "vae", "text_encoder", "tokenizer", "scheduler")


# ---- The text-to-image pipeline ----

def load_pipeline(model, device="cpu", precision="fp32"):
    """A Stable Diffusion 1 or 2 pipeline, by hub name or folder, with a DDIM scheduler. All of it is frozen and in eval mode.

    The weights are fp32, whatever they were saved in. `precision` is that of the autocast that U-Net and VAE will run under.
    Raises ValueError, in one line, if the model cannot be found or has another architecture.
    """
    import diffusers
    silence_libraries()
    refuse_incomplete_folder(Path(model))
    pipeline = from_pretrained(diffusers.StableDiffusionPipeline, model, "model", dtype=torch.float32,
                               safety_checker=None, requires_safety_checker=False)
    unet, vae, text_encoder = pipeline.unet.config, pipeline.vae.config, pipeline.text_encoder.config
    fits = (unet.in_channels, unet.cross_attention_dim) == (vae.latent_channels, text_encoder.hidden_size)
    if not fits or unet.addition_embed_type:
        raise ValueError(f"model {str(model)!r} is not a text-to-image model of Stable Diffusion 1 or 2: its U-Net asks for "
                         "more than a latent and a text")
    # Stable Diffusion is published with another sampler. The betas and offsets are the model's own, the step is DDIM's.
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.to(device)
    if pipeline.unet.device.type == "cpu" and precision == "bf16":
        # torch's fused attention is slow in bf16 on a CPU. With the plain one bf16 is the faster precision, if the processor has
        # AVX512-BF16 (python studies/benchmark.py --precision fp32 bf16 --images 64).
        pipeline.unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        network.eval().requires_grad_(False)
    return pipeline


def refuse_incomplete_folder(folder):
    """Raise ValueError if this is a folder, but not one of a whole pipeline."""
    missing = [part for part in PIPELINE_PARTS if folder.is_dir() and not (folder / part).exists()]
    if missing:
        raise ValueError(f"model {str(folder)!r} is a folder, but not of a Stable Diffusion pipeline: it has no {', '.join(missing)}")


def autocast(device, precision):
    """The context in which networks run at that precision. Their weights stay fp32."""
    return torch.autocast(torch.device(device).type, PRECISIONS[precision], enabled=precision != "fp32")


def latent_shape(pipeline):
    """(C, H, W) of the latents that the U-Net denoises."""
    config = pipeline.unet.config
    return config.in_channels, config.sample_size, config.sample_size


@torch.no_grad()
def encode_prompts(pipeline, prompts):
    """B texts -> the text encoder's last hidden states (B, L, E), and those of the empty prompt (1, L, E)."""
    tokenizer = pipeline.tokenizer
    tokens = tokenizer([*prompts, ""], padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
                       return_tensors="pt").input_ids.to(pipeline.unet.device)
    states = pipeline.text_encoder(tokens)[0]
    return states[:-1], states[-1:]


@torch.no_grad()
def decode(pipeline, x_0, precision="fp32"):
    """Latents (B, C, H, W) -> images (B, 3, 8 H, 8 W in Stable Diffusion), fp32 in [0, 1].

    Raises FloatingPointError if an image is not finite. As 8-bit pixels it would look like a black one.
    """
    vae, parts = pipeline.vae, []
    for part in x_0.split(8):  # at 512 x 512 pixels the decoder's activations need more memory than anything else
        with autocast(vae.device, precision):
            images = vae.decode(part / vae.config.scaling_factor).sample.float()
        if not images.isfinite().all():
            raise FloatingPointError("an image is not finite: start a new run with --precision fp32 or a smaller --learning-rate")
        parts.append((images / 2 + 0.5).clamp(0, 1))
    return torch.cat(parts)


def to_pil(image):
    """An image (3, H, W), float in [0, 1] or uint8 -> 8-bit RGB image of Pillow, rounded, not truncated."""
    if image.dtype != torch.uint8:
        image = (image.float() * 255).round().clamp(0, 255).byte()
    return Image.fromarray(image.cpu().permute(1, 2, 0).numpy())


# ---- Networks that several rewards use: CLIP, and a scoring head ----

def load_clip(model, device, described_as, processor=""):
    """A CLIP's image processor and its network, in fp32, by hub name or folder. The processor may come from another model."""
    announce("CLIP", model)
    from transformers import AutoImageProcessor, CLIPModel
    return (from_pretrained(AutoImageProcessor, processor or model, described_as, backend="pil"),
            from_pretrained(CLIPModel, model, described_as, dtype=torch.float32).to(device).eval())


def clip_pixels(processor, images):
    """B images, each of Pillow or (3, H, W), uint8 or float in [0, 1] -> CLIP's input (B, 3, 224, 224).

    All become 8-bit images first. A processor takes floats for bytes, and would divide [0, 1] by 255 once more.
    """
    images = [image if isinstance(image, Image.Image) else to_pil(image) for image in images]
    return processor(images, return_tensors="pt").pixel_values


@torch.no_grad()
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


# ---- Files and errors ----

def silence_libraries():
    """Turn off the libraries' warnings and loading bars, which would bury our few lines. Call it before the first loading."""
    import diffusers
    import transformers
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def announce(network, name):
    """Tell the user what is being loaded: it may take minutes, and gigabytes."""
    silence_libraries()
    print(f"loading {network}: {name}", file=sys.stderr, flush=True)


def from_pretrained(loader, name, described_as, **options):
    """loader.from_pretrained(name, **options), for a hub name or a folder.

    described_as: how error messages call it, with its flag. Raises ValueError with that, the name, and the reason.
    """
    try:
        return loader.from_pretrained(str(name), **options)
    except Exception as error:  # a dozen types: the hub's own, safetensors' own, ...
        reason = "its files cannot be loaded"
        if isinstance(error, OSError) and not Path(name).is_dir():
            reason = "it is neither a folder here nor reachable on the hub (no such name, or no network)"
        raise ValueError(f"{described_as} {str(name)!r}: {reason}: {short_message(error)}") from error


def hub_file(name, filename, described_as):
    """The path of one file of a folder, or of a hub repository. Raises ValueError, as from_pretrained does."""
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
        raise ValueError(f"the weights {str(path)!r} cannot be loaded: {type_and_message(error)}") from error
    if not isinstance(weights, dict):
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
        raise ValueError(f"the weights of the {described_as} do not fit: {' '.join(str(error).split())[:200]}") from error
    return network.eval()


def type_and_message(error):
    """'KeyError: the first line of its message'."""
    message = str(error).strip().splitlines()
    return f"{type(error).__name__}: {message[0]}" if message else type(error).__name__


def short_message(error):
    """The first line of an error's message, at most 200 characters, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
