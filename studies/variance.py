"""How noisy is DDPO's gradient, over the number of denoising steps and the baselines?

    python studies/variance.py runs/NAME     # a finished run of DDPO-IS, as `python train.py` makes them

With one reward at the end and T actions, does the variance of the gradient stay controlled? The policy is
held at its pretrained weights. The gradient of one image i is A_i G_i: its advantage, a number, times its
score function

    G_i = 1/T sum_t grad log p_theta(x_{t-1} | x_t, c)        (all weights of the U-Net; log p per dimension)

The gradient has 4.14 million dimensions. A first trial, with 192 images and over all dimensions at once,
could not tell its signal from 0. So it is projected on one direction in which the reward is known to improve:
u, the unit vector from the pretrained weights to those that the run ended with. With g_i = A_i <G_i, u> of N
independent images, the figure is

    SNR = E[g] / (std[g] / sqrt(B)),     of a batch of B = 64 images, an epoch of the emoji preset

This is the ratio of the mean to its standard error. It is negative where the estimated gradient points away
from u. Its own standard error is the jackknife's. The images have another seed than the run, since the noise
of the run's first batches is part of u. The run had T = 10, the per-prompt baseline, and left out the last
two steps: a direction found otherwise might favour other settings. The baseline of a prompt is computed from
other images of that prompt, the batch's from the N images. Every baseline is measured on the same images, and
twice: learning from all T steps, and from all but the last two.
"""
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the method is, if run as a script
from ddpo import whiten
from evaluate import finished_run
from prompts import load_prompts
from sampling import rollout, score
from studies import command_line
from studies.report import markdown
from support.settings import completed
from train import load_rewards, policy_of

BATCH, SKIP, SEED = 64, 2, 200
COLUMNS = [f"{baseline}, {steps}" for steps in ("all steps", "all but the last two")
           for baseline in ("per-prompt baseline", "batch baseline", "no baseline")]


def direction(policy, trained):
    """The unit vector from the policy's weights to the trained policy's: one tensor for each weight."""
    pairs = zip(policy.denoiser.parameters(), trained.denoiser.parameters())
    moves = [after.detach() - before.detach() for before, after in pairs]
    length = sum(move.square().sum() for move in moves).sqrt()
    return [move / length for move in moves]


def projected_scores(policy, trajectory, steps, u):
    """<G_i, u> of every image, where G_i is the mean over those steps of the chain: (N,) float64."""
    weights, projected = list(policy.denoiser.parameters()), []
    for image in tqdm(range(len(trajectory.prompts)), desc="gradients", leave=False, disable=None):
        log_probs = torch.cat([score(policy, trajectory, torch.tensor([image]), k)[0] for k in steps])
        gradients = torch.autograd.grad(log_probs.mean(), weights)
        projected.append(sum((gradient * part).sum() for gradient, part in zip(gradients, u)).item())
    return np.array(projected)


def signal_to_noise(gradients, batch):
    """Mean over standard error of a batch's mean, of N projected gradients (N,)."""
    return gradients.mean() / (gradients.std(ddof=1) / batch**0.5)


def jackknife(gradients, batch):
    """The signal to noise ratio and its standard error, by leaving out one image after the other."""
    N = len(gradients)
    leave_one_out = np.array([signal_to_noise(np.delete(gradients, k), batch) for k in range(N)])
    return signal_to_noise(gradients, batch), ((N - 1) * leave_one_out.var()) ** 0.5


def measure_snr(config, model, images, pool):
    """(SNR, standard error) of each column. model: the folder of the trained model."""
    reward, prompts, policy = load_rewards(config)[0], load_prompts(config.prompts), policy_of(config)
    u = direction(policy, policy_of(replace(config, precision="fp32"), model))
    rng, T, clip = torch.Generator().manual_seed(SEED), config.sampling_steps, config.advantage_clip
    chosen = [prompts[i] for i in torch.randint(len(prompts), (images,), generator=rng)]

    def draw(asked, keep_chain):
        trajectory = rollout(policy, [prompt.text for prompt in asked], rng, config.sample_batch, keep_chain)
        values, _ = reward(policy.decode(trajectory.x_0), asked)
        return trajectory, values.numpy()

    trajectory, rewards = draw(chosen, keep_chain=True)
    _, others = draw(prompts * pool, keep_chain=False)
    by_prompt = {prompt.text: others[k::len(prompts)] for k, prompt in enumerate(prompts)}
    early, late = (projected_scores(policy, trajectory, steps, u)
                   for steps in (range(T - SKIP), range(T - SKIP, T)))
    own = np.array([whiten(value, by_prompt[prompt.text]) for value, prompt in zip(rewards, chosen)])
    of_batch = np.array([whiten(value, rewards) for value in rewards])
    advantages = own.clip(-clip, clip), of_batch.clip(-clip, clip), rewards
    return [jackknife(values * scores, BATCH) for scores in (((T - SKIP) * early + SKIP * late) / T, early)
            for values in advantages]


def print_rows(args, all_steps=(5, 10, 20, 50), images=512, pool=10):
    """Print the table, row by row. pool: other images of each prompt, for its baseline."""
    config, model = finished_run(args.run)
    print(markdown(["T", *COLUMNS], []))
    for T in all_steps:
        here = completed(replace(config, **args.flags, sampling_steps=T, skip_last_steps=0))
        cells = ["{:.2f} ± {:.2f}".format(*column) for column in measure_snr(here, model, images, pool)]
        print(f"| {T} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    sys.exit(command_line(__doc__, print_rows, None, run=dict(type=Path, help="a finished run of DDPO-IS")))
