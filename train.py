"""Fine-tune a text-to-image diffusion model on a reward: the experiment in five paragraphs.

    python train.py --reward compressibility                  # the bundled toy model, on a laptop
    python train.py --reward compressibility --preset paper   # Stable Diffusion v1.4, on one GPU
    python train.py --resume runs/compressibility-ddpo-is-1   # go on where a run stopped
"""
import random
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from baselines_rwr import rwr_update, rwr_weights, sparse_weights
from beyond.diffusion_nft import nft_preferences, nft_update
from beyond.ocr import text_of
from ddpo import Learner, PromptStatistics, clipped_loss, ddpo_update, score_function_loss
from policy import load_policy
from prompts import load_prompts
from rewards import display, load_reward, to_pil
from sampling import rollout
from support import processes, run_folder
from support.loading import save_pipeline
from support.model_card import before_and_after, write_card
from support.run_page import write_page
from support.settings import build_config, load_settings, parse, reward_options, saved_settings, short_name
from support.stopping import fallen_rewards, go_back, stop_limits
from support.trackers import load_trackers
from support.user_files import hashes_of

RUNS = Path("runs")
EVAL_SEED = 1234  # of the evaluation's noise, whatever --seed is


def train(run):
    """The experiment: act, judge, compare, learn, tell. It goes on after epoch run.epoch."""
    config, policy, rng = run.config, run.policy, run.rng
    coefficients_of, update, keep_chain = ALGORITHMS[config.algorithm]
    if run.epoch < 0 and tell(run, 0, {}):  # of the pretrained weights
        return
    left = range(run.epoch + 1, config.epochs + 1)
    bar = tqdm(left, run.reward.name, config.epochs, initial=run.epoch, unit="epoch")
    for epoch in bar:
        clock = Clock(policy.device)

        # 1. Act: draw an image for each of a batch of prompts. DDPO keeps the chains.
        prompts = draw_prompts(run.prompts, config, rng)
        texts = [prompt.text for prompt in prompts]
        with policy.with_weights(run.learner.old):  # DiffusionNFT's v_old; of the others none
            trajectory = rollout(policy, texts, rng, config, keep_chain)
        clock.lap("seconds_sample")

        # 2. Judge: decode the images and ask for their rewards. Nothing else looks at them.
        seed_rewards(config, epoch)
        rewards, notes = judge(policy, run.reward, trajectory, prompts, clock)

        # 3. Compare: was an image better than what its prompt usually gets?
        coefficients, metrics = coefficients_of(texts, rewards, run.statistics, config)

        # 4. Learn: score the recorded steps, and make the better images a little more likely.
        metrics |= update(policy, trajectory, coefficients, run.learner, rng, config)
        clock.lap("seconds_learn")

        # 5. Tell: evaluate, log and save.
        metrics |= {**reward_metrics("", texts, rewards, notes), **clock.laps}
        bar.set_postfix(samples=display(metrics["reward_mean"], run.reward.unit))
        if tell(run, epoch, metrics):
            break


# ---- The paragraphs, one by one ----

def draw_prompts(prompts, config, rng):
    """The prompts of an epoch: none twice before each has come once. Each for images_per_prompt images."""
    count, n = config.samples_per_epoch // config.images_per_prompt, len(prompts)
    chosen = torch.cat([torch.randperm(n, generator=rng) for _ in range(-(-count // n))])[:count]
    return [prompts[i] for i in chosen.repeat_interleave(config.images_per_prompt)]


def seed_rewards(config, epoch):
    """Seed the global generators, which are the rewards', so that a resumed run draws the same numbers."""
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed((config.seed * 1_000_003 + epoch) % 2**32)


def judge(policy, reward, trajectory, prompts, clock):
    """Rewards (B,) and B notes of the images that the chains ended with, decoded in parts."""
    def judged(rows):
        images = policy.decode(trajectory.x_0[rows])
        clock.lap("seconds_sample")
        return reward(images, prompts[rows])

    rewards, notes = [], []
    for part in processes.parts(processes.share(len(prompts)), reward, "at_once"):
        with part as rows:
            some, words = judged(rows)
            rewards.append(some)
            notes += words
        clock.lap("seconds_reward")
    return processes.gathered(torch.cat(rewards)), processes.gathered(notes)


def advantages(texts, rewards, statistics, config):
    """Advantages (B,). For the log: own_statistics, the share of images with their own prompt's statistics.

    If prompts seldom come back it stays 0, and the baseline is the batch's.
    """
    values, own_statistics = statistics.advantages(texts, rewards)
    return values, {"own_statistics": own_statistics}


# Of each algorithm: how rewards become coefficients of the images, the update, and whether it learns from the
# chain. (RWR needs x_0 alone.) A new one is named in support/settings.py, too: DDPO or FINE_TUNING.
ALGORITHMS = {
    "ddpo-is": (advantages, partial(ddpo_update, loss=clipped_loss), True),
    "ddpo-sf": (advantages, partial(ddpo_update, loss=score_function_loss), True),
    "rwr": (lambda texts, r, _, c: (rwr_weights(texts, r, c.beta), {}), rwr_update, False),
    "rwr-sparse": (lambda texts, r, _, c: (sparse_weights(texts, r, c.percentile), {}), rwr_update, False),
    "nft": (lambda texts, r, _, c: (nft_preferences(texts, r), {}), nft_update, False)}

# In the log's order; null in row 0, and where an algorithm has none. What they mean: reward_metrics,
# advantages, ddpo.summary, ddpo.ratio_info, weighted_denoising_loss, evaluate_fixed.
TRAINING_METRICS = (
    "reward_mean", "reward_std", "seconds_sample", "seconds_reward", "seconds_learn", "own_statistics",
    "loss", "approx_kl", "kl_pretrained", "ratio_mean", "clip_fraction_low", "clip_fraction_high",
    "denoising_error", "grad_norm", "ratio_deviation", "skipped_updates")
EVALUATION_METRICS = ("eval_reward_mean", "eval_reward_std", "watched", "seconds_eval")


def tell(run, epoch, metrics):
    """End an epoch: evaluate, log, save, show. Returns whether --stop-below ends the run."""
    config, folder, run.epoch = run.config, run.folder, epoch
    is_evaluated = epoch % config.eval_every == 0 or epoch == config.epochs
    is_due = is_evaluated if config.stop_below else epoch % config.checkpoint_every == 0
    row = {"epoch": epoch, "reward_queries": epoch * config.samples_per_epoch,
           **dict.fromkeys(TRAINING_METRICS), **metrics, **dict.fromkeys(EVALUATION_METRICS),
           **(evaluate_fixed(run) if is_evaluated else {})}
    run.rows.append(row)
    run_folder.append_line(folder / "log.jsonl", row)
    for show in run.trackers:
        shown(run, "--tracker", lambda: show(row))
    if is_evaluated:
        if fallen := run.limits and fallen_rewards(run):
            go_back(run, fallen)
        name, unit, shape = run.reward.name, run.reward.unit, (config.eval_prompts, *run.policy.image_size)
        shown(run, "curve.png", lambda: run_folder.draw_curve(folder, name, unit, run.units))
        shown(run, "the pictures", lambda: run_folder.draw_progress(folder, unit, shape))
        shown(run, "index.html", lambda: write_page(
            folder, saved_settings(config), {**run.units, name: unit}, run.epoch, shape[1] / shape[2]))
        if fallen:
            return True
    if epoch and (is_due or epoch == config.epochs):
        run.save()
    return False


def shown(run, part, work):
    """work(), or the text of its error, which is told: what only shows must not end a run."""
    try:
        return work()
    except Exception as error:
        return told_once(run, part, f"{type(error).__name__}: {error}")


def told_once(run, part, error):
    """Say that a part failed, unless it was said. Returns the error's text."""
    if part not in run.told:
        print(f"\n{part} failed, the run goes on: {error}", file=sys.stderr)
    run.told.add(part)
    return error


# ---- The evaluation: fixed prompts, fixed noise ----

def evaluate_fixed(run):
    """Draw the fixed prompts from the fixed noise, judge the images and save them. Returns metrics.

    eval_reward_mean, eval_reward_std  of these images.
    watched                            name -> mean of a watched reward over the images that it can judge. If
                                       it falls, the reward is gamed, or the images break.
    """
    clock, reward = Clock(run.policy.device), run.reward
    seed_rewards(run.config, run.epoch)
    prompts, images = draw_fixed(run.fixed_policy, run.prompts, run.config)
    rewards, notes = map(processes.gathered, reward(images, prompts))
    watched, run.failed = dict.fromkeys(other.name for other in run.watched), set()
    for other in run.watched:
        values = shown(run, other.name, lambda: other(images, prompts)[0])
        parts = processes.gathered([values])
        if errors := [part for part in parts if isinstance(part, str)]:  # perhaps in another process
            run.failed.add(other.name)
            told_once(run, other.name, errors[0])
        elif not (values := torch.cat(parts)).isnan().all():
            watched[other.name] = values.nanmean().item()
    texts = processes.gathered([prompt.text for prompt in prompts])
    pictures = processes.gathered([to_pil(image) for image in images])
    labels = ["\n".join(filter(None, (text, display(value, reward.unit), note)))
              for text, value, note in zip(texts, rewards.tolist(), notes)]
    shown(run, "the pictures", lambda: run_folder.save_samples(run.folder, run.epoch, pictures, labels))
    clock.lap("seconds_eval")
    return {**reward_metrics("eval_", texts, rewards, notes), "watched": watched, **clock.laps}


def draw_fixed(policy, prompts, config):
    """The fixed prompts and their images, always from the same noise: this process's share."""
    chosen, rng = fixed_prompts(prompts, config), torch.Generator().manual_seed(EVAL_SEED)
    texts = [prompt.text for prompt in chosen]
    trajectory = rollout(policy, texts, rng, config, keep_chain=False, title="evaluating")
    mine = processes.share(len(chosen))
    return chosen[mine], policy.decode(trajectory.x_0[mine])


def fixed_prompts(prompts, config):
    """The prompts of an evaluation, spread evenly over the set."""
    return [prompts[i * len(prompts) // config.eval_prompts] for i in range(config.eval_prompts)]


def reward_metrics(prefix, texts, rewards, notes):
    """For the log: mean; deviation (at 0 nothing is left to learn from); notes: [prompt, reward, note]."""
    metrics = {"reward_mean": rewards.mean().item(), "reward_std": rewards.std(correction=0).item()}
    if prefix or any(notes):
        metrics["notes"] = [list(row) for row in zip(texts, rewards.tolist(), notes)]
    return {prefix + name: value for name, value in metrics.items()}


# ---- The state: all that is saved and restored ----

class Run:
    """A run in memory: what it is given, and all that changes.

    state: of an earlier run, to go on with. epoch: the last in the log, -1 before that of the pretrained
    weights. rows: the log. trackers: they show a row elsewhere. failed: watched rewards that failed in the
    last evaluation. told: parts that only show, whose failure was told. lock: held while the run lives.
    """

    def __init__(self, config, folder, prompts, policy, reward, watched, state=None):
        self.config, self.folder, self.lock = config, folder, run_folder.lock_run(folder)
        self.prompts, self.policy, self.reward, self.watched = prompts, policy, reward, watched
        self.units, self.limits = {reward.name: reward.unit for reward in watched}, stop_limits(config)
        self.files = hashes_of((config.prompts, config.reward, *config.watch))
        self.fixed_policy = policy  # of the evaluations
        if config.eval_steps:
            self.fixed_policy = policy.with_chain(config.eval_steps, config.eta, config.noise, scored=False)
        self.learner, self.epoch, self.rows = Learner(policy, config), -1, []
        self.failed, self.told = set(), set()
        self.statistics = PromptStatistics(
            config.stats_buffer, config.stats_min_count, config.advantage_clip, config.baseline)
        self.rng = torch.Generator().manual_seed(config.seed)  # of prompts, noise and order
        if state:
            self.load_state_dict(state)
            self.rows = run_folder.read_rows(folder)[:self.epoch + 1]
        self.trackers = load_trackers(config.tracker, folder, saved_settings(config), self.epoch)

    def save(self):
        """Write the checkpoint: everything that changes, the settings, and hashes of the user's files."""
        weights = {name: weight.detach() for name, weight in self.policy.trained.items()}
        run_folder.save_checkpoint(self.folder, {
            "settings": saved_settings(self.config), "files": self.files, "epoch": self.epoch,
            "weights": weights, "learner": self.learner.state_dict(),
            "statistics": self.statistics.rewards, "rng": self.rng.get_state()})

    def load_state_dict(self, state):
        """Go back to a checkpoint."""
        self.epoch, self.statistics.rewards = state["epoch"], state["statistics"]
        for name, weight in self.policy.trained.items():
            weight.data.copy_(state["weights"][name])
        self.learner.load_state_dict(state["learner"])
        self.rng.set_state(state["rng"])


# ---- A run, new or resumed ----

def load_rewards(config):
    """The trained reward and the watched ones."""
    return [load_reward(name, config.device, name in config.watch, **reward_options(config, name))
            for name in (config.reward, *config.watch)]


def load_parts(config):
    """Prompts, policy, reward and watched rewards of a run's settings."""
    prompts = load_prompts(config.prompts)
    needs = {"counting": (lambda prompt: prompt.questions, "questions, as in two_to_eight_animals"),
             "ocr": (text_of, "texts, as in signs")}
    asked, what = needs.get(config.reward, (bool, ""))  # of other rewards any prompt will do
    if not all(map(asked, prompts)):
        raise ValueError(f"--prompts {config.prompts}: {config.reward} needs {what}")
    stop_limits(config)  # refused before the loading
    reward, *watched = load_rewards(config)
    policy = load_policy(config)
    if config.training_guidance:
        policy.with_guidance(config.training_guidance)  # refused now, and not after the first images
    return prompts, policy, reward, watched


def new_run(flags):
    """A new run in a new folder."""
    config = build_config(flags)
    if config.name and processes.is_first() and (RUNS / config.name).exists():  # told before the loading
        raise ValueError(f"runs/{config.name} exists: choose another --name, or --resume it")
    parts = load_parts(config)
    stem = f"{short_name(config.reward)}-{config.algorithm}"
    run = Run(config, processes.from_first(lambda: run_folder.create_run(RUNS, config.name, stem)), *parts)
    run.save()  # so that a run can be resumed from its first moment
    return run


def resume(folder, flags):
    """A run that was stopped or finished, at its last checkpoint."""
    state = run_folder.load_checkpoint(folder)
    config = load_settings(state["settings"], flags)
    if config.epochs < state["epoch"] or config.epochs == state["epoch"] and (folder / "model").exists():
        raise ValueError(f"{folder} has done {state['epoch']} epochs: give a larger --epochs to go on")
    run = Run(config, folder, *load_parts(config), state)
    for name, now in run.files.items():
        if state["files"].get(name) not in (None, now):
            print(f"{name} has changed since the checkpoint of {folder}", file=sys.stderr)
    run_folder.forget_after(folder, run.epoch)
    if flags:  # they are settings of the run from now on
        run.save()
    return run


# ---- The command ----

def main(argv=None):
    """The command line. Returns the exit code."""
    if threading.current_thread() is threading.main_thread():  # others may set none: Gradio's, Streamlit's
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill interrupts as Ctrl-C does
    try:
        processes.start()
        flags = parse(argv, __doc__)
        folder = flags.pop("resume", None)
        run = resume(folder, flags) if folder else new_run(flags)
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    print(description(run), flush=True)
    try:
        train(run)
    except BaseException as error:
        print(f"\ntrain.py: {type(error).__name__}; go on from the last checkpoint with: python train.py "
              f"--resume {run.folder}", file=sys.stderr)
        if isinstance(error, KeyboardInterrupt):
            return 130
        raise
    run_folder.save_model(run.folder, partial(save_pipeline, run.policy.pipeline))
    shown(run, "the model's card", lambda: write_card(run))
    print(outcome(run), flush=True)
    processes.finish()
    return 0


def description(run):
    """The derived numbers of a run, in three lines, and a line on a learning rate that may not be meant."""
    c, watched = run.config, ", ".join(reward.name for reward in run.watched) or "nothing"
    millions = sum(weight.numel() for weight in run.policy.trained.values()) / 1e6
    lines = [
        f"{run.folder}: {run.reward.name} by {c.algorithm} on {len(run.prompts)} prompts; watched: {watched}",
        f"{c.model}: {millions:.2f} million trainable weights, guidance {run.policy.guidance_scale:g}, "
        f"{c.device}, {c.precision}, processes: {processes.size()}",
        f"{c.epochs} epochs of {c.samples_per_epoch} samples and {c.updates_per_epoch} updates, in all "
        f"{c.epochs * c.samples_per_epoch} reward queries"]
    if c.preset != "emoji" and not (5e-5 <= c.learning_rate if c.lora_rank else c.learning_rate <= 1e-4):
        lines.append("--learning-rate: 3e-4 is usual for adapters, 1e-5 for all weights")
    return "\n".join(lines)


def outcome(run):
    """The last line: what became of the reward and of the watched rewards on the fixed prompts."""
    queries, ((name, before, after, unit), *others) = before_and_after(run)  # unit: a factor and a name
    gain = f" ({100 * unit[0] * (after - before) / abs(before):+.0f} %)" if before and unit[1] != "%" else ""
    seconds = round(run_folder.seconds_of(run.rows))
    watched = ", ".join(f"{other} {display(start, own)} -> {display(end, own)}"
                        for other, start, end, own in others)
    return (f"{name}: {display(before, unit)} -> {display(after, unit)}{gain} on "
            f"{run.config.eval_prompts} fixed prompts after {queries} reward queries, "
            f"{seconds // 60} min {seconds % 60:02} s" + (f"; watched: {watched}" if watched else ""))


class Clock:
    """Seconds by name. A lap is the time since the last one; laps of one name add up."""

    def __init__(self, device):
        self.laps, self.last, self.device = {}, time.perf_counter(), device

    def lap(self, name):
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)  # else only the calls are timed
        now = time.perf_counter()
        self.laps[name], self.last = round(self.laps.get(name, 0) + now - self.last, 3), now


if __name__ == "__main__":
    sys.exit(main())
