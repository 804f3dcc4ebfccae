"""Fine-tune a text-to-image diffusion model on a reward, with DDPO or the baselines: the experiment in five paragraphs.

    python train.py --reward compressibility                  # the embedded model, on a laptop
    python train.py --reward compressibility --preset paper   # Stable Diffusion v1.4, on one GPU
    python train.py --resume runs/compressibility-ddpo-is-1   # go on where a run stopped
"""
import random
import signal
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import runs
from baselines_rwr import rwr_update, rwr_weights, sparse_weights
from ddpo import PromptStatistics, clipped_loss, ddpo_update, score_function_loss
from judge import shares_right
from prompts import PROMPT_SETS, load_prompts
from rewards import UNITS, RewardError, display, load_reward, to_pil
from sampling import Trajectory, load_policy, rollout
from settings import REWARD_OWNERS, build_config, check, load_config, parse, short_name

RUNS = Path("runs")
EVAL_SEED = 1234  # of the evaluation's noise, whatever --seed is
PICTURES_AT_ONCE = 256  # drawn before they are judged: 10,000 of 512 x 512 pixels would fill 31 GB

# How an algorithm learns, and whether from the chain or from x_0 alone, when no chain needs to be kept.
UPDATES = {"ddpo-is": (partial(ddpo_update, loss=clipped_loss), True),
           "ddpo-sf": (partial(ddpo_update, loss=score_function_loss), True),
           "rwr": (rwr_update, False),
           "rwr-sparse": (rwr_update, False)}


class Experiment:
    """All that changes while a run runs."""

    def __init__(self, config, policy):
        self.config, self.policy = config, policy
        self.optimizer = torch.optim.AdamW(
            policy.unet.parameters(), lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon, weight_decay=config.weight_decay)
        # The default grows the scale after 2,000 good steps, which is more than a run has.
        self.scaler = torch.amp.GradScaler(policy.device.type, growth_interval=100, enabled=config.precision == "fp16")
        self.statistics = PromptStatistics(config.stats_buffer, config.stats_min_count, config.advantage_clip,
                                           config.baseline)
        self.rng = torch.Generator().manual_seed(config.seed)  # of prompts, noise and order
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(config.seed)
        self.epoch, self.seconds = 0, 0.0
        self.remember()

    def remember(self):
        """Keep a copy of the state between two epochs, which an interrupted epoch goes back to."""
        self.remembered = self.state_dict()

    def state_dict(self):
        """A copy of everything, on the CPU, of plain types that torch.load takes with weights_only."""
        return _copy({
            "epoch": self.epoch, "seconds": self.seconds, "unet": self.policy.unet.state_dict(),
            "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
            "statistics": self.statistics.state_dict(), "rng": self.rng.get_state(),
            "global_rngs": global_rngs()})

    def load_state_dict(self, state):
        self.epoch, self.seconds = state["epoch"], state["seconds"]
        for name in ("optimizer", "scaler", "statistics"):
            getattr(self, name).load_state_dict(state[name])
        self.policy.unet.load_state_dict(state["unet"])
        self.rng.set_state(state["rng"])
        set_global_rngs(state["global_rngs"])
        self.remember()


def global_rngs():
    """States of the libraries' own generators: nothing of ours draws from them, but a user's reward may."""
    name, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest], "torch": torch.get_rng_state(), "cuda": cuda}


def set_global_rngs(states):
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


def _copy(value):
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return type(value)(_copy(item) for item in value) if isinstance(value, (list, tuple)) else value


# The log's figures that belong to an epoch of training, in order; null in row 0, of the pretrained weights, and where the
# algorithm has no such figure.
TRAINING_FIGURES = ("reward_mean", "reward_std", "seconds_sample", "seconds_reward", "seconds_learn", "own_statistics", "loss",
                    "approx_kl", "kl_pretrained", "ratio_mean", "clip_fraction_low", "clip_fraction_high", "denoising_error",
                    "grad_norm", "ratio_deviation", "skipped_updates")


def train(experiment, prompts, reward, folder):
    """The experiment: act, judge, compare, learn, tell. Continues from experiment.epoch."""
    config, policy, rng = experiment.config, experiment.policy, experiment.rng
    update, keep_chain = UPDATES[config.algorithm]
    if not runs.read_rows(folder):
        figures = evaluate_fixed(experiment, prompts, reward, folder)
        runs.append_row(folder, {"epoch": 0, "reward_queries": 0, **dict.fromkeys(TRAINING_FIGURES), **figures})
        experiment.seconds += figures["seconds_eval"]
        experiment.remember()
    for epoch in progress_bar(experiment, folder):
        clock, parts = Clock(), []
        chosen = [prompts[i] for i in torch.randint(len(prompts), (config.samples_per_epoch,), generator=rng)]
        texts = [prompt.text for prompt in chosen]
        for start in range(0, len(chosen), PICTURES_AT_ONCE):
            some = chosen[start:start + PICTURES_AT_ONCE]

            # 1. Act: draw an image for each of a batch of prompts; DDPO keeps the chains.
            trajectory, images = rollout(policy, [prompt.text for prompt in some], rng, config.sample_batch, keep_chain)
            clock.lap("seconds_sample")

            # 2. Judge: the only place where the pictures are looked at.
            parts.append((trajectory, *reward(images, some)))
            clock.lap("seconds_reward")
        trajectory, rewards, notes = join(parts)

        # 3. Compare: was it better than what this prompt usually gets?
        worth, compared = credit(experiment, texts, rewards)

        # 4. Learn: make the better pictures more likely, a little.
        info = update(policy, trajectory, worth, experiment.optimizer, experiment.scaler, rng, config)
        clock.lap("seconds_learn")

        # 5. Tell: evaluate, log and save.
        experiment.epoch = epoch
        row = {"epoch": epoch, "reward_queries": epoch * config.samples_per_epoch, **dict.fromkeys(TRAINING_FIGURES),
               "reward_mean": rewards.mean().item(), "reward_std": rewards.std(correction=0).item(), **clock.laps, **compared,
               **info, **evaluate_fixed(experiment, prompts, reward, folder), **noted("notes", texts, rewards, notes)}
        runs.append_row(folder, row)
        experiment.seconds += clock.total()
        experiment.remember()
        if due(epoch, config.checkpoint_every, config.epochs):
            runs.save_checkpoint(folder, experiment.remembered)
            runs.draw_curve(folder, short_name(config.reward), *UNITS.get(config.reward, (1, "")))


def join(parts):
    """Trajectories, rewards (B,) and notes of several parts, as one each."""
    trajectories, rewards, notes = zip(*parts)
    return Trajectory.join(trajectories), torch.cat(rewards), sum(notes, [])


def credit(experiment, texts, rewards):
    """What each picture is worth to the algorithm, (B,): advantages for DDPO, weights for RWR; and figures for the log."""
    config = experiment.config
    if config.algorithm == "rwr":
        return rwr_weights(texts, rewards, config.beta), {}
    if config.algorithm == "rwr-sparse":
        return sparse_weights(texts, rewards, config.percentile), {}
    advantages, own_statistics = experiment.statistics.advantages(texts, rewards)
    return advantages, {"own_statistics": own_statistics}


def evaluate_fixed(experiment, prompts, reward, folder):
    """Draw the fixed prompts from the fixed noise, if it is time to: figures for the log (null if not), and the pictures.

    These images are not counted as reward queries: nothing is learned from them. The global generators are put back, so
    that how often one evaluates changes nothing.
    """
    config, epoch = experiment.config, experiment.epoch
    if not due(epoch, config.eval_every, config.epochs):
        return dict.fromkeys(("eval_reward_mean", "eval_reward_std", "eval_named", "eval_counted", "seconds_eval"))
    clock, rngs = Clock(), global_rngs()
    chosen, images = draw_fixed(experiment.policy, prompts, config)
    rewards, notes = reward(images, chosen)
    texts = [prompt.text for prompt in chosen]
    labels = ["\n".join(filter(None, (text, display(config.reward, value), note)))
              for text, value, note in zip(texts, rewards.tolist(), notes)]
    runs.save_samples(folder, epoch, [to_pil(image) for image in images], labels)
    set_global_rngs(rngs)
    clock.lap("seconds_eval")
    return {"eval_reward_mean": rewards.mean().item(), "eval_reward_std": rewards.std(correction=0).item(),
            **shares_right(images, texts), **clock.laps, **noted("eval_notes", texts, rewards, notes)}


def noted(name, texts, rewards, notes):
    """For the log: what a judge said of each picture, with the prompt and the reward that it belongs to; nothing if nothing."""
    return {name: [list(row) for row in zip(texts, rewards.tolist(), notes)]} if any(notes) else {}


def draw_fixed(policy, prompts, config):
    """The evaluation's prompts, spread evenly over the set, and their images, always from the same noise."""
    chosen = [prompts[i * len(prompts) // config.eval_prompts] for i in range(config.eval_prompts)]
    _, images = rollout(policy, [prompt.text for prompt in chosen], torch.Generator().manual_seed(EVAL_SEED),
                        config.sample_batch, keep_chain=False, title="evaluating")
    return chosen, images


def due(epoch, every, last):
    return epoch % every == 0 or epoch == last


def policy_of(config, model=None, scored=True):
    """The pretrained policy of a run's settings, or with those settings another model's."""
    return load_policy(model or config.model, config.sampling_steps, config.eta, config.guidance_scale, config.device,
                       config.precision, config.kl_weight > 0 and model is None, scored)


def reward_of(config):
    """The reward of a run's settings, its network loaded if it has one."""
    options = {name: getattr(config, name) for name, owners in REWARD_OWNERS.items() if config.reward in owners}
    return load_reward(config.reward, config.device, **options)


def check_questions(config, prompts):
    """Raise ValueError if the reward asks what the prompts do not bring along."""
    if config.reward == "counting" and not all(prompt.questions for prompt in prompts):
        asking = [name for name in PROMPT_SETS if all(prompt.questions for prompt in load_prompts(name))]
        raise ValueError(f"counting asks questions that its prompts bring along: choose --prompts {' or '.join(asking)}")


def progress_bar(experiment, folder):
    """The epochs still to run, counted from 1, under a bar that shows the last rewards."""
    config, first = experiment.config, experiment.epoch
    with tqdm(total=config.epochs, initial=first, desc=short_name(config.reward), unit="epoch") as bar:
        def show():
            rows = runs.read_rows(folder)
            evaluated = [row["eval_reward_mean"] for row in rows if row["eval_reward_mean"] is not None]
            shown = {"fixed_prompts": display(config.reward, evaluated[-1])} if evaluated else {}
            if rows and rows[-1]["reward_mean"] is not None:
                shown["samples"] = display(config.reward, rows[-1]["reward_mean"])
            bar.set_postfix(shown)

        show()
        for epoch in range(first + 1, config.epochs + 1):
            yield epoch
            bar.update()
            show()


class Clock:
    """Seconds since the last lap, by name; laps of one name add up."""

    def __init__(self):
        self.laps, self.start, self.last = {}, time.perf_counter(), time.perf_counter()

    def lap(self, name):
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # else a lap would time the launching of kernels
        now = time.perf_counter()
        self.laps[name], self.last = round(self.laps.get(name, 0) + now - self.last, 3), now

    def total(self):
        return time.perf_counter() - self.start


def describe(config, policy, prompts, folder):
    """The derived numbers, in a few lines."""
    weights = sum(weight.numel() for weight in policy.unet.parameters())
    if UPDATES[config.algorithm][1]:
        images = config.samples_per_epoch // config.updates_per_epoch
        steps = config.sampling_steps - config.skip_last_steps
        share = f"{images} images x {steps} steps = {images * steps} pairs"
    else:
        share = f"{config.batch_size} images"
    return (f"{folder}: {short_name(config.reward)} by {config.algorithm} on {len(prompts)} prompts\n"
            f"{config.model}: {weights / 1e6:.2f} million trainable weights, {config.device}, {config.precision}\n"
            f"{config.epochs} epochs of {config.samples_per_epoch} samples = {config.epochs * config.samples_per_epoch} "
            f"reward queries; {config.updates_per_epoch} updates an epoch, {config.epochs * config.updates_per_epoch} in "
            f"all, each on {share}")


def outcome(config, rows, seconds):
    """The last line: what became of the reward on the fixed prompts."""
    before, after = (row["eval_reward_mean"] for row in (rows[0], rows[-1]))
    factor, _ = UNITS.get(config.reward, (1, ""))
    change = f" ({factor * (after - before) / abs(before):+.0%})".replace("%", " %") if before else ""
    return (f"{short_name(config.reward)}: {display(config.reward, before)} -> {display(config.reward, after)}{change} on "
            f"{config.eval_prompts} fixed prompts after {rows[-1]['reward_queries']} reward queries, "
            f"{seconds // 60:.0f} min {seconds % 60:02.0f} s")


def open_run(flags):
    """A new run, or the one to resume: its experiment, prompts, reward function and folder. Raises ValueError."""
    resumed = flags.pop("resume", None)
    if resumed is None:
        config = build_config(flags)
    else:
        others = sorted(set(flags) - {"epochs"})
        if others:
            raise ValueError(f"--resume takes the run's own settings and only --epochs beside it, not "
                             + ", ".join("--" + name.replace("_", "-") for name in others))
        config = load_config(resumed)
        state = runs.load_checkpoint(resumed)
        epochs = flags.get("epochs", config.epochs)
        if epochs < config.epochs:
            raise ValueError(f"--epochs {epochs}: {resumed} is a run of {config.epochs} epochs, and can only be made longer")
        if epochs == state["epoch"] and (resumed / "model").exists():
            raise ValueError(f"{resumed} has done all its {epochs} epochs: give a larger --epochs to go on")
        config.epochs = epochs
        check(config)
    prompts = load_prompts(config.prompts)
    check_questions(config, prompts)
    reward = reward_of(config)
    experiment = Experiment(config, policy_of(config))
    if resumed is None:
        folder = runs.create_run(RUNS, config.name, f"{short_name(config.reward)}-{config.algorithm}", asdict(config))
    else:
        folder = resumed
        try:
            experiment.load_state_dict(state)
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"the checkpoint of {resumed} is of another model than {config.model}") from error
        runs.save_settings(folder, asdict(config))
        runs.forget_after(folder, experiment.epoch)
    return experiment, prompts, reward, folder


def fail(message):
    """One clear line on a user's mistake; the exit code 2."""
    print(f"train.py: {message}", file=sys.stderr)
    return 2


def main(argv=None):
    """The command line. Returns the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill saves, too
    try:
        flags = parse(argv, __doc__)
        experiment, prompts, reward, folder = open_run(flags)
    except (ValueError, OSError) as error:
        return fail(error)
    except torch.OutOfMemoryError:
        return fail("the model does not fit into the GPU's memory")
    except KeyboardInterrupt:
        print("\ntrain.py: interrupted before the run began", file=sys.stderr)
        return 130
    print(describe(experiment.config, experiment.policy, prompts, folder), flush=True)
    try:
        train(experiment, prompts, reward, folder)
        rows = runs.read_rows(folder)
        runs.save_model(folder, experiment.policy.pipeline)
    except KeyboardInterrupt:
        return stop(experiment, folder, "interrupted", 130)
    except torch.OutOfMemoryError:
        return stop(experiment, folder, "out of GPU memory: a run with a smaller --micro-batch or --sample-batch needs less", 2)
    except (RewardError, FloatingPointError, OSError) as error:
        return stop(experiment, folder, error, 2)
    except Exception:  # a bug, or the GPU: its traceback is wanted, but the work is not lost
        stop(experiment, folder, "failed", 1)
        raise
    print(outcome(experiment.config, rows, experiment.seconds))
    return 0


def stop(experiment, folder, reason, code):
    """Save the state at the start of the epoch that was under way, and say how to go on."""
    impatience = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not cut the saving short
    try:
        runs.save_checkpoint(folder, experiment.remembered)
        kept = f"the state after {experiment.remembered['epoch']} epochs is saved"
    except OSError as error:
        kept = f"the state could not be saved ({error}), an earlier checkpoint is unharmed"
    finally:
        signal.signal(signal.SIGINT, impatience)
    print(f"\ntrain.py: {reason}; {kept}; go on with: python train.py --resume {folder}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
