"""How noisy is DDPO's gradient, over the number of denoising steps and the baselines? (compare.py --ablation variance)

With one reward at the end and T actions, does the variance of the gradient stay controlled? The policy is held at its pretrained
weights. The gradient of one image i is A_i G_i: its advantage, a number, times its score function

    G_i = 1/T sum_t grad log p_theta(x_{t-1} | x_t, c)                (all weights of the U-Net; log p per latent dimension)

The gradient has 4.14 million dimensions. A first trial, with 192 images and over all dimensions at once, could not tell its signal
from 0. So it is projected on one direction in which the reward is known to improve: u, the unit vector from the pretrained weights to those that
a run of the comparison ended with. With g_i = A_i <G_i, u> of N independent images, the figure is

    SNR = E[g] / (std[g] / sqrt(B)),     of a batch of B = 64 images, an epoch of the emoji preset

This is the ratio of the mean to its standard error. It is negative where the estimated gradient points away from u. Its own standard
error is the jackknife's. The images have another seed than the run, since the noise of the run's first batches is part of u. The run had
T = 10, the per-prompt baseline, and left out the last two steps: a direction found otherwise might favour other settings. The
baseline of a prompt is computed from other images of that prompt, the batch's from the N images. Every
baseline is measured on the same images, and twice: learning from all T steps, and from all but the last two.
"""
from dataclasses import replace

import numpy as np
import torch
from settings import build_config, reward_options, shared_settings
from tqdm import tqdm

import runs
from ddpo import whiten
from prompts import load_prompts
from rewards import load_reward, short_name
from sampling import rollout, score
from train import policy_of

STEPS = (5, 10, 20, 50)
IMAGES, BATCH, SEED = 512, 64, 200
POOL = 10  # images of each prompt for its baseline; the gradient is measured on other images
SKIP = 2
NAMES = {f"{baseline}, {which}": f"{words}, {steps}"
         for which, steps in (("all", "all steps"), ("skip", "all but the last two"))
         for baseline, words in (("prompt", "per-prompt baseline"), ("batch", "batch baseline"), ("none", "no baseline"))}


def direction(policy, trained):
    """The unit vector from the policy's weights to the trained policy's: one tensor for each weight of the U-Net."""
    moves = [after.detach() - before.detach() for before, after in zip(policy.denoiser.parameters(), trained.denoiser.parameters())]
    length = sum(move.square().sum() for move in moves).sqrt()
    return [move / length for move in moves]


def projected_scores(policy, trajectory, steps, u):
    """<G_i, u> of every image, where G_i is the mean over those steps of the chain: (N,) float64."""
    weights, projected = list(policy.denoiser.parameters()), []
    for image in tqdm(range(len(trajectory.prompts)), desc="gradients", leave=False, disable=None):
        log_probs = torch.cat([score(policy, trajectory, torch.tensor([image]), k)[0] for k in steps.tolist()])
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


def measure_snr(config, trained, images, pool):
    """name -> (SNR, standard error), for each baseline, over all of config.sampling_steps and over all but the last two."""
    reward = load_reward(config.reward, config.device, **reward_options(config, config.reward))
    prompts, policy = load_prompts(config.prompts), policy_of(config)
    u = direction(policy, policy_of(replace(config, precision="fp32"), trained))
    rng = torch.Generator().manual_seed(config.seed)
    chosen = [prompts[i] for i in torch.randint(len(prompts), (images,), generator=rng)]

    def draw(asked, keep_chain):
        trajectory = rollout(policy, [prompt.text for prompt in asked], rng, config.sample_batch, keep_chain)
        values, _ = reward(policy.decode(trajectory.x_0), asked)
        return trajectory, values.numpy()

    trajectory, rewards = draw(chosen, keep_chain=True)
    _, other_rewards = draw(prompts * pool, keep_chain=False)
    by_prompt = {prompt.text: other_rewards[k::len(prompts)] for k, prompt in enumerate(prompts)}
    T = config.sampling_steps
    early, late = (projected_scores(policy, trajectory, steps, u) for steps in torch.arange(T).split([T - SKIP, SKIP]))
    projected = {"all": ((T - SKIP) * early + SKIP * late) / T, "skip": early}
    clip = config.advantage_clip
    advantages = {"prompt": np.array([whiten(value, by_prompt[c.text]) for value, c in zip(rewards, chosen)]).clip(-clip, clip),
                  "batch": np.array([whiten(value, rewards) for value in rewards]).clip(-clip, clip), "none": rewards}
    return {f"{name}, {which}": jackknife(values * scores, BATCH)
            for name, values in advantages.items() for which, scores in projected.items()}


def measure_variance(folder, command, trained, provenance, steps=STEPS, images=IMAGES, pool=POOL, **flags):
    """Measure what is missing in FOLDER/variance.jsonl, draw variance.png beside it, and return the table in Markdown.

    command: what the table says made it. trained: the folder of a run, whose model/ gives the direction. provenance: the
    commit and the machine. flags: of train.py: reward, watch, prompts, device, precision. Raises ValueError, RewardError or FloatingPointError, as train.py
    does.
    """
    log, lines = folder / "variance.jsonl", {}
    for T in tqdm(steps, desc="variance", unit="T"):
        config = build_config({**flags, "seed": SEED, "sampling_steps": T, "skip_last_steps": 0})
        asked = {"settings": shared_settings(config), "seed": SEED, "direction": trained.name, "images": images, "pool": pool,
                 "batch": BATCH}
        old = [line for line in runs.read_lines(log) if asked.items() <= line.items()]
        lines[T] = old[-1] if old else {**asked, **provenance, **measure_snr(config, trained / "model", images, pool)}
        if not old:
            runs.append_line(log, lines[T])
    draw(lines, folder / "variance.png")
    rows = ["| T | " + " | ".join(NAMES.values()) + " |", "|" + "---|" * (1 + len(NAMES))]
    for T, line in lines.items():
        rows.append(f"| {T} | " + " | ".join("{:.2f} ± {:.2f}".format(*line[name]) for name in NAMES) + " |")
    text = "\n".join(rows)
    runs.write_text(folder / "variance.md", (
        f"# Signal to noise of DDPO's gradient: {short_name(config.reward)}\n\n`{command}`; commit "
        f"{' and '.join(sorted({line['commit'] for line in lines.values()}))}. {images} images for each T at the pretrained "
        f"weights, projected on the direction of {trained.name}. Estimate ± its standard error, for a batch of {BATCH}. How: see "
        f"variance.py.\n\n{text}\n\n![Signal to noise over T](variance.png)\n"))
    return text


def draw(lines, path):
    """SNR over T with its standard error, a curve a name."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = list(lines)
    for name, label in NAMES.items():
        axes.errorbar(steps, [lines[T][name][0] for T in steps], [lines[T][name][1] for T in steps], capsize=3, label=label,
                      fmt="o-" if name.endswith("all") else "s--")
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set(xscale="log", xticks=steps, xticklabels=steps, xlabel="denoising steps T",
             ylabel=f"signal to noise, {BATCH} images")
    axes.minorticks_off()
    axes.legend(fontsize=8)
    runs.write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110))
