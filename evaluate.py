"""What training did to the pictures: the base model and the trained one on the same fixed prompts and noise.

    python evaluate.py runs/compressibility-ddpo-is-1 [more runs]

Prints a row a run: the reward before and after, and how many animals the independent judge (judge.py, the embedded
model's) named before, and of these how many it still names. Writes before_after.png into each run's folder.
"""
import argparse
import sys
from pathlib import Path

import runs
from judge import right_animals
from prompts import load_prompts
from rewards import RewardError, display, to_pil
from settings import check, load_config, short_name
from train import draw_fixed, policy_of, reward_of

COLUMNS = 12


def evaluate_run(folder):
    """Table row of one finished run. Raises ValueError if it is not one."""
    config = load_config(folder)
    check(config)
    if not (folder / "model").exists():
        raise ValueError(f"{folder} has no model/ yet: finish it with python train.py --resume {folder}")
    reward, prompts = reward_of(config), load_prompts(config.prompts)
    means, named, pictures, labels = [], [], [], []
    for model in (config.model, folder / "model"):
        chosen, images = draw_fixed(policy_of(config, model), prompts, config)
        values, _ = reward(images, chosen)
        means.append(values.mean().item())
        named.append(right_animals(images, [prompt.text for prompt in chosen]))
        pictures += [to_pil(image) for image in images[:COLUMNS]]
        labels += [f"{prompt.text}\n{display(config.reward, value)}"
                   for prompt, value in zip(chosen, values[:COLUMNS].tolist())]
    grid = runs.draw_grid(pictures, labels, columns=len(pictures) // 2)  # before above after
    runs.write_atomically(folder / "before_after.png", grid.save)
    judged = ("-", "-")
    before, after = named
    if before is not None:
        still = sum(b and a for b, a in zip(before, after))
        judged = f"{sum(before)} of {len(before)}", f"{still} ({still / max(sum(before), 1):.0%})"
    return [short_name(config.reward), config.algorithm, str(config.seed), *(display(config.reward, m) for m in means),
            f"{(means[1] - means[0]) / abs(means[0]):+.0%}" if means[0] else "-", *judged]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders under runs/")
    rows = [["reward", "algorithm", "seed", "before", "after", "reward gained", "named before", "still named"], ["---"] * 8]
    refused = 0
    for folder in parser.parse_args(argv).runs:
        try:
            rows.append(evaluate_run(folder))
        except (ValueError, OSError, RewardError, FloatingPointError) as error:  # the others are evaluated all the same
            print(f"evaluate.py: {error}", file=sys.stderr)
            refused = 2
    print("\n".join("| " + " | ".join(row) + " |" for row in rows))
    return refused


if __name__ == "__main__":
    sys.exit(main())
