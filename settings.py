"""Every setting of a run: its default, the presets, the flags, and what is refused.

Later sources override earlier ones: the defaults of Config, ALGORITHMS, PRESETS, PRESET_REWARDS, PRESET_ALGORITHMS, PRESET_BOTH, the flags.
"""
import argparse
import importlib.util
import json
import math
import os
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

import parallel
import runs
from ddpo import BASELINES
from policy import PRECISIONS
from prompts import PROMPT_SETS
from rewards import DEFAULT_PROMPTS, LEARNED, REWARDS, Alignment, short_name
from sampling import NOISES

ROOT = Path(__file__).resolve().parent


def setting(default, text):
    """A field of Config, with its help text."""
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """Every setting of a run.

    The defaults are the paper's (appendix D.1, D.2, D.5), with these exceptions.
    From the authors' code: eta, stats_buffer and stats_min_count, wording, advantage_clip (their JAX code: 10, their port: 5).
    Ours: epochs (the paper's 50,000 queries, divided), precision (their JAX code runs in fp32, their port in fp16 autocast), the
    settings of memory and speed, and how often to evaluate and to save.
    """
    preset: str = setting("emoji", "emoji: the embedded model; paper: Stable Diffusion v1.4 with the paper's settings, and fp16; lora: "
                                   "likewise, v1.5 and LoRA of rank 4; sdxl: LoRA of SDXL; flow: LoRA of any flow-matching model, of Stable Diffusion 3.5 medium "
                                   "without --model (both untested by us at full size)")
    reward: str = setting("compressibility", "%(names)s, or your own as path/to/file.py:function")
    watch: tuple = setting((), "a reward to evaluate on the fixed prompts but never to train on, as for --reward; may be repeated; "
                               "replaces the preset's; none: watch nothing. Options such as --reward-model go to the trained reward if it "
                               "reads them, else to the watched one")
    prompts: str = setting("", "%(sets)s, or a file: text with one prompt a line, or .jsonl; empty: the reward's own set")
    algorithm: str = setting("ddpo-is", "%(algorithms)s")
    model: str = setting("CompVis/stable-diffusion-v1-4", "any text-to-image pipeline of diffusers: hub name or folder; of Stable Diffusion "
                                                          "1, 2 and SDXL also one .safetensors or .ckpt file")
    prediction_type: str = setting("", "what the network predicts, if the model's own files say it wrongly or not at all: epsilon, v_prediction or sample")
    t5: bool = setting(True, "Stable Diffusion 3: read prompts with its third text encoder, too (20 GB in fp32, 10 in half precision)")
    lora_rank: int = setting(0, "train adapters of this rank beside the denoiser's attention (LoRA); 0: all weights of the denoiser")
    lora_alpha: int = setting(0, "an adapter adds alpha / rank B A x; 0: as the rank")
    height: int = setting(0, "of the images, in pixels; 0: the model's own")
    width: int = setting(0, "of the images, in pixels; 0: the model's own")
    call: str = setting("", "JSON of other options of the pipeline's call, as {\"clip_skip\": 1, \"negative_prompt\": \"blurred\"}")
    reward_model: str = setting("", "learned rewards: folder or hub name of another network than the published one")
    aesthetic_head: str = setting("", "aesthetic: the MLP's weights as a file of safetensors or torch")
    wording: str = setting("code", "alignment: code or paper, whose question and reference sentence to use")
    bert_model: str = setting("", "alignment: folder or hub name of BERTScore's encoder instead of deberta-xlarge-mnli")
    bert_baseline: float = setting(0.0, "alignment: what unrelated sentences score, taken as 0 (deberta-xlarge-mnli: 0.517)")
    name: str = setting("", "the run's folder under runs/; empty: reward, algorithm and the next free number")
    seed: int = setting(0, "seed of the training: prompts, noise, order")
    epochs: int = setting(196, "how often to sample and then learn; an epoch of RWR is what the paper calls a round")
    samples_per_epoch: int = setting(256, "images drawn in an epoch, each one reward query")
    images_per_prompt: int = setting(1, "images of each prompt that an epoch draws; with --stats-buffer 1 --stats-min-count 1 they are "
                                        "compared with each other alone, as in GRPO")
    updates_per_epoch: int = setting(4, "optimizer steps in an epoch; in DDPO each on its own share of the samples")
    batch_size: int = setting(128, "RWR, nft: images of an update")
    sampling_steps: int = setting(50, "denoising steps T")
    eta: float = setting(1.0, "noise of the chain, in (0, 1]")
    noise: str = setting("ddim", "sigma of a step: ddim, eta times that of the forward process's posterior; or cps, b' sin(eta pi / 2) "
                                 "(sampling.py)")
    guidance_scale: float = setting(0.0, "guidance weight of the pipeline's call, in sampling and in learning; 1 is none (of Z-Image 0, by --call). 0: of Stable "
                                         "Diffusion 1 and 2 the paper's 5 (emoji: 3; with a VLM's reward 1), else the call's own default")
    training_guidance: float = setting(0.0, "RWR, nft: guidance weight w in the loss; 0: as in sampling; 1: none, so that only the sampling "
                                            "is guided")
    learning_rate: float = setting(1e-5, "of AdamW; with --lora-rank 3e-4, and 3e-3 on the embedded model")
    adam_beta1: float = setting(0.9, "of AdamW")
    adam_beta2: float = setting(0.999, "of AdamW")
    adam_epsilon: float = setting(1e-8, "of AdamW")
    weight_decay: float = setting(1e-4, "of AdamW")
    max_grad_norm: float = setting(1.0, "the gradient is clipped to this norm")
    clip_range: float = setting(1e-4, "trust region of DDPO-IS: the ratio, per latent dimension, stays in 1 +- this")
    advantage_clip: float = setting(10.0, "DDPO: advantages are clipped to +- this")
    stats_buffer: int = setting(32, "DDPO, nft: the mean and deviation of a prompt are over this many of its last rewards")
    stats_min_count: int = setting(16, "DDPO, nft: with fewer rewards than this a prompt takes the batch's mean and deviation")
    skip_last_steps: int = setting(0, "DDPO: number of last steps that are not learned from (ddpo.py says why)")
    learn_steps: int = setting(0, "DDPO: number of steps that an update learns from, drawn at random; 0: all that are not skipped. Fewer "
                                  "take less time, and do not bias the gradient")
    baseline: str = setting("prompt", "DDPO, nft: what a reward is compared with: prompt, batch, or none (the bare reward)")
    kl_weight: float = setting(0.0, "DDPO: penalty on the KL to the pretrained policy, per step and latent dimension (a weight of "
                                       "DPOK's code means something else: see ddpo.surrogate)")
    beta: float = setting(0.2, "rwr: inverse temperature, by which rewards are multiplied")
    nft_strength: float = setting(1.0, "nft: b, how far v+ and v- lie from the old prediction, in units of the change")
    percentile: float = setting(0.9, "rwr-sparse: rewards of a prompt below this percentile, in [0, 1), are dropped")
    precision: str = setting("fp16", "of the networks: fp32, fp16 (GPU only) or bf16; weights that train stay in fp32, and so does a VAE that overflows")
    sample_batch: int = setting(16, "images drawn at a time: memory and speed only")
    micro_batch: int = setting(4, "images in a forward pass of learning: memory and speed only")
    gradient_checkpointing: bool = setting(False, "learning: compute activations twice instead of keeping them; slower, less memory")
    compile: bool = setting(False, "compile the U-Net by torch.compile: minutes at the start, then faster sampling on a GPU")
    eval_every: int = setting(10, "epochs between evaluations on fixed prompts and noise; the last is always evaluated")
    eval_steps: int = setting(0, "denoising steps of an evaluation; 0: as many as in training")
    stop_below: tuple = setting((), "a watched reward's value, as animal=0.9, or a share of its start, as animal=90%%%%: end the run at the "
                                    "first evaluation that finds it lower, with the weights of the evaluation before; may be repeated; none: "
                                    "never end. Checkpoints are then saved at evaluations, and at no other epoch")
    eval_prompts: int = setting(64, "number of fixed prompts in an evaluation, spread evenly over the prompt set")
    checkpoint_every: int = setting(1, "epochs between checkpoints (10 GB with all weights of Stable Diffusion), to which an interrupted "
                                     "run goes back; the last is always saved")
    tracker: str = setting("none", "where else to show the run: none, tensorboard or wandb")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1 or mps (we have not tested mps)")

    def __post_init__(self):
        # JSON and the command line give a list.
        self.watch, self.stop_below = (() if list(value) == ["none"] else tuple(value) for value in (self.watch, self.stop_below))


# ---- What algorithms and presets ask for ----

# RWR's numbers are appendix D.2's. Five epochs of 10,000 samples spend as many queries as DDPO; the authors' code has ten.
_RWR = {"epochs": 5, "samples_per_epoch": 10_000, "updates_per_epoch": 400, "eval_every": 1}
ALGORITHMS = {"ddpo-is": {}, "ddpo-sf": {"updates_per_epoch": 1}, "rwr": _RWR, "rwr-sparse": _RWR, "nft": {}}

EMOJI = ROOT / "emoji"
# An image is compared with the seven others of its prompt in the same epoch: a baseline from the first epoch on.
_GROUPS = {"images_per_prompt": 8, "stats_buffer": 1, "stats_min_count": 1}
PRESETS = {
    "emoji": {
        "model": str(EMOJI / "model"),
        "watch": (f"{EMOJI / 'judge.py'}:animal", f"{EMOJI / 'judge.py'}:number"),
        # Fewer and larger steps than the paper's, for a smaller model. How they were found: studies/results/README.md.
        "precision": "fp32", "epochs": 8, "samples_per_epoch": 64, "updates_per_epoch": 4, "sampling_steps": 10,
        **_GROUPS,
        "learning_rate": 2e-4,
        "clip_range": 2e-3,  # per dimension, and the latent has 2,048 dimensions where Stable Diffusion's has 16,384
        "skip_last_steps": 2,
        "sample_batch": 64, "micro_batch": 64, "eval_every": 1, "eval_prompts": 45},
    "paper": {},
    "lora": {"model": "stable-diffusion-v1-5/stable-diffusion-v1-5", "lora_rank": 4},  # appendix C, and the authors' port
    # Untested by us at full size.
    "sdxl": {"model": "stabilityai/stable-diffusion-xl-base-1.0", "lora_rank": 32, "precision": "bf16", "sampling_steps": 20, "eval_steps": 40,
             **_GROUPS, "sample_batch": 4, "micro_batch": 1, "gradient_checkpointing": True},
    # Steps, size of the groups, rank, alpha and image size are Flow-GRPO's (Liu et al. 2025, arXiv 2505.05470). The last action of such a
    # chain adds hardly any noise, so its gradient would drown the others': with the last step, which is no action, it is skipped.
    "flow": {"model": "stabilityai/stable-diffusion-3.5-medium", "lora_rank": 32, "lora_alpha": 64, "precision": "bf16", "sampling_steps": 10,
             "eval_steps": 40, "height": 512, "width": 512, "skip_last_steps": 2, "samples_per_epoch": 240, **_GROUPS, "images_per_prompt": 24,
             "sample_batch": 8, "micro_batch": 1, "gradient_checkpointing": True}}
# With --lora-rank, for any algorithm. 3e-4 is that of the authors' port; 1e-5, the paper's for all weights, moves adapters too little.
LORA_LEARNING_RATES = {"emoji": 3e-3}  # studies/results/README.md; else 3e-4

# What a preset says for one reward; "" stands for any other reward. The prompts are those that the preset's model can draw.
# In 10 guided steps the embedded model nearly always draws what it is asked for, so a VLM has nothing to teach it. In 4 unguided
# steps a sixth of the images show another animal (with the first embedded model, for which the batches and steps were chosen, two fifths). A
# single image tells little then, so the batches are larger. The learning rate is from a sweep with the third model, on alignment.
_EMOJI_VLM = {"prompts": "two_to_four_animals", "reward_model": str(EMOJI / "vlm"),
              "sampling_steps": 4, "samples_per_epoch": 256, "updates_per_epoch": 4, "epochs": 12, "learning_rate": 5e-5,
              "eval_every": 2, "eval_prompts": 135}
PRESET_REWARDS = {"emoji": {
    # The encoder is the model's own and has read captions alone. So the bare prompt is compared, as in the paper's wording.
    "alignment": {**_EMOJI_VLM, "wording": "paper", "bert_model": str(EMOJI / "model")},
    "counting": _EMOJI_VLM,
    "": {"prompts": "emoji_animals"}}}

# What a preset says for one algorithm: chosen from studies/compare.py --sweep (studies/results/README.md). All spend 512 queries.
# training_guidance: at this weight rounds without a reward change the images least (there, "Rounds without a reward").
_EMOJI_RWR = {"epochs": 4, "samples_per_epoch": 128, "updates_per_epoch": 20, "batch_size": 32, "learning_rate": 1e-4,
              "training_guidance": 1.4, "eval_every": 1}
PRESET_ALGORITHMS = {"emoji": {
    "ddpo-sf": {"epochs": 32, "samples_per_epoch": 16, "updates_per_epoch": 1, "learning_rate": 1e-4, "eval_every": 4},
    "rwr": {**_EMOJI_RWR, "beta": 60.0},
    "rwr-sparse": _EMOJI_RWR,
    "nft": {"updates_per_epoch": 10, "batch_size": 32, "learning_rate": 1e-4}}}

# What a preset says for one algorithm on a VLM's reward, on top of PRESET_REWARDS and PRESET_ALGORITHMS: chosen on alignment in the same
# way. All spend 3,072 queries. No training_guidance was found at which rounds without a reward leave these images as they are.
_EMOJI_VLM_RWR = {"samples_per_epoch": 768, "updates_per_epoch": 120, "training_guidance": 1.0}
_EMOJI_VLM_ALGORITHMS = {
    "ddpo-sf": {"epochs": 12, "samples_per_epoch": 256, "learning_rate": 1e-4, "eval_every": 2},
    "rwr": _EMOJI_VLM_RWR,
    "rwr-sparse": {**_EMOJI_VLM_RWR, "learning_rate": 2e-4},
    "nft": {"epochs": 4, "samples_per_epoch": 768, "updates_per_epoch": 120, "learning_rate": 3e-4, "eval_every": 1}}
PRESET_BOTH = {"emoji": {(algorithm, reward): choice for reward in ("alignment", "counting")
                         for algorithm, choice in _EMOJI_VLM_ALGORITHMS.items()}}

# Settings that only some algorithms read. With another algorithm they are refused. (RWR has no chain, and so no KL and no ratio.
# A DDPO update without guidance would score another policy than the one that sampled.)
DDPO, RWR = ("ddpo-is", "ddpo-sf"), ("rwr", "rwr-sparse")
FINE_TUNING, WITH_ADVANTAGES = (*RWR, "nft"), (*DDPO, "nft")
ALGORITHM_SETTINGS = {
    "clip_range": ("ddpo-is",), "baseline": WITH_ADVANTAGES, "skip_last_steps": DDPO, "learn_steps": DDPO, "kl_weight": DDPO, "advantage_clip": DDPO,
    "stats_buffer": WITH_ADVANTAGES, "stats_min_count": WITH_ADVANTAGES,
    "batch_size": FINE_TUNING, "training_guidance": FINE_TUNING, "beta": ("rwr",), "percentile": ("rwr-sparse",),
    "nft_strength": ("nft",)}

# Settings that say where something is. With --resume they say where the same thing is now.
PLACES = ("model", "prompts", "reward", "watch", "reward_model", "aesthetic_head", "bert_model")
# Settings of memory and speed, which change the result in rounding only.
SPEED = ("sample_batch", "micro_batch", "gradient_checkpointing", "compile")

# Settings that only some rewards read: the options of rewards.load_reward.
REWARD_SETTINGS = {"reward_model": tuple(LEARNED), "aesthetic_head": ("aesthetic",), "wording": ("alignment",),
                   "bert_model": ("alignment",), "bert_baseline": ("alignment",)}


# ---- Making a Config ----

def build_config(flags):
    """The Config of a dict of flags. Raises ValueError: see check."""
    preset, algorithm, reward = (flags.get(name, getattr(Config, name)) for name in ("preset", "algorithm", "reward"))
    for name in flags:
        if algorithm not in ALGORITHM_SETTINGS.get(name, ALGORITHMS):
            raise ValueError(f"--{name.replace('_', '-')} is read by {', '.join(ALGORITHM_SETTINGS[name])}, not by {algorithm}")
    of_reward, of_algorithm = preset_reward(preset, reward), PRESET_ALGORITHMS.get(preset, {}).get(algorithm, {})
    of_both = PRESET_BOTH.get(preset, {}).get((algorithm, reward), {})
    chosen = {**ALGORITHMS[algorithm], **PRESETS[preset], **of_reward, **of_algorithm, **of_both}
    config = Config(**{**chosen, **flags})
    if config.lora_rank and "learning_rate" not in flags:
        config.learning_rate = LORA_LEARNING_RATES.get(preset, 3e-4)
    if "training_guidance" not in flags and config.guidance_scale not in (0, usual_guidance(config)):
        config.training_guidance = Config.training_guidance  # the preset's goes with the preset's guidance
    config.prompts = config.prompts or of_reward.get("prompts") or DEFAULT_PROMPTS.get(reward, "common_animals")
    make_paths_absolute(config)
    if "watch" not in flags:  # the preset's choice, which may have the name of the reward that is trained
        config.watch = tuple(name for name in config.watch if short_name(name) != short_name(config.reward))
    take_options_of_watched(config, flags)
    config.device = chosen_device(config.device)
    check(config)
    return config


def usual_guidance(config):
    """Guidance weight of Stable Diffusion 1 and 2 if --guidance-scale says none: the paper's, or that of the bundled models."""
    if config.preset != "emoji":
        return 5.0
    # The largest of 1, 2, 3, 5 whose images are as near to the scenes as was asked: emoji/model/README.md. For a VLM: see _EMOJI_VLM.
    return 1.0 if config.reward in ("alignment", "counting") else 3.0


def call_options(config):
    """--call as a dict. ValueError if it is not a JSON object."""
    try:
        options = json.loads(config.call or "{}")
    except ValueError as error:
        raise ValueError(f"--call {config.call}: it is not JSON: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"--call {config.call}: must be a JSON object, as {{\"max_sequence_length\": 256}}")
    return options


def take_options_of_watched(config, flags):
    """Put the preset's options of the watched rewards into the config, where neither a flag nor the trained reward has them.

    Raises ValueError if a flag could be for more than one watched reward.
    """
    for option, readers in REWARD_SETTINGS.items():
        watched = [name for name in config.watch if name in readers and config.reward not in readers]
        if option in flags and len(watched) > 1:
            raise ValueError(f"--{option.replace('_', '-')} could be for {' and '.join(watched)}: watch one of them")
        for name in watched:
            if option not in flags:
                setattr(config, option, preset_reward(config.preset, name).get(option, getattr(Config, option)))


def chosen_device(name):
    """The device that "auto" means here, or the one that was named."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def make_paths_absolute(config):
    """Keep whole paths, so that a run can be resumed from any folder. Hub names and prompt sets stay as they are."""
    config.reward, config.watch = absolute_reward(config.reward), tuple(absolute_reward(name) for name in config.watch)
    for name in sorted({*PLACES} - {"reward", "watch"}):
        value = getattr(config, name)
        if value and value not in PROMPT_SETS and Path(value).exists():
            setattr(config, name, str(Path(value).resolve()))


def absolute_reward(name):
    """A reward's name, in which the path of a user's file is absolute."""
    path, colon, function = name.rpartition(":")
    return f"{Path(path).resolve()}:{function}" if colon else name


def preset_reward(preset, reward):
    """What the preset says for that reward."""
    choices = PRESET_REWARDS.get(preset, {})
    return choices.get(reward, choices.get("", {}))


def reward_options(config, name):
    """The options of rewards.load_reward for a reward that is trained, watched or evaluated.

    The trained reward takes the settings of the run. So does a watched one, if the trained reward does not read that option. Else,
    and for any other reward, it is the preset's option, or the default.
    """
    options = {}
    for option, readers in REWARD_SETTINGS.items():
        if name in readers:
            of_run = name == config.reward or name in config.watch and config.reward not in readers
            of_preset = preset_reward(config.preset, name).get(option, getattr(Config, option))
            options[option] = getattr(config, option) if of_run else of_preset
    return options


def saved_settings(folder, config):
    """The settings of a run, as runs.save_settings writes them.

    A path inside the run or the project is kept relative to it, so that both may be moved.
    """
    folders = [(str(Path(folder).resolve()), "{run}"), (str(ROOT), "{project}")]
    return json.loads(json.dumps(moved_paths(asdict(config), folders)))  # lists for tuples, as they are read again


def load_config(folder):
    """The settings of a run under runs/. Raises ValueError if there are none, or if they are damaged or of another version."""
    settings = runs.load_settings(folder)
    differing = sorted(set(settings) ^ {item.name for item in fields(Config)})
    if differing:
        others = f" and {len(differing) - 3} others" if len(differing) > 3 else ""
        raise ValueError(f"{folder / 'config.json'} is of another version: it differs in {', '.join(differing[:3])}{others}")
    for item in fields(Config):
        kinds = {float: (int, float), tuple: list}.get(item.type, item.type)
        if not isinstance(settings[item.name], kinds) or isinstance(settings[item.name], bool) != (item.type is bool):
            raise ValueError(f"{folder / 'config.json'} is damaged: {item.name} is {settings[item.name]!r}")
    return Config(**moved_paths(settings, [("{run}", str(Path(folder).resolve())), ("{project}", str(ROOT))]))


def moved_paths(settings, folders):
    """The settings, with the paths in PLACES moved. folders: pairs (old, new); a path inside old becomes the same inside new."""
    def moved(value):
        for old, new in folders:
            if value.startswith(f"{old}{os.sep}"):
                return new + value[len(old):]
        return value

    return {name: value if name not in PLACES else moved(value) if isinstance(value, str) else [moved(one) for one in value]
            for name, value in settings.items()}


def shared_settings(config):
    """The settings that make a result what it is and that its algorithm reads, as they may be published.

    They leave out the run's name and seed and the settings of speed. Paths are relative to the project.
    """
    def published(value):
        return value.replace(f"{ROOT}/", "") if isinstance(value, str) else value

    left_out = ("name", "seed", "device", "checkpoint_every", "tracker", *SPEED)
    return {name: list(map(published, value)) if isinstance(value, tuple) else published(value)  # of types that JSON has
            for name, value in {**asdict(config), "guidance_scale": config.guidance_scale or usual_guidance(config)}.items()
            if name not in left_out and config.algorithm in ALGORITHM_SETTINGS.get(name, ALGORITHMS)}


# ---- What is refused ----

def check(config):
    """Refuse settings that cannot run. Raises ValueError, in one line that says what to do."""
    check_numbers(config)
    check_epoch(config)
    check_watched(config)
    call_options(config)
    check_options([name for name in REWARD_SETTINGS if getattr(config, name) != getattr(Config, name)],
                  [config.reward, *config.watch])
    check_device(config.device)
    check_processes(config)
    if config.compile:
        check_compiler(config.device, config.precision)
    if config.precision == "fp16" and not config.device.startswith("cuda"):
        raise ValueError("--precision fp16 needs a GPU with CUDA; use --precision fp32 (or bf16)")
    if Path(config.name).name != config.name or config.name in (".", ".."):
        raise ValueError(f"--name {config.name!r}: must be a plain name; the run's folder is runs/NAME")


def check_numbers(config):
    """Raise ValueError if a setting is out of its range."""
    may_be_zero = ("weight_decay", "seed", "lora_rank", "lora_alpha", "guidance_scale", "height", "width", "adam_beta1", "adam_beta2", "kl_weight", "beta",
                   "percentile", "skip_last_steps", "learn_steps", "eval_steps", "bert_baseline",
                   "training_guidance")
    for item in fields(config):
        value, flag = getattr(config, item.name), "--" + item.name.replace("_", "-")
        zero = item.name in may_be_zero
        if item.type in (int, float) and not (math.isfinite(value) and (value > 0 or zero and value == 0)):
            raise ValueError(f"{flag} {value}: must be a {'non-negative' if zero else 'positive'} number")
    if config.seed >= 2**32:
        raise ValueError(f"--seed {config.seed}: must be below {2**32}")
    if max(config.adam_beta1, config.adam_beta2) >= 1:
        raise ValueError("--adam-beta1 and --adam-beta2 must be below 1")
    if config.lora_alpha and not config.lora_rank:
        raise ValueError(f"--lora-alpha {config.lora_alpha} goes with --lora-rank")
    if config.prediction_type not in ("", "epsilon", "v_prediction", "sample"):
        raise ValueError(f"--prediction-type {config.prediction_type}: choose epsilon, v_prediction or sample")
    if config.baseline not in BASELINES:
        raise ValueError(f"--baseline {config.baseline}: choose {', '.join(BASELINES)}")
    if config.noise not in NOISES:
        raise ValueError(f"--noise {config.noise}: choose {', '.join(NOISES)}")
    if config.percentile >= 1:
        raise ValueError(f"--percentile {config.percentile:g}: must be below 1, as 0.9 for the best tenth")
    if config.algorithm == "nft" and config.baseline == "none":
        raise ValueError("--baseline none: nft asks whether an image is better than others; choose prompt or batch")
    if config.stats_min_count > max(config.stats_buffer, config.images_per_prompt):
        raise ValueError(f"--stats-min-count {config.stats_min_count} is more than --stats-buffer {config.stats_buffer} "
                         f"rewards or --images-per-prompt {config.images_per_prompt} can give")


def check_epoch(config):
    """Raise ValueError if an epoch's images and steps cannot be dealt out to its updates."""
    if config.algorithm == "ddpo-sf" and config.updates_per_epoch > 1:
        raise ValueError(f"--updates-per-epoch {config.updates_per_epoch}: ddpo-sf takes one update an epoch, since its "
                         "samples must come from the current weights; use --algorithm ddpo-is for more")
    if config.samples_per_epoch % config.images_per_prompt:
        raise ValueError(f"--samples-per-epoch {config.samples_per_epoch} does not divide into --images-per-prompt "
                         f"{config.images_per_prompt}")
    if config.algorithm in WITH_ADVANTAGES and config.baseline == "prompt" and config.images_per_prompt == config.stats_buffer == 1:
        raise ValueError("--images-per-prompt 1 with --stats-buffer 1 compares an image with itself alone: give --stats-buffer 16 "
                         "--stats-min-count 8, too")
    if config.algorithm in DDPO and config.samples_per_epoch % config.updates_per_epoch:
        raise ValueError(f"--samples-per-epoch {config.samples_per_epoch} does not divide into --updates-per-epoch "
                         f"{config.updates_per_epoch} equal shares")
    if config.algorithm in DDPO and config.skip_last_steps >= config.sampling_steps:
        raise ValueError(f"--skip-last-steps {config.skip_last_steps} leaves none of --sampling-steps {config.sampling_steps}")
    if config.algorithm in DDPO and config.learn_steps > config.sampling_steps - config.skip_last_steps:
        raise ValueError(f"--learn-steps {config.learn_steps}: only {config.sampling_steps - config.skip_last_steps} steps are "
                         "learned from (--sampling-steps less --skip-last-steps)")


def check_watched(config):
    """Raise ValueError if two rewards would have one name, or if --stop-below has another than the watched ones."""
    for name in config.watch:
        if short_name(name) == short_name(config.reward):
            raise ValueError(f"--watch {short_name(name)}: " + (
                "it is the reward that is trained" if name == config.reward else "the trained reward has this name, too"))
        if [short_name(other) for other in config.watch].count(short_name(name)) > 1:
            raise ValueError(f"--watch {short_name(name)}: two watched rewards have this name, and would be one in the log")
    if config.stop_below and config.checkpoint_every != Config.checkpoint_every:
        raise ValueError("--stop-below saves checkpoints at evaluations: set --eval-every, and leave --checkpoint-every out")
    for name in stop_limits(config):
        if name not in map(short_name, config.watch):
            raise ValueError(f"--stop-below {name}: it is not watched; watched are {', '.join(map(short_name, config.watch)) or 'none'}")


def stop_limits(config):
    """name -> (number, whether it is a share of the reward's start), of --stop-below. Raises ValueError."""
    limits = {}
    for text in config.stop_below:
        name, _, value = text.partition("=")
        try:
            number = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"--stop-below {text}: must be as animal=0.9, a value of a watched reward, or as animal=90%, a share of its start")
        if name in limits:
            raise ValueError(f"--stop-below {text}: {name} has a limit already")
        limits[name] = number, value.endswith("%")
    return limits


def lowest(start, share):
    """What a watched reward that began at start must not fall below if it may lose all but that share of its size, whatever its sign."""
    return start - (1 - share) * abs(start)


def learned_steps(config):
    """How many steps a DDPO update learns from; one less if the last is no action (sampling.py) and is not skipped."""
    return config.learn_steps or config.sampling_steps - config.skip_last_steps


def check_compiler(device, precision):
    """Raise ValueError if torch.compile has no compiler here, or makes wrong programs."""
    if (device, precision) == ("cpu", "bf16"):  # torch 2.13: the inner levels of a compiled U-Net get gradients of exactly 0
        raise ValueError("--compile with --precision bf16 trains only the outer level of the U-Net on a CPU: use --precision fp32")
    if device.startswith("cuda") and not importlib.util.find_spec("triton"):
        raise ValueError("--compile needs the package triton, which comes with torch for GPUs on Linux")
    if not any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++")))):
        raise ValueError("--compile needs a C++ compiler, as g++")


def check_processes(config):
    """Raise ValueError if the processes that torchrun started cannot share this run's work."""
    count = parallel.size()
    images = config.batch_size if config.algorithm in FINE_TUNING else config.samples_per_epoch // config.updates_per_epoch
    if count > 1 and config.samples_per_epoch % count:
        raise ValueError(f"--samples-per-epoch {config.samples_per_epoch} does not divide into equal shares for {count} processes")
    if count > min(images, config.eval_prompts):
        raise ValueError(f"{count} processes are too many: an update has {images} images to share, an evaluation {config.eval_prompts} prompts")
    if count > 1 and config.device not in ("cuda", "cpu"):
        raise ValueError(f"--device {config.device}: several processes need --device cuda, where each takes a GPU of its own, or cpu")
    if count > 1 and config.device == "cuda" and parallel.local_rank() >= torch.cuda.device_count():
        raise ValueError(f"torch sees {torch.cuda.device_count()} GPUs: start no more processes on a machine (--nproc-per-node)")


def check_device(name):
    """Raise ValueError if torch has no such device here."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: choose auto, cpu, cuda, cuda:1 or mps") from error
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}.get(device.type)
    if count is None:
        raise ValueError(f"--device {name}: choose auto, cpu, cuda, cuda:1 or mps")
    if (device.index or 0) >= count:
        seen = f"torch sees only {count} of them" if count else "torch sees no GPU"
        raise ValueError(f"--device {name}: {seen}; use --device {f'{device.type}:0' if count else 'cpu'}")


def check_options(options, rewards):
    """Raise ValueError if one of these options is read by none of these rewards."""
    for name in options:
        if not set(REWARD_SETTINGS[name]) & set(rewards):
            raise ValueError(f"--{name.replace('_', '-')} is read by {', '.join(REWARD_SETTINGS[name])}, not by "
                             f"{', '.join(map(short_name, rewards))}")


def check_questions(prompts, rewards, every_prompt):
    """Raise ValueError if counting is among those rewards, and not every prompt (or, if False, none) has questions."""
    has_questions = [bool(prompt.questions) for prompt in prompts]
    if "counting" in rewards and not (all if every_prompt else any)(has_questions):
        sets = [name for name, prompt_set in PROMPT_SETS.items() if all(prompt.questions for prompt in prompt_set())]
        raise ValueError(f"counting needs prompts with questions: choose --prompts {' or '.join(sets)}")


# ---- The command line ----

def parse(argv, description):
    """The flags that were given, as a dict. Raises ValueError if one is unknown or malformed."""
    names = {"names": ", ".join(REWARDS), "sets": ", ".join(PROMPT_SETS), "algorithms": ", ".join(ALGORITHMS)}
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.error = refuse  # one line, not the usage of forty flags
    speed, places = (", ".join("--" + name.replace("_", "-") for name in names) for names in (SPEED, PLACES))
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with runs/NAME. With it may be given: --epochs, --stop-below, --device, "
                        f"--tracker; {speed}; and the new place of what has moved ({places})")
    choices = {"preset": PRESETS, "algorithm": ALGORITHMS, "wording": Alignment.WORDINGS, "precision": PRECISIONS,
               "baseline": BASELINES, "noise": NOISES, "tracker": ("none", "tensorboard", "wandb")}
    for item in fields(Config):
        kind = {"type": item.type, "choices": choices.get(item.name), "metavar": item.name.split("_")[-1].upper()}
        if item.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        if item.type is tuple:
            kind = {"action": "append", "metavar": "NAME=VALUE" if item.name == "stop_below" else "NAME"}
        parser.add_argument("--" + item.name.replace("_", "-"), **kind,
                            help=item.metadata["help"] % names + _default_text(item.name, item.default))
    return vars(parser.parse_args(argv))


def refuse(message):
    """What argparse is to do with a mistake."""
    raise ValueError(message)


def _default_text(name, default):
    """' (default: 196; rwr: 5; emoji: 8; emoji, rwr: 4)'."""
    sources = [("default", {name: default or {"prompts": "the reward's"}.get(name, default)}), *ALGORITHMS.items()]
    for preset, choices in PRESETS.items():
        sources.append((preset, choices))
        for table in (PRESET_REWARDS, PRESET_ALGORITHMS):
            sources += [(f"{preset}, {one}" if one else preset, own) for one, own in table.get(preset, {}).items()]
        sources += [(f"{preset}, {algorithm}, {reward}", own) for (algorithm, reward), own in PRESET_BOTH.get(preset, {}).items()]
    texts = [f"{source}: {_default_value(choices[name])}" for source, choices in sources if choices.get(name, "") not in ("", ())]
    return f" ({'; '.join(texts)})" if texts else ""


def _default_value(value):
    if isinstance(value, tuple):
        return " and ".join(map(_default_value, value))
    return value.replace(f"{ROOT}/", "") if isinstance(value, str) else value
