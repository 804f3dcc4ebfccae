"""Every setting of a run: its default, the rules of the presets, the flags, and what is refused.

A later rule overrides an earlier one, and a flag overrides all.
"""
import argparse
import importlib.util
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

from emoji import preset
from support import processes
from support.networks import one_line_errors

ROOT = Path(__file__).resolve().parents[1]
DDPO, RWR = ("ddpo-is", "ddpo-sf"), ("rwr", "rwr-sparse")
FINE_TUNING = (*RWR, "nft")  # which settings an algorithm reads: see Config
ALGORITHMS = (*DDPO, *RWR, "nft")
PRESETS = ("emoji", "paper", "lora", "sdxl", "flow")
VLM = ("alignment", "counting")  # rewards by a vision-language model
LEARNED = ("aesthetic", *VLM, "pickscore", "hpsv2", "imagereward")


def setting(default, text, **facts):
    """A field of Config, with its help text and what else is known of it.

    read_by: the algorithms that read it; rewards: the rewards that do; others refuse it. choices. zero: it
    may be 0, as it may if its default is. below: it must be smaller. place: where something is. speed: it
    changes the result in rounding only. resumable: it may be given with --resume, as may places and speed.
    """
    return field(default=default, metadata={"help": text, **facts})


@dataclass
class Config:
    """Every setting of a run.

    The defaults are the paper's (appendix D.1, D.2, D.5). From the authors' code are eta, stats_buffer and
    stats_min_count, wording, advantage_clip (their JAX code: 10, their port: 5). Ours are epochs (50,000
    queries, divided), precision (their JAX code: fp32), memory, speed, how often to evaluate and to save.
    """
    preset: str = setting("emoji", "toy model; or the paper's, LoRA, SDXL, flow matching", choices=PRESETS)
    reward: str = setting("compressibility", "of rewards.py, or path/to/file.py:function", place=True)
    watch: tuple = setting((), "a reward to evaluate alone; may be repeated; none: nothing", place=True)
    prompts: str = setting("common_animals", "a set of prompts.py, or a text file or .jsonl", place=True)
    algorithm: str = setting("ddpo-is", "DDPO by importance sampling or score function; or others",
                             choices=ALGORITHMS)
    model: str = setting("CompVis/stable-diffusion-v1-4", "pipeline: hub name, folder, one file", place=True)
    prediction_type: str = setting("", "what the network predicts, if no file says it",
                                   choices=("", "epsilon", "v_prediction", "sample"))
    t5: bool = setting(True, "Stable Diffusion 3: read prompts with its third text encoder, too (10 GB)")
    lora_rank: int = setting(0, "train adapters of this rank beside the attention; 0: all weights")
    lora_alpha: int = setting(0, "an adapter adds alpha / rank B A x; 0: as the rank")
    height: int = setting(0, "of the images, in pixels; 0: the model's own")
    width: int = setting(0, "of the images, in pixels; 0: the model's own")
    call: str = setting("", 'JSON of other options of the pipeline\'s call, as {"clip_skip": 1}')
    reward_model: str = setting("", "another network than the published one", place=True, rewards=LEARNED)
    aesthetic_head: str = setting("", "a file of the MLP's weights", place=True, rewards=("aesthetic",))
    wording: str = setting("code", "whose question to use", choices=("code", "paper"), rewards=("alignment",))
    bert_model: str = setting("", "BERTScore's encoder", place=True, rewards=("alignment",))
    bert_baseline: float = setting(0.0, "what unrelated sentences score", below=1, rewards=("alignment",))
    name: str = setting("", "the run's folder in runs/; empty: reward, algorithm, the next free number")
    seed: int = setting(0, "of the training: prompts, noise, order", below=2**32)
    epochs: int = setting(196, "how often to sample and learn; of RWR: the paper's rounds", resumable=True)
    samples_per_epoch: int = setting(256, "images drawn in an epoch, each one reward query")
    images_per_prompt: int = setting(1, "with --stats-buffer 1 --stats-min-count 1 a group, as in GRPO")
    updates_per_epoch: int = setting(4, "optimizer steps in an epoch; DDPO: each on its share of the samples")
    batch_size: int = setting(128, "images of an update", read_by=FINE_TUNING)
    sampling_steps: int = setting(50, "denoising steps T")
    eta: float = setting(1.0, "how random the chain is, in (0, 1]")
    noise: str = setting("ddim", "sigma of a step: sampling.py", choices=("ddim", "cps"))
    guidance_scale: float = setting(0.0, "of the pipeline's call; 0: its default or --sd-guidance")
    sd_guidance: float = setting(5.0, "guidance of Stable Diffusion 1 and 2, if --guidance-scale is 0")
    training_guidance: float = setting(0.0, "in the loss; 0: as in sampling", read_by=FINE_TUNING)
    learning_rate: float = setting(1e-5, "of AdamW")
    adam_beta1: float = setting(0.9, "of AdamW", zero=True, below=1)
    adam_beta2: float = setting(0.999, "of AdamW", zero=True, below=1)
    adam_epsilon: float = setting(1e-8, "of AdamW")
    weight_decay: float = setting(1e-4, "of AdamW", zero=True)
    max_grad_norm: float = setting(1.0, "the gradient is clipped to this norm")
    clip_range: float = setting(1e-4, "the ratio, per dimension, stays in 1 +- this", read_by=("ddpo-is",))
    advantage_clip: float = setting(10.0, "advantages are clipped to +- this", read_by=DDPO)
    stats_buffer: int = setting(32, "last rewards that a prompt's statistics are of", read_by=DDPO)
    stats_min_count: int = setting(16, "with fewer, a prompt takes the batch's", read_by=DDPO)
    skip_last_steps: int = setting(0, "last steps not learned from: ddpo.py", read_by=DDPO)
    learn_steps: int = setting(0, "steps of an update, at random; 0: all others", read_by=DDPO)
    baseline: str = setting("prompt", "what a reward is compared with; none: with nothing",
                            choices=("prompt", "batch", "none"), read_by=DDPO)
    kl_weight: float = setting(0.0, "of the KL to the pretrained: ddpo.surrogate", read_by=DDPO)
    beta: float = setting(0.2, "inverse temperature of rewards", zero=True, read_by=("rwr",))
    nft_strength: float = setting(1.0, "b: how far v+ and v- lie from v_old", read_by=("nft",))
    percentile: float = setting(0.9, "rewards below it are dropped", zero=True, below=1, read_by=RWR[1:])
    precision: str = setting("fp16", "of networks, not of trained weights", choices=("fp32", "fp16", "bf16"))
    sample_batch: int = setting(16, "images drawn at a time", speed=True)
    micro_batch: int = setting(16, "images in a forward pass of learning; halved, as others, where memory "
                               "runs out", speed=True)
    gradient_checkpointing: bool = setting(False, "compute activations twice, to save memory", speed=True)
    compile: bool = setting(False, "torch.compile the denoiser: minutes at the start", speed=True)
    eval_every: int = setting(10, "epochs between evaluations on fixed prompts and noise; and the last")
    eval_steps: int = setting(0, "denoising steps of an evaluation; 0: as in training")
    eval_prompts: int = setting(64, "fixed prompts of an evaluation, spread evenly over the set")
    stop_below: tuple = setting((), "animal=0.9, or animal=90%%: a watched reward below it, or that share of "
                                "its start, ends the run; may be repeated", resumable=True)
    checkpoint_every: int = setting(1, "epochs between checkpoints (10 GB of Stable Diffusion, all weights)")
    tracker: str = setting("none", "where else to show the run", choices=("none", "tensorboard", "wandb"),
                           resumable=True)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1 or mps (not tested)", resumable=True)


# ---- The rules: where they hold, and what they set ----

RULES = [  # a later rule overrides an earlier one, and a flag overrides all
    # RWR's numbers are appendix D.2's. Five epochs spend as many queries as DDPO; the authors' code has ten.
    (dict(algorithm=RWR), dict(epochs=5, samples_per_epoch=10_000, updates_per_epoch=400, eval_every=1)),
    (dict(algorithm="ddpo-sf"), dict(updates_per_epoch=1)),
    (dict(algorithm="nft"), dict(images_per_prompt=8)),
    (dict(reward=("compressibility", "incompressibility")), dict(prompts="imagenet_animals")),  # the paper's
    (dict(reward=("pickscore", "hpsv2")), dict(prompts="painted_animals")),
    (dict(reward="imagereward"), dict(prompts="dpok")),
    (dict(reward="ocr"), dict(prompts="signs")),
    (dict(reward="alignment"), dict(prompts="animal_activities")),
    (dict(reward="counting"), dict(prompts="two_to_eight_animals")),
    (dict(lora=True), dict(learning_rate=3e-4)),  # of the authors' port
    # Appendix C, and the authors' port.
    (dict(preset="lora"), dict(model="stable-diffusion-v1-5/stable-diffusion-v1-5", lora_rank=4)),
    # Untested by us at full size, as the next. At 20 steps the last but one would make 73 % of the variance
    # that ddpo.py, 5, is about (`pytest test_ddpo.py -k last_but_one`).
    (dict(preset="sdxl"), dict(
        model="stabilityai/stable-diffusion-xl-base-1.0", lora_rank=32, precision="bf16", sampling_steps=20,
        skip_last_steps=2, eval_steps=40, **preset.GROUPS, sample_batch=4, micro_batch=1,
        gradient_checkpointing=True)),
    # Steps, groups, rank, alpha and image size are Flow-GRPO's (Liu et al. 2025, arXiv 2505.05470). The last
    # action of such a chain adds little noise: with the last step, which is no action, it is skipped.
    (dict(preset="flow"), dict(
        model="stabilityai/stable-diffusion-3.5-medium", lora_rank=32, lora_alpha=64, precision="bf16",
        sampling_steps=10, eval_steps=40, height=512, width=512, skip_last_steps=2, samples_per_epoch=240,
        **preset.GROUPS | dict(images_per_prompt=24), sample_batch=8, micro_batch=1,
        gradient_checkpointing=True)),
    *preset.RULES]  # of the toy model


def chosen(**asked):
    """What the rules say for a preset, an algorithm, a reward, and lora: whether adapters train."""
    def holds(name, wanted):
        return asked[name] in wanted if isinstance(wanted, tuple) else asked[name] == wanted

    values = {}
    for where, what in RULES:
        if all(holds(name, wanted) for name, wanted in where.items()):
            values |= what
    return values


# ---- Making a Config ----

def build_config(flags):
    """The Config of a dict of flags. ValueError: see check."""
    asked = {name: flags.get(name, getattr(Config, name)) for name in ("preset", "algorithm", "reward")}
    rank = flags.get("lora_rank", chosen(**asked, lora=False).get("lora_rank"))
    values = chosen(**asked, lora=bool(rank))
    if not rank:
        values.pop("lora_alpha", None)
    for name in flags.get("watch", ()):  # the rules' options of a watched reward, if the trained one has none
        own = chosen(**{**asked, "reward": name, "lora": bool(rank)})
        values = {option: own[option] for option in options_of(name) if option in own} | values
    config = Config(**{**values, **flags})
    for name in flags:
        readers = Config.__dataclass_fields__[name].metadata.get("read_by", ALGORITHMS)
        if config.algorithm not in readers:
            raise ValueError(f"{flag_of(name)} is read by {', '.join(readers)}, not by {config.algorithm}")
    usual = "sd_guidance" not in flags and config.guidance_scale in (0, config.sd_guidance)
    if "training_guidance" not in flags and not usual:
        config.training_guidance = Config.training_guidance  # the rule's goes with the rule's guidance
    if "watch" not in flags:  # the rule's choice may have the name of the reward that is trained
        config.watch = tuple(name for name in config.watch if short_name(name) != short_name(config.reward))
    return completed(config)


def completed(config):
    """The Config with the device that "auto" means here, absolute paths, and "none" as nothing; checked."""
    for name in ("watch", "stop_below"):
        value = getattr(config, name)
        setattr(config, name, () if list(value) == ["none"] else tuple(value))
    if config.device == "auto":
        config.device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in facts("place"):
        setattr(config, name, absolute(getattr(config, name)))
    check(config)
    return config


def absolute(name, start="."):
    """A path, or a reward's path/to/file.py:function, in full if there is such a file. Other names stay."""
    if isinstance(name, (tuple, list)):
        return tuple(absolute(one, start) for one in name)
    path, colon, function = name.rpartition(":") if ".py:" in name else (name, "", "")
    place = (Path(start) / path).resolve()
    is_path = colon or "/" in name or "." in name  # a set of prompts may have the name of a folder here
    return f"{place}{colon}{function}" if is_path and place.exists() else name


def saved_settings(config):
    """The settings as a dict of plain values. Paths inside the project are relative to it."""
    return json.loads(json.dumps(asdict(config), ensure_ascii=False).replace(f"{ROOT}/", ""))


def preset_settings(settings):
    """What the rules say for the preset, algorithm and reward of saved settings, as saved settings."""
    asked = {name: settings[name] for name in ("preset", "algorithm", "reward")}
    return saved_settings(Config(**{**chosen(**asked, lora=settings["lora_rank"] > 0), **asked}))


def load_settings(settings, flags):
    """The Config of saved settings, with the flags of --resume."""
    allowed = facts("resumable") + facts("place") + facts("speed")
    others = [flag_of(name) for name in flags if name not in allowed]
    if others:
        raise ValueError(f"{', '.join(others)}: not with --resume; only {', '.join(map(flag_of, allowed))}")
    places = {name: absolute(settings[name], ROOT) for name in facts("place")}
    before, config = Config(**{**settings, **places}), Config(**{**settings, **places, **flags})
    if names_of(before) != names_of(config):
        raise ValueError(f"--resume takes the run's own rewards alone: {', '.join(names_of(before))}")
    return completed(config)


def names_of(config):
    """The names of the trained and the watched rewards."""
    return [short_name(name) for name in (config.reward, *config.watch)]


def reward_options(config, name):
    """The options of a reward: the run's, but the rules' for one that it neither trains nor watches."""
    own = chosen(preset=config.preset, algorithm=config.algorithm, reward=name, lora=bool(config.lora_rank))
    values = vars(config) if name in (config.reward, *config.watch) else {**vars(Config), **own}
    return {option: values[option] for option in options_of(name)}


def options_of(reward):
    """The settings that a reward reads."""
    return [item.name for item in fields(Config) if reward in item.metadata.get("rewards", ())]


def facts(name):
    """The settings of which that is known: "place", "speed", "resumable"."""
    return [item.name for item in fields(Config) if item.metadata.get(name)]


def flag_of(name):
    """'--clip-range'."""
    return "--" + name.replace("_", "-")


def short_name(reward):
    """'compressibility', or the function's name of 'path/to/file.py:function'."""
    return reward.rpartition(":")[2]


# ---- What is refused ----

def check(config):
    """ValueError, in one line, if settings cannot run or do not go together."""
    for item in fields(Config):
        value, known, flag = getattr(config, item.name), item.metadata, flag_of(item.name)
        readers = known.get("rewards", (config.reward,))
        if value != item.default and not {*readers} & {config.reward, *config.watch}:
            raise ValueError(f"{flag} is read by {', '.join(readers)} alone")
        if value not in known.get("choices", (value,)):
            raise ValueError(f"{flag} {value}: choose {', '.join(filter(None, known['choices']))}")
        if item.type in (int, float):
            limit, zero = known.get("below", math.inf), known.get("zero", item.default == 0)
            if not (0 < value < limit or zero and value == 0):
                raise ValueError(f"{flag} {value}: must be {'from' if zero else 'above'} 0, below {limit}")
    for wrong, message in refusals(config):
        if wrong:
            raise ValueError(message)
    call_options(config)
    with one_line_errors("--device", config.device):
        torch.empty(0, device=config.device)


def refusals(c):
    """Pairs: whether something is wrong with a Config, and what to say then."""
    ddpo, names, n = c.algorithm in DDPO, names_of(c), c.samples_per_epoch
    images = n // c.updates_per_epoch if ddpo else c.batch_size
    learned = c.sampling_steps - c.skip_last_steps
    yield len({*names}) < len(names), f"two rewards have one name, and would be one in the log: {names}"
    yield c.name != Path(c.name).name, f"--name {c.name}: must be a plain name, of a folder in runs/"
    yield c.guidance_scale and "guidance_scale" in call_options(c), "--call and --guidance-scale both say it"
    yield c.lora_alpha and not c.lora_rank, f"--lora-alpha {c.lora_alpha} goes with --lora-rank"
    # In torch 2.13 the inner levels of a compiled U-Net get gradients of exactly 0 in bf16 on a CPU (found at
    # 4fedaa4).
    half = c.precision == "fp16" or c.compile and c.precision == "bf16"
    yield half and not c.device.startswith("cuda"), "--precision fp16, or --compile with bf16, needs CUDA"
    yield c.algorithm == "nft" and c.images_per_prompt == 1, "--images-per-prompt 1: nft compares a prompt's"
    yield (c.stats_min_count > max(c.stats_buffer, c.images_per_prompt),
           f"--stats-min-count {c.stats_min_count}: more than --stats-buffer or --images-per-prompt can give")
    yield (c.algorithm == "ddpo-sf" and c.updates_per_epoch > 1,
           "--updates-per-epoch: ddpo-sf takes one, since its samples must come from the current weights")
    yield n % c.images_per_prompt, "--samples-per-epoch does not divide into groups of --images-per-prompt"
    alone = c.baseline == "prompt" and c.images_per_prompt == c.stats_buffer == 1
    yield alone and ddpo, "--stats-buffer 1 compares an image with itself"
    yield ddpo and n % c.updates_per_epoch, "--samples-per-epoch does not divide into --updates-per-epoch"
    yield (ddpo and max(c.learn_steps, 1) > learned,
           f"--skip-last-steps leaves {learned} of --sampling-steps, too few to learn from")
    yield (processes.size() > min(images, c.eval_prompts, n),
           f"{processes.size()} processes are too many for {images} images or {c.eval_prompts} eval prompts")
    yield (c.tracker != "none" and not importlib.util.find_spec(c.tracker),
           f"--tracker {c.tracker} needs a package: pip install {c.tracker}")


def call_options(config):
    """--call as a dict. ValueError if it is no JSON object."""
    with one_line_errors("--call", config.call):
        return dict(json.loads(config.call or "{}"))


# ---- The command line ----

def parse(argv, description):
    """The flags that were given, as a dict. ValueError if one is unknown or malformed."""
    parser = argparse.ArgumentParser(
        description=description, epilog="Defaults are the paper's; for presets see support/settings.py.",
        argument_default=argparse.SUPPRESS, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse  # one line, not the usage of sixty flags
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with runs/NAME")
    for item in fields(Config):
        kind = {bool: {"action": argparse.BooleanOptionalAction}, tuple: {"action": "append"}}.get(
            item.type, {"type": item.type, "choices": item.metadata.get("choices")})
        readers = item.metadata.get("read_by", item.metadata.get("rewards", ()))
        only = f"; only {', '.join(readers)}" if readers else ""
        default = f" (default: {item.default})" if item.default not in ("", ()) else ""
        parser.add_argument(flag_of(item.name), **kind, help=item.metadata["help"] + only + default)
    return vars(parser.parse_args(argv))


def refuse(message):
    """What argparse is to do with a mistake."""
    raise ValueError(message)
