"""Rewards learned from people's preferences: PickScore, HPS v2, ImageReward. Contract: rewards.py.

Of these the paper trains on ImageReward alone, in the comparison with DPOK (appendix C). We have not run the
published weights: the tests send tiny random networks through this very code, and compare with the packages
hpsv2 and image-reward (oracles/). To add one, write a class here and name it in `rewards.LEARNED`.
"""
from pathlib import Path

import torch
import torch.nn.functional as F

from support.networks import (clip_pixels, from_pretrained, hub_file, image_embeddings, load_clip,
                              load_weights, read_weights, scoring_head)

CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
# Parts of the published names -> of those in transformers, one replacement after the other.
OPEN_CLIP = {"^(?!visual|text_projection|logit_scale)": "text_model.", "^visual.(?!proj)": "vision_model.",
             "^text_projection": "text_projection.weight", "^visual.proj": "visual_projection.weight",
             "token_embedding": "embeddings.token_embedding", "class_embedding": "embeddings.class_embedding",
             "positional_embedding": "embeddings.position_embedding.weight",
             "conv1": "embeddings.patch_embedding", "transformer.resblocks": "encoder.layers",
             "ln_pre": "pre_layrnorm", "ln_post": "post_layernorm", "ln_final": "final_layer_norm",
             "ln_([12])": r"layer_norm\1", r"\.attn\.": ".self_attn.", "c_fc": "fc1", "c_proj": "fc2"}
BLIP = {"^patch_embed.proj": "embeddings.patch_embedding", "^cls_token": "embeddings.class_embedding",
        "^pos_embed": "embeddings.position_embedding", "^blocks": "encoder.layers", "^norm": "post_layernorm",
        "norm([12])": r"layer_norm\1", "attn.qkv": "self_attn.qkv", "attn.proj": "self_attn.projection"}


class PickScore:
    """PickScore v1 (Kirstain et al. 2023): cosine of image and prompt, by a CLIP-H tuned on preferences.

    About 0.2; the published scores are 100 times that. Fetches 3.9 GB; on a GPU it takes 4.8 GB in fp32
    (studies/results/gpu.md). The formula is the model card's; there is no package to compare with.
    reward_model: another CLIP with its processor and tokenizer, by hub name or folder.
    """

    def __init__(self, device, reward_model=""):
        from transformers import AutoTokenizer
        model, words = reward_model or "yuvalkirstain/PickScore_v1", reward_model or CLIP_H
        self.processor, self.clip = load_clip(model, device, processor=words)
        self.tokenizer = from_pretrained(AutoTokenizer, words)

    @torch.no_grad()
    def __call__(self, images, prompts):
        tokens = self.tokenizer([prompt.text for prompt in prompts], padding="max_length", truncation=True,
                                max_length=77, return_tensors="pt").to(self.clip.device)
        texts = self.clip.get_text_features(**tokens).pooler_output        # (B, E)
        return F.cosine_similarity(image_embeddings(self.clip, clip_pixels(self.processor, images)), texts)


class HPSv2(PickScore):
    """HPS v2 (Wu et al. 2023): a cosine like PickScore's, about 0.28, with the names of open_clip.

    Fetches 3.9 GB, which are its weights in fp32. Tested against the package hpsv2.
    reward_model: a folder with HPS_v2_compressed.pt, or with version 2.1's HPS_v2.1_compressed.pt, and CLIP's
    config, processor and tokenizer, as transformers saves them.
    """

    def __init__(self, device, reward_model=""):
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPConfig, CLIPModel
        clip_h = reward_model or CLIP_H
        self.processor = from_pretrained(AutoImageProcessor, clip_h, backend="pil")
        self.tokenizer = from_pretrained(AutoTokenizer, clip_h)
        config = from_pretrained(CLIPConfig, clip_h)
        newer = (Path(clip_h) / "HPS_v2.1_compressed.pt").is_file()
        file = "HPS_v2.1_compressed.pt" if newer else "HPS_v2_compressed.pt"
        weights = read_weights(hub_file(reward_model or "xswu/HPSv2", file))
        weights = from_open_clip(weights.get("state_dict", weights))
        self.clip = load_weights(CLIPModel(config), weights, "", OPEN_CLIP).to(device)


def from_open_clip(weights):
    """open_clip's weights, split and turned as CLIPModel has them, under the names that OPEN_CLIP reads."""
    ours = {}
    for name, weight in weights.items():
        if "in_proj_" in name:  # query, key and value in one
            for letter, third in zip("qkv", weight.chunk(3)):
                ours[name.replace("in_proj_", f"{letter}_proj.")] = third
        else:
            ours[name] = weight.T if name in ("text_projection", "visual.proj") else weight
    return ours


class ImageReward:
    """ImageReward v1.0 (Xu et al. 2023): BLIP reads the prompt while it looks at the image, an MLP scores.

    About 0 for an average image, with a standard deviation of 1. Fetches 1.8 GB; on a GPU it takes
    2.3 GB in fp32 (studies/results/gpu.md). Tested against the package image-reward. reward_model: a folder
    with ImageReward.pt and BERT's tokenizer.
    """
    MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the published score, from the package

    def __init__(self, device, reward_model=""):
        from transformers import AutoTokenizer, CLIPImageProcessorPil
        self.tokenizer = from_pretrained(AutoTokenizer, reward_model or "bert-base-uncased")
        weights = read_weights(hub_file(reward_model or "THUDM/ImageReward", "ImageReward.pt"))
        vision, text = new_blip(weights)
        self.vision = load_weights(vision, weights, "blip.visual_encoder.", BLIP).to(device)
        self.text = load_weights(text, weights, "blip.text_encoder.").to(device)
        head, side = scoring_head(text.config.hidden_size), vision.config.image_size
        self.head = load_weights(head, weights, "mlp.layers.").to(device)
        crop = {"height": side, "width": side}
        self.processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=crop)

    @torch.no_grad()
    def __call__(self, images, prompts):
        pixels = clip_pixels(self.processor, images).to(self.vision.device)
        tokens = self.tokenizer([prompt.text for prompt in prompts], padding="max_length", truncation=True,
                                max_length=35, return_tensors="pt").to(self.vision.device)
        parts = zip(pixels.split(32), tokens.input_ids.split(32), tokens.attention_mask.split(32))
        return torch.cat([self.rate(*part) for part in parts])

    def rate(self, pixels, tokens, mask):
        """Pixels (B, 3, H, W), tokens (B, L) and their mask (B, L) -> rewards (B,)."""
        patches = self.vision(pixels).last_hidden_state                      # (B, P, E)
        states = self.text(tokens, attention_mask=mask, encoder_hidden_states=patches).last_hidden_state
        return (self.head(states[:, 0]).squeeze(1) - self.MEAN) / self.STD


def new_blip(weights):
    """BLIP's vision and text networks, without weights yet, of the sizes of ImageReward's weights."""
    from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    def shape(name):
        if f"blip.{name}" not in weights:
            raise ValueError(f"the reward model has no weights blip.{name}: is it ImageReward.pt?")
        return weights[f"blip.{name}"].shape

    def depth(prefix):
        return len({name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)})

    E, _, _, patch = shape("visual_encoder.patch_embed.proj.weight")
    words, width = shape("text_encoder.embeddings.word_embeddings.weight")
    vision = BlipVisionConfig(
        image_size=round((shape("visual_encoder.pos_embed")[1] - 1) ** 0.5) * patch, patch_size=patch,
        hidden_size=E, num_attention_heads=E // 64, num_hidden_layers=depth("blip.visual_encoder.blocks."),
        intermediate_size=shape("visual_encoder.blocks.0.mlp.fc1.bias")[0], layer_norm_eps=1e-6)
    text = BlipTextConfig(
        vocab_size=words, hidden_size=width, encoder_hidden_size=E, num_attention_heads=width // 64,
        num_hidden_layers=depth("blip.text_encoder.encoder.layer."),
        intermediate_size=shape("text_encoder.encoder.layer.0.intermediate.dense.bias")[0],
        max_position_embeddings=shape("text_encoder.embeddings.position_embeddings.weight")[0])
    return BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)
