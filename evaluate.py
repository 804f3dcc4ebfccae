"""What training did to the pictures: the base model and the trained one on the same prompts and noise, seen in training or not.

    python evaluate.py runs/compressibility-ddpo-is-1 [more runs]
    python evaluate.py runs/NAME --prompts unseen_emoji_animals --images 90 --reward compressibility --reward incompressibility
    python evaluate.py runs/NAME --eta 0 --sampling-steps 20      # does a policy trained with noise help the sampler without?
    python evaluate.py runs/NAME/model --prompts objects          # any model, by folder or hub name, against the preset's

Prints a row for each model and reward: the reward's mean before, after and its gain, each with a 95 % interval over the
images, and the share of images that improved; how many animals the independent judge (judge.py, the embedded model's) named
before, and of these how many it still names; how often it found the number asked for, and both, before -> after; and the
variety of the pictures, which is what training on a reward destroys first: the mean distance between any two, in pixels (root
mean square, of 1) or, with --clip, 1 - cosine of that CLIP's embeddings. A run's picture, before above after, goes to
before_after.png in its folder, or where --picture says.
"""
import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

import runs
from judge import right_animals
from prompts import load_prompts
from rewards import UNITS, Alignment, RewardError, display, image_embeddings, load_clip, preprocess, to_pil
from sampling import PRECISIONS
from settings import PRESETS, REWARD_OWNERS, Config, build_config, check, load_config, preset_reward, short_name
from train import check_questions, draw_fixed, policy_of, reward_of

COLUMNS = 12
HEADER = ["model", "reward", "prompts", "images", "before", "after", "gain", "improved", "named before", "still named",
          "number right", "both right", "variety before", "after"]


def settings_of(target, args):
    """Settings to draw with, the trained model, and where its picture goes (None: nowhere). Raises ValueError."""
    if (Path(target) / "config.json").exists():
        config, model, picture = load_config(Path(target)), Path(target) / "model", Path(target) / "before_after.png"
        if not model.exists():
            raise ValueError(f"{target} has no model/ yet: finish it with python train.py --resume {target}")
    else:
        config, model, picture = build_config({"preset": args.preset}), target, None
    changes = {"prompts": args.prompts, "sampling_steps": args.sampling_steps, "eval_prompts": args.images,
               "device": args.device, "precision": args.precision, "skip_last_steps": 0}  # nothing is learned here
    config = replace(config, **{name: value for name, value in changes.items() if value is not None})
    check(config)
    # A policy without noise has no log-probabilities, and so no place in the settings of a training; it can be drawn from.
    return config if args.eta is None else replace(config, eta=args.eta), model, args.picture or picture


def with_reward(config, reward, args):
    """The same settings for a reward. Its options are those asked for, else the run's own reward's, else the preset's."""
    preset = next((name for name in PRESETS if PRESETS[name].get("model") == config.model), "paper")
    own = vars(config) if reward == config.reward else {**vars(Config()), **preset_reward(preset, reward)}
    options = {name: own[name] if getattr(args, name) is None or reward not in owners else getattr(args, name)
               for name, owners in REWARD_OWNERS.items()}
    config = replace(config, reward=reward, **options)
    check(replace(config, eta=1.0))
    return config


def variety(images, clip):
    """Mean distance between two of B images (B, 3, H, W): root mean square of pixels, or 1 - cosine in CLIP's embedding.

    NaN for one image.
    """
    if clip is None:
        points = images.flatten(1)
        return (torch.pdist(points) / points.shape[1] ** 0.5).mean().item()
    processor, network = clip
    points = F.normalize(image_embeddings(network, preprocess(processor, images)))
    return torch.pdist(points).square().mean().item() / 2  # of unit vectors: 1 - cosine


def evaluate(target, args, loaded):
    """The table's rows of one run or model; `loaded` keeps the rewards for the next. Raises ValueError, RewardError, ..."""
    config, model, picture = settings_of(target, args)
    prompts, rewards = load_prompts(config.prompts), []
    for name in args.reward or [config.reward]:
        wanted = with_reward(config, name, args)
        check_questions(wanted, prompts)
        key = (wanted.device, name, *(getattr(wanted, option) for option in REWARD_OWNERS))
        loaded[key] = loaded.get(key) or reward_of(wanted)
        rewards.append((name, loaded[key]))
    clip = load_clip(args.clip, config.device) if args.clip else None
    policies = [policy_of(config, which, scored=False) for which in (config.model, model)]
    drawn = [draw_fixed(policy, prompts, config) for policy in policies]
    chosen, texts = drawn[0][0], [prompt.text for prompt in drawn[0][0]]
    varieties = [f"{variety(images, clip):.3f}" for _, images in drawn]
    cells = judged([right_animals(images, texts) for _, images in drawn])
    rows, labels = [], texts * 2
    for name, reward in rewards:
        (before, notes), (after, more_notes) = (reward(images, chosen) for _, images in drawn)
        values = torch.cat([before, after]).tolist()
        labels = ["\n".join(filter(None, (label, display(name, value), note)))
                  for label, value, note in zip(labels, values, notes + more_notes)]
        rows.append(["/".join(Path(target).parts[-2:]), short_name(name), Path(config.prompts).stem, str(len(texts)),
                     with_interval(name, before), with_interval(name, after), gain(name, before, after),
                     f"{(after > before).float().mean():.0%}", *cells, *varieties])
    if picture:
        shown = [to_pil(image) for _, images in drawn for image in images[:COLUMNS]]
        labels = labels[:COLUMNS][:len(texts)] + labels[len(texts):][:COLUMNS]
        runs.write_atomically(picture, runs.draw_grid(shown, labels, columns=len(shown) // 2).save)  # before above after
    return rows


def judged(before_after):
    """The judge's cells, from right_animals before and after; '-' where it cannot tell."""
    (named, number), (named_after, number_after) = before_after
    if named is None:
        return ["-"] * 4
    still, both = [a and b for a, b in zip(named, named_after)], [[a and b for a, b in zip(*right)] for right in before_after]
    return [f"{sum(named)} of {len(named)}", f"{sum(still)} ({sum(still) / max(sum(named), 1):.0%})",
            *(f"{sum(before)} -> {sum(after)}" for before, after in ((number, number_after), both))]


def with_interval(name, values):
    """The mean of a reward over B images, and half its 95 % interval (normal: the images are many), in the reward's unit."""
    half = 1.96 * values.double().std().item() / len(values) ** 0.5 if len(values) > 1 else float("nan")
    mean = display(name, values.double().mean().item())
    number, _, unit = mean.partition(" ")
    return f"{number} ± {half:.2g} {unit}".rstrip() if half == half else mean


def gain(name, before, after):
    """The mean gain of B images, likewise; of a reward with a unit, such as a size, also as a share of the start."""
    factor, unit = UNITS.get(name, (1, ""))
    change = with_interval(name, after - before)
    return f"{change} ({(after - before).mean() / before.mean().abs():+.0%})" if unit and before.mean() else change


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders under runs/, or models by folder or hub name")
    parser.add_argument("--reward", action="append", help="any of train.py's, more than once if you like (default: the run's)")
    parser.add_argument("--prompts", help="a set of python prompts.py, or a text file (default: the run's)")
    parser.add_argument("--images", type=int, help="number of images, spread evenly over the prompts (default: the run's)")
    parser.add_argument("--sampling-steps", type=int, help="denoising steps T (default: the run's)")
    parser.add_argument("--eta", type=float, help="noise of the DDIM chain, from 0 (default: the run's)")
    parser.add_argument("--clip", help="folder or hub name of a CLIP whose embeddings measure variety (default: pixels)")
    parser.add_argument("--preset", choices=PRESETS, default="emoji", help="of a model that is no run: base model and settings")
    parser.add_argument("--picture", type=Path, help="where the picture goes (default: before_after.png of a run)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where to draw (default: the run's)")
    parser.add_argument("--precision", choices=PRECISIONS, help="of the U-Net (default: the run's)")
    parser.add_argument("--wording", choices=Alignment.WORDINGS, help="of alignment, as train.py's")
    parser.add_argument("--bert-baseline", type=float, help="likewise")
    for flag in ("--reward-model", "--aesthetic-head", "--bert-model"):
        parser.add_argument(flag, help="of the rewards that have it, as train.py's")
    args = parser.parse_args(argv)
    if args.picture and len(args.models) > 1:
        print("evaluate.py: --picture is of one model: each would write over the last", file=sys.stderr)
        return 2
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.images is not None and args.images < 1:
        print(f"evaluate.py: --images {args.images}: must be at least 1", file=sys.stderr)
        return 2
    rows, refused, loaded = [HEADER, ["---"] * len(HEADER)], 0, {}
    for target in args.models:
        try:
            rows += evaluate(target, args, loaded)
        except (ValueError, OSError, RewardError, FloatingPointError, torch.OutOfMemoryError) as error:
            print(f"evaluate.py: {error}", file=sys.stderr)  # the others are evaluated all the same
            refused = 2
    print("\n".join("| " + " | ".join(row) + " |" for row in rows))
    return refused


if __name__ == "__main__":
    sys.exit(main())
