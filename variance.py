"""How noisy is DDPO's gradient, over the number of denoising steps and the baselines? (compare.py --ablation variance)

The question of a review: one terminal reward, T actions, does the variance of the gradient stay controlled? The policy is held
at its pretrained weights, and the gradient of one image i is G_i A_i: its advantage, a number, times its score function

    G_i = 1/T sum_t grad log p_theta(x_{t-1} | x_t, c)                (all weights of the U-Net; log p per latent dimension)

So the G_i of N images, kept whole, give the estimate under every baseline, on the same images, without sampling again. With
g_i = A_i G_i over N independent images, the signal is |E g|^2, estimated without bias by the mean of <g_i, g_j> over i != j, and
the noise of a batch of B images is (E|g|^2 - |E g|^2) / B. The ratio reported is

    SNR = |E g| / sqrt(noise of a batch),     of B = 64 images, the emoji preset's epoch

the mean over its standard error, over all weights at once, as a vector: no projection. The standard error of the SNR is from
a jackknife over 16 groups of the images. A prompt's baseline is the mean of other images of it, drawn for that.
"""
import json

import numpy as np
import torch
from tqdm import tqdm

import runs
from prompts import load_prompts
from rewards import load_reward
from sampling import load_policy, rollout, score
from settings import build_config

STEPS = (5, 10, 20, 50)
IMAGES, BATCH, GROUPS = 192, 64, 16
POOL = 10  # images of each prompt that its baseline is taken from; the gradient's images are others


def score_functions(policy, trajectory):
    """G_i of every image: (N, number of weights) fp32."""
    T = len(trajectory.timesteps)
    weights = list(policy.unet.parameters())
    rows = []
    for image in tqdm(range(len(trajectory.prompts)), desc=f"T = {T}: gradients", leave=False, disable=None):
        log_probs, _ = score(policy, trajectory, torch.full((T,), image), torch.arange(T))
        rows.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(log_probs.mean(), weights)]))
    return torch.stack(rows)


def signal_to_noise(products, advantages, batch):
    """The SNR of a batch's mean of g_i = A_i G_i. products (N, N): <G_i, G_j>; advantages (N,). 0 where no signal is seen."""
    products = products * np.outer(advantages, advantages)
    N = len(products)
    squares = np.trace(products) / N
    signal = (products.sum() - np.trace(products)) / (N * (N - 1))
    return (max(signal, 0.0) / ((squares - signal) / batch)) ** 0.5


def jackknife(products, advantages, batch, groups):
    """The SNR and its standard error, by leaving out one group of images after the other."""
    N = len(products)
    left = []
    for k in range(groups):
        rest = np.arange(N) % groups != k
        left.append(signal_to_noise(products[np.ix_(rest, rest)], advantages[rest], batch))
    error = ((groups - 1) / groups * ((np.array(left) - np.mean(left)) ** 2).sum()) ** 0.5
    return signal_to_noise(products, advantages, batch), error


def measure(config, steps, images, pool, groups):
    """One line of the results: SNR and standard error at T = steps under each baseline."""
    reward, prompts = load_reward(config.reward), load_prompts(config.prompts)
    policy = load_policy(config.model, steps, config.eta, config.guidance_scale, config.device, config.precision)
    rng = torch.Generator().manual_seed(config.seed)
    chosen = [prompts[i] for i in torch.randint(len(prompts), (images,), generator=rng)]
    trajectory, pictures = rollout(policy, [prompt.text for prompt in chosen], rng, config.sample_batch)
    rewards, _ = reward(pictures, chosen)
    others = prompts * pool
    _, pictures = rollout(policy, [prompt.text for prompt in others], rng, config.sample_batch, keep_chain=False)
    other_rewards, _ = reward(pictures, others)
    by_prompt = {prompt.text: other_rewards[k::len(prompts)].numpy() for k, prompt in enumerate(prompts)}
    gradients = score_functions(policy, trajectory)
    products = (gradients @ gradients.T).double().cpu().numpy()
    r = rewards.double().numpy()
    advantages = {"none": r, "batch": (r - r.mean()) / r.std(),
                  "prompt": np.array([(value - by_prompt[prompt.text].mean()) / by_prompt[prompt.text].std()
                                      for value, prompt in zip(r, chosen)])}
    found = {name: jackknife(products, values, BATCH, groups) for name, values in advantages.items()}
    return {"steps": steps, "images": images, "batch": BATCH, **{name: [float(x) for x in pair] for name, pair in found.items()}}


def measure_variance(reward, folder, steps=STEPS, images=IMAGES, pool=POOL, groups=GROUPS, **flags):
    """Measure what is missing in FOLDER/variance.jsonl, draw variance.png beside it, and return the table in Markdown."""
    from matplotlib.figure import Figure
    config = build_config({"reward": reward, **flags})
    log = folder / "variance.jsonl"
    lines = {line["steps"]: line for line in map(json.loads, log.read_text().splitlines())} if log.exists() else {}
    for T in tqdm([T for T in steps if T not in lines], desc="variance", unit="T"):
        lines[T] = measure(config, T, images, pool, groups)
        folder.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as file:
            file.write(json.dumps(lines[T]) + "\n")
    names = {"prompt": "per-prompt baseline", "batch": "batch baseline", "none": "no baseline"}
    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.subplots()
    for name, label in names.items():
        axes.errorbar(steps, [lines[T][name][0] for T in steps], [lines[T][name][1] for T in steps], fmt="o-", capsize=3,
                      label=label)
    axes.set(xscale="log", xticks=steps, xticklabels=steps, xlabel="denoising steps T", ylim=(0, None),
             ylabel=f"gradient's signal to noise, {BATCH} images")
    axes.minorticks_off()
    axes.legend()
    runs.write_atomically(folder / "variance.png", lambda path: figure.savefig(path, dpi=110))
    rows = ["| T | " + " | ".join(names.values()) + " |", "|" + "---|" * 4]
    rows += [f"| {T} | " + " | ".join("{:.2f} ± {:.2f}".format(*lines[T][name]) for name in names) + " |" for T in steps]
    text = "\n".join(rows)
    runs.write_atomically(folder / "variance.md", lambda path: path.write_text(
        f"# Signal to noise of DDPO's gradient: {config.reward}\n\n`python compare.py --ablation variance`; {images} images for "
        f"each T at the pretrained weights, estimate and standard error as in variance.py\n\n{text}\n\n![](variance.png)\n"))
    return text
