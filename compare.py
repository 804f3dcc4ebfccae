"""Figure 4 of the paper on the embedded model: the four algorithms at the same number of reward queries, by one command.

    python compare.py --reward compressibility --seeds 5       # the comparison
    python compare.py --reward compressibility --sweep         # what each algorithm's settings were chosen from
    python compare.py --drift                                  # from both rewards' comparisons: less what they do alike
    python compare.py --ablation clip-range                    # one question; python compare.py --help names them all

Every run is `python train.py` with the flags that are written down with its numbers: nothing here trains. Finished runs
stand in results/REWARD/STUDY.jsonl, one line each, and are not run again, for this or another study of the reward, unless a
setting that they read has changed since; a run that was stopped is resumed. From them come STUDY.md, the table, and STUDY.png,
the figure; and from the first seed's runs, while their folders under runs/ are there, STUDY_pictures.png.
"""
import argparse
import hashlib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import runs
from rewards import REWARDS, UNITS, RewardError, load_reward
from sampling import PRECISIONS
from settings import ALGORITHMS, RWR, Config, build_config, shared_settings, short_name
from train import RUNS
from variance import measure_variance

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
QUERIES = 1536  # the emoji preset's 24 epochs
SWEEP_QUERIES, SWEEP_SEED = 832, 100  # the comparison uses seeds from 0
# Student's t, two-sided 95 %, by degrees of freedom; beyond, the last is a little too wide.
T_95 = [np.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10]


def rwr_rounds(number, queries, images=32):
    """RWR's settings for that many rounds. About as many pictures are learned from as five passes over all, as in the paper."""
    samples = queries // number
    return {"epochs": number, "samples_per_epoch": samples, "batch_size": images,
            "updates_per_epoch": round(5 * samples / images)}


# The same number of settings for each algorithm, over learning rate and what is its own.
SWEEP = {
    "ddpo-is": [dict(learning_rate=2e-4, updates_per_epoch=8), dict(learning_rate=2e-4, updates_per_epoch=4),
                dict(learning_rate=4e-4, updates_per_epoch=8, clip_range=1e-2), dict(learning_rate=4e-4, updates_per_epoch=8)],
    "ddpo-sf": [dict(learning_rate=2e-4, samples_per_epoch=64), dict(learning_rate=1e-4, samples_per_epoch=16),
                dict(learning_rate=2e-4, samples_per_epoch=16), dict(learning_rate=1e-4, samples_per_epoch=64)],
    "rwr": [dict(learning_rate=lr, beta=beta, **rwr_rounds(rounds, SWEEP_QUERIES))
            for lr, beta, rounds in ((1e-4, 5.0, 2), (3e-5, 5.0, 2), (1e-4, 20.0, 2), (3e-5, 20.0, 4))],
    "rwr-sparse": [dict(learning_rate=lr, percentile=percentile, **rwr_rounds(rounds, SWEEP_QUERIES))
                   for lr, percentile, rounds in ((1e-4, 0.9, 2), (3e-5, 0.9, 2), (1e-4, 0.75, 2), (3e-5, 0.9, 4))]}

# One question each, on top of the emoji preset: the curves' labels and the flags behind them, and the number of queries.
ABLATIONS = {
    # Rounds of RWR change the pictures without any reward, too: percentile 0 and beta 0 tell how.
    "guidance": (640, {f"{name} training{control}": {"algorithm": "rwr-sparse", **guided, **flags, **rwr_rounds(5, 640)}
                       for control, flags in (("", {}), (", no reward", {"percentile": 0.0}))
                       for name, guided in (("guided", {}), ("unguided", {"guided_training": False}))}),
    # The pictures must be in danger for the penalty to matter: twice the preset's learning rate, and a wider trust region.
    "kl": (640, {f"KL weight {weight:g}": {"kl_weight": weight, "learning_rate": 4e-4, "clip_range": 1e-2}
                 for weight in (0.0, 0.1, 1.0, 10.0)}),
    "interleaving": (800, {
        f"{number} round{'s' * (number > 1)}{control}": {"algorithm": "rwr", **flags, **rwr_rounds(number, 800)}
        for control, numbers, flags in (("", (1, 2, 5, 10, 20), {}), (", no reward", (1, 5, 20), {"beta": 0.0}))
        for number in numbers}),
    "estimators": (640, {"DDPO-IS, 8 updates of 8 images": {"learning_rate": 2e-4}, **{
        f"DDPO-SF, an update of {images} images": {"algorithm": "ddpo-sf", "learning_rate": 2e-4, "samples_per_epoch": images}
        for images in (64, 8)}}),
    "clip-range": (640, {f"clip range {clip:g}": {"clip_range": clip} for clip in (5e-4, 2e-3, 1e-2, 1.0)}),
    "baseline": (640, {"per prompt": {}, "batch": {"baseline": "batch"}, "none": {"baseline": "none"}}),
}


@dataclass(frozen=True)
class Run:
    """One line of results/REWARD/STUDY.jsonl to be: `flags` of train.py, name and seed apart, in the order they are shown."""
    study: str
    label: str
    seed: int
    flags: dict

    @property
    def name(self):
        """Of its folder under runs/, which runs of other settings do not share."""
        words = "-".join("".join(c if c.isalnum() or c == "." else " " for c in self.label).split())
        # Of what is not the default, so that a setting which comes later, at its default, leaves the name as it is.
        own = {name: value for name, value in shared_settings(self.config).items() if value != getattr(Config, name)}
        mark = hashlib.sha1(json.dumps(own, sort_keys=True).encode()).hexdigest()[:6]
        return f"{self.study}-{short_name(self.flags['reward'])}-{words}-seed{self.seed}-{mark}"

    @property
    def arguments(self):
        """Of train.py."""
        pairs = [(name.replace("_", "-"), value) for name, value in {**self.flags, "seed": self.seed}.items()]
        return [word for name, value in pairs for word in (
            [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", f"{value}"])]

    @property
    def config(self):
        return build_config({**self.flags, "seed": self.seed})

    @property
    def queries(self):
        return self.config.epochs * self.config.samples_per_epoch

    @property
    def key(self):
        """All that makes its numbers what they are, whatever study it was made for: by this its line is found again."""
        return self.seed, json.dumps(shared_settings(self.config), sort_keys=True)


def plan(study, label, seed, flags, queries):
    """A run of that many reward queries, evaluated about eight times, or after each of fewer epochs."""
    samples = build_config(flags).samples_per_epoch
    if queries < samples or queries % samples:
        raise ValueError(f"--queries {queries} does not divide into epochs of {samples}, as {label} has them")
    epochs = queries // samples
    every = -(-epochs // 8)
    return Run(study, label, seed, {**flags, "epochs": epochs, "eval_every": every, "checkpoint_every": every})


def plans(args, common):
    """The runs of the study asked for, seed by seed, so that a study cut short is one of fewer seeds."""
    # Their queries divide into epochs of 64, the emoji preset's; for some rewards it has larger ones.
    shared = {**common, "samples_per_epoch": 64}
    if args.sweep:
        return [plan("sweep", f"{algorithm} {k + 1}", SWEEP_SEED, {**shared, "algorithm": algorithm, **choice}, SWEEP_QUERIES)
                for algorithm in args.algorithms or SWEEP for k, choice in enumerate(SWEEP[algorithm])]
    if args.ablation:
        queries, choices = ABLATIONS[args.ablation]
        return [plan(args.ablation, label, seed, {**shared, **choice}, queries)
                for seed in range(args.seeds) for label, choice in choices.items()]
    methods = {algorithm: {"algorithm": algorithm} for algorithm in args.algorithms or ALGORITHMS}
    if not args.algorithms:  # the control: what RWR's rounds do to the pictures without any reward
        methods["no reward"] = {"algorithm": "rwr", "beta": 0.0}
    name = "main" if args.queries == QUERIES else f"main-{args.queries}"
    return [plan(name, label, seed, {**common, **flags}, args.queries)
            for seed in range(args.seeds) for label, flags in methods.items()]


def complete(planned, log):
    """Train what no study of the reward has yet, and see that each run has its line in the log. Returns run.key -> line.

    A run that fails is told and left out; raises ValueError in the end if there were such.
    """
    own, others, failed = finished_runs(log), {}, []
    for other in sorted(log.parent.glob("*.jsonl")):
        others.update(finished_runs(other))
    for run in planned:
        if run.key in others and run.key not in own:
            own[run.key] = {**others[run.key], "label": run.label}
            runs.append_line(log, own[run.key])
    missing = [run for run in planned if run.key not in own]
    total = sum(run.queries for run in planned)
    with tqdm(total=total, initial=total - sum(run.queries for run in missing), unit="query", smoothing=0) as bar:
        for run in missing:
            done = bar.n
            bar.set_description(run.name)
            try:
                own[run.key] = finish(run, lambda queries: _show(bar, done + queries))
                runs.append_line(log, own[run.key])
            except ValueError as error:
                tqdm.write(f"compare.py: {error}", file=sys.stderr)
                failed.append(run.name)
            _show(bar, done + run.queries)
    if failed:
        raise ValueError(f"{len(failed)} of {len(planned)} runs failed ({', '.join(failed)}): no report was written")
    return own


def finished_runs(log):
    """Run.key -> line, of one study's JSON lines."""
    lines = {}
    for line in runs.read_lines(log):
        try:  # settings that came later have their defaults
            settings = shared_settings(Config(**line["settings"]))
        except (KeyError, TypeError):  # not a run, or of a version that had other settings
            continue
        if "rows" in line:
            lines[line["seed"], json.dumps(settings, sort_keys=True)] = line
    return lines


def finish(run, show):
    """Train it, from the start, from where it was stopped, or not at all if that is done. Returns its line for the results."""
    folder, made = RUNS / run.name, commit()
    arguments = [*run.arguments, "--name", run.name]
    if (folder / "checkpoint" / "state.pt").exists():
        arguments, made = ["--resume", str(folder)], f"{made} (begun earlier)"
    elif folder.exists():  # stopped before there was anything to resume
        shutil.rmtree(folder)
    if not (folder / "model").exists():
        _train(arguments, folder, show)
    rows = runs.read_rows(folder)
    seconds = sum(row[name] or 0 for row in rows for name in row if name.startswith("seconds_"))
    kept = ("epoch", "reward_queries", "eval_reward_mean", "eval_named", "eval_counted", "reward_mean", "approx_kl",
            "grad_norm", "loss")
    return {"label": run.label, "seed": run.seed, "folder": run.name,
            "command": shlex.join(["python", "train.py", *run.arguments]), "commit": made, "machine": machine(),
            "minutes": round(seconds / 60, 2), "updates": run.config.epochs * run.config.updates_per_epoch,
            "rows": [{name: row[name] for name in kept} for row in rows], "settings": shared_settings(run.config)}


def _train(arguments, folder, show):
    """python train.py in a process of its own, its reward queries shown while it runs. Raises ValueError if it fails."""
    with tempfile.TemporaryFile("w+") as errors:  # a pipe that nobody reads would block it when full
        process = subprocess.Popen([sys.executable, str(HERE / "train.py"), *arguments], stdout=subprocess.DEVNULL,
                                   stderr=errors, env={**os.environ, "TQDM_DISABLE": "1"})
        try:
            while process.poll() is None:
                rows = runs.read_rows(folder)
                show(rows[-1]["reward_queries"] if rows else 0)
                time.sleep(1)
        except BaseException:
            if process.poll() is None:
                process.terminate()  # it saves; after a Ctrl-C it is saving, and does not mind
                process.wait()
            raise
        if process.returncode:
            errors.seek(0)
            said = errors.read().strip().splitlines() or [f"exit code {process.returncode}"]
            raise ValueError(f"{folder} stopped: {said[-1]}")


def _show(bar, queries):
    bar.n = queries
    bar.refresh()


def commit():
    """The commit of the code, with -dirty where code or assets are not as committed."""
    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "-s", "--", "*.py", "assets")
        return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")
    except OSError:  # no git here
        return "unknown"


def machine():
    """What a run's minutes were measured on."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    threads = torch.get_num_threads()
    return (f"{os.cpu_count()} cores, {threads} thread{'s' * (threads > 1)}, {platform.machine()}, "
            f"torch {torch.__version__}{gpu}")


# ---- What came out ----

def evaluated(line):
    """A run's evaluations: queries, reward, shares of pictures with the animal and with the number asked for (NaN: unknown)."""
    rows = [row for row in line["rows"] if row["eval_reward_mean"] is not None]
    return tuple(np.array([np.nan if row.get(name) is None else row[name] for row in rows], float)
                 for name in ("reward_queries", "eval_reward_mean", "eval_named", "eval_counted"))


def course(line):
    """Queries and reward at the end of every epoch, since only there the policy changes; interpolated between evaluations."""
    queries, reward, *_ = evaluated(line)
    epochs = np.array([row["reward_queries"] for row in line["rows"]], float)
    epochs = epochs[epochs <= queries[-1]]
    return epochs, np.interp(epochs, queries, reward)


def area(line):
    """Area under the curve of reward against queries, divided by the queries: the mean reward of the policies on the way."""
    queries, reward = course(line)
    return (reward[:-1] * np.diff(queries)).sum() / queries[-1]


def queries_to(line, gain):
    """Reward queries after which the policy's reward first stood that share of its start above it; NaN if it never did."""
    queries, reward = course(line)
    above = np.nonzero(reward >= reward[0] + gain * abs(reward[0]))[0]
    return queries[above[0]] if len(above) and reward[0] else np.nan


def interval(values):
    """Mean, and half the 95 % interval of the mean (Student's t over the seeds); NaN for one seed."""
    values = np.asarray(values, float)
    n = len(values)
    spread = values.std(ddof=1) / n**0.5 if n > 1 else np.nan
    return values.mean(), spread * T_95[min(n, len(T_95)) - 1]


def by_label(lines):
    """label -> its lines, in the order of the first."""
    groups = {}
    for line in lines:
        groups.setdefault(line["label"], []).append(line)
    return groups


def gained(line):
    """Reward gained by the end of a run, in percent of the start; NaN from a start of 0."""
    _, reward, *_ = evaluated(line)
    return 100 * (reward[-1] - reward[0]) / abs(reward[0]) if reward[0] else np.nan


def beyond_no_reward(label, group, groups):
    """What RWR's runs gained beyond the same rounds without a reward, seed by seed; none where these were not run."""
    control = groups.get(f"{label}, no reward", groups.get("no reward", []))
    control = {line["seed"]: gained(line) for line in control}
    of_rwr = group[0]["settings"]["algorithm"] in RWR and "no reward" not in label
    return [gained(line) - control[line["seed"]] for line in group if of_rwr and line["seed"] in control]


def cell(values, digits=2, scale=1.0):
    """Mean and interval as a table shows them; '-' for none."""
    mean, half = interval([scale * value for value in values]) if len(values) else (np.nan, np.nan)
    if not np.isfinite(mean):
        return "-"
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if np.isfinite(half) else "")


def markdown(rows):
    """A table; the first row is its head."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def without_drift(lines, opposite):
    """Table of the mean gain over a reward and its opposite, seed by seed: what is done to the pictures for both cancels."""
    ends = {(line["label"], line["seed"]): gained(line) for line in opposite}
    rows = [["", "seeds", "mean gain over both rewards (%)"]]
    for label, group in by_label(lines).items():
        values = [(gained(line) + ends[label, line["seed"]]) / 2 for line in group if (label, line["seed"]) in ends]
        if values:
            rows.append([label, str(len(values)), cell(values, 1)])
    return markdown(rows)


def table(lines, reward):
    """The study in Markdown, one row a label."""
    factor, unit = UNITS.get(reward, (1, "reward"))
    rows = [["", "seeds", f"start ({unit})", f"end ({unit})", "reward gained (%)", "beyond no reward (%)",
             f"mean on the way ({unit})", "named at the end (%)", "counted (%)", "queries to a gain of 10 %", "of 20 %",
             "queries", "updates", "minutes"]]
    groups = by_label(lines)
    for label, group in groups.items():
        ends = [evaluated(line) for line in group]
        reached = []
        for gain in (0.1, 0.2):
            values = [queries_to(line, gain) for line in group]
            got = np.isfinite(values).sum()
            reached.append(cell(values, 0) if got == len(group) else f"{got} of {len(group)} seeds got there")
        rows.append([label, str(len(group)), cell([e[1][0] for e in ends], scale=factor),
                     cell([e[1][-1] for e in ends], scale=factor), cell([gained(line) for line in group], 1),
                     cell(beyond_no_reward(label, group, groups), 1), cell([area(line) for line in group], scale=factor),
                     *(cell([100 * e[k][-1] for e in ends], 1) for k in (2, 3)), *reached,
                     f"{ends[0][0][-1]:.0f}", str(group[0]["updates"]), cell([line["minutes"] for line in group], 1)])
    return markdown(rows)


def figure(lines, reward, path):
    """Reward against queries, and against the share of animals that the judge still names: mean and 95 % interval."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    factor, unit = UNITS.get(reward, (1, ""))
    plot = Figure(figsize=(13, 4.2), layout="constrained")
    left, right = plot.subplots(1, 2, sharey=True)
    colors = colormaps["tab20" if len(by_label(lines)) > 10 else "tab10"].colors
    for color, (label, group) in zip(colors, by_label(lines).items()):
        queries, _ = course(group[0])
        mean, half = np.array([interval(column) for column in factor * np.array([course(line)[1] for line in group]).T]).T
        seeds = f"{len(group)} seed{'s' * (len(group) > 1)}"
        left.plot(queries, mean, drawstyle="steps-post", color=color, label=f"{label} ({seeds})")
        left.fill_between(queries, mean - half, mean + half, step="post", color=color, alpha=0.2, linewidth=0)
        left.plot(queries[-1], mean[-1], "o", markersize=4, color=color)
        rewards, named = (np.array([evaluated(line)[k] for line in group]) for k in (1, 2))
        right.plot(100 * named.mean(0), factor * rewards.mean(0), "-", color=color)
        right.plot(100 * named[:, -1], factor * rewards[:, -1], "o", color=color)
    name = {"compressibility": "JPEG size (kB): lower is better", "incompressibility": "JPEG size (kB): higher is better"}
    name = name.get(reward, f"{reward} ({unit})" if unit else reward)
    left.set(xlabel="reward queries", ylabel=name, title="mean and 95 % interval over seeds")
    right.set(xlabel="animals that the judge names (%)", title="line: mean on the way; points: seeds at the end")
    plot.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    runs.write_atomically(path, lambda temporary: plot.savefig(temporary, dpi=110))


def pictures(lines, path):
    """The first fixed prompts before, and after each label's run of the first seed, one row each; needs their folders."""
    first = [line for line in lines if line["seed"] == lines[0]["seed"]]
    grids = [sorted((RUNS / line["folder"] / "samples").glob("epoch_*.png")) for line in first]
    if all(grids):
        rows = [("before", grids[0][0]), *((line["label"], grid[-1]) for line, grid in zip(first, grids))]
        runs.write_atomically(path, runs.first_rows(rows).save)


def report(lines, reward, path, command):
    """STUDY.md, STUDY.png and the pictures. Returns the table."""
    figure(lines, reward, path.with_name(path.name + ".png"))
    shown = path.with_name(path.name + "_pictures.png")
    pictures(lines, shown)
    settings = "\n".join(f"* {label}: `{group[0]['command']}`" for label, group in by_label(lines).items())
    made = "; ".join(sorted({f"commit {line['commit']}, {line['machine']}" for line in lines}))
    intervals = "Intervals are 95 % (Student's t) over the seeds. " if len(by_label(lines)) < len(lines) else ""
    rows = f"\n\nThe first fixed prompts, seed {lines[0]['seed']}:\n\n![pictures]({shown.name})" if shown.exists() else ""
    text = (f"# {path.name}: {reward}\n\n`{command}`; {made}. {intervals}A gain is a share of the start; beyond "
            "no reward: less that of the same rounds of RWR without a reward, seed by seed. Named, counted: by the "
            f"independent judge as asked for, of {lines[0]['settings']['eval_prompts']} fixed prompts. Mean on the way: of the "
            "policies that the queries were spent on, which change when an epoch or a round ends.\n\n"
            f"{table(lines, reward)}\n\n![the curves]({path.name}.png){rows}\n\nThe first seed's commands:\n\n{settings}\n")
    runs.write_atomically(path.with_name(path.name + ".md"), lambda temporary: temporary.write_text(text))
    return table(lines, reward)


def study(args, common, command):
    """Run what is missing of a study, and report. Raises ValueError, OSError."""
    planned, reward = plans(args, common), short_name(args.reward)
    path = RESULTS / reward / planned[0].study
    lines = complete(planned, path.with_name(path.name + ".jsonl"))
    return report([lines[run.key] for run in planned], reward, path, command)


def drift(args, common, command):
    """results/drift.md, from what is there of the comparison on compressibility and on incompressibility. Returns its table."""
    found = []
    for reward in ("compressibility", "incompressibility"):
        lines = finished_runs(RESULTS / reward / "main.jsonl")
        found.append([lines[run.key] for run in plans(args, {**common, "reward": reward}) if run.key in lines])
    text = without_drift(*found)
    runs.write_atomically(RESULTS / "drift.md", lambda path: path.write_text(
        f"# Compressibility and incompressibility together\n\n`{command}`, from their `main.jsonl`: the mean of a seed's gains "
        "on the two, in percent of the start. A size that falls for both rewards alike cancels: what is left is what the reward "
        f"itself did. Intervals are 95 % over the seeds.\n\n{text}\n"))
    return text


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", default="compressibility", help=f"{', '.join(REWARDS)}, or path/to/file.py:function")
    parser.add_argument("--seeds", type=int, help="0 to SEEDS - 1 (default: 5; of an ablation 3)")
    parser.add_argument("--queries", type=int, help=f"reward queries of a run of the comparison, which divide into "
                        f"the epochs and rounds of all (default: {QUERIES})")
    parser.add_argument("--prompts", help="a set's name or a text file (default: the preset's)")
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, metavar="NAME",
                        help=f"of the comparison or the sweep, some of {', '.join(ALGORITHMS)} (default: all)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where to train")
    parser.add_argument("--precision", choices=PRECISIONS, help="of the U-Net (default: the preset's)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--sweep", action="store_true", help="the settings that the preset's were chosen from")
    which.add_argument("--drift", action="store_true",
                       help="what the comparisons on both JPEG rewards did, less what they did alike")
    which.add_argument("--ablation", choices=[*ABLATIONS, "variance"], help="one question")
    args = parser.parse_args(argv)
    command = shlex.join(["python", "compare.py", *argv])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill is told to the run that is under way, like Ctrl-C
    try:
        if args.queries is not None and (args.sweep or args.ablation):
            raise ValueError("--queries is of the comparison: a sweep and each ablation have their own")
        if args.algorithms and args.ablation:
            raise ValueError("--algorithms is of the comparison and the sweep: an ablation has its own")
        if args.drift and args.reward != "compressibility":
            raise ValueError("--drift is of compressibility and incompressibility together: leave --reward out")
        if args.seeds is not None and (args.sweep or args.ablation == "variance"):
            raise ValueError("--seeds is of the comparison and the other ablations: a sweep and the variance have their own")
        if args.seeds is not None and args.seeds < 1:
            raise ValueError(f"--seeds {args.seeds}: must be at least 1")
        if args.reward not in REWARDS:
            load_reward(args.reward)  # a name that is none is refused before anything is written
        args.seeds = args.seeds or (3 if args.ablation else 5)
        args.queries = QUERIES if args.queries is None else args.queries
        common = {name: getattr(args, name) for name in ("reward", "prompts", "device", "precision") if getattr(args, name)}
        if args.drift:
            print(drift(args, common, command))
        elif args.ablation == "variance":
            folder = RESULTS / short_name(args.reward)
            run = plan("main", "ddpo-is", 0, {**common, "algorithm": "ddpo-is"}, QUERIES)  # the comparison's first
            trained = RUNS / complete([run], folder / "main.jsonl")[run.key]["folder"]
            if not (trained / "model").exists():
                raise ValueError(f"the direction is that of {trained}, whose model/ is gone: make it again with "
                                 f"{shlex.join(['python', 'train.py', *run.arguments, '--name', trained.name])}")
            print(measure_variance(folder, command, trained, {"commit": commit(), "machine": machine()}, **common))
        else:
            print(study(args, common, command))
    except (ValueError, OSError, RewardError, FloatingPointError, torch.OutOfMemoryError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ncompare.py: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
