"""Universal guidance beside a trained policy (paper, appendix B): reward, watched reward and seconds a picture.

    python train.py --reward studies/redness.py:redness --stop-below animal=90% --name red && python studies/guidance.py runs/red
    echo "a wolf" > wolf.txt    # the same on one prompt: add --prompts wolf.txt, and another --name
    python studies/guidance.py runs/wolf --images 50 --recurrences 6 --micro-batch 1 --gradient-checkpointing    # the README's, on Stable Diffusion

Prints two tables. The first is a sweep of the scale g on other noise than the second. The rule: of the scales that keep nine tenths of
what the first watched reward of the run was without guidance, take the one with the highest reward; without a watched reward, the one
with the highest reward. The second table has the base model, guidance at that scale, and the run's own policy, on the evaluation's
prompts and noise. Its picture, in this order from above, goes to guidance.png in the run's folder.

Guidance draws by DDIM with eta 0. The base model and the trained one draw as in training, with the run's eta. So the first table's g = 0,
on its own noise, is the base model without eta's noise.
"""
import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the method is, if this file is run as a script
from baselines_guidance import guided_rollout
from networks import to_pil
from settings import check, chosen_device, lowest, refuse

import runs
from evaluate import finished_run, with_interval
from policy import PRECISIONS
from prompts import load_prompts
from rewards import RewardError
from sampling import rollout
from train import EVAL_SEED, MAY_CHANGE, fixed_prompts, load_rewards, policy_of

SWEEP_SEED = 100  # of the noise on which the scale is chosen
COLUMNS = 12      # of the picture


def drawn(policy, prompts, seed, config, guidance=None):
    """Images of the prompts, and the seconds that one took. guidance: guided_rollout's reward and settings; None: the plain chain."""
    start, rng = time.perf_counter(), torch.Generator().manual_seed(seed)
    if guidance:
        x_0 = guided_rollout(policy, prompts, rng=rng, batch_size=config.micro_batch, **guidance)  # it keeps activations, as learning does
    else:
        x_0 = rollout(policy, [prompt.text for prompt in prompts], rng, config.sample_batch, keep_chain=False).x_0
    images = policy.decode(x_0)
    return images, (time.perf_counter() - start) / len(prompts)


def row(name, images, seconds, prompts, rewards):
    """A row of the table, and the means of the rewards."""
    values = [reward(images, prompts)[0] for reward in rewards]
    cells = [with_interval(value[~value.isnan()], reward.unit) for value, reward in zip(values, rewards)]
    return [name, *cells, f"{seconds:.2g}"], [value.nanmean().item() for value in values]


def chosen_scale(means):
    """The scale that the rule takes. means: scale -> means of the reward and of the watched ones; scale 0 is without guidance."""
    kept = {scale: mean for scale, mean in means.items()
            if len(mean) < 2 or mean[1] != mean[1] or mean[1] >= lowest(means[0.0][1], 0.9)}  # NaN: it can judge none
    return max(kept, key=lambda scale: kept[scale][0])


def guidable(config, checkpointing):
    """The base model with frozen weights: a gradient to the latents needs none to the weights, nor the memory for it."""
    policy = policy_of(config, config.model, scored=False)
    for network in (policy.denoiser, policy.pipeline.vae):
        network.requires_grad_(False)
        if checkpointing:
            network.enable_gradient_checkpointing()
    return policy


def compare(run, args):
    """The two tables, as lines. Raises ValueError, OSError, RewardError, FloatingPointError or torch.OutOfMemoryError."""
    config, model = finished_run(run)
    queries = runs.load_checkpoint(run, MAY_CHANGE)["epoch"] * config.samples_per_epoch
    changes = {"eval_prompts": args.images, "micro_batch": args.micro_batch, "precision": args.precision, "compile": False,
               "device": args.device and chosen_device(args.device)}
    config = replace(config, **{name: value for name, value in changes.items() if value is not None})
    check(config)
    prompts = fixed_prompts(load_prompts(config.prompts), config)
    rewards = load_rewards(config)
    guided = guidable(replace(config, eta=0.0, sampling_steps=args.sampling_steps or config.sampling_steps), args.gradient_checkpointing)
    options = {"reward": rewards[0], "recurrences": args.recurrences, "backward_steps": args.backward_steps,
               "backward_rate": args.backward_rate}
    head = ["", *(reward.name for reward in rewards), "seconds a picture"]
    lines, means = [head, ["---"] * len(head)], {}
    for scale in dict.fromkeys([0.0, *args.scales]):
        unguided = {} if scale else {"backward_steps": 0}
        images = drawn(guided, prompts, SWEEP_SEED, config, {**options, **unguided, "scale": scale})
        cells, means[scale] = row(f"g = {scale:g}", *images, prompts, rewards)
        lines.append(cells)
    best = chosen_scale(means)
    lines += [[], [f"g = {best:g} is taken"], [], head, ["---"] * len(head)]
    pictures = []
    for name, policy, guidance in (
            ("base model", policy_of(config, config.model, scored=False), None),
            (f"universal guidance, g = {best:g}, k = {args.recurrences}, m = {args.backward_steps}", guided, {**options, "scale": best}),
            (f"{config.algorithm}, {queries} queries", policy_of(config, model, scored=False), None)):
        images, seconds = drawn(policy, prompts, EVAL_SEED, config, guidance)
        lines.append(row(name, images, seconds, prompts, rewards)[0])
        pictures += [to_pil(image) for image in images[:COLUMNS]]
    labels = [prompt.text for prompt in prompts[:COLUMNS]] * 3
    runs.write_atomically(run / "guidance.png", runs.draw_grid(pictures, labels, columns=len(pictures) // 3).save)
    return ["| " + " | ".join(cells) + " |" if len(cells) > 1 else "".join(cells) for cells in lines]


def main(argv=None):
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run under runs/, whose reward is differentiable")
    parser.add_argument("--scales", type=float, nargs="+", default=[10.0, 30.0, 100.0, 300.0, 1000.0], help="g, of the sweep (default: %(default)s)")
    parser.add_argument("--recurrences", type=int, default=1, help="k, passes at a timestep (default: %(default)s)")
    parser.add_argument("--backward-steps", type=int, default=0, help="m (default: %(default)s)")
    parser.add_argument("--backward-rate", type=float, default=1.0, help="step size of these (default: %(default)s)")
    parser.add_argument("--images", type=int, help="number of images, spread evenly over the prompts (default: the run's)")
    parser.add_argument("--sampling-steps", type=int, help="of guidance (default: the run's)")
    parser.add_argument("--micro-batch", type=int, help="images that guidance draws at a time, with the activations of U-Net and VAE in "
                        "memory (default: the run's)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="compute these activations twice instead")
    parser.add_argument("--device", help="where to draw: auto, cpu, cuda, cuda:1, mps (default: the run's)")
    parser.add_argument("--precision", choices=PRECISIONS, help="of the networks (default: the run's)")
    parser.error = refuse  # one line, not the usage of all flags
    try:
        args = parser.parse_args(argv)
        for name, least in (("images", 1), ("sampling_steps", 1), ("micro_batch", 1), ("recurrences", 1), ("backward_steps", 0)):
            if getattr(args, name) is not None and getattr(args, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")
        if not all(0 < value < float("inf") for value in (*args.scales, args.backward_rate)):
            raise ValueError("--scales and --backward-rate must be positive numbers; the sweep has g = 0 by itself")
        print("\n".join(compare(args.run, args)))
    except torch.OutOfMemoryError:
        print("guidance.py: out of GPU memory: a smaller --micro-batch needs less, and so does --gradient-checkpointing", file=sys.stderr)
        return 2
    except (ValueError, OSError, RewardError, FloatingPointError) as error:
        print(f"guidance.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
