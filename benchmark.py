"""What a query costs on the machine at hand, and whether the ratio is 1 there: seconds, memory, precision.

    python benchmark.py                                        # the emoji preset
    python benchmark.py --preset paper --model random          # Stable Diffusion v1.4's architecture, without a download
    python benchmark.py --preset paper --model random --algorithm rwr --images 256
    python benchmark.py --reward aesthetic pickscore           # what it costs to judge a picture, likewise with random weights

For each precision it draws images as train.py does, scores what was drawn at other batch sizes than it was drawn at (kernels
of another shape round otherwise, and under autocast that is not small), learns from it, and prints a row of a table. `random`
makes the model once, under runs/: its pictures are noise, but they cost what real ones cost.
"""
import argparse
import re
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import hub
import runs
from prompts import load_prompts
from rewards import RewardError, load_reward, load_vlm, scoring_head
from sampling import PRECISIONS, rollout, score
from settings import ALGORITHMS, PRESET_REWARDS, PRESETS, build_config
from train import RUNS, UPDATES, Experiment, policy_of

# TFLOP of a query at 512 x 512 and 50 steps: a guided U-Net step is 2 x 0.803 forward, learning three times that; decoding 2.5.
TFLOP_STEP, TFLOP_DECODE = 2 * 0.803, 2.5
# The embedded model's, padded to the other's length: which words a random model reads is all the same.
EMOJI_TOKENIZER = Path(PRESETS["emoji"]["model"]) / "tokenizer"


def random_stable_diffusion(folder):
    """A pipeline of Stable Diffusion v1.4's architecture with random weights, 4 GB in fp32, in that folder."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8)
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                        block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512)
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12))
    tokenizer = CLIPTokenizer.from_pretrained(EMOJI_TOKENIZER, model_max_length=77)
    scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
                              steps_offset=1, set_alpha_to_one=False)
    pipeline = StableDiffusionPipeline(vae, text_encoder, tokenizer, unet, scheduler, None, None,
                                       requires_safety_checker=False)
    runs.write_atomically(folder, pipeline.save_pretrained)


def layers(width, depth, heads, **others):
    """A transformer's sizes, as transformers' configs call them."""
    return {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth, "num_attention_heads": heads,
            **others}


# The published rewards' sizes: of CLIP ViT-L/14 and ViT-H/14, of BLIP with ViT-L/16, of LLaVA 1.5 7B, of deberta-xlarge-mnli.
CLIP_L = {"projection_dim": 768, "vision_config": layers(1024, 24, 16, image_size=224, patch_size=14),
          "text_config": layers(768, 12, 12)}
CLIP_H = {"projection_dim": 1024, "vision_config": layers(1280, 32, 16, image_size=224, patch_size=14),
          "text_config": layers(1024, 24, 16)}
BLIP = layers(1024, 24, 16, image_size=224, patch_size=16), layers(768, 12, 12, encoder_hidden_size=1024, vocab_size=30524)
LLAVA = {"vision_config": layers(1024, 24, 16, image_size=336, patch_size=14),
         "text_config": {**layers(4096, 32, 32, vocab_size=32064), "intermediate_size": 11008}}
DEBERTA = layers(1024, 48, 16, relative_attention=True, pos_att_type=["c2p", "p2c"], position_biased_input=False)


def image_processor(vision):
    """CLIP's, for pictures of the size that a vision tower of these sizes takes."""
    from transformers import CLIPImageProcessorPil
    side = vision["image_size"]
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def random_clip(folder, sizes):
    """A CLIP with random weights in that folder, with an image processor and a tokenizer. Returns load_reward's options."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    CLIPModel(CLIPConfig(**sizes)).save_pretrained(folder)
    image_processor(sizes["vision_config"]).save_pretrained(folder)
    CLIPTokenizer.from_pretrained(EMOJI_TOKENIZER, model_max_length=77).save_pretrained(folder)
    return {"reward_model": str(folder)}


def random_aesthetic(folder):
    """A random CLIP ViT-L/14 and a random head in that folder, as Aesthetic takes them. Returns load_reward's options."""
    head = scoring_head(CLIP_L["projection_dim"])
    torch.save({f"layers.{name}": weight for name, weight in head.state_dict().items()}, folder / "head.pth")
    return {**random_clip(folder, CLIP_L), "aesthetic_head": str(folder / "head.pth")}


def random_pickscore(folder):
    """Likewise a CLIP ViT-H/14."""
    return random_clip(folder, CLIP_H)


def random_imagereward(folder):
    """Likewise ImageReward's BLIP and head, under the names of the published file."""
    from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel, CLIPTokenizer
    from transformers.models.blip.modeling_blip_text import BlipTextModel
    vision = BlipVisionModel(BlipVisionConfig(**BLIP[0]))
    text = BlipTextModel(BlipTextConfig(**BLIP[1]), add_pooling_layer=False)
    weights = {f"blip.text_encoder.{name}": weight for name, weight in text.state_dict().items()}
    for name, weight in vision.state_dict().items():
        for ours, theirs in BLIP_NAMES.items():
            name = re.sub(ours, theirs, name)
        weights[f"blip.visual_encoder.{name}"] = weight
    head = scoring_head(BLIP[1]["hidden_size"])
    weights |= {f"mlp.layers.{name}": weight for name, weight in head.state_dict().items()}
    torch.save(weights, folder / "ImageReward.pt")
    CLIPTokenizer.from_pretrained(EMOJI_TOKENIZER).save_pretrained(folder)
    return {"reward_model": str(folder)}


# The published names of BLIP's vision tower, from transformers' (rewards.ImageReward goes the other way).
BLIP_NAMES = {"^embeddings.patch_embedding": "patch_embed.proj", "^embeddings.class_embedding": "cls_token",
              "^embeddings.position_embedding": "pos_embed", "^post_layernorm": "norm", "^encoder.layers": "blocks",
              "self_attn.qkv": "attn.qkv", "self_attn.projection": "attn.proj", "layer_norm([12])": r"norm\1"}


def random_counting(folder):
    """Likewise a LLaVA 1.5 7B in half precision, 14 GB. Its answers are as long as may be: real ones cost less."""
    from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor
    vision, text = LLAVA["vision_config"], LLAVA["text_config"]
    tokenizer = LlavaProcessor.from_pretrained(PRESET_REWARDS["emoji"]["counting"]["reward_model"], backend="pil").tokenizer
    config = LlavaConfig(vision_config=CLIPVisionConfig(**vision), text_config=LlamaConfig(
        **text, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"))
    # As published, and half the memory while it is made.
    AutoModelForImageTextToText.from_config(config, dtype=torch.float16).save_pretrained(folder)
    LlavaProcessor(image_processor(vision), tokenizer, patch_size=vision["patch_size"],
                   vision_feature_select_strategy="default", num_additional_image_tokens=1).save_pretrained(folder)
    return {"reward_model": str(folder)}


def random_alignment(folder):
    """Likewise, and BERTScore's encoder."""
    from transformers import CLIPTokenizer, DebertaConfig, DebertaModel
    encoder = folder / "encoder"
    DebertaModel(DebertaConfig(**DEBERTA)).save_pretrained(encoder)
    CLIPTokenizer.from_pretrained(EMOJI_TOKENIZER).save_pretrained(encoder)
    return {**random_counting(folder), "bert_model": str(encoder)}


RANDOM_REWARDS = {"aesthetic": random_aesthetic, "pickscore": random_pickscore, "imagereward": random_imagereward,
                  "alignment": random_alignment, "counting": random_counting}  # hpsv2's network is pickscore's


def benchmark_reward(name, images, side, device):
    """A row of the rewards' table. The network is made in a folder that is temporary, and loaded as train.py loads it."""
    hub.quiet()
    torch.manual_seed(0)
    prompts = (load_prompts("two_to_eight_animals") * images)[:images]
    with tempfile.TemporaryDirectory() as folder:
        reward = load_reward(name, device, **RANDOM_REWARDS[name](Path(folder)))
    pictures = torch.rand(images, 3, side, side, device=device)
    reward(pictures[:1], prompts[:1])  # to warm up
    _, seconds, gigabytes = timed(device, lambda: reward(pictures, prompts))
    load_vlm.cache_clear()  # else the next one's memory would be counted on top
    return [name, f"{seconds / images:.3g}", f"{gigabytes:.1f}" if gigabytes else "-"]


def timed(device, work):
    """The result of work(), its seconds, and on a GPU its peak memory in GB (else 0)."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    result = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start, torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0


@torch.no_grad()
def ratio_deviation(policy, trajectory, micro_batch):
    """Largest |p_theta / p_old - 1| over all recorded pairs, scored so many at a time by the weights that drew them."""
    B, T = trajectory.log_probs.shape
    pairs = torch.cartesian_prod(torch.arange(B), torch.arange(T))
    scored = torch.cat([score(policy, trajectory, *part.T)[0] for part in pairs.split(micro_batch)])
    return ((scored - trajectory.log_probs.flatten()).exp() - 1).abs().max().item()


def benchmark(config, images, micro_batches, peak):
    """A row of the table."""
    policy = policy_of(config)
    experiment = Experiment(config, policy)
    update, keep_chain = UPDATES[config.algorithm]
    texts = [prompt.text for prompt in (load_prompts(config.prompts) * images)[:images]]

    def draw():
        return rollout(policy, texts, torch.Generator().manual_seed(0), config.sample_batch, keep_chain)

    def learn(trajectory):
        return update(policy, trajectory, torch.randn(images).abs(), experiment.optimizer, experiment.scaler, experiment.rng,
                      config)

    trajectory, _ = draw()
    learn(trajectory)  # to warm up: the first call of each kernel is not what an epoch is made of
    (trajectory, _), sampling, memory_sampling = timed(config.device, draw)
    deviations = [ratio_deviation(policy, trajectory, size) for size in micro_batches] if keep_chain else []
    _, learning, memory_learning = timed(config.device, lambda: learn(trajectory))
    # RWR learns from five pictures for each one drawn, whatever whole batches are here.
    share = 1 if keep_chain else 5 * images / (config.updates_per_epoch * config.batch_size)
    cells = [config.precision, f"{sampling / images:.3g}", f"{share * learning / images:.3g}",
             *(f"{gigabytes:.1f}" if gigabytes else "-" for gigabytes in (memory_sampling, memory_learning)),
             *(f"{deviation:.1e}" for deviation in deviations)]
    if peak and keep_chain:
        query = config.sampling_steps * 4 * TFLOP_STEP + TFLOP_DECODE
        cells.append(f"{query / peak / ((sampling + learning) / images):.0%}")
    return cells


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="emoji", help="whose settings (default: emoji)")
    add("--model", help="folder or hub name, or random; by default the preset's")
    add("--algorithm", choices=ALGORITHMS, default="ddpo-is")
    add("--precision", nargs="+", choices=PRECISIONS, help="default: fp32 on a CPU, all three on a GPU")
    add("--images", type=int, default=16, help="drawn and learned from (default: 16)")
    add("--sample-batch", type=int, help="images drawn at a time; by default the preset's")
    add("--micro-batch", type=int, help="pairs learned from at a time; by default the preset's")
    add("--ratio-batches", type=int, nargs="+", default=[1, 7, 16], help="pairs scored at a time (default: 1 7 16)")
    add("--peak-tflops", type=float, help="of the card, dense, for the share of it that 512 x 512 pictures reach")
    add("--reward", nargs="+", choices=RANDOM_REWARDS, help="instead: seconds and memory of judging 512 x 512 pictures, by "
        "networks of the published sizes with random weights (alignment and counting ask a VLM of 14 GB)")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    flags = {name: getattr(args, name) for name in ("preset", "model", "algorithm", "sample_batch", "micro_batch")
             if getattr(args, name) is not None}
    try:
        for name in ("images", "sample_batch", "micro_batch", "ratio_batches"):
            if getattr(args, name) is not None and np.min(getattr(args, name)) < 1:
                raise ValueError(f"--{name.replace('_', '-')}: must be at least 1")
        if args.peak_tflops and args.preset != "paper":
            raise ValueError("--peak-tflops is of --preset paper: its arithmetic is of 512 x 512 pictures")
        if "fp16" in (args.precision or ()) and device == "cpu":
            raise ValueError("--precision fp16 needs a GPU")
        if args.reward:
            unread = ("model", "precision", "sample_batch", "micro_batch", "peak_tflops")
            if others := [name for name in unread if getattr(args, name)]:
                raise ValueError(f"--{others[0].replace('_', '-')} is not of --reward, which draws and learns from nothing")
            print("| reward | s/image | peak GB |\n|---|---|---|")
            for name in args.reward:
                print("| " + " | ".join(benchmark_reward(name, args.images, 512, device)) + " |", flush=True)
            return 0
        if args.model == "random":
            flags["model"] = str(RUNS / "random-stable-diffusion")
            if not Path(flags["model"]).exists():
                random_stable_diffusion(Path(flags["model"]))
        config = build_config({**flags, "precision": "fp32"})
        _, chain = UPDATES[config.algorithm]
        updates = 1 if chain else max(1, 5 * args.images // config.batch_size)
        config = replace(config, samples_per_epoch=args.images, updates_per_epoch=updates)
        names = ["precision", "sampling (s/query)", "learning (s/query)", "peak GB sampling", "peak GB learning"]
        names += [f"largest \\|ratio - 1\\| at {size} pairs" for size in args.ratio_batches] if chain else []
        names += ["share of peak"] if args.peak_tflops and chain else []
        print(f"{config.algorithm}, {args.images} images of {config.sampling_steps} steps, drawn {config.sample_batch} and "
              f"learned from {config.micro_batch} at a time\n\n| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
        for precision in args.precision or (PRECISIONS if device == "cuda" else ["fp32"]):
            print("| " + " | ".join(row(replace(config, precision=precision), args)) + " |", flush=True)
    except (ValueError, OSError, RewardError) as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def row(config, args):
    """A row of the table, or what stood in its way: the other precisions are measured all the same."""
    try:
        return benchmark(config, args.images, args.ratio_batches, args.peak_tflops)
    except (FloatingPointError, torch.OutOfMemoryError) as error:
        return [config.precision, str(error).splitlines()[0]]


if __name__ == "__main__":
    sys.exit(main())
