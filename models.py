"""The text-to-image models: what differs between three architectures, and what all share: texts, images, adapters, precision.

A pipeline is diffusers' own. Its denoiser, a U-Net or a transformer, is what trains. How a pipeline is loaded, and which ones are refused,
is in pipelines.py.

B images or prompts, N (image, timestep) pairs, latents of (C, H, W), prompts of L tokens and E features.
"""
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from networks import one_line_errors
from schedules import is_flow

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


# ---- Three architectures ----

@dataclass(frozen=True)
class Architecture:
    """What differs between diffusers' pipelines."""
    title: str            # for messages
    denoiser: str         # the part of the pipeline that trains
    networks: dict        # part -> its class in diffusers or transformers, the denoiser first
    optional: tuple       # those that may be missing
    tokenizers: dict      # part -> the text encoder that reads its tokens
    predict: Callable     # (pipeline, denoiser, x_t (N, C, H, W), t (N,), texts) -> (N, C, H, W); texts: a tuple of encode_prompts
    adapted: tuple        # the layers beside which LoRA puts adapters: the projections of attention
    vae_in_fp32: bool     # its VAE overflows in half precision, so it runs in fp32 unless its settings say otherwise (force_upcast)


def predict_sd(pipeline, unet, x_t, t, texts):
    """Stable Diffusion 1 and 2: one text encoder's states."""
    states, = texts
    return unet(x_t, t, states).sample


def predict_sdxl(pipeline, unet, x_t, t, texts):
    """SDXL: the states of two text encoders side by side, the second's pooled state, and the size of the image."""
    (states, pooled), pixels = texts, image_size(pipeline)
    sizes = pooled.new_tensor([[*pixels, 0, 0, *pixels]]).expand(len(x_t), -1)  # original size, corner of a crop, target size: no crop
    return unet(x_t, t, states, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample


def predict_sd3(pipeline, transformer, x_t, t, texts):
    """Stable Diffusion 3: a transformer over patches, which reads the states of two CLIPs, then T5's, and the CLIPs' pooled states."""
    states, pooled = texts
    return transformer(x_t, timestep=t, encoder_hidden_states=states, pooled_projections=pooled).sample


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CLIPS = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"}
ARCHITECTURES = {
    "StableDiffusionPipeline": Architecture(
        "Stable Diffusion 1 or 2", "unet",
        {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}, (),
        {"tokenizer": "text_encoder"}, predict_sd, ATTENTION, False),
    "StableDiffusionXLPipeline": Architecture(
        "SDXL", "unet",
        {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel",
         "text_encoder_2": "CLIPTextModelWithProjection"}, (),
        CLIPS, predict_sdxl, ATTENTION, True),
    "StableDiffusion3Pipeline": Architecture(
        "Stable Diffusion 3", "transformer",
        {"transformer": "SD3Transformer2DModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModelWithProjection",
         "text_encoder_2": "CLIPTextModelWithProjection", "text_encoder_3": "T5EncoderModel"}, ("text_encoder_3",),
        {**CLIPS, "tokenizer_3": "text_encoder_3"}, predict_sd3,
        (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"), False)}


def architecture_of(pipeline):
    """The Architecture of a diffusers pipeline."""
    return ARCHITECTURES[type(pipeline).__name__]


def denoiser_of(pipeline):
    """The network of a pipeline that trains."""
    return getattr(pipeline, architecture_of(pipeline).denoiser)


def networks_of(pipeline):
    """The networks of a pipeline, the denoiser first."""
    found = (getattr(pipeline, part) for part in architecture_of(pipeline).networks)
    return [network for network in found if network is not None]


def autocast(device, precision):
    """The context in which networks run at that precision, whatever their weights are in."""
    return torch.autocast(torch.device(device).type, PRECISIONS[precision], enabled=precision != "fp32")


def vae_precision(pipeline, precision):
    """The precision in which a pipeline's VAE runs if the other networks run in that one."""
    return "fp32" if architecture_of(pipeline).vae_in_fp32 and pipeline.vae.config.force_upcast else precision


def latent_shape(pipeline):
    """(C, H, W) of the latents that the denoiser denoises."""
    config = denoiser_of(pipeline).config
    size = config.sample_size
    return config.in_channels, *(size if isinstance(size, (list, tuple)) else (size, size))


def image_size(pipeline):
    """(height, width) in pixels of the images that it draws."""
    return tuple(side * pipeline.vae_scale_factor for side in latent_shape(pipeline)[1:])


# ---- LoRA ----

LORA_FILE = "pytorch_lora_weights.safetensors"


def add_lora(pipeline, rank, seed):
    """Freeze the denoiser and put adapters of that rank beside its attention projections (Hu et al. 2021), in fp32. Only they train.

    alpha is the rank, so that an adapter adds B A x. A is drawn from `seed`, B is 0: the denoiser begins as the pretrained one.
    """
    from peft import LoraConfig
    denoiser = denoiser_of(pipeline)
    denoiser.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):  # peft draws on the CPU from the global generator, which is the rewards'
        torch.manual_seed(seed)
        denoiser.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian",
                                        target_modules=list(architecture_of(pipeline).adapted)))
    for weight in denoiser.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def is_lora(folder):
    """Whether a folder holds adapters, which need the model that they were trained beside."""
    return (Path(folder) / LORA_FILE).is_file()


def load_lora(pipeline, folder):
    """Put the adapters of a folder beside the denoiser's weights, frozen. Raises ValueError, in one line, if they do not fit."""
    with one_line_errors("LoRA", folder):
        pipeline.load_lora_weights(str(folder), weight_name=LORA_FILE)
    denoiser_of(pipeline).requires_grad_(False)


def save_pipeline(pipeline, folder):
    """Write a pipeline, or its denoiser's adapters alone if it has any, as plain diffusers loads them: with their rank and alpha."""
    denoiser = denoiser_of(pipeline)
    if not getattr(denoiser, "peft_config", None):
        with drawable(pipeline):
            pipeline.save_pretrained(folder)
        return
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict
    pipeline.save_lora_weights(folder, get_peft_model_state_dict(denoiser),
                               **_collate_lora_metadata({architecture_of(pipeline).denoiser: denoiser}))


@contextlib.contextmanager
def drawable(pipeline):
    """The context in which a pipeline has a scheduler that its own class draws with: diffusers' U-Nets know another one for flows."""
    import diffusers
    scheduler = pipeline.scheduler
    if is_flow(scheduler) and architecture_of(pipeline).denoiser == "unet":
        pipeline.scheduler = diffusers.UniPCMultistepScheduler(
            num_train_timesteps=scheduler.config.num_train_timesteps, prediction_type="flow_prediction", use_flow_sigmas=True, steps_offset=1,
            flow_shift=scheduler.config.shift)
    try:
        yield
    finally:
        pipeline.scheduler = scheduler


# ---- A second set of weights ----

class WithWeights:
    """A network as it was with those weights, of which it keeps a copy: name -> weight. It is called as the network is."""

    def __init__(self, network, weights):
        self.network = network
        self.weights = {name: weight.detach().clone() for name, weight in weights.items()}

    def __call__(self, *inputs, **options):
        return torch.func.functional_call(self.network, self.weights, inputs, options)


# ---- Texts and images ----

KEPT = 2**28  # numbers: 1 GB


@torch.no_grad()
def encode_prompts(pipeline, prompts):
    """B texts -> what the denoiser is told of them, and of the empty prompt: two tuples of tensors, with B rows and with one.

    The first tensor of a tuple is the text encoders' hidden states (B, L, E). SDXL and Stable Diffusion 3 have a second, the pooled
    states (B, P). Each text is encoded once, since the text encoders do not train. Its states are kept on the CPU.
    """
    known, device = pipeline.__dict__.setdefault("states_of_prompts", {}), denoiser_of(pipeline).device
    new = [text for text in dict.fromkeys(prompts) if text not in known]
    others = {part.replace("tokenizer", "prompt"): None for part in architecture_of(pipeline).tokenizers if part != "tokenizer"}

    def encoded(texts, guided):  # states of the texts, of the empty prompt, then likewise the pooled states
        return pipeline.encode_prompt(prompt=texts, **others, device=device, num_images_per_prompt=1, do_classifier_free_guidance=guided)

    if new and sum(tensor.numel() for states in known.values() for tensor in states) > KEPT:
        known.clear()
        new = list(dict.fromkeys(prompts))
    if None not in known:  # the empty prompt: of SDXL it is no text's states but zeros
        known[None] = [states[0].cpu() for states in encoded([""], True)[1::2]]
    if new:
        known.update(zip(new, zip(*(states.cpu() for states in encoded(new, False)[::2]))))
    return (tuple(torch.stack(rows).to(device) for rows in zip(*(known[text] for text in prompts))),
            tuple(states[None].to(device) for states in known[None]))


def tokens_of(pipeline, prompts, whole=False):
    """B texts -> B tuples of the tokens that the text encoders read, or with `whole` of all tokens: one tuple for each tokenizer."""
    found = []
    for name in architecture_of(pipeline).tokenizers:
        if tokenizer := getattr(pipeline, name):
            options = {} if whole else {"max_length": tokenizer.model_max_length, "truncation": True}
            texts = pipeline.maybe_convert_prompt([*prompts, ""], tokenizer) if hasattr(pipeline, "maybe_convert_prompt") else [*prompts, ""]
            found.append([tuple(row) for row in tokenizer(texts, **options).input_ids[:-1]])  # "", since it refuses an empty list
    return list(zip(*found))


def cut_prompts(pipeline, prompts):
    """A line that says which of B texts the text encoders cut off, or None if the one with the longest context reads each to its end."""
    tokenizers, prompts = [getattr(pipeline, name) for name in architecture_of(pipeline).tokenizers], list(prompts)
    longest = [tokenizer.model_max_length for tokenizer in tokenizers if tokenizer]
    of_longest = longest.index(max(longest))
    cut = [(text, len(tokens[of_longest])) for text, tokens in zip(prompts, tokens_of(pipeline, prompts, whole=True))
           if len(tokens[of_longest]) > max(longest)]
    if not cut:
        return None
    lengths = sorted({length for _, length in cut})
    span = " to ".join(str(length) for length in dict.fromkeys((lengths[0], lengths[-1])))
    return (f"{len(cut)} of {len(prompts)} prompts have {span} tokens and are cut to the text encoder's {max(longest)}, the first is "
            f"{cut[0][0]!r}")


@torch.no_grad()
def decode(pipeline, x_0, precision="fp32"):
    """Latents (B, C, H, W) -> images (B, 3, height, width) of image_size, fp32 in [0, 1].

    Raises FloatingPointError if an image is not finite. As 8-bit pixels it would look like a black one.
    """
    height, width = image_size(pipeline)
    images = torch.empty(len(x_0), pipeline.vae.config.out_channels, height, width, device=x_0.device)
    # The decoder's activations need more memory than anything else: 1 GB an image of 512 x 512 pixels.
    at_once = min(8, max(1, 2**19 // (height * width)))
    for latents, part in zip(x_0.split(at_once), images.split(at_once)):
        part[:] = decode_with_gradient(pipeline, latents, precision)
    return images


def decode_with_gradient(pipeline, x_0, precision="fp32"):
    """As decode, all at once, and with a gradient to the latents: baselines_guidance.py follows it."""
    config = pipeline.vae.config
    with autocast(x_0.device, vae_precision(pipeline, precision)):
        latents = x_0 / config.scaling_factor + (config.get("shift_factor") or 0)
        decoded = pipeline.vae.decode(latents).sample.float()
    if not decoded.isfinite().all():
        raise FloatingPointError("an image is not finite")
    return (decoded / 2 + 0.5).clamp(0, 1)
