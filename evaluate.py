"""What training did to the pictures: the base model and the trained one on the same prompts and noise, seen in training or not.

    python evaluate.py runs/compressibility-ddpo-is-1 [more runs]
    python evaluate.py runs/NAME --prompts unseen_emoji_animals --images 90 --reward compressibility --reward incompressibility
    python evaluate.py runs/NAME --eta 0 --sampling-steps 20      # does a policy trained with noise help the sampler without?
    python evaluate.py runs/NAME/model --prompts objects          # any model, by folder or hub name, against the preset's

Prints a row for each model and reward: the reward's means, its gain as a share of the start with a 95 % interval over the
images, the share of images that improved; how many animals the independent judge (judge.py, the embedded model's) named
before, and of these how many it still names; and the variety of the pictures, which is what training on a reward destroys
first: the mean distance between any two, in pixels (root mean square, of 1) or, with --clip, 1 - cosine of that CLIP's
embeddings. A run's picture, before above after, goes to before_after.png in its folder, or where --picture says.
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
from rewards import RewardError, display, image_embeddings, load_clip, preprocess, to_pil
from settings import PRESETS, REWARD_OWNERS, Config, build_config, check, load_config, short_name
from train import check_questions, draw_fixed, policy_of, reward_of

COLUMNS = 12
HEADER = ["model", "reward", "prompts", "images", "before", "after", "gain (95 %)", "improved", "named before", "still named",
          "variety before", "after"]


def settings_of(target, args):
    """Settings to draw with, the trained model, and where its picture goes (None: nowhere). Raises ValueError."""
    if (Path(target) / "config.json").exists():
        config, model, picture = load_config(Path(target)), Path(target) / "model", Path(target) / "before_after.png"
        check(config)
        if not model.exists():
            raise ValueError(f"{target} has no model/ yet: finish it with python train.py --resume {target}")
    else:
        config, model, picture = build_config({"preset": args.preset}), target, None
    changes = {"prompts": args.prompts, "sampling_steps": args.sampling_steps, "eval_prompts": args.images}
    config = replace(config, **{name: value for name, value in changes.items() if value is not None})
    check(config)
    # A policy without noise has no log-probabilities, and so no place in the settings of a training; it can be drawn from.
    return config if args.eta is None else replace(config, eta=args.eta), model, args.picture or picture


def with_reward(config, reward):
    """The same settings for another reward: what was set for the own one is not for it."""
    others = {name: getattr(Config, name) for name in REWARD_OWNERS} if reward != config.reward else {}
    return replace(config, reward=reward, **others)


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


def evaluate(target, args):
    """The table's rows of one run or model. Raises ValueError, RewardError, FloatingPointError."""
    config, model, picture = settings_of(target, args)
    prompts = load_prompts(config.prompts)
    configs = [with_reward(config, reward) for reward in args.reward or [config.reward]]
    for one in configs:
        check_questions(one, prompts)
    rewards = [reward_of(one) for one in configs]
    clip = load_clip(args.clip, config.device) if args.clip else None
    policies = [policy_of(config, which, scored=False) for which in (config.model, model)]
    drawn = [draw_fixed(policy, prompts, config) for policy in policies]
    chosen, texts = drawn[0][0], [prompt.text for prompt in drawn[0][0]]
    varieties = [f"{variety(images, clip):.3f}" for _, images in drawn]
    named = [right_animals(images, texts) for _, images in drawn]
    judged = ["-", "-"]
    if named[0] is not None:
        still = sum(b and a for b, a in zip(*named))
        judged = [f"{sum(named[0])} of {len(texts)}", f"{still} ({still / max(sum(named[0]), 1):.0%})"]
    rows, labels = [], [text + "\n" for text in texts * 2]
    for one, reward in zip(configs, rewards):
        before, after = (reward(images, chosen)[0] for _, images in drawn)
        labels = [label + f"{display(one.reward, value)} " for label, value in zip(labels, torch.cat([before, after]).tolist())]
        rows.append([Path(target).name, short_name(one.reward), Path(config.prompts).stem, str(len(texts)),
                     *(display(one.reward, values.mean().item()) for values in (before, after)),
                     gain(before, after), f"{(after > before).float().mean():.0%}", *judged, *varieties])
    if picture:
        shown = [to_pil(image) for _, images in drawn for image in images[:COLUMNS]]
        labels = labels[:COLUMNS][:len(texts)] + labels[len(texts):][:COLUMNS]
        runs.write_atomically(picture, runs.draw_grid(shown, labels, columns=len(shown) // 2).save)  # before above after
    return rows


def gain(before, after):
    """Mean gain of B images, as a share of the mean before, and half its 95 % interval (normal: the images are many)."""
    change, start = (after - before).double(), before.double().mean().abs().item()
    if not start:
        return "-"
    half = 1.96 * change.std().item() / len(change) ** 0.5
    return f"{change.mean().item() / start:+.0%} ± {half / start:.0%}"


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
    args = parser.parse_args(argv)
    if args.images is not None and args.images < 1:
        print(f"evaluate.py: --images {args.images}: must be at least 1", file=sys.stderr)
        return 2
    rows, refused = [HEADER, ["---"] * len(HEADER)], 0
    for target in args.models:
        try:
            rows += evaluate(target, args)
        except (ValueError, OSError, RewardError, FloatingPointError, torch.OutOfMemoryError) as error:
            print(f"evaluate.py: {error}", file=sys.stderr)  # the others are evaluated all the same
            refused = 2
    print("\n".join("| " + " | ".join(row) + " |" for row in rows))
    return refused


if __name__ == "__main__":
    sys.exit(main())
