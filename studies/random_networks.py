"""Stable Diffusion v1.4 with random weights: it costs what the real one costs, without a download."""
import torch

from emoji.preset import HERE as EMOJI


def stable_diffusion():
    """The pipeline. Its tokenizer is the toy model's, padded: a random model reads any words alike."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=64, block_out_channels=(320, 640, 1280, 1280),
                                cross_attention_dim=768, attention_head_dim=8)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512)
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
        num_attention_heads=12))
    tokenizer = CLIPTokenizer.from_pretrained(EMOJI / "model" / "tokenizer", model_max_length=77)
    return StableDiffusionPipeline(vae, text_encoder, tokenizer, unet, noise_scheduler(), None, None,
                                   requires_safety_checker=False)


def noise_scheduler():
    """The scheduler that Stable Diffusion v1.4 is published with."""
    from diffusers import PNDMScheduler
    return PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                         skip_prk_steps=True, set_alpha_to_one=False)
