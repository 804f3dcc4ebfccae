"""Every setting of a run: its default, the presets, the flags, and what is refused.

A flag stands above the preset (there: what it says for an algorithm above what it says for a reward, above what it says for
all), the preset above what the algorithm asks for, and that above Config, the paper's numbers.
"""
import argparse
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

import runs
from ddpo import BASELINES
from prompts import PROMPT_SETS
from rewards import DEFAULT_PROMPTS, LEARNED, REWARDS, Alignment
from sampling import PRECISIONS


def setting(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """Every setting of a run. The defaults are the paper's (appendix D)."""
    reward: str = setting("compressibility", "%(names)s, or your own as path/to/file.py:function")
    prompts: str = setting("", "%(sets)s, or a text file, one prompt a line; empty: the reward's own set")
    algorithm: str = setting("ddpo-is", "%(algorithms)s")
    model: str = setting("CompVis/stable-diffusion-v1-4", "folder or hub name of a Stable Diffusion pipeline")
    reward_model: str = setting("", "of a learned reward: folder or hub name of another network than the published one")
    aesthetic_head: str = setting("", "of aesthetic: the MLP's weights as a file, safetensors or torch's")
    wording: str = setting("code", "of alignment: question and reference sentence as in the authors' code, or as in the paper")
    bert_model: str = setting("", "of alignment: folder or hub name of BERTScore's encoder instead of deberta-xlarge-mnli")
    bert_baseline: float = setting(0.0, "of alignment: what unrelated sentences score, taken as 0 (deberta-xlarge-mnli: 0.517)")
    name: str = setting("", "the run's folder under runs/; empty: reward, algorithm and the next free number")
    seed: int = setting(0, "of the training: prompts, noise, order")
    epochs: int = setting(196, "rounds of sampling and learning")
    samples_per_epoch: int = setting(256, "images drawn, and reward queries spent, an epoch")
    updates_per_epoch: int = setting(4, "optimizer steps an epoch; in DDPO each on its own share of the samples")
    batch_size: int = setting(128, "RWR: images of an update")
    sampling_steps: int = setting(50, "denoising steps T")
    eta: float = setting(1.0, "noise of the DDIM chain, in (0, 1]")
    guidance_scale: float = setting(5.0, "classifier-free guidance w, in sampling and in learning; 1 is none")
    guided_training: bool = setting(True, "RWR: guidance in the loss too; without, only the sampling is guided")
    learning_rate: float = setting(1e-5, "of AdamW")
    adam_beta1: float = setting(0.9, "of AdamW")
    adam_beta2: float = setting(0.999, "of AdamW")
    adam_epsilon: float = setting(1e-8, "of AdamW")
    weight_decay: float = setting(1e-4, "of AdamW")
    max_grad_norm: float = setting(1.0, "the gradient is clipped to this norm")
    clip_range: float = setting(1e-4, "trust region of DDPO-IS: the ratio, per latent dimension, stays in 1 +- this")
    advantage_clip: float = setting(10.0, "DDPO: advantages are clipped to +- this")
    stats_buffer: int = setting(32, "DDPO: last rewards of a prompt that its mean and deviation are taken over")
    stats_min_count: int = setting(16, "DDPO: with fewer rewards than this, a prompt uses the batch's mean and deviation")
    skip_last_steps: int = setting(0, "DDPO: last steps of the chain that are not learned from (see the README's departures)")
    baseline: str = setting("prompt", "DDPO: what a reward is compared with: prompt, batch, or none (the bare reward)")
    kl_weight: float = setting(0.0, "DDPO: penalty on the KL to the pretrained policy, per step and latent dimension (DPOK)")
    beta: float = setting(0.2, "RWR (rwr): inverse temperature, by which rewards are multiplied")
    percentile: float = setting(0.9, "RWR (rwr-sparse): of a prompt's rewards, in [0, 1); what lies below is dropped")
    precision: str = setting("fp16", "autocast of the U-Net: fp32, fp16 (GPU only) or bf16; weights train in fp32")
    sample_batch: int = setting(16, "images drawn at a time: memory and speed only")
    micro_batch: int = setting(4, "(image, step) pairs (RWR: images) that an update takes in at a time: memory and speed only")
    eval_every: int = setting(10, "epochs between evaluations on fixed prompts and noise; the last is always evaluated")
    eval_prompts: int = setting(64, "number of those prompts, spread evenly over the prompt set")
    checkpoint_every: int = setting(10, "epochs between checkpoints; the last is always saved")
    device: str = setting("auto", "auto, cpu or cuda")


# What an algorithm asks for (appendix D.2).
_RWR = {"epochs": 5, "samples_per_epoch": 10_000, "updates_per_epoch": 400, "eval_every": 1, "checkpoint_every": 1}
ALGORITHMS = {"ddpo-is": {}, "ddpo-sf": {"updates_per_epoch": 1}, "rwr": _RWR, "rwr-sparse": _RWR}

ASSETS = Path(__file__).resolve().parent / "assets"
PRESETS = {
    "emoji": {
        "model": str(ASSETS / "emoji"),
        "precision": "fp32", "epochs": 24, "samples_per_epoch": 64, "updates_per_epoch": 8, "sampling_steps": 10,
        "learning_rate": 2e-4,
        # Tuned: the latent is 8 times smaller than Stable Diffusion's, and 1e-4 per dimension another trust region.
        "clip_range": 2e-3,
        # Of 10 steps the last but one moves far at a tiny sigma: 7/8 of the gradient's variance, and little left to decide.
        "skip_last_steps": 2,
        # About one image per prompt and epoch: a prompt's own statistics come late, and stale.
        "stats_buffer": 16, "stats_min_count": 8,
        "sample_batch": 64, "micro_batch": 64, "eval_every": 3, "eval_prompts": 45, "checkpoint_every": 3},
    "paper": {}}

# What a preset says for one reward, above what it says for all; "" for any other reward. The prompts are those that the
# preset's model can draw. With the preset's 10 guided steps it draws nearly always what it is asked for, so that a VLM has
# nothing to teach it; with 4 unguided ones it fails half the time. Failures are few and say little: hence the larger batches.
_EMOJI_VLM = {"prompts": "two_to_four_animals", "reward_model": str(ASSETS / "emoji_vlm"), "guidance_scale": 1.0,
              "sampling_steps": 4, "samples_per_epoch": 256, "updates_per_epoch": 4, "epochs": 12, "learning_rate": 1e-4,
              "eval_every": 2, "checkpoint_every": 2, "eval_prompts": 135}
PRESET_REWARDS = {"emoji": {
    # Its own text encoder has read captions alone, so what is compared is the bare prompt, as in the paper's wording.
    "alignment": {**_EMOJI_VLM, "wording": "paper", "bert_model": str(ASSETS / "emoji")},
    "counting": _EMOJI_VLM,
    "": {"prompts": "common_animals"}}}

# Settings that only some algorithms read: given with another, they are a mistake. (RWR has no chain to take a KL or a ratio
# over; and a DDPO update without guidance would score another policy than the one that sampled.)
DDPO, RWR = ("ddpo-is", "ddpo-sf"), ("rwr", "rwr-sparse")
OWNERS = {"clip_range": ("ddpo-is",), "baseline": DDPO, "skip_last_steps": DDPO, "kl_weight": DDPO, "advantage_clip": DDPO,
          "stats_buffer": DDPO, "stats_min_count": DDPO,
          "batch_size": RWR, "guided_training": RWR, "beta": ("rwr",), "percentile": ("rwr-sparse",)}

REWARD_OWNERS = {"reward_model": tuple(LEARNED), "aesthetic_head": ("aesthetic",), "wording": ("alignment",),
                 "bert_model": ("alignment",), "bert_baseline": ("alignment",)}

# What a preset says for one algorithm, above what it says for all: chosen from compare.py --sweep (results/README.md).
_EMOJI_RWR = {"epochs": 4, "samples_per_epoch": 384, "updates_per_epoch": 60, "batch_size": 32, "learning_rate": 1e-4,
              "eval_every": 1, "checkpoint_every": 1}
PRESET_ALGORITHMS = {"emoji": {
    "ddpo-sf": {"samples_per_epoch": 64, "updates_per_epoch": 1, "learning_rate": 1e-4},
    "rwr": {**_EMOJI_RWR, "beta": 20.0},
    "rwr-sparse": _EMOJI_RWR}}


def short_name(reward):
    """'compressibility', or the function's name of 'path/to/file.py:function'."""
    return reward.rpartition(":")[2]


def build_config(flags):
    """Config with, in this order, what the algorithm, the preset and the flags ask for. Raises ValueError: see check."""
    preset, algorithm = flags.get("preset", "emoji"), flags.get("algorithm", Config.algorithm)
    reward = flags.get("reward", Config.reward)
    for name in flags:
        if algorithm not in OWNERS.get(name, ALGORITHMS):
            raise ValueError(f"--{name.replace('_', '-')} is not of {algorithm}, but of {', '.join(OWNERS[name])}")
    config = Config(**{**ALGORITHMS[algorithm], **PRESETS[preset], **preset_reward(preset, reward),
                       **PRESET_ALGORITHMS.get(preset, {}).get(algorithm, {}),
                       **{key: value for key, value in flags.items() if key != "preset"}})
    own_prompts = preset_reward(preset, reward).get("prompts") or DEFAULT_PROMPTS.get(reward, "common_animals")
    config.prompts = config.prompts or own_prompts
    # What is a path is kept whole, so that a run can be resumed from any folder.
    path, colon, function = config.reward.rpartition(":")
    config.reward = f"{Path(path).resolve()}:{function}" if colon else config.reward
    config.prompts = config.prompts if config.prompts in PROMPT_SETS else str(Path(config.prompts).resolve())
    for name in ("model", "reward_model", "bert_model"):  # a hub name is left as it is
        if getattr(config, name) and Path(getattr(config, name)).is_dir():
            setattr(config, name, str(Path(getattr(config, name)).resolve()))
    config.aesthetic_head = str(Path(config.aesthetic_head).resolve()) if config.aesthetic_head else ""
    if config.device == "auto":
        config.device = "cuda" if torch.cuda.is_available() else "cpu"
    check(config)
    return config


def preset_reward(preset, reward):
    """What the preset says for that reward, above what it says for all."""
    own = PRESET_REWARDS.get(preset, {})
    return own.get(reward, own.get("", {}))


def load_config(folder):
    """The settings of a run under runs/. Raises ValueError if there is none, or it is of another version."""
    try:
        return Config(**runs.load_settings(folder))
    except TypeError as error:
        raise ValueError(f"{folder / 'config.json'} is not of this version: {error}") from error


def shared_settings(config):
    """The settings that make a result what it is and that its algorithm reads, as they may be published.

    So without the run's name and seed, knobs of speed, and this machine's folders.
    """
    here = str(Path(__file__).resolve().parent)
    left_out = ("name", "seed", "device", "sample_batch", "micro_batch", "checkpoint_every")
    return {name: value.replace(here + "/", "") if isinstance(value, str) else value for name, value in asdict(config).items()
            if name not in left_out and config.algorithm in OWNERS.get(name, ALGORITHMS)}


def check(config):
    """Refuse settings that cannot run. Raises ValueError, in one line, with what to do."""
    for item in fields(config):
        value, flag = getattr(config, item.name), "--" + item.name.replace("_", "-")
        may_be_zero = item.name in ("weight_decay", "seed", "adam_beta1", "adam_beta2", "kl_weight", "beta", "percentile",
                                    "skip_last_steps", "bert_baseline")
        if item.type in (int, float) and not (math.isfinite(value) and (value > 0 or may_be_zero and value == 0)):
            raise ValueError(f"{flag} {value}: must be a {'non-negative' if may_be_zero else 'positive'} number")
    if config.seed >= 2**32:
        raise ValueError(f"--seed {config.seed}: must be below {2**32}")
    if max(config.adam_beta1, config.adam_beta2) >= 1:
        raise ValueError("--adam-beta1 and --adam-beta2 must be below 1")
    if config.algorithm == "ddpo-sf" and config.updates_per_epoch > 1:
        raise ValueError(f"--updates-per-epoch {config.updates_per_epoch}: ddpo-sf takes one update an epoch, since its "
                         "samples must come from the current weights; use --algorithm ddpo-is for more")
    if config.algorithm in DDPO and config.samples_per_epoch % config.updates_per_epoch:
        raise ValueError(f"--samples-per-epoch {config.samples_per_epoch} does not divide into --updates-per-epoch "
                         f"{config.updates_per_epoch} equal shares")
    if config.algorithm in DDPO and config.skip_last_steps >= config.sampling_steps:
        raise ValueError(f"--skip-last-steps {config.skip_last_steps} leaves none of --sampling-steps {config.sampling_steps}")
    if config.baseline not in BASELINES:
        raise ValueError(f"--baseline {config.baseline}: choose {', '.join(BASELINES)}")
    for name, owners in REWARD_OWNERS.items():
        if getattr(config, name) != getattr(Config, name) and config.reward not in owners:
            raise ValueError(f"--{name.replace('_', '-')} is not of {short_name(config.reward)}, but of {', '.join(owners)}")
    if config.bert_baseline >= 1:
        raise ValueError(f"--bert-baseline {config.bert_baseline:g}: must be below 1")
    if config.percentile >= 1:
        raise ValueError(f"--percentile {config.percentile:g}: must be below 1, as 0.9 for the best tenth")
    if config.stats_min_count > config.stats_buffer:
        raise ValueError(f"--stats-min-count {config.stats_min_count} is more than --stats-buffer {config.stats_buffer} "
                         "rewards can hold")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no GPU is to be seen; use --device cpu")
    if config.precision == "fp16" and config.device == "cpu":
        raise ValueError("--precision fp16 needs a GPU; use --precision fp32 (or bf16) on a CPU")
    if Path(config.name).name != config.name or config.name in (".", ".."):
        raise ValueError(f"--name {config.name!r}: must be a plain name; the run's folder is runs/NAME")


def parse(argv, description):
    """Flags, as a dict of those given. Raises ValueError on one that is unknown or ill-formed."""
    names = {"names": ", ".join(REWARDS), "sets": ", ".join(PROMPT_SETS), "algorithms": ", ".join(ALGORITHMS)}
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.error = _refuse  # one line, not the usage of thirty flags
    parser.add_argument("--preset", choices=PRESETS, help="emoji, the embedded model (default), or paper")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with runs/NAME; only --epochs may be given with it")
    choices = {"algorithm": ALGORITHMS, "wording": Alignment.WORDINGS, "precision": PRECISIONS, "baseline": BASELINES,
               "device": ("auto", "cpu", "cuda")}
    for item in fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if item.type is bool else {
            "type": item.type, "choices": choices.get(item.name), "metavar": item.name.split("_")[-1].upper()}
        parser.add_argument("--" + item.name.replace("_", "-"), **kind,
                            help=item.metadata["help"] % names + _default_text(item.name, item.default))
    return vars(parser.parse_args(argv))


def _refuse(message):
    raise ValueError(message)


def _default_text(name, default):
    """' (default: 196; rwr: 5; emoji: 24; emoji, rwr: 4)'."""
    sources = [("default", {name: default or {"prompts": "the reward's"}.get(name, default)})]
    sources += [(algorithm, own) for algorithm, own in ALGORITHMS.items()]
    for preset, own in PRESETS.items():
        sources += [(preset, own)]
        sources += [(f"{preset}, {one}" if one else preset, of_one) for of_each in (PRESET_REWARDS, PRESET_ALGORITHMS)
                    for one, of_one in of_each.get(preset, {}).items()]
    said = [f"{who}: {Path(own[name]).name if isinstance(own[name], str) and who != 'default' else own[name]}"
            for who, own in sources if name in own and own[name] != ""]
    return f" ({'; '.join(said)})" if said else ""
