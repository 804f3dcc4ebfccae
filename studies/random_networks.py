"""Networks of the published sizes with random weights: they cost what the real ones cost, and need no download.

Each function writes one into a folder, in the form in which it is published, so that it is loaded by the real loading code.
"""
import re
from pathlib import Path

import torch
from networks import scoring_head
from settings import PRESET_REWARDS, PRESETS

import runs

# The embedded model's tokenizer, padded to the other's length: a random model reads any words alike.
TOKENIZER = Path(PRESETS["emoji"]["model"]) / "tokenizer"


def write_stable_diffusion(folder):
    """A pipeline of Stable Diffusion v1.4's architecture, 4 GB in fp32."""
    runs.write_atomically(folder, stable_diffusion().save_pretrained)


def stable_diffusion():
    """That pipeline, in memory."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8)
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                        block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512)
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12))
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=77)
    return StableDiffusionPipeline(vae, text_encoder, tokenizer, unet, noise_scheduler(), None, None, requires_safety_checker=False)


def noise_scheduler():
    """The scheduler that Stable Diffusion v1.4 is published with."""
    from diffusers import PNDMScheduler
    return PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1,
                         set_alpha_to_one=False)


def layers(width, depth, heads, **others):
    """A transformer's sizes, under the names of transformers' configs."""
    return {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth, "num_attention_heads": heads,
            **others}


# The published sizes: CLIP ViT-L/14 and ViT-H/14, BLIP with ViT-L/16, LLaVA 1.5 7B, deberta-xlarge-mnli.
CLIP_L = {"projection_dim": 768, "vision_config": layers(1024, 24, 16, image_size=224, patch_size=14),
          "text_config": layers(768, 12, 12)}
CLIP_H = {"projection_dim": 1024, "vision_config": layers(1280, 32, 16, image_size=224, patch_size=14),
          "text_config": layers(1024, 24, 16)}
BLIP = layers(1024, 24, 16, image_size=224, patch_size=16), layers(768, 12, 12, encoder_hidden_size=1024, vocab_size=30524)
LLAVA = {"vision_config": layers(1024, 24, 16, image_size=336, patch_size=14),
         "text_config": {**layers(4096, 32, 32, vocab_size=32064), "intermediate_size": 11008}}
DEBERTA = layers(1024, 48, 16, relative_attention=True, pos_att_type=["c2p", "p2c"], position_biased_input=False)


def image_processor(vision):
    """CLIP's, for images of the size that a vision tower of these sizes takes."""
    from transformers import CLIPImageProcessorPil
    side = vision["image_size"]
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


# ---- One function for each learned reward: it writes the network and returns the options for load_reward ----

def write_clip(folder, sizes):
    """A CLIP with an image processor and a tokenizer."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    CLIPModel(CLIPConfig(**sizes)).save_pretrained(folder)
    image_processor(sizes["vision_config"]).save_pretrained(folder)
    CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=77).save_pretrained(folder)
    return {"reward_model": str(folder)}


def write_aesthetic(folder):
    """A CLIP ViT-L/14 and the aesthetic head."""
    head = scoring_head(CLIP_L["projection_dim"])
    torch.save({f"layers.{name}": weight for name, weight in head.state_dict().items()}, folder / "head.pth")
    return {**write_clip(folder, CLIP_L), "aesthetic_head": str(folder / "head.pth")}


def write_pickscore(folder):
    """A CLIP ViT-H/14."""
    return write_clip(folder, CLIP_H)


def write_imagereward(folder):
    """BLIP and the scoring head, under the names of the published file."""
    from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel, CLIPTokenizer
    from transformers.models.blip.modeling_blip_text import BlipTextModel
    vision = BlipVisionModel(BlipVisionConfig(**BLIP[0]))
    text = BlipTextModel(BlipTextConfig(**BLIP[1]), add_pooling_layer=False)
    weights = {f"blip.text_encoder.{name}": weight for name, weight in text.state_dict().items()}
    for name, weight in vision.state_dict().items():
        for ours, published in BLIP_NAMES.items():
            name = re.sub(ours, published, name)
        weights[f"blip.visual_encoder.{name}"] = weight
    head = scoring_head(BLIP[1]["hidden_size"])
    weights |= {f"mlp.layers.{name}": weight for name, weight in head.state_dict().items()}
    torch.save(weights, folder / "ImageReward.pt")
    CLIPTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return {"reward_model": str(folder)}


# The published names of BLIP's vision tower, from transformers' (preference_rewards.ImageReward goes the other way).
BLIP_NAMES = {"^embeddings.patch_embedding": "patch_embed.proj", "^embeddings.class_embedding": "cls_token",
              "^embeddings.position_embedding": "pos_embed", "^post_layernorm": "norm", "^encoder.layers": "blocks",
              "self_attn.qkv": "attn.qkv", "self_attn.projection": "attn.proj", "layer_norm([12])": r"norm\1"}


def write_counting(folder):
    """A LLaVA 1.5 7B in half precision, 14 GB. Its answers are as long as they may be; real ones cost less."""
    from transformers import (
        AutoModelForImageTextToText,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaProcessor,
    )
    vision, text = LLAVA["vision_config"], LLAVA["text_config"]
    tokenizer = LlavaProcessor.from_pretrained(PRESET_REWARDS["emoji"]["counting"]["reward_model"], backend="pil").tokenizer
    config = LlavaConfig(vision_config=CLIPVisionConfig(**vision), text_config=LlamaConfig(
        **text, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"))
    # In half precision, as it is published: so it needs half the memory while it is made.
    AutoModelForImageTextToText.from_config(config, dtype=torch.float16).save_pretrained(folder)
    LlavaProcessor(image_processor(vision), tokenizer, patch_size=vision["patch_size"],
                   vision_feature_select_strategy="default", num_additional_image_tokens=1).save_pretrained(folder)
    return {"reward_model": str(folder)}


def write_alignment(folder):
    """The same LLaVA, and BERTScore's encoder."""
    from transformers import CLIPTokenizer, DebertaConfig, DebertaModel
    encoder = folder / "encoder"
    DebertaModel(DebertaConfig(**DEBERTA)).save_pretrained(encoder)
    CLIPTokenizer.from_pretrained(TOKENIZER).save_pretrained(encoder)
    return {**write_counting(folder), "bert_model": str(encoder)}


RANDOM_REWARDS = {"aesthetic": write_aesthetic, "pickscore": write_pickscore, "imagereward": write_imagereward,
                  "alignment": write_alignment, "counting": write_counting}  # hpsv2 has the network of pickscore
