"""How noisy is DDPO's gradient, over the number of denoising steps and the baselines? (compare.py --ablation variance)

The question of a review: one terminal reward, T actions, does the variance of the gradient stay controlled? The policy is held
at its pretrained weights, and the gradient of one image i is G_i A_i: its advantage, a number, times its score function

    G_i = 1/T sum_t grad log p_theta(x_{t-1} | x_t, c)                (all weights of the U-Net; log p per latent dimension)

So the G_i of N images, kept whole (2 x N x 4.14 million numbers, 6.4 GB), give the estimate under every baseline, on the same
images, without sampling again. With g_i = A_i G_i over N independent images, the signal is |E g|^2, estimated by the mean of
<g_i, g_j> over i != j, and the noise of a batch of B images is (E|g|^2 - |E g|^2) / B. The figure reported is

    SNR^2 = |E g|^2 / noise of a batch,     of B = 64 images, the emoji preset's epoch

the squared ratio of the mean to its standard error, over all weights at once, as a vector: no projection. It is proportional to
B, and an estimate that may come out below 0 where no signal is seen. Its standard error is from a jackknife over groups of the
images. A prompt's baseline is the mean and deviation of other images of it, drawn for that; the batch's is that of the N.
Each is measured twice: learning from all T steps, and from all but the last two (train.py's --skip-last-steps 2).
"""
import numpy as np
import torch
from tqdm import tqdm

import runs
from ddpo import whiten
from prompts import load_prompts
from rewards import load_reward
from sampling import rollout, score
from settings import build_config, shared_settings, short_name
from train import policy_of

STEPS = (5, 10, 20, 50)
IMAGES, BATCH, GROUPS = 192, 64, 16
POOL = 10  # images of each prompt that its baseline is taken from; the gradient's images are others
SKIP = 2
NAMES = {f"{baseline}, {which}": f"{words}, {steps}" for which, steps in (("all", "all steps"), ("skip", "all but the last two"))
         for baseline, words in (("prompt", "per-prompt baseline"), ("batch", "batch baseline"), ("none", "no baseline"))}


def score_functions(policy, trajectory, steps):
    """G_i of every image, mean over those steps of the chain: (N, number of weights) fp32."""
    weights = list(policy.unet.parameters())
    N = len(trajectory.prompts)
    rows = torch.empty(N, sum(weight.numel() for weight in weights), device=policy.device)
    for image in tqdm(range(N), desc="gradients", leave=False, disable=None):
        log_probs, _ = score(policy, trajectory, torch.full((len(steps),), image), steps)
        torch.cat([grad.flatten() for grad in torch.autograd.grad(log_probs.mean(), weights)], out=rows[image])
    return rows


def squared_snr(products, advantages, batch):
    """SNR^2 of a batch's mean of g_i = A_i G_i. products (N, N): <G_i, G_j>; advantages (N,)."""
    products = products * np.outer(advantages, advantages)
    N = len(products)
    squares = np.trace(products) / N
    signal = (products.sum() - np.trace(products)) / (N * (N - 1))
    return signal / ((squares - signal) / batch)


def jackknife(products, advantages, batch, groups):
    """SNR^2 and its standard error, by leaving out one group of images after the other."""
    left = []
    for k in range(groups):
        rest = np.arange(len(products)) % groups != k
        left.append(squared_snr(products[np.ix_(rest, rest)], advantages[rest], batch))
    error = ((groups - 1) / groups * ((np.array(left) - np.mean(left)) ** 2).sum()) ** 0.5
    return squared_snr(products, advantages, batch), error


def measure_steps(config, images, pool, groups):
    """SNR^2 and its standard error under each baseline, over all of config.sampling_steps and all but the last two."""
    reward, prompts = load_reward(config.reward), load_prompts(config.prompts)
    policy = policy_of(config)
    rng = torch.Generator().manual_seed(config.seed)
    chosen = [prompts[i] for i in torch.randint(len(prompts), (images,), generator=rng)]
    trajectory, pictures = rollout(policy, [prompt.text for prompt in chosen], rng, config.sample_batch)
    rewards = reward(pictures, chosen)[0].double().numpy()
    others = prompts * pool
    _, pictures = rollout(policy, [prompt.text for prompt in others], rng, config.sample_batch, keep_chain=False)
    other_rewards = reward(pictures, others)[0].double().numpy()
    by_prompt = {prompt.text: other_rewards[k::len(prompts)] for k, prompt in enumerate(prompts)}
    T = config.sampling_steps
    early, late = (score_functions(policy, trajectory, steps) for steps in torch.arange(T).split([T - SKIP, SKIP]))
    products = {"skip": early @ early.T}
    products["all"] = (early.mul_(T - SKIP).add_(late.mul_(SKIP)).div_(T)) @ early.T
    advantages = {"prompt": np.array([whiten(value, by_prompt[prompt.text]) for value, prompt in zip(rewards, chosen)]),
                  "batch": np.array([whiten(value, rewards) for value in rewards]), "none": rewards}
    return {f"{name}, {which}": [float(x) for x in jackknife(
        product.double().cpu().numpy(), values.clip(-config.advantage_clip, config.advantage_clip), BATCH, groups)]
        for name, values in advantages.items() for which, product in products.items()}


def measure_variance(folder, command, steps=STEPS, images=IMAGES, pool=POOL, groups=GROUPS, **flags):
    """Measure what is missing in FOLDER/variance.jsonl, draw variance.png beside it, and return the table in Markdown.

    command is what the table says made it; flags are of train.py: reward, device, precision. Raises ValueError, RewardError or FloatingPointError, as train.py does.
    """
    log, lines = folder / "variance.jsonl", {}
    for T in tqdm(steps, desc="variance", unit="T"):
        config = build_config({**flags, "sampling_steps": T, "skip_last_steps": 0})
        asked = {"settings": shared_settings(config), "images": images, "pool": pool, "groups": groups, "batch": BATCH}
        old = [line for line in runs.read_lines(log) if {name: line[name] for name in asked} == asked]
        lines[T] = old[-1] if old else {**asked, **measure_steps(config, images, pool, groups)}
        if not old:
            runs.append_line(log, lines[T])
    draw(lines, folder / "variance.png")
    rows = ["| T | " + " | ".join(NAMES.values()) + " |", "|" + "---|" * (1 + len(NAMES))]
    rows += [f"| {T} | " + " | ".join("{:.2f} ± {:.2f}".format(*line[name]) for name in NAMES) + " |" for T, line in lines.items()]
    text = "\n".join(rows)
    runs.write_atomically(folder / "variance.md", lambda path: path.write_text(
        f"# Squared signal to noise of DDPO's gradient: {short_name(config.reward)}\n\n`{command}`; "
        f"{images} images for each T at the pretrained weights; estimate ± its standard error, of a batch of {BATCH}; how: "
        f"variance.py\n\n{text}\n\n![](variance.png)\n"))
    return text


def draw(lines, path):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = list(lines)
    for name, label in NAMES.items():
        axes.errorbar(steps, [lines[T][name][0] for T in steps], [lines[T][name][1] for T in steps], capsize=3, label=label,
                      fmt="o-" if name.endswith("all") else "s--")
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set(xscale="log", xticks=steps, xticklabels=steps, xlabel="denoising steps T",
             ylabel=f"squared signal to noise, {BATCH} images")
    axes.minorticks_off()
    axes.legend(fontsize=8)
    runs.write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110))
