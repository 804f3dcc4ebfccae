"""Fine-tune a text-to-image diffusion model on a reward, with DDPO or a baseline: the experiment in five paragraphs.

    python train.py --reward compressibility                  # the embedded model, on a laptop
    python train.py --reward compressibility --preset paper   # Stable Diffusion v1.4, on one GPU
    python train.py --resume runs/compressibility-ddpo-is-1   # go on where a run stopped
"""
import copy
import hashlib
import json
import random
import sys
import time
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import parallel
import runs
from baselines_rwr import nft_preferences, nft_update, rwr_update, rwr_weights, sparse_weights
from ddpo import PromptStatistics, clipped_loss, ddpo_update, score_function_loss
from networks import to_pil, type_and_message
from policy import is_lora, load_lora, load_policy
from process import notify, say, stop_on_signals
from prompts import load_prompts
from rewards import RewardError, display, load_reward
from sampling import rollout
from settings import (PLACES, SPEED, build_config, call_options, check, check_questions, chosen_device, learned_steps, load_config,
                      lowest, make_paths_absolute, parse, reward_options, saved_settings, stop_limits, usual_guidance)
from trackers import load_tracker

RUNS = Path("runs")
EVAL_SEED = 1234  # of the evaluation's noise, whatever --seed is
IMAGES_AT_ONCE = 256  # decoded and judged: 10,000 images of 512 x 512 pixels would fill 31 GB

# The update of each algorithm, and whether it learns from the chain. RWR needs x_0 alone, so no chain is kept.
UPDATES = {"ddpo-is": (partial(ddpo_update, loss=clipped_loss), True),
           "ddpo-sf": (partial(ddpo_update, loss=score_function_loss), True),
           "rwr": (rwr_update, False),
           "rwr-sparse": (rwr_update, False),
           "nft": (nft_update, False)}


def train(experiment):
    """The experiment: act, judge, compare, learn, tell. It goes on after epoch experiment.epoch."""
    config, policy, rng = experiment.config, experiment.policy, experiment.rng
    update, keep_chain = UPDATES[config.algorithm]
    if experiment.epoch < 0:
        if fallen := tell(experiment, 0, {}):  # of the pretrained weights
            raise RewardError(f"--stop-below: before any training, {fallen}")
    for epoch in progress_bar(experiment):
        clock = Clock(policy.device)

        # 1. Act: draw an image for each of a batch of prompts. DDPO keeps the chains.
        chosen = draw_without_replacement(len(experiment.prompts), config.samples_per_epoch // config.images_per_prompt, rng)
        prompts = [experiment.prompts[i] for i in chosen.repeat_interleave(config.images_per_prompt)]
        trajectory = rollout(policy, [prompt.text for prompt in prompts], rng, config.sample_batch, keep_chain)
        clock.lap("seconds_sample")

        # 2. Judge: decode the images and ask for their rewards. Nothing else looks at them.
        rewards, notes = judge(experiment, trajectory, prompts, clock)

        # 3. Compare: was an image better than what its prompt usually gets?
        coefficients, metrics = compare(experiment, trajectory.prompts, rewards)

        # 4. Learn: make the better images a little more likely.
        metrics |= update(policy, trajectory, coefficients, experiment.optimizer, experiment.scaler, rng, config)
        clock.lap("seconds_learn")

        # 5. Tell: evaluate, log and save.
        if fallen := tell(experiment, epoch, {**reward_metrics("", trajectory.prompts, rewards, notes), **metrics, **clock.laps}):
            go_back(experiment, fallen)
            break


# ---- The paragraphs, one by one ----

def draw_without_replacement(n, count, rng):
    """`count` of n prompts at random, (count,): none twice before each has come once."""
    return torch.cat([torch.randperm(n, generator=rng) for _ in range(-(-count // n))])[:count]


def judge(experiment, trajectory, prompts, clock):
    """Rewards (B,) and B notes of the images that the chains ended with. They are decoded in parts, since all may fill memory."""
    rewards, notes, policy = [], [], experiment.policy
    for part in parallel.my_parts(len(prompts), IMAGES_AT_ONCE):
        images = policy.decode(trajectory.x_0[part])
        clock.lap("seconds_sample")
        part_rewards, part_notes = experiment.reward(images, prompts[part])
        clock.lap("seconds_reward")
        rewards.append(part_rewards)
        notes += part_notes
    rewards, notes = parallel.gathered(torch.cat(rewards)), parallel.gathered(notes)
    clock.lap("seconds_reward")
    return rewards, notes


def compare(experiment, texts, rewards):
    """The coefficient of each image in the update, (B,): an advantage for DDPO, a weight for RWR, r for nft. And metrics for the log.

    own_statistics  DDPO, nft: share of the images whose prompt has stats_min_count rewards of its own. It rises to 1. If prompts
                    seldom come back it stays 0, and the baseline is the batch's.
    """
    config = experiment.config
    if config.algorithm == "rwr":
        return rwr_weights(texts, rewards, config.beta), {}
    if config.algorithm == "rwr-sparse":
        return sparse_weights(texts, rewards, config.percentile), {}
    advantages, own_statistics = experiment.statistics.advantages(texts, rewards)
    return nft_preferences(advantages) if config.algorithm == "nft" else advantages, {"own_statistics": own_statistics}


# The metrics of an epoch of training, in the log's order. They are null in row 0, and where an algorithm has no such metric.
# Their meaning is in the docstrings of reward_metrics, compare, ddpo.summary, ddpo.ratio_info and
# baselines_rwr.weighted_denoising_loss. seconds_sample includes the decoding.
TRAINING_METRICS = ("reward_mean", "reward_std", "seconds_sample", "seconds_reward", "seconds_learn", "own_statistics", "loss",
                    "approx_kl", "kl_pretrained", "ratio_mean", "clip_fraction_low", "clip_fraction_high", "denoising_error",
                    "grad_norm", "ratio_deviation", "skipped_updates")


def tell(experiment, epoch, metrics):
    """End an epoch: evaluate, add a row to the log, save the state, show the row to the tracker, draw the curve.

    Returns fallen_rewards. If there are any, the state is not saved.
    """
    config, folder, reward = experiment.config, experiment.folder, experiment.reward
    experiment.epoch = epoch
    row = {"epoch": epoch, "reward_queries": epoch * config.samples_per_epoch, **dict.fromkeys(TRAINING_METRICS), **metrics,
           **evaluate_fixed(experiment)}
    experiment.rows.append(row)
    runs.append_row(folder, row)
    is_evaluated, fallen = row["eval_reward_mean"] is not None, fallen_rewards(experiment)
    due = is_evaluated and not fallen if config.stop_below else is_due(epoch, config.checkpoint_every, config.epochs)
    if epoch and due:
        experiment.save()
    experiment.track(row)
    if is_evaluated:
        runs.draw_curve(folder, reward.name, reward.unit, {other.name: other.unit for other in experiment.watched})
    return fallen


def fallen_rewards(experiment):
    """The watched rewards that the last epoch's evaluation found below --stop-below, in words; an empty text if there are none.

    Raises RewardError if such a reward can judge none of the fixed prompts.
    """
    first, last, fallen = experiment.rows[0]["watched"], experiment.rows[-1]["watched"], []
    if last is None:
        return ""
    for name, (number, is_share) in stop_limits(experiment.config).items():
        unit = next(reward.unit for reward in experiment.watched if reward.name == name)
        if None in (first[name], last[name]):
            raise RewardError(f"--stop-below {name}: it can judge none of the fixed prompts")
        limit = lowest(first[name], number) if is_share else number
        if last[name] < limit:
            fallen.append(f"{name} {display(last[name], unit)} is below {display(limit, unit)}")
    return " and ".join(fallen)


def go_back(experiment, fallen):
    """Take back the weights of the last checkpoint, and say so. The log keeps the rows of the epochs that are given up."""
    epoch = experiment.epoch
    experiment.load_state_dict(runs.load_checkpoint(experiment.folder, MAY_CHANGE))
    experiment.rows = experiment.rows[:max(experiment.epoch, 0) + 1]
    say(f"stopped after epoch {epoch} and {epoch * experiment.config.samples_per_epoch} reward queries: {fallen}; the weights are those of "
        f"epoch {max(experiment.epoch, 0)}")


def evaluate_fixed(experiment):
    """Every eval_every epochs: draw the fixed prompts from the fixed noise, and save the images. Returns metrics, null if not due.

    eval_reward_mean, eval_reward_std  as reward_mean and reward_std, of these images. They rise more smoothly.
    watched                            name -> mean of a watched reward over the images that it can judge. If it falls while the
                                       reward rises, the reward is being gamed.

    The images are not counted as reward queries: nothing is learned from them. The global random generators that the trained reward
    drew from are put back, so that how often one evaluates changes nothing.
    """
    config, reward = experiment.config, experiment.reward
    if not is_due(experiment.epoch, config.eval_every, config.epochs):
        return dict.fromkeys(("eval_reward_mean", "eval_reward_std", "watched", "seconds_eval"))
    clock, states = Clock(experiment.policy.device), reward.rng_states
    prompts, images = draw_fixed(experiment.fixed_policy, experiment.prompts, config)
    texts = parallel.gathered([prompt.text for prompt in prompts])
    rewards, notes = map(parallel.gathered, reward(images, prompts))
    watched = {other.name: mean_of_known(parallel.gathered(other(images, prompts)[0])) for other in experiment.watched}
    labels = ["\n".join(filter(None, (text, display(value, reward.unit), note)))
              for text, value, note in zip(texts, rewards.tolist(), notes)]
    images = parallel.gathered([to_pil(image) for image in images])
    runs.save_samples(experiment.folder, experiment.epoch, images, labels)
    reward.rng_states = states
    clock.lap("seconds_eval")
    return {**reward_metrics("eval_", texts, rewards, notes), "watched": watched, **clock.laps}


def fixed_prompts(prompts, config):
    """The prompts of an evaluation, spread evenly over the set."""
    return [prompts[i * len(prompts) // config.eval_prompts] for i in range(config.eval_prompts)]


def draw_fixed(policy, prompts, config):
    """The fixed prompts and their images, always from the same noise: this process's share."""
    chosen = fixed_prompts(prompts, config)
    trajectory = rollout(policy, [prompt.text for prompt in chosen], torch.Generator().manual_seed(EVAL_SEED),
                         config.sample_batch, keep_chain=False, title="evaluating")
    mine = parallel.share(len(chosen))
    return chosen[mine], policy.decode(trajectory.x_0[mine])


def reward_metrics(prefix, texts, rewards, notes):
    """For the log: mean and deviation of rewards (B,), and the reward's notes, if it has any.

    reward_mean  Healthy: rises, with noise.
    reward_std   If it goes to 0, nothing is left to learn from.
    notes        [prompt, reward, note] of each image.
    """
    metrics = {"reward_mean": rewards.mean().item(), "reward_std": rewards.std(correction=0).item()}
    if any(notes):
        metrics["notes"] = [list(row) for row in zip(texts, rewards.tolist(), notes)]
    return {prefix + name: value for name, value in metrics.items()}


def mean_of_known(values):
    """The mean of the values (B,) that are not NaN, None if all are."""
    known = values[~values.isnan()]
    return known.mean().item() if len(known) else None


def is_due(epoch, every, last):
    """Whether something that is done every so many epochs, and after the last, is done now."""
    return epoch % every == 0 or epoch == last


def progress_bar(experiment):
    """The epochs that are left, under a bar that shows the last rewards."""
    config, reward = experiment.config, experiment.reward
    with tqdm(total=config.epochs, initial=experiment.epoch, desc=reward.name, unit="epoch") as bar:
        def show():
            for title, name in (("fixed_prompts", "eval_reward_mean"), ("samples", "reward_mean")):
                values = [row[name] for row in experiment.rows if row[name] is not None]
                shown.update({title: display(values[-1], reward.unit)} if values else {})
            bar.set_postfix(shown)

        shown = {}
        show()
        for epoch in range(experiment.epoch + 1, config.epochs + 1):
            yield epoch
            bar.update()
            show()


class Clock:
    """Seconds by name. A lap is the time since the last one; laps of one name add up."""

    def __init__(self, device):
        self.laps, self.last, self.device = {}, time.perf_counter(), device

    def lap(self, name):
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)  # it works in the background: else a lap would time the calls alone
        now = time.perf_counter()
        self.laps[name], self.last = round(self.laps.get(name, 0) + now - self.last, 3), now


# ---- The state: all that is saved and restored ----

class Experiment:
    """A run in memory: what it is given (config, policy, prompts, reward, watched rewards, folder), and all that changes.

    state_dict says what is saved and restored. epoch: the last that the log tells of, -1 before the pretrained weights are told of.
    saved_epoch: that of the checkpoint. rows: the log. track: shows a row elsewhere (trackers.py). lock: held while it lives.
    settings: the config as it was saved.
    """

    def __init__(self, config, policy, prompts=(), reward=None, watched=()):
        self.config, self.policy, self.prompts = config, policy, prompts
        self.folder = self.lock = self.settings = self.saved_epoch = self.track = None  # set by new_run and resume
        self.reward, self.watched = reward, watched
        self.fixed_policy = policy  # of the evaluations
        if config.eval_steps:
            self.fixed_policy = policy.with_chain(config.eval_steps, config.eta, config.noise, scored=False)
        self.identity = identity_of(self)
        self.optimizer = adamw(policy, config)
        # By default the scale grows only after 2,000 good steps. The paper's DDPO-IS run has 784.
        self.scaler = torch.amp.GradScaler(policy.device.type, growth_interval=100, enabled=config.precision == "fp16")
        self.statistics = PromptStatistics(config.stats_buffer, config.stats_min_count, config.advantage_clip,
                                           config.baseline)
        self.rng = torch.Generator().manual_seed(config.seed)  # of prompts, noise and order
        for seed in (random.seed, np.random.seed, torch.manual_seed):  # of the rewards, if they draw random numbers
            seed(config.seed)
        self.epoch, self.rows = -1, []

    def save(self):
        """Write the checkpoint. An epoch that is cut short goes back to it, so no copy in memory is needed: it would be 10 GB."""
        runs.save_checkpoint(self.folder, {"settings": self.settings, **self.state_dict()})
        self.saved_epoch = self.epoch

    def state_dict(self):
        """Everything that changes, of plain types that torch.load takes with weights_only. The tensors are no copies.

        And the identity of what the run was given, which must not change.
        """
        return {"epoch": self.epoch, "weights": {name: weight.detach() for name, weight in self.policy.trained.items()},
                "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                "statistics": self.statistics.state_dict(), "rng": self.rng.get_state(),
                "reward_rngs": {reward.name: reward.rng_states for reward in self.rewards}, "identity": self.identity}

    def load_state_dict(self, state):
        """Go back to a state_dict."""
        self.epoch = self.saved_epoch = state["epoch"]
        # The run may go on on another device, and torch puts the count of steps where the saved `fused` says.
        groups = [{**group, "fused": adamw_is_fused(self.policy)} for group in state["optimizer"]["param_groups"]]
        state = {**state, "optimizer": {**state["optimizer"], "param_groups": groups}}
        if self.policy.device.type == "cpu":  # the optimizer would go on in the checkpoint's own memory, which is the file's
            state["optimizer"] = copy.deepcopy(state["optimizer"])
        for name in ("optimizer", "scaler", "statistics"):
            getattr(self, name).load_state_dict(state[name])
        if state["weights"].keys() != self.policy.trained.keys():
            raise ValueError("the checkpoint holds other weights")
        self.policy.denoiser.load_state_dict(state["weights"], strict=False)
        self.rng.set_state(state["rng"])
        for reward in self.rewards:
            reward.rng_states = state["reward_rngs"][reward.name]

    @property
    def rewards(self):
        """The trained reward and the watched ones."""
        return [self.reward, *self.watched] if self.reward else []


def adamw(policy, config):
    """The optimizer of the trained weights, in fp32. (The authors' JAX code keeps the first moment in bf16.)"""
    return torch.optim.AdamW(policy.trained.values(), lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2),
                             eps=config.adam_epsilon, weight_decay=config.weight_decay, fused=adamw_is_fused(policy))


def adamw_is_fused(policy):
    """On a GPU torch's default AdamW would need one more copy of the weights during the step, 3.4 GB of Stable Diffusion."""
    return policy.device.type == "cuda"


def identity_of(experiment):
    """setting -> hash, which tell whether a resumed run is given the same prompts and reward files as before, wherever they are now."""
    prompts = json.dumps([astuple(prompt) for prompt in experiment.prompts])
    return {"prompts": hashlib.sha256(prompts.encode()).hexdigest(),
            **{f"reward {reward.name}": reward.identity for reward in experiment.rewards}}


# ---- The run: new, resumed, stopped ----

def policy_of(config, model=None, scored=True):
    """The policy of a run's settings before its training; or another model, or another folder's adapters, under these settings."""
    adapters = model if model and is_lora(model) else None
    training = {"trains": False} if model else {
        "keep_reference": config.kl_weight > 0, "lora_rank": config.lora_rank, "lora_alpha": config.lora_alpha, "seed": config.seed,
        "gradient_checkpointing": config.gradient_checkpointing, "compiled": config.compile}
    policy = load_policy(config.model if adapters else model or config.model, config.sampling_steps, config.eta, config.guidance_scale,
                         config.device, config.precision, config.noise, scored, config.height, config.width, call_options(config),
                         config.t5, config.prediction_type, usual_guidance(config), **training)
    if adapters:
        load_lora(policy, adapters)
    if not model and config.training_guidance:
        policy.with_guidance(config.training_guidance)  # refused now, and not after the first images
    return policy


def load_rewards(config):
    """The trained reward of a run, and the watched ones."""
    return [load_reward(name, config.device, nan_allowed=name in config.watch, **reward_options(config, name))
            for name in (config.reward, *config.watch)]


def build_experiment(config):
    """The Experiment of a run's settings, without a folder yet. Raises ValueError if something cannot be loaded."""
    prompts = load_prompts(config.prompts)
    check_questions(prompts, [config.reward], every_prompt=True)
    check_questions(prompts, config.watch, every_prompt=False)
    reward, *watched = load_rewards(config)
    return Experiment(config, policy_of(config), prompts, reward, watched)


def new_run(flags):
    """A new run in a new folder: its Experiment. Raises ValueError."""
    config = build_config(flags)
    if config.name and parallel.is_first():
        runs.refuse_existing(RUNS / config.name)  # before anything is loaded
    experiment = build_experiment(config)

    def create():
        experiment.folder = runs.create_run(RUNS, config.name, f"{experiment.reward.name}-{config.algorithm}")
        return experiment.folder

    try:
        experiment.folder = parallel.from_first(create)
        experiment.lock = runs.lock_run(experiment.folder)
        experiment.settings = saved_settings(experiment.folder, config)
        experiment.track = load_tracker(config.tracker, experiment.folder, experiment.settings, -1)
        runs.save_settings(experiment.folder, experiment.settings)
        experiment.save()  # so that a run can be resumed from its first moment
    except BaseException:  # a folder without settings would only block its name
        if experiment.folder:
            runs.remove(experiment.folder)
        raise
    return experiment


MAY_CHANGE = ("epochs", "device", "tracker", "stop_below", *SPEED, *PLACES)  # with --resume


def resume(folder, flags):
    """The Experiment of a run that was stopped or finished, at its last checkpoint. Raises ValueError."""
    others = sorted(set(flags) - set(MAY_CHANGE))
    if others:
        raise ValueError("--resume uses the run's own settings: only --stop-below and the settings of time, place, memory and speed may "
                         "be given with it (see --help), not " + ", ".join("--" + name.replace("_", "-") for name in others))
    config = load_config(folder)
    lock, state = runs.lock_run(folder), runs.load_checkpoint(folder, MAY_CHANGE)
    epochs = flags.get("epochs", config.epochs)
    if epochs < state["epoch"]:
        raise ValueError(f"--epochs {epochs}: {folder} has done {state['epoch']} epochs already")
    if epochs == state["epoch"] and (folder / "model").exists():
        raise ValueError(f"{folder} has done all its {epochs} epochs: give a larger --epochs to go on")
    rows = runs.read_rows(folder)[:state["epoch"] + 1]
    if [row["epoch"] for row in rows] != list(range(state["epoch"] + 1)):
        raise ValueError(f"the log of {folder} lacks epochs up to {state['epoch']}: put log.jsonl back, or start a new run")
    config = replace(config, **flags)
    config.device = chosen_device(config.device)
    make_paths_absolute(config)
    if config.precision == "fp16" and not config.device.startswith("cuda"):
        raise ValueError(f"{folder} is a run in fp16, which needs a GPU with CUDA: go on where there is one")
    check(config)
    experiment = build_experiment(config)
    refuse_changes(experiment, state["identity"], folder)
    experiment.folder, experiment.lock = folder, lock
    try:
        experiment.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"the checkpoint of {folder} is damaged, or of another version of the libraries") from error
    experiment.settings = saved_settings(folder, config)
    experiment.track = load_tracker(config.tracker, folder, experiment.settings, experiment.epoch)
    experiment.rows = rows
    if config.stop_below and experiment.epoch >= 0 and rows[-1]["watched"] is None:
        raise ValueError(f"--stop-below: the checkpoint of {folder} is of epoch {experiment.epoch}, which was not evaluated, so there would be "
                         "no weights to go back to; go on without it")
    if rows and (fallen := fallen_rewards(experiment)):
        raise ValueError(f"--stop-below: {fallen} at epoch {experiment.epoch}, of which the checkpoint of {folder} is; set another limit")
    parallel.meet()  # nothing may be refused from here on, since the run changes
    runs.save_settings(folder, experiment.settings)
    runs.forget_after(folder, experiment.epoch)
    return experiment


def refuse_changes(experiment, before, folder):
    """Raise ValueError if the prompts or a reward's file are not those that the run began with. (Nobody looks at the model.)"""
    places = {"prompts": experiment.config.prompts, **{f"reward {reward.name}": reward.source for reward in experiment.rewards}}
    for name in dict.fromkeys([*before, *experiment.identity]):
        if name not in experiment.identity or name not in before:
            raise ValueError(f"{folder} began {'with' if name in before else 'without'} the {name}: give the same rewards, or start a "
                             "new run")
        if before[name] != experiment.identity[name]:
            raise ValueError(f"{folder} began with another state of the {name} than {places[name]!r} holds now: put the old one "
                             "back, say where it is now, or start a new run")


def stop(experiment, reason, code, goes_on=True):
    """Say why a run stops, which epoch its checkpoint is of, and how to go on, if it can. Returns the exit code."""
    parallel.leave(reason)
    finished = experiment.saved_epoch == experiment.config.epochs and (experiment.folder / "model").exists()
    go_on = "" if finished or not goes_on else f"; go on with: python train.py --resume {experiment.folder}"
    notify(f"\ntrain.py: {reason}; the state after {max(experiment.saved_epoch, 0)} epochs is saved{go_on}")
    return code


def not_finite(experiment, error):
    """What to do about a latent, an image or a gradient that is not finite."""
    if experiment.optimizer.state:
        return f"{error}: start a new run with a smaller --learning-rate or --precision fp32"
    precision = "" if experiment.config.precision == "fp32" else "; --precision fp32 may help"
    return (f"{error}, and nothing was learned yet: it is the pretrained model {experiment.config.model} itself that fails, not the "
            f"training{precision}; a VAE in fp16 is a known cause, another --model or VAE is the cure")


# ---- The command line ----

def main(argv=None):
    """The command line. Returns the exit code."""
    stop_on_signals()
    try:
        parallel.start()
        flags = parse(argv, __doc__)
        folder = flags.pop("resume", None)
        experiment = resume(folder, flags) if folder else new_run(flags)
    except (ValueError, OSError, RewardError, parallel.OtherProcessFailed) as error:
        return fail(error)
    except torch.OutOfMemoryError:
        return fail("the model does not fit into the GPU's memory")
    except KeyboardInterrupt:
        return fail("interrupted before the run began", 130)
    try:
        say(description(experiment))
        train(experiment)
        runs.save_model(experiment.folder, experiment.policy.save)
        say(outcome(experiment))
        parallel.finish()
    except KeyboardInterrupt:
        return stop(experiment, "interrupted", 130)
    except torch.OutOfMemoryError:
        return stop(experiment, "out of GPU memory: a smaller --micro-batch or --sample-batch needs less, and so does "
                                "--gradient-checkpointing", 2)
    except FloatingPointError as error:  # it would come again
        return stop(experiment, not_finite(experiment, error), 2, goes_on=False)
    except (RewardError, OSError, parallel.OtherProcessFailed) as error:
        return stop(experiment, error, 2)
    except Exception as error:  # a bug, or the GPU: its traceback is wanted, but the work is not lost
        stop(experiment, f"failed: {type_and_message(error)}", 1)
        parallel.speak_of_a_bug()
        raise
    return 0


def fail(message, code=2):
    """One clear line on why no run begins. Returns the exit code."""
    parallel.leave(message)
    notify(f"train.py: {message}")
    return code


def description(experiment):
    """The derived numbers of a run, in three lines, and a line for each surprise."""
    config = experiment.config
    weights = sum(weight.numel() for weight in experiment.policy.trained.values())
    if UPDATES[config.algorithm][1]:
        images = config.samples_per_epoch // config.updates_per_epoch
        steps = learned_steps(config)
        share = f"{images} images at {steps} steps"
    else:
        share = f"{config.batch_size} images"
    processes = f" in {parallel.size()} processes" if parallel.size() > 1 else ""
    watched = f"; watched: {', '.join(reward.name for reward in experiment.watched)}" if experiment.watched else ""
    return (f"{experiment.folder}: {experiment.reward.name} by {config.algorithm} on {len(experiment.prompts)} prompts{watched}\n"
            f"{config.model}: {weights / 1e6:.2f} million trainable weights, guidance {experiment.policy.guidance_scale:g}, {config.device}{processes}, {config.precision}\n"
            f"{config.epochs} epochs of {config.samples_per_epoch} samples = {config.epochs * config.samples_per_epoch} "
            f"reward queries; {config.updates_per_epoch} updates an epoch, {config.epochs * config.updates_per_epoch} in "
            f"all, each on {share}" + "".join(f"\n{line}" for line in surprises(experiment)))


def surprises(experiment):
    """Lines on what may not be meant: LoRA's learning rate without LoRA or the reverse, an inexact ratio."""
    config = experiment.config
    if config.preset != "emoji" and not config.lora_rank and config.learning_rate > 1e-4:
        yield (f"--learning-rate {config.learning_rate:g} is LoRA's: with it all weights of Stable Diffusion soon draw black images; "
               "the paper has 1e-5")
    if config.lora_rank and config.learning_rate < 5e-5:
        yield f"--learning-rate {config.learning_rate:g} is that of all weights: adapters learn next to nothing with it; try 3e-4"
    if config.compile and config.precision == "bf16" and config.algorithm == "ddpo-is":
        yield "--compile rounds sampling and learning differently, and in bf16 that may be more than --clip-range: see ratio_deviation"


def outcome(experiment):
    """The last line: what became of the reward and of the watched rewards on the fixed prompts."""
    config = experiment.config
    rows = [row for row in experiment.rows if row["eval_reward_mean"] is not None]  # all end with one, but if --epochs was made smaller
    minutes, seconds = divmod(round(sum(value or 0 for row in experiment.rows for name, value in row.items() if name.startswith("seconds_"))), 60)
    before, after = (row["eval_reward_mean"] for row in (rows[0], rows[-1]))
    factor, unit = experiment.reward.unit
    change = f" ({factor * (after - before) / abs(before):+.0%})".replace("%", " %") if before and unit != "%" else ""
    watched = ", ".join(f"{reward.name} " + " -> ".join(
        display(row["watched"][reward.name], reward.unit) for row in (rows[0], rows[-1])) for reward in experiment.watched)
    return (f"{experiment.reward.name}: {display(before, experiment.reward.unit)} -> {display(after, experiment.reward.unit)}"
            f"{change} on {config.eval_prompts} fixed prompts after {rows[-1]['reward_queries']} reward queries, "
            f"{minutes} min {seconds:02} s" + (f"; watched: {watched}" if watched else ""))


if __name__ == "__main__":
    sys.exit(main())
