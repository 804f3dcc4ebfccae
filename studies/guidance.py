"""Universal guidance beside a trained policy (paper, appendix B): reward, watched reward, seconds a picture.

    python train.py --reward studies/redness.py:redness --stop-below animal=90% --name red
    python studies/guidance.py runs/red
    python studies/guidance.py runs/red --eval-prompts 50 --recurrences 6

Prints two tables. The first is a sweep of the scale g on other noise than the second. The rule: of the scales
that keep nine tenths of what the first watched reward of the run was without guidance, take the one with the
highest reward; without a watched reward, the one with the highest reward. The second table has the base
model, guidance at that scale, and the run's own policy, on the evaluation's prompts and noise. Its picture,
in this order from above, goes to guidance.png in the run's folder. Other flags replace the run's settings.

Guidance draws by DDIM with eta 0. The base model and the trained one draw as in training, with the run's eta.
So the first table's g = 0, on its own noise, is the base model without eta's noise.
"""
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the method is, if run as a script
from beyond.universal_guidance import guided_rollout
from evaluate import finished_run, with_interval
from policy import load_policy
from prompts import load_prompts
from rewards import to_pil
from sampling import rollout
from studies import command_line
from studies.report import markdown
from support.run_folder import draw_grid, write_atomically
from support.settings import completed
from support.stopping import floor_of
from train import EVAL_SEED, fixed_prompts, load_rewards

SWEEP_SEED = 100  # of the noise on which the scale is chosen
COLUMNS = 12      # of the picture


def drawn(policy, prompts, seed, config, **guidance):
    """Images of the prompts, and the seconds that one took. guidance: guided_rollout's other arguments."""
    start, rng = time.perf_counter(), torch.Generator().manual_seed(seed)
    if guidance:  # it keeps activations, as learning does
        x_0 = guided_rollout(policy, prompts, rng=rng, batch_size=config.micro_batch, **guidance)
    else:
        x_0 = rollout(policy, [prompt.text for prompt in prompts], rng, config.sample_batch, False).x_0
    return policy.decode(x_0), (time.perf_counter() - start) / len(prompts)


def row(name, images, seconds, prompts, rewards):
    """A row of the table, and the means of the rewards."""
    values = [reward(images, prompts)[0] for reward in rewards]
    cells = ["-" if value.isnan().all() else with_interval(value[~value.isnan()], reward.unit)
             for value, reward in zip(values, rewards)]
    return [name, *cells, f"{seconds:.2g}"], [value.nanmean().item() for value in values]


def chosen_scale(means):
    """The scale that the rule takes. means: scale -> means of the reward and of the watched ones."""
    kept = {scale: mean for scale, mean in means.items() if len(mean) < 2
            or mean[1] != mean[1] or mean[1] >= floor_of(means[0.0][1], 0.9)}  # NaN: it can judge none
    return max(kept, key=lambda scale: kept[scale][0])


def guidable(config):
    """The base model with frozen weights: a gradient to the latents needs none to them, nor its memory."""
    policy = load_policy(replace(config, eta=0.0), config.model, scored=False)
    for network in (policy.denoiser, policy.pipeline.vae):
        network.requires_grad_(False)
        if config.gradient_checkpointing:
            network.enable_gradient_checkpointing()
    return policy


def compare(args):
    """The two tables."""
    config, model = finished_run(args.run)
    config = completed(replace(config, **{"compile": False, **args.flags}))
    prompts, rewards = fixed_prompts(load_prompts(config.prompts), config), load_rewards(config)
    guided, sweep, means, table, pictures = guidable(config), [], {}, [], []
    options = {"reward": rewards[0], "recurrences": args.recurrences, "backward_rate": args.backward_rate}
    for scale in dict.fromkeys([0.0, *args.scales]):  # g = 0 is without guidance of either kind
        drawing = drawn(guided, prompts, SWEEP_SEED, config, scale=scale, **options,
                        backward_steps=args.backward_steps if scale else 0)
        cells, means[scale] = row(f"g = {scale:g}", *drawing, prompts, rewards)
        sweep.append(cells)
    options |= {"scale": chosen_scale(means), "backward_steps": args.backward_steps}
    title = f"g = {options['scale']:g}, k = {args.recurrences}, m = {args.backward_steps}"
    for name, policy, guidance in (
            ("base model", load_policy(config, config.model, scored=False), {}),
            (f"universal guidance, {title}", guided, options),
            (config.algorithm, load_policy(config, model, scored=False), {})):
        images, seconds = drawn(policy, prompts, EVAL_SEED, config, **guidance)
        table.append(row(name, images, seconds, prompts, rewards)[0])
        pictures += [to_pil(image) for image in images[:COLUMNS]]
    labels = [prompt.text for prompt in prompts[:COLUMNS]] * 3
    write_atomically(args.run / "guidance.png", draw_grid(pictures, labels, columns=len(pictures) // 3).save)
    head = ["", *(reward.name for reward in rewards), "seconds a picture"]
    return f"{markdown(head, sweep)}\n\n{markdown(head, table)}"


def main(argv=None):
    return command_line(
        __doc__, compare, argv, run=dict(type=Path, help="a finished run, whose reward is differentiable"),
        scales=dict(type=float, nargs="+", default=[10, 30, 100, 300, 1000], help="g, to choose from"),
        recurrences=dict(type=int, default=1, help="k, passes at a timestep (default: 1)"),
        backward_steps=dict(type=int, default=0, help="m (default: 0)"),
        backward_rate=dict(type=float, default=1.0, help="step size of these (default: 1)"))


if __name__ == "__main__":
    sys.exit(main())
