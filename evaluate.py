"""What training did to the images: the base model and the trained one, on the same prompts and the same noise.

    python evaluate.py runs/compressibility-ddpo-is-1 [more runs]
    python evaluate.py runs/NAME --prompts unseen_emoji_animals --images 90 --reward incompressibility
    python evaluate.py runs/NAME --eta 0 --sampling-steps 20      # does the gain remain when sampling without noise?
    python evaluate.py runs/NAME/model --prompts objects          # any model, by folder or hub name, against the preset's

Prints a row for each model and reward. The rewards are the run's own or those of --reward, and then the watched ones:

    before, after, change  means over the images that the reward can judge, each with a 95 % interval
    improved               share of these images with a higher reward than before
    variety                mean distance between two images, which falls when they become alike: root mean square of the
                           pixels (in [0, 1]) or, with --clip, 1 - cosine of that CLIP's embeddings

A run's image, before above after, goes to before_after.png in its folder, or where --output says.
"""
import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

import runs
from networks import clip_pixels, image_embeddings, load_clip, to_pil
from policy import PRECISIONS
from process import notify, say
from prompts import load_prompts
from rewards import Alignment, RewardError, display, load_reward
from settings import (PRESETS, REWARD_SETTINGS, absolute_reward, build_config, check, check_options, check_questions,
                      chosen_device, load_config, make_paths_absolute, refuse, reward_options)
from train import draw_fixed, policy_of

COLUMNS = 12
HEADER = ["model", "reward", "prompts", "images", "before", "after", "change", "improved", "variety before", "variety after"]


def evaluate(target, args, loaded):
    """The table's rows of one run or model, and an error if its image could not be written. `loaded` keeps the rewards.

    Raises ValueError, OSError, RewardError, FloatingPointError or torch.OutOfMemoryError, each with a message for the user.
    """
    config, model, output = settings_of(target, args)
    prompts, asked = load_prompts(config.prompts), [absolute_reward(name) for name in args.reward or [config.reward]]
    given = {option: getattr(args, option) for option in REWARD_SETTINGS if getattr(args, option) is not None}
    check_questions(prompts, asked, every_prompt=False)
    check_options(given, asked)
    rewards = [reward_for(config, name, given if name in asked else {}, loaded)
               for name in dict.fromkeys([*asked, *config.watch])]
    clip = load_clip(args.clip, config.device, "CLIP (--clip)") if args.clip else None
    try:  # one after the other: two large models would not fit on a GPU
        drawn = [draw_fixed(policy_of(config, source, scored=False), prompts, config) for source in (config.model, model)]
    except FloatingPointError as error:
        raise FloatingPointError(f"{target}: {error}: --precision fp32 may help") from error
    chosen, texts = drawn[0][0], [prompt.text for prompt in drawn[0][0]]
    varieties = [f"{variety(images, clip):.3f}" for _, images in drawn]
    rows, labels = [], texts * 2
    for reward in rewards:
        (before, notes), (after, more_notes) = (reward(images, chosen) for _, images in drawn)
        values = torch.cat([before, after]).tolist()
        labels = ["\n".join(filter(None, (label, f"{reward.name} {display(value, reward.unit)}", note)))
                  for label, value, note in zip(labels, values, notes + more_notes)]
        rows.append(["/".join(Path(target).parts[-2:]), reward.name, Path(config.prompts).stem, str(len(texts)),
                     *reward_cells(before, after, reward.unit), *varieties])
    if output:
        shown = [to_pil(image) for _, images in drawn for image in images[:COLUMNS]]
        labels = labels[:COLUMNS][:len(texts)] + labels[len(texts):][:COLUMNS]
        try:
            runs.write_atomically(output, runs.draw_grid(shown, labels, columns=len(shown) // 2).save)  # before above after
        except OSError as error:
            return rows, error
    return rows, None


def finished_run(folder):
    """The settings of a run and the folder of its trained model. Raises ValueError if it has none yet."""
    config, model = load_config(folder), folder / "model"
    if not model.exists():
        raise ValueError(f"{folder} has no model/ yet: finish it with python train.py --resume {folder}")
    return config, model


def settings_of(target, args):
    """Settings to draw with, the trained model, and where its image goes (None: nowhere). Raises ValueError."""
    if (Path(target) / "config.json").exists():
        (config, model), output = finished_run(Path(target)), Path(target) / "before_after.png"
    else:
        given = {name: getattr(args, name) for name in ("device", "precision") if getattr(args, name) is not None}
        config, model, output = build_config({"preset": args.preset, **given}), target, None
    steps = config.eval_steps or None if args.sampling_steps is None else args.sampling_steps
    changes = {"model": args.base, "prompts": args.prompts, "sampling_steps": steps, "eval_prompts": args.images, "device": args.device,
               "precision": args.precision, "skip_last_steps": 0, "learn_steps": 0, "compile": False}  # nothing is learned here
    config = replace(config, **{name: value for name, value in changes.items() if value is not None})
    make_paths_absolute(config)
    check(config)
    # check refuses eta 0, since such a policy cannot be trained. It can be drawn from.
    return config if args.eta is None else replace(config, eta=args.eta), model, args.output or output


def reward_for(config, name, given, loaded):
    """A loaded reward, with the given options that it reads, else those of the run or its preset."""
    options = reward_options(config, name)
    options |= {option: value for option, value in given.items() if option in options}
    key = (name, config.device, *options.items())
    if key not in loaded:
        loaded[key] = load_reward(name, config.device, nan_allowed=True, **options)
    return loaded[key]


@torch.no_grad()
def variety(images, clip):
    """Mean distance between two of B images (B, 3, H, W): root mean square of the pixels, or 1 - cosine in CLIP's embedding.

    NaN for one image.
    """
    if clip is None:
        points = images.flatten(1)
        return (torch.pdist(points) / points.shape[1] ** 0.5).mean().item()
    processor, network = clip
    points = F.normalize(image_embeddings(network, clip_pixels(processor, images)))
    return torch.pdist(points).square().mean().item() / 2  # of unit vectors: 1 - cosine


def reward_cells(before, after, unit):
    """The cells before, after, change and improved, of a reward's values (B,) on B images; '-' if it can judge none of them."""
    known = ~(before.isnan() | after.isnan())
    if not known.any():
        return ["-"] * 4
    before, after = before[known], after[known]
    change = with_interval(after - before, unit)
    if unit[1] not in ("", "%") and before.mean():  # of a reward with a unit, such as a size: also as a share of the start
        change += f" ({unit[0] * (after - before).mean() / before.mean().abs():+.0%})"
    return [with_interval(before, unit), with_interval(after, unit), change, f"{(after > before).float().mean():.0%}"]


def with_interval(values, unit):
    """The mean of a reward over B images in its unit, and half its 95 % interval (normal: the images are many)."""
    factor, name = unit
    half = 1.96 * abs(factor) * values.std().item() / len(values) ** 0.5 if len(values) > 1 else float("nan")
    mean, _, name = display(values.mean().item(), unit).partition(" ")
    return f"{mean} ± {half:.2g} {name}".rstrip() if half == half else f"{mean} {name}".rstrip()


def main(argv=None):
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders under runs/, or models by folder or hub name")
    parser.add_argument("--reward", action="append", help="as in train.py; may be given more than once (default: the run's)")
    parser.add_argument("--prompts", help="a set of python prompts.py, or a text file (default: the run's)")
    parser.add_argument("--images", type=int, help="number of images, spread evenly over the prompts (default: the run's)")
    parser.add_argument("--sampling-steps", type=int, help="denoising steps T (default: the run's)")
    parser.add_argument("--eta", type=float, help="noise of the chain, from 0 (default: the run's)")
    parser.add_argument("--clip", help="folder or hub name of a CLIP whose embeddings measure variety (default: pixels)")
    parser.add_argument("--preset", choices=PRESETS, default="emoji",
                        help="for a model that is not a run: whose base model and settings")
    parser.add_argument("--base", metavar="MODEL", help="of a run: where the model is now that it began with; else: what to compare with (default: the preset's model)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the image goes (default: before_after.png of a run)")
    parser.add_argument("--device", help="where to draw: auto, cpu, cuda, cuda:1, mps (default: the run's)")
    parser.add_argument("--precision", choices=PRECISIONS, help="of the networks (default: the run's)")
    parser.add_argument("--wording", choices=Alignment.WORDINGS, help="alignment: as in train.py")
    parser.add_argument("--bert-baseline", type=float, help="alignment: as in train.py")
    for flag in ("--reward-model", "--aesthetic-head", "--bert-model"):
        parser.add_argument(flag, help="for the rewards that read it: as in train.py")
    parser.error = refuse  # one line, not the usage of all flags
    try:
        args = parser.parse_args(argv)
        if args.output and len(args.models) > 1:
            raise ValueError("--output is for one model: each would overwrite the last")
        if args.output and args.output.suffix.lower() not in Image.registered_extensions():
            raise ValueError(f"--output {args.output}: must be the name of an image, as before_after.png")
        if args.images is not None and args.images < 1:
            raise ValueError(f"--images {args.images}: must be at least 1")
    except ValueError as error:
        notify(f"evaluate.py: {error}")
        return 2
    args.device = args.device and chosen_device(args.device)
    rows, code, loaded = [HEADER, ["---"] * len(HEADER)], 0, {}
    for target in args.models:
        try:
            more_rows, error = evaluate(target, args, loaded)
            rows += more_rows
            if error:
                raise error
        except (ValueError, OSError, RewardError, FloatingPointError, torch.OutOfMemoryError) as error:
            notify(f"evaluate.py: {error}")  # the others are evaluated all the same
            code = 2
    say("\n".join("| " + " | ".join(row) + " |" for row in rows))
    return code


if __name__ == "__main__":
    sys.exit(main())
