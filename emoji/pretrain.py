"""How the bundled toy models were made, from an emoji font alone.

They are the text-to-image model emoji/model, its flow-matching twin, the judge and the VLM.

    python emoji/pretrain.py            # remakes model and judge from nothing
    python emoji/pretrain.py --flow     # makes the flow-matching model emoji/flow
    python emoji/pretrain.py --vlm      # makes the vision-language model emoji/vlm
    python emoji/pretrain.py --check    # measures model and judge on fresh scenes, prints the card's table

    # trains the shipped weights for longer
    python emoji/pretrain.py --start emoji/model --work runs/better --output runs/better/model

If a command is stopped, the same command goes on. The flow-matching model begins with the weights of
emoji/model. --flow --check and --vlm --check measure those models alone.

The first command takes hours on two cores.

There are four stages, each with its own checkpoint under runs/pretrain: draw a pool of scenes; train the
autoencoder; train the judge; train the U-Net together with the text encoder on the pool's latents. The
vision-language model has two stages on the same pool: its vision tower, then the whole. Only tests import
this file.
"""
import argparse
import ctypes
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from functools import cache, lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # where the method is, if this file is run as a script
from emoji.judge import ANIMALS, EMOJI, MAX_NUMBER, SIZE, WEIGHTS, Judge, load_judge
from policy import load_policy, training_levels
from prompts import NUMBER_WORDS, counting_questions, with_number
from rewards import VLM, Alignment, compressibility, dialogue, to_pil
from sampling import rollout, target_of
from support.loading import load_pipeline, plain_scheduler
from support.networks import normalised
from support.run_folder import read_rows, write_atomically
from support.settings import Config

TOKENS = 16             # context of the text encoder
LATENT_CHANNELS = 8
POOL_SEED, FRESH_SEED = 0, 1
# What a scene can show: (animal, the judge's class; number).
SUBJECTS = [(animal, number) for animal in range(len(ANIMALS)) for number in range(1, MAX_NUMBER + 1)]
# The first model's worst animals by the judge's confidence (--check). Their scenes come twice in a pass, and
# have their own sheet.
HARD = ["spider", "sloth", "seal", "rat", "hedgehog", "koala", "sheep", "elephant", "whale", "squid"]
FONTS = ["/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",      # Debian, Ubuntu
         "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",  # Fedora
         "/usr/share/fonts/noto/NotoColorEmoji.ttf"]               # Arch


# ---- Scenes: one to four of an animal, on a background that holds most of the JPEG's bytes ----

@cache
def glyph(animal, font):
    """The animal's emoji as an RGBA image, cropped. Noto Color Emoji has bitmaps of 109 px only."""
    image = Image.new("RGBA", (160, 160))
    noto = ImageFont.truetype(font, 109)
    ImageDraw.Draw(image).text((12, 12), EMOJI[animal], font=noto, embedded_color=True)
    return image.crop(image.getbbox())


def draw_background(rng):
    """One of six kinds, (64, 64, 3) float in [0, 255]. All are light, so that black animals stay visible."""
    a, b = rng.uniform(110, 255, (2, 3))
    b = a + (b - a) * 0.7
    y, x = np.mgrid[:SIZE, :SIZE]
    kind = rng.choice(["plain", "horizon", "gradient", "noise", "stripes", "checks"],
                      p=[.14, .1, .1, .26, .2, .2])
    if kind == "plain":
        share = np.zeros((SIZE, SIZE))
    elif kind == "horizon":
        share = (y > rng.integers(20, 52)).astype(float)
    elif kind == "gradient":
        angle = rng.uniform(0, 2 * np.pi)
        share = (np.cos(angle) * (x - 31.5) + np.sin(angle) * (y - 31.5)) / 90 + 0.5
    elif kind == "noise":
        cell = rng.choice([4, 8])
        colours = (a + b) / 2 + rng.uniform(15, 45) * rng.uniform(-1, 1, (SIZE // cell, SIZE // cell, 3))
        return np.clip(colours.repeat(cell, 0).repeat(cell, 1), 0, 255)
    elif kind == "stripes":
        across = [x, y, x + y, x - y][rng.integers(4)]
        share = (across // rng.integers(5, 10) % 2).astype(float)
    else:
        cell = rng.integers(6, 12)
        share = ((x // cell + y // cell) % 2).astype(float)
    return a + share[..., None] * (b - a)


def draw_scene(seed, index, font):
    """Scene `index` of the endless series `seed`.

    Returns the image (64, 64, 3) uint8, the animal (the judge's class) and the number.
    """
    rng = np.random.default_rng([seed, index])
    animal = int(rng.integers(len(ANIMALS)))
    number = int(rng.choice([1, 2, 3, 4], p=[.64, .12, .12, .12]))
    image = Image.fromarray(draw_background(rng).astype(np.uint8))
    # Two to four stand in different quadrants, so that everyone counts the same.
    quadrants = rng.permutation([(16, 16), (48, 16), (16, 48), (48, 48)])[:number]
    for centre in quadrants:
        size = rng.uniform(36, 58) if number == 1 else rng.uniform(25, 32)
        slack = (SIZE - size) / 2 if number == 1 else (36 - size) / 2
        centre = (SIZE / 2 if number == 1 else centre) + rng.uniform(-slack, slack, 2)
        drawing = glyph(ANIMALS[animal], font)
        if rng.random() < 0.5:
            drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        scale = size / max(drawing.size)
        drawing = drawing.resize([round(side * scale) for side in drawing.size], Image.Resampling.LANCZOS)
        drawing = drawing.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC, expand=True)
        image.paste(drawing, tuple(int(c - side / 2) for c, side in zip(centre, drawing.size)), drawing)
    return np.asarray(image), animal, number


def _draw(task):
    return draw_scene(*task)


def draw_scenes(seed, count, font):
    """`count` scenes, drawn on all cores.

    Returns the images (count, 64, 64, 3) uint8, the animals and the numbers (count,) int64.
    """
    images = np.empty((count, SIZE, SIZE, 3), np.uint8)
    labels = np.empty((count, 2), np.int64)
    with multiprocessing.get_context("spawn").Pool() as pool:
        scenes = pool.imap(_draw, ((seed, i, font) for i in range(count)), chunksize=64)
        for i, (image, *label) in enumerate(tqdm(scenes, "drawing scenes", count)):
            images[i], labels[i] = image, label
    return images, labels[:, 0], labels[:, 1]


def to_float(images, device):
    """(B, 64, 64, 3) uint8 -> (B, 3, 64, 64) float in [0, 1]."""
    return torch.as_tensor(images).to(device).permute(0, 3, 1, 2).float() / 255


def caption(animal, number, bare=False):
    """'a cat', or 'cat' if bare; 'two cats'."""
    return ANIMALS[animal] if bare and number == 1 else with_number(ANIMALS[animal], number)


# ---- The architectures: Stable Diffusion's and LLaVA's own, made small ----

def new_autoencoder():
    """64 x 64 x 3 to latents of 16 x 16 x 8."""
    from diffusers import AutoencoderKL
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48), layers_per_block=1, latent_channels=LATENT_CHANNELS,
        norm_num_groups=8, sample_size=SIZE, mid_block_add_attention=False)


def new_unet():
    """Three levels, with cross-attention on the inner two."""
    from diffusers import UNet2DConditionModel
    return UNet2DConditionModel(
        sample_size=SIZE // 4, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, layers_per_block=1,
        block_out_channels=(32, 64, 128), norm_num_groups=8, cross_attention_dim=64,
        attention_head_dim=4,  # diffusers reads it as the number of heads
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))


def new_text_encoder(tokenizer):
    """CLIP's, two layers of 64."""
    from transformers import CLIPTextConfig, CLIPTextModel
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, projection_dim=64,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))


def new_tokenizer():
    """CLIP's byte-level BPE: all bytes, and merges learned from the captions.

    Each word of the captions becomes one token.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer
    start, end, suffix = "<|startoftext|>", "<|endoftext|>", "</w>"
    learner = Tokenizer(models.BPE(unk_token=end, end_of_word_suffix=suffix))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    captions = [caption(*subject) for subject in SUBJECTS]
    learner.train_from_iterator(captions, trainers.BpeTrainer(
        vocab_size=4000, end_of_word_suffix=suffix, show_progress=False))
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    final_letters = [letter + suffix for letter in letters]
    vocabulary = [start, end, *letters, *final_letters, *(a + b for a, b in merges)]
    vocabulary = {token: k for k, token in enumerate(dict.fromkeys(vocabulary))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, bos_token=start, eos_token=end, pad_token=end,
                         unk_token=end, model_max_length=TOKENS)


def new_vlm_processor():
    """LLaVA's processor, with a tokenizer of whole words: those of the questions and answers."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast
    said = [text for subject in SUBJECTS for pair in questions(*subject) for text in pair]
    splitter, special = pre_tokenizers.Whitespace(), ["<pad>", "<unk>", "<s>", "</s>", "<image>"]
    words = sorted({word for text in ["USER: ASSISTANT:", *said]
                    for word, _ in splitter.pre_tokenize_str(text.lower())})
    vocabulary = {word: k for k, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), splitter
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<image>"], model_max_length=128)
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    return LlavaProcessor(image_processor, tokenizer, patch_size=8, vision_feature_select_strategy="default",
                          num_additional_image_tokens=1)


def new_vlm(tokenizer):
    """LLaVA's: a CLIP vision tower of five layers, a Llama of three."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
    layers = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4}
    return LlavaForConditionalGeneration(LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=SIZE, patch_size=8, num_hidden_layers=5, **layers),
        text_config=LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=3, max_position_embeddings=128,
                                pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
                                eos_token_id=tokenizer.eos_token_id, **layers),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_layer=-1,
        attn_implementation="eager"))


# ---- Training ----

def train_networks(name, make, loss, steps, learning_rate, args):
    """Train the networks of make() on `loss(networks, step) -> scalar`.

    Returns those with the EMA weights, in eval mode. 0 steps leave them as make() gives them.

    A loss draws from batch(). So a run that goes on from its checkpoint is the run that was never stopped.
    The learning rate warms up linearly, stays, and decays linearly to zero over the last 30 %. The EMA looks
    back over a twentieth of the run.
    """
    path = args.work / f"{name}.pt"
    torch.manual_seed(POOL_SEED)
    modules = nn.ModuleDict(make()).to(args.device).train()
    if not steps:
        return modules.eval()
    ema = AveragedModel(modules, multi_avg_fn=partial(_average, max(0.0, 1 - 20 / steps)), use_buffers=True)
    optimizer = torch.optim.AdamW(
        modules.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min((k + 1) / 200, 1.0, max(steps - k, 0) / (0.3 * steps)))
    first = 0
    if path.exists():
        state = torch.load(path, map_location=args.device, weights_only=True)
        first = state["step"]
        modules.load_state_dict(state["modules"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        # The rate depends on the step alone, so the number of steps may change on the way.
        schedule.last_epoch = first - 1
        schedule.step()
    bar = tqdm(range(first, steps), f"{name:11}", initial=first, total=steps)
    smooth = None
    for step in bar:
        value = loss(modules, step)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.update_parameters(modules)
        smooth = value.item() if smooth is None else 0.99 * smooth + 0.01 * value.item()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{smooth:.4f}")
        if (step + 1) % 500 == 0 or step + 1 == steps:
            state = {"step": step + 1, "modules": modules.state_dict(), "ema": ema.state_dict(),
                     "optimizer": optimizer.state_dict()}
            write_atomically(path, partial(torch.save, state))
    return ema.module.eval()


def begun(args, **networks):
    """The networks, with the weights of --start if it is given: a model can be trained for longer."""
    if args.start:
        for name, network in networks.items():
            weights = load_judge(args.start.parent / WEIGHTS.name) if name == "judge" else (
                type(network).from_pretrained(args.start / name))
            network.load_state_dict(weights.float().state_dict())
    return networks


def batch(scenes, step, size):
    """A step's scenes (size,) of those given, and its random generator.

    Each pass takes every scene once, in a new order.
    """
    passed, row = divmod(step, len(scenes) // size)
    chosen = _order(passed, len(scenes))[row * size:][:size]
    return np.sort(scenes[chosen]), np.random.default_rng([POOL_SEED, step])


@lru_cache(1)
def _order(passed, count):
    return np.random.default_rng([POOL_SEED, passed, count]).permutation(count)


def _average(decay, averages, currents, updates):
    # The decay warms up: the random first weights would count for too long.
    decay = min(decay, (1 + updates) / (10 + updates))
    for average, current in zip(averages, currents):
        average.lerp_(current, 1 - float(decay)) if average.is_floating_point() else average.copy_(current)


def train_autoencoder(images, args):
    """The autoencoder, on squared error and a small KL."""
    def loss(networks, step):
        chosen, rng = batch(np.arange(len(images)), step, 16)
        x = to_float(images[chosen], args.device) * 2 - 1
        with torch.autocast(args.device, torch.bfloat16):
            posterior = networks["vae"].encode(x).latent_dist
            noise = torch.as_tensor(rng.standard_normal(posterior.mean.shape, np.float32), device=args.device)
            reconstruction = networks["vae"].decode(posterior.mean + posterior.std * noise).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        # A small weight first, then a larger one, against the denoiser's errors.
        kl_weight = 1e-4 if step < args.autoencoder_steps / 4 else 5e-4
        return F.mse_loss(reconstruction.float(), x) + kl_weight * kl.float()

    return train_networks("autoencoder", lambda: begun(args, vae=new_autoencoder()), loss,
                          args.autoencoder_steps, 2e-3, args)["vae"]


def as_if_generated(x, rng):
    """Images (B, 3, 64, 64), some made a little soft, some a little noisy, as generated images are.

    A judge should not mind.
    """
    soft = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    mix = torch.as_tensor(rng.random((len(x), 1, 1, 1), np.float32) ** 2, device=x.device)
    grain = torch.as_tensor(rng.standard_normal(x.shape, np.float32), device=x.device)
    return x + mix * (soft - x) + 0.05 * mix.flip(0) * grain


def train_judge(images, animals, numbers, args):
    """The judge, on the scenes' animals and numbers."""
    def loss(networks, step):
        chosen, rng = batch(np.arange(len(images)), step, 64)
        x = as_if_generated(to_float(images[chosen], args.device), rng)
        return classification_loss(*networks["judge"](x), animals[chosen], numbers[chosen])

    return train_networks("judge", lambda: begun(args, judge=Judge()), loss,
                          args.judge_steps, 2e-3, args)["judge"]


def classification_loss(animal_logits, number_logits, animals, numbers):
    """Cross-entropy of logits (B, 75) and (B, 4) against the scenes' animals and numbers (B,), summed."""
    device = animal_logits.device
    return (F.cross_entropy(animal_logits, torch.as_tensor(animals, device=device))
            + F.cross_entropy(number_logits, torch.as_tensor(numbers - 1, device=device)))


def train_tower(images, animals, numbers, processor, args):
    """The VLM's vision tower, on the judge's task.

    (LLaVA's tower is CLIP's, which was trained on images before, too.)
    """
    def loss(networks, step):
        chosen, rng = batch(np.arange(len(images)), step, 64)
        x = as_if_generated(to_float(images[chosen], args.device), rng)
        with torch.autocast(args.device, torch.bfloat16):
            states = networks["tower"](normalised(x, processor.image_processor)).last_hidden_state
            patches = states[:, 1:]                                    # without the class token, as LLaVA
            pooled = torch.cat([patches.amax(1), patches.mean(1)], 1)  # (B, 2 E), as in judge.py
            return classification_loss(networks["animal"](pooled), networks["number"](pooled),
                                       animals[chosen], numbers[chosen])

    def make():
        tower = new_vlm(processor.tokenizer).model.vision_tower
        width = 2 * tower.config.hidden_size
        return {"tower": tower, "animal": nn.Linear(width, len(ANIMALS)),
                "number": nn.Linear(width, MAX_NUMBER)}

    return train_networks("tower", make, loss, args.tower_steps, 1e-3, args)["tower"]


def train_vlm(images, animals, numbers, args):
    """The VLM: each scene is asked one of four questions.

    The loss is the next-token loss of the answer alone.
    """
    processor = new_vlm_processor()
    tokenizer, tower = processor.tokenizer, train_tower(images, animals, numbers, processor, args)
    dialogues = {(a, n, k): tokens_and_labels(processor, *pair)
                 for a, n in SUBJECTS for k, pair in enumerate(questions(a, n))}
    kinds = len(questions(0, 1))

    def loss(networks, step):
        chosen, rng = batch(np.arange(len(images)), step, 64)
        x = as_if_generated(to_float(images[chosen], args.device), rng)
        asked = [dialogues[scene]
                 for scene in zip(animals[chosen], numbers[chosen], rng.integers(kinds, size=64))]
        length = max(len(ids) for ids, _ in asked)
        ids, labels = (torch.tensor([row + [fill] * (length - len(row)) for row in rows], device=args.device)
                       for rows, fill in zip(zip(*asked), (tokenizer.pad_token_id, -100)))
        with torch.autocast(args.device, torch.bfloat16):
            return networks["vlm"](
                input_ids=ids, pixel_values=normalised(x, processor.image_processor), labels=labels,
                attention_mask=(ids != tokenizer.pad_token_id).long()).loss

    def make():
        network = new_vlm(tokenizer)
        network.model.vision_tower.load_state_dict(tower.state_dict())
        return {"vlm": network}

    network = train_networks("vlm", make, loss, args.vlm_steps, 1e-3, args)["vlm"]
    network.to("cpu", torch.float16).save_pretrained(args.vlm_output)
    processor.save_pretrained(args.vlm_output)


def questions(animal, number):
    """What may be asked about a scene, and the right answers."""
    how_many, which = (question for question, _ in counting_questions(ANIMALS[animal], number))
    whole = caption(animal, number)
    return [(question, whole) for question, _ in Alignment.WORDINGS.values()] + [
        (how_many, NUMBER_WORDS[number]), (which, ANIMALS[animal])]


def tokens_and_labels(processor, question, answer):
    """Token ids of a question about an image and its answer, and the labels.

    The labels are the ids of the answer and its end, else -100.
    """
    tokenizer = processor.tokenizer
    asked = dialogue(processor, question).replace("<image>", "<image>" * (SIZE // processor.patch_size) ** 2)
    asked, said = (tokenizer(text, add_special_tokens=False).input_ids for text in (asked, answer))
    said.append(tokenizer.eos_token_id)
    return asked + said, [-100] * len(asked) + said


@torch.no_grad()
def encode_pool(vae, images, args):
    """The pool's latents (N, 8, 16, 16), scaled to variance 1, and the scaling factor.

    They are encoded once and kept.
    """
    weights = b"".join(weight.cpu().numpy().tobytes() for weight in vae.state_dict().values())
    # If the autoencoder is trained for longer, it is another one, with latents of its own.
    path = args.work / f"latents-{len(images)}-{hashlib.sha256(weights).hexdigest()[:8]}.pt"
    if not path.exists():
        batches = tqdm(torch.arange(len(images)).split(64), "encoding   ")
        latents = [vae.encode(to_float(images[b], args.device) * 2 - 1).latent_dist.mean.cpu()
                   for b in batches]
        write_atomically(path, partial(torch.save, torch.cat(latents)))
    latents = torch.load(path, weights_only=True)
    factor = 1 / latents.std().item()
    return latents * factor, factor


def train_denoiser(name, latents, animals, numbers, tokenizer, scheduler, steps, args):
    """U-Net and text encoder jointly, on the loss of the scheduler's kind.

    This is diffusion's, on epsilon, or flow matching's, on eps - x_0. 10 % of the captions are dropped, for
    guidance.
    """
    from diffusers.models.attention_processor import AttnProcessor
    kinds = [(*subject, bare) for subject in SUBJECTS for bare in (False, True)]
    row = {kind: k for k, kind in enumerate(kinds)}
    ids = tokenizer([caption(*kind) for kind in kinds] + [""], padding="max_length", truncation=True,
                    return_tensors="pt").input_ids.to(args.device)
    (kind, timesteps, a_of, b_of), size = training_levels(scheduler), args.denoiser_batch
    hard = np.flatnonzero(np.isin(animals, [ANIMALS.index(name) for name in HARD]))
    scenes = np.concatenate([np.arange(len(latents)), hard])

    def loss(networks, step):
        chosen, rng = batch(scenes, step, size)
        bare, dropped = rng.random((2, size)) < [[0.3], [0.1]]
        rows = [-1 if d else row[a, n, bool(b)]
                for a, n, b, d in zip(animals[chosen], numbers[chosen], bare, dropped)]
        x_0 = latents[torch.as_tensor(chosen)].to(args.device)        # (B, 8, 16, 16)
        # One timestep from each part of the range: the loss varies less than with independent ones
        # (Kingma et al. 2021, app. I.1).
        place = (rng.random() + rng.permutation(size) / size) % 1     # (B,), in [0, 1)
        level = torch.as_tensor((place * len(timesteps)).astype(int))
        t = timesteps[level]
        a, b = (values[level].to(args.device)[:, None, None, None] for values in (a_of, b_of))
        noise = torch.as_tensor(rng.standard_normal(x_0.shape, np.float32), device=args.device)
        states = networks["text_encoder"](ids[rows])[0]
        with torch.autocast(args.device, torch.bfloat16):  # faster, see train_autoencoder
            prediction = networks["unet"](a * x_0 + b * noise, t.to(args.device), states).sample.float()
        errors = (prediction - target_of(x_0, noise, a, b, kind)).square().mean((1, 2, 3))
        if kind == "flow":
            return errors.mean()
        # Min-SNR weights (Hang et al. 2023, gamma = 5): most of the plain loss is about noise that nobody
        # sees.
        snr = (a / b).flatten() ** 2
        return (snr.clamp(max=5) / snr * errors).mean()

    def make():
        networks = begun(args, unet=new_unet(), text_encoder=new_text_encoder(tokenizer))
        if args.device == "cpu":
            # The plain attention: these sequences are short.
            networks["unet"].set_attn_processor(AttnProcessor())
        return networks

    return train_networks(name, make, loss, steps, 1e-3, args)


def scheduler():
    """Stable Diffusion's schedule."""
    from diffusers import DDIMScheduler
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                         set_alpha_to_one=False, clip_sample=False)


def remake(args):
    """All four stages, each skipped if its checkpoint says that it is done.

    Then model and judge are saved.
    """
    from diffusers import StableDiffusionPipeline
    images, animals, numbers = load_pool(args)
    vae = train_autoencoder(images, args)
    judge = train_judge(images, animals, numbers, args)
    latents, scaling_factor = encode_pool(vae, images, args)
    vae.register_to_config(scaling_factor=scaling_factor)
    tokenizer = new_tokenizer()
    networks = train_denoiser("denoiser", latents, animals, numbers, tokenizer, scheduler(),
                              args.denoiser_steps, args)
    pipeline = StableDiffusionPipeline(
        vae, networks["text_encoder"], tokenizer, networks["unet"], scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    save_model(pipeline, args)
    save_file({name: weight.half().contiguous() if weight.is_floating_point() else weight
               for name, weight in judge.cpu().state_dict().items()}, args.output.parent / WEIGHTS.name)


def remake_flow(args):
    """The flow-matching twin of the model in --start.

    It has that model's autoencoder. Its U-Net and text encoder are trained on with another loss.
    """
    from diffusers import StableDiffusionPipeline, UniPCMultistepScheduler
    images, animals, numbers = load_pool(args)
    start = os.path.relpath(args.start)  # this path is saved with the model
    pipeline = StableDiffusionPipeline.from_pretrained(start).to(args.device)
    latents, _ = encode_pool(pipeline.vae, images, args)
    # Diffusers' own class draws with this one: its U-Nets do not know the scheduler of flow matching's
    # transformers.
    pipeline.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, steps_offset=1)
    networks = train_denoiser("flow", latents, animals, numbers, pipeline.tokenizer,
                              plain_scheduler(pipeline.scheduler), args.flow_steps, args)
    pipeline.unet, pipeline.text_encoder = networks["unet"], networks["text_encoder"]
    save_model(pipeline, args)


def save_model(pipeline, args):
    """Save a pipeline in --output, in half precision."""
    pipeline.to("cpu", torch.float16).save_pretrained(args.output)
    # transformers would load a text encoder saved in fp16 as fp16, diffusers the rest as fp32, and these do
    # not mix.
    pipeline.text_encoder.float().save_pretrained(args.output / "text_encoder")


def load_pool(args):
    """The pool of scenes: images, animals, numbers. It is drawn once and kept under `work`."""
    args.work.mkdir(parents=True, exist_ok=True)
    path = args.work / "scenes.npz"
    if not path.exists():
        images, animals, numbers = draw_scenes(POOL_SEED, args.scenes, args.font)
        write_atomically(path, partial(np.savez, images=images, animals=animals, numbers=numbers))
    pool = np.load(path)
    if len(pool["numbers"]) != args.scenes:
        sys.exit(f"pretrain.py: {path} holds {len(pool['numbers'])} scenes, not --scenes {args.scenes}: "
                 "delete it, and the scenes are drawn again")
    return pool["images"], pool["animals"], pool["numbers"]


# ---- What came out ----

def sample(prompts, steps, args):
    """Images (B, 3, 64, 64) in [0, 1] of B prompts by the model in --output.

    They are drawn as a policy draws: eta = 1, seed 0.
    """
    policy = load_policy(Config(
        model=str(args.output), sampling_steps=steps, guidance_scale=args.guidance_scale, device=args.device,
        precision="fp32"), scored=False)
    trajectory = rollout(policy, prompts, torch.Generator().manual_seed(0), 64, keep_chain=False,
                         title=f"{steps} steps".ljust(11))
    return policy.decode(trajectory.x_0)


def frechet_distance(features, others):
    """Between two sets of features (N, D) and (M, D): |m - m'|^2 + tr(C + C' - 2 (C C')^1/2).

    This is eq. 6 of Heusel et al. 2017.
    """
    (mean, covariance), (other_mean, other_covariance) = (
        (part.mean(0), np.cov(part, rowvar=False)) for part in (features, others))
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    # C C' has the eigenvalues of root C' root, which is symmetric.
    cross = np.sqrt(np.linalg.eigvalsh(root @ other_covariance @ root).clip(0)).sum()
    return ((mean - other_mean) ** 2).sum() + np.trace(covariance) + np.trace(other_covariance) - 2 * cross


def judged(judge, images, animals, numbers):
    """What the judge sees in images (B, 3, 64, 64) of those animals and numbers (B,).

    Returns its pooled features (B, 256), its confidence in the right animal (B,), and whether animal and
    number are right (2, B).
    """
    device = next(judge.parameters()).device
    with torch.no_grad():
        features = torch.cat([judge.pooled(part.to(device)) for part in images.split(256)])
        confidence = judge.animal(features).softmax(1).cpu().numpy()
        seen = judge.number(features).argmax(1).cpu().numpy() + 1
    right = np.stack([confidence.argmax(1) == animals, seen == numbers])
    return features.double().cpu().numpy(), confidence[range(len(animals)), animals], right


def judge_of(args):
    """The file of the judge of the model in --output.

    A flow model has none of its own: its judge is that of the model in --start.
    """
    return (args.start if args.flow else args.output).parent / WEIGHTS.name


def print_card(args):
    """Print the tables of the model card.

    All distances are to one set of fresh scenes. The samples have its captions.
    """
    judge, vae = load_judge(judge_of(args), args.device), load_pipeline(args.output, args.device).vae
    count, steps = args.check_images, args.sampling_steps
    images, animals, numbers = draw_scenes(FRESH_SEED, 2 * count, args.font)
    scenes, others = (to_float(half, args.device) for half in np.split(images, 2))
    prompts = [caption(*pair) for pair in zip(animals[:count], numbers[:count])]
    with torch.no_grad():
        decoded = torch.cat([vae(part * 2 - 1).sample.clamp(-1, 1) / 2 + 0.5 for part in scenes.split(64)])
    psnr = -10 * (decoded - scenes).square().mean().log10().item()
    truth = judged(judge, scenes, animals[:count], numbers[:count])
    print(f"\n{count} images each, guidance {args.guidance_scale:g}, eta 1\n\n"
          "| images | animal right | number right | Fréchet distance | JPEG size |\n|---|---|---|---|---|")
    for name, pictures, half in (
            ("fresh scenes", scenes, slice(count)),
            ("other fresh scenes: the floor", others, slice(count, None)),
            (f"scenes through the autoencoder, PSNR {psnr:.1f} dB", decoded, slice(count)),
            *((f"samples, {k} steps", sample(prompts, k, args), slice(count)) for k in (50, steps))):
        features, confidence, right = judged(judge, pictures, animals[half], numbers[half])
        print("| " + " | ".join([name, *(f"{share:.1%}" for share in right.mean(1)),
                                 f"{frechet_distance(features, truth[0]):.1f}",
                                 f"{-np.mean(compressibility(pictures, None)):.2f} kB"]) + " |")
    # These are of the last row, the samples of few steps.
    print_by_number_and_animal(confidence, right, animals[:count], numbers[:count])
    print_drift(args)


def print_by_number_and_animal(confidence, right, animals, numbers):
    """Print what judged() says of samples of these animals and numbers (B,).

    It prints the shares by number, and the ten worst animals.
    """
    for number in range(1, MAX_NUMBER + 1):
        shares = right[:, numbers == number].mean(1)
        print(f'| of these "{caption(0, number)}" and so on | '
              + " | ".join(f"{share:.1%}" for share in shares) + " | - | - |")
    means = {name: confidence[animals == k].mean()
             for k, name in enumerate(ANIMALS) if (animals == k).any()}
    worst = ", ".join(f"{name} {means[name]:.0%}" for name in sorted(means, key=means.get)[:10])
    print(f"\nthe ten worst animals, by the judge's mean confidence: {worst}\n")


def print_drift(args):
    """Print what three rounds of RWR without a reward (beta 0) do to the pictures of 45 prompts."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, HERE.parent / "train.py", "--name", "drift",
                        "--model", args.output.resolve(),
                        "--algorithm", "rwr", "--beta", "0", "--epochs", "3", "--eval-every", "3",
                        "--sampling-steps", str(args.sampling_steps),
                        "--guidance-scale", str(args.guidance_scale), "--device", args.device],
                       cwd=folder, check=True)
        before, *_, after = read_rows(Path(folder) / "runs" / "drift")
    sizes = [-row["eval_reward_mean"] for row in (before, after)]
    print("\n| three rounds of RWR without a reward | before | after | |\n|---|---|---|---|")
    print(f"| JPEG size | {sizes[0]:.2f} kB | {sizes[1]:.2f} kB | {sizes[1] / sizes[0] - 1:+.0%} |")
    print("| animal right, says the shipped judge | "
          + " | ".join(f"{row['watched']['animal']:.0%}" for row in (before, after)) + " | |")


def print_vlm_card(args):
    """Print the table of the VLM's card: how often its answers are right.

    rewards.VLM asks it about fresh scenes and about samples.
    """
    count = min(args.check_images, 2048)
    scenes, animals, numbers = draw_scenes(FRESH_SEED, count, args.font)
    samples = sample([caption(*pair) for pair in zip(animals, numbers)], args.sampling_steps, args)
    vlm = VLM(args.device, str(args.vlm_output))
    print(f"\n| asked, {count:,} images of all animals | about | right | animal | number | worst animal |\n"
          "|---|---|---|---|---|---|")
    meant = {caption(*subject): subject for subject in SUBJECTS}
    for about, images in (("fresh scenes", to_float(scenes, "cpu")),
                          (f"samples, {args.sampling_steps} steps", samples)):
        for k, (question, _) in enumerate(questions(0, 1)):
            answers = vlm.answer(images, [question] * len(images))
            right = np.array([answer == questions(a, n)[k][1]
                              for answer, a, n in zip(answers, animals, numbers)])
            worst = min(set(animals), key=lambda a: right[animals == a].mean())
            parts = ["-", "-"]
            if k < len(Alignment.WORDINGS):  # the answer is a caption: each part may be right by itself
                understood = np.array([meant.get(answer, (-1, 0)) for answer in answers])
                parts = [f"{np.mean(understood[:, part] == truth):.1%}"
                         for part, truth in enumerate((animals, numbers))]
            print("| " + " | ".join([question, about, f"{right.mean():.1%}", *parts,
                                     f"{ANIMALS[worst]}, {right[animals == worst].mean():.0%}"]) + " |")


def contact_sheet(args, path, prompts, columns):
    """An image of every prompt, in rows, with captions."""
    tile, label = 96, 14
    rows = -(-len(prompts) // columns)
    sheet = Image.new("RGB", (columns * (tile + 4), rows * (tile + label + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for k, (prompt, image) in enumerate(zip(prompts, sample(prompts, args.sampling_steps, args))):
        x, y = k % columns * (tile + 4), k // columns * (tile + label + 4)
        sheet.paste(to_pil(image).resize((tile, tile), Image.Resampling.LANCZOS), (x, y))
        pen.text((x + tile / 2, y + tile + 1), prompt, fill="black", anchor="ma")
    sheet.save(path)


def draw_contact_sheets(args):
    """Every animal, then rows of two, three and four.

    Of the diffusion model also the hard animals, ten images of each.
    """
    prompts = [caption(a, 1) for a in range(len(ANIMALS))]
    prompts += [caption((7 * n + 5 * k) % len(ANIMALS), n) for n in (2, 3, 4) for k in range(15)]
    if args.flow:
        contact_sheet(args, args.output.parent / "contact_sheet_flow.png", prompts, 15)
        return
    contact_sheet(args, args.output.parent / "contact_sheet.png", prompts, 15)
    hard = [with_number(name, 1) for name in HARD for _ in range(10)]
    contact_sheet(args, args.output.parent / "hard_animals.png", hard, 10)


def parse(argv):
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--check", action="store_true", help="measure the models in --output, train nothing")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--vlm", action="store_true", help="the vision-language model instead of the others")
    which.add_argument("--flow", action="store_true", help="the flow-matching model instead of the others")
    add("--output", type=Path,
        help="folder of the text-to-image model (default: emoji/model, with --flow emoji/flow)")
    add("--vlm-output", type=Path, default=HERE / "vlm", help="folder of the vision-language model")
    add("--start", type=Path,
        help="a folder as --output: autoencoder, judge (beside the folder), U-Net and text encoder begin "
             "with its weights, not random ones, where --work has no checkpoint of them yet; those of 0 "
             "steps stay as they are")
    add("--work", type=Path, default=Path("runs/pretrain"), help="scenes and checkpoints")
    add("--font", default=next((font for font in FONTS if os.path.exists(font)), FONTS[0]),
        help="NotoColorEmoji.ttf")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--scenes", type=int, default=100_000, help="size of the pool of training scenes")
    add("--autoencoder-steps", type=int, default=12_000, help="each on 16 scenes")
    add("--judge-steps", type=int, default=1_600, help="each on 64 scenes")
    add("--denoiser-steps", type=int, default=33_000, help="each on 64 scenes")
    add("--flow-steps", type=int, default=2_000, help="each on 512 scenes, since few large steps suit a GPU")
    add("--denoiser-batch", type=int,
        help="scenes in a step of U-Net and text encoder (default: 64, with --flow 512)")
    add("--tower-steps", type=int, default=6_000, help="each on 64 scenes")
    add("--vlm-steps", type=int, default=2_000, help="each on 64 scenes")
    add("--sampling-steps", type=int, default=10,
        help="for the check and the contact sheet: the emoji preset's")
    add("--guidance-scale", type=float, default=3.0,
        help="for the check and the contact sheet: the emoji preset's")
    add("--check-images", type=int, default=4096, help="the check's samples, and fresh scenes beside them")
    args = parser.parse_args(argv)
    args.output = args.output or HERE / ("flow" if args.flow else "model")
    if args.denoiser_batch is None:
        args.denoiser_batch = 512 if args.flow else 64
    args.start = args.start or (HERE / "model" if args.flow else None)
    return args


def refuse_mistakes(args):
    """Exit with one line if the arguments cannot be what is meant."""
    if not os.path.exists(args.font):
        sys.exit(f"pretrain.py: no emoji font at {args.font}: install Noto Color Emoji (Debian, Ubuntu: "
                 "apt install fonts-noto-color-emoji) or give its file with --font")
    if args.vlm and args.start:
        sys.exit("pretrain.py: --start is not for --vlm, whose networks begin with random weights")
    if args.start and not all(path.exists() for path in (
            args.start / "model_index.json", args.start.parent / WEIGHTS.name)):
        sys.exit(f"pretrain.py: --start {args.start}: no model is there, or no {WEIGHTS.name} beside it: "
                 "give a folder as emoji/model")
    least = 0 if args.start and not args.flow else 1  # 0 steps keep a network of --start as it is
    of_diffusion = ("autoencoder", "judge", "denoiser")
    for name in ("tower", "vlm") if args.vlm else ("flow",) if args.flow else of_diffusion:
        if (steps := getattr(args, f"{name}_steps")) < least:
            sys.exit(f"pretrain.py: --{name}-steps {steps}: must be at least {least}")
    if args.denoiser_batch < 1:
        sys.exit(f"pretrain.py: --denoiser-batch {args.denoiser_batch}: must be at least 1")
    if args.scenes < (most := max(64, args.denoiser_batch)):
        sys.exit(f"pretrain.py: --scenes {args.scenes}: a step takes {most}")
    needed = {args.output / "model_index.json": args.check or args.vlm,
              judge_of(args): args.check and not args.vlm,
              args.vlm_output / "config.json": args.check and args.vlm}
    for path, is_needed in needed.items():
        if is_needed and not path.exists():
            sys.exit(f"pretrain.py: there is no {path} to measure")
    if args.check_images <= 256:
        sys.exit(f"pretrain.py: --check-images {args.check_images}: a distance in the judge's 256 features "
                 "needs more than 256 images")


def main(argv=None):
    """The command line."""
    args = parse(argv)
    refuse_mistakes(args)
    if sys.platform == "linux" and args.device == "cpu":
        # glibc gives the memory of large tensors back to the kernel at each free. It is to keep
        # it: no mmap for them (M_MMAP_MAX = 0), no trimming (M_TRIM_THRESHOLD).
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0), libc.mallopt(-1, 2**31 - 1)
    if args.vlm:
        if not args.check:
            train_vlm(*load_pool(args), args)
        print_vlm_card(args)
        return
    if not args.check:
        (remake_flow if args.flow else remake)(args)
        draw_contact_sheets(args)
    print_card(args)


if __name__ == "__main__":
    main()
