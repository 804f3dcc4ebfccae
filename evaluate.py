"""What training did to the images: the base model and the trained one, on the same prompts and noise.

    python evaluate.py runs/compressibility-ddpo-is-1 [more runs]
    python evaluate.py runs/NAME --prompts unseen_emoji_animals --images 90 --reward incompressibility
    python evaluate.py runs/NAME --eta 0 --sampling-steps 20      # does the gain remain without noise?
    python evaluate.py runs/NAME --merge FOLDER                   # adapters and base model as one pipeline

Prints a row for each run and reward: the run's own or those of --reward, and then the watched ones.

    before, after, change  means over the images that the reward can judge, each with a 95 % interval
    improved               share of these images with a higher reward than before

The images, before above after, go to before_after.png in the run's folder. By default all is as in the run.
"""
import argparse
import sys
from pathlib import Path

import torch

from policy import load_policy
from prompts import load_prompts
from rewards import display, load_reward, to_pil
from support import run_folder
from support.loading import is_lora, merge_lora, save_pipeline
from support.settings import absolute, load_settings, refuse, reward_options
from train import draw_fixed

COLUMNS = 12
HEADER = ["run", "reward", "prompts", "images", "before", "after", "change", "improved"]


def evaluate(folder, args):
    """The table's rows of one run."""
    config, model = finished_run(folder, args.device)
    config.prompts = absolute(args.prompts or config.prompts)
    config.sampling_steps = args.sampling_steps or config.eval_steps or config.sampling_steps
    config.eval_prompts = args.images or config.eval_prompts
    config.eta = config.eta if args.eta is None else args.eta  # 0, too: nothing is scored
    asked = [absolute(name) for name in args.reward or [config.reward]]
    rewards = [load_reward(name, config.device, nan_allowed=True, **reward_options(config, name))
               for name in dict.fromkeys([*asked, *config.watch])]
    prompts = load_prompts(config.prompts)
    drawn = [draw_fixed(load_policy(config, source, scored=False), prompts, config)
             for source in (config.model, model)]  # one after the other: two would not fit on a GPU
    chosen, texts = drawn[0][0], [prompt.text for prompt in drawn[0][0]]
    rows, labels = [], texts * 2
    for reward in rewards:
        (before, notes), (after, more_notes) = (reward(images, chosen) for _, images in drawn)
        values = torch.cat([before, after]).tolist()
        labels = ["\n".join(filter(None, (label, f"{reward.name} {display(value, reward.unit)}", note)))
                  for label, value, note in zip(labels, values, notes + more_notes)]
        rows.append([folder.name, reward.name, Path(config.prompts).stem, str(len(texts)),
                     *reward_cells(before, after, reward.unit)])
    shown = [to_pil(image) for _, images in drawn for image in images[:COLUMNS]]
    labels = labels[:COLUMNS][:len(texts)] + labels[len(texts):][:COLUMNS]
    grid = run_folder.draw_grid(shown, labels, columns=len(shown) // 2)  # before above after
    run_folder.write_atomically(folder / "before_after.png", grid.save)
    return rows


def finished_run(folder, device=None, **others):
    """The settings of a run, on another device if one is given, with others, and the folder of its model."""
    settings, model = run_folder.load_checkpoint(folder)["settings"], folder / "model"
    if not model.exists():
        raise ValueError(f"{folder} has no model/ yet: finish it with python train.py --resume {folder}")
    return load_settings({**settings, **others}, {"device": device} if device else {}), model


def merge(run, folder):
    """Write a run's adapters and its base model as one pipeline in fp32, which plain diffusers loads."""
    config, model = finished_run(run, "cpu", precision="fp32")
    if folder.exists():
        raise ValueError(f"{folder} exists")
    if not is_lora(model):
        raise ValueError(f"{model} is whole: it has no adapters")
    pipeline = load_policy(config, model).pipeline
    merge_lora(pipeline)
    save_pipeline(pipeline, folder)
    return f"{folder}: {config.model} with the adapters of {run}"


def reward_cells(before, after, unit):
    """The cells before, after, change and improved, of a reward's values (B,); '-' if it can judge none."""
    known = ~(before.isnan() | after.isnan())
    if not known.any():
        return ["-"] * 4
    before, after = before[known], after[known]
    change, improved = with_interval(after - before, unit), (after > before).float().mean()
    if unit[1] not in ("", "%") and before.mean():  # of a reward with a unit, such as a size
        change += f" ({unit[0] * (after - before).mean() / before.mean().abs():+.0%} of the start)"
    return [with_interval(before, unit), with_interval(after, unit), change, f"{improved:.0%}"]


def with_interval(values, unit):
    """The mean of a reward over B images in its unit, and half its 95 % interval (normal: B is large)."""
    if len(values) == 1:  # it says nothing of an interval
        return display(values.item(), unit)
    half = 1.96 * abs(unit[0]) * values.std().item() / len(values) ** 0.5
    mean, _, name = display(values.mean().item(), unit).partition(" ")
    return f"{mean} ± {half:.2g} {name}".rstrip()


def main(argv=None):
    """The command line. Returns the exit code."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("runs", nargs="+", type=Path, help="folders under runs/")
    parser.add_argument("--reward", action="append", help="as in train.py; may be repeated")
    parser.add_argument("--prompts", help="a set of python prompts.py, or a file")
    parser.add_argument("--images", type=int, help="how many, spread evenly over the prompts")
    parser.add_argument("--sampling-steps", type=int, help="denoising steps T")
    parser.add_argument("--eta", type=float, help="how random the chain is, from 0")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 or mps")
    parser.add_argument("--merge", type=Path, metavar="FOLDER", help="write one pipeline, do nothing else")
    parser.error = refuse  # one line, not the usage of all flags
    try:
        args = parser.parse_args(argv)
        if args.merge:
            if len(args.runs) > 1:
                refuse("--merge takes one run")
            print(merge(args.runs[0], args.merge))
            return 0
        rows = [row for folder in args.runs for row in evaluate(folder, args)]
    except (ValueError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    for row in (HEADER, ["---"] * len(HEADER), *rows):
        print("| " + " | ".join(row) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
