"""Figure 4 of the paper on the embedded model: its four algorithms, and nft, at the same number of reward queries, by one command.

    python studies/compare.py --reward compressibility --seeds 5       # the comparison
    python studies/compare.py --reward compressibility --sweep         # what each algorithm's settings were chosen from
    python studies/compare.py --drift                                  # the mean gain over both JPEG rewards
    python studies/compare.py --twins                                  # DDPO-IS on a diffusion and on a flow-matching model
    python studies/compare.py --ablation clip-range                    # one question; --help names them all

Every run is `python train.py` with the flags that are written down with its numbers: nothing here trains. A finished run has one
line in studies/results/REWARD/STUDY.jsonl. It is not run again, for this or another study of the reward, unless a setting that
it reads, or the model, has changed. A run that was stopped is resumed. --jobs trains several at a time. From the lines come STUDY.md, the table, and STUDY.png, the
figure. As long as the first seed's folders under runs/ are there, they also give STUDY_images.png.
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
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the method is, if this file is run as a script
from settings import ALGORITHMS, EMOJI, PRESET_REWARDS, ROOT, Config, build_config, shared_settings

import runs
from policy import PRECISIONS
from rewards import REWARDS, RewardError, short_name, unit_of, user_function
from studies.report import report, without_drift
from studies.variance import measure_variance
from train import RUNS

RESULTS = Path(__file__).resolve().parent / "results"
QUERIES = 512    # the emoji preset's 8 epochs: with 12 no setting of DDPO-IS keeps nine animals of ten
SWEEP_SEED = 100  # the comparison takes seeds from 0


# ---- The studies ----

def rwr_settings(rounds, queries, batch_size=32):
    """RWR's settings for so many epochs (the paper's rounds). Its updates make five passes over the samples, as in the paper."""
    samples = queries // rounds
    return {"epochs": rounds, "samples_per_epoch": samples, "batch_size": batch_size,
            "updates_per_epoch": round(5 * samples / batch_size)}


def fine_tuning_choices(queries, many):
    """Four settings for RWR, sparse RWR and nft each, in four rounds; for nft also in `many`."""
    # In four rounds: at the preset's training guidance these change the images least without a reward.
    return {
        "rwr": [dict(learning_rate=lr, beta=beta, **rwr_settings(4, queries))
                for lr, beta in ((1e-4, 5.0), (1e-4, 20.0), (1e-4, 60.0), (3e-5, 20.0))],
        "rwr-sparse": [dict(learning_rate=lr, percentile=percentile, **rwr_settings(4, queries))
                       for lr, percentile in ((1e-4, 0.9), (1e-4, 0.75), (2e-4, 0.9), (3e-5, 0.9))],
        "nft": [dict(learning_rate=lr, **rwr_settings(rounds, queries)) for rounds in (many, 4) for lr in (1e-4, 3e-4)]}


# Four settings for each algorithm. They vary the learning rate and the algorithm's own settings.
SWEEP = {
    "ddpo-is": [dict(learning_rate=2e-4, updates_per_epoch=8), dict(learning_rate=2e-4, updates_per_epoch=4),
                dict(learning_rate=4e-4, updates_per_epoch=8, clip_range=1e-2), dict(learning_rate=4e-4, updates_per_epoch=8)],
    "ddpo-sf": [dict(learning_rate=2e-4, samples_per_epoch=64), dict(learning_rate=1e-4, samples_per_epoch=16),
                dict(learning_rate=2e-4, samples_per_epoch=16), dict(learning_rate=1e-4, samples_per_epoch=64)],
    **fine_tuning_choices(QUERIES, 8)}

# Settings for a VLM's reward, whose preset has larger epochs and so more queries.
VLM_QUERIES = 3072
VLM_SWEEP = {
    "ddpo-is": [dict(learning_rate=lr, updates_per_epoch=updates) for lr in (5e-5, 1e-4) for updates in (4, 2)],
    "ddpo-sf": [dict(learning_rate=lr, samples_per_epoch=samples) for lr in (5e-5, 1e-4) for samples in (256, 64)],
    **fine_tuning_choices(VLM_QUERIES, 12)}

# The preset as it was before it had groups: an image is compared with the last rewards of its prompt, which comes once or twice an epoch.
RUNNING = {"images_per_prompt": 1, "stats_buffer": 16, "stats_min_count": 8, "updates_per_epoch": 8}

# One question each, on top of the emoji preset: the number of queries, the curves' labels and the flags behind them. A label may
# have its own number of queries.
ABLATIONS = {
    # RWR changes the images without any reward, too. Percentile 0 and beta 0 show how.
    "guidance": (640, {f"{name} training{control}": {"algorithm": "rwr-sparse", **guided, **flags, **rwr_settings(5, 640)}
                       for control, flags in (("", {}), (", no reward", {"percentile": 0.0}))
                       for name, guided in (("guided", {}), ("unguided", {"training_guidance": 1.0}))}),
    # The penalty only matters if the images are in danger: twice the preset's learning rate, and a wider trust region.
    "kl": (640, {f"KL weight {weight:g}": {"kl_weight": weight, "learning_rate": 4e-4, "clip_range": 1e-2}
                 for weight in (0.0, 0.1, 1.0, 10.0)}),
    "interleaving": (800, {
        f"{number} round{'s' * (number > 1)}{control}": {"algorithm": "rwr", **flags, **rwr_settings(number, 800)}
        for control, numbers, flags in (("", (1, 2, 5, 10, 20), {}), (", no reward", (1, 5, 20), {"beta": 0.0}))
        for number in numbers}),
    "estimators": (640, {"DDPO-IS, 8 updates of 8 images": {"learning_rate": 2e-4, "updates_per_epoch": 8}, **{
        f"DDPO-SF, an update of {images} images": {"algorithm": "ddpo-sf", "learning_rate": 2e-4, "samples_per_epoch": images}
        for images in (64, 8)}}),
    "clip-range": (640, {f"clip range {clip:g}": {"clip_range": clip} for clip in (5e-4, 2e-3, 1e-2, 1.0)}),
    # Runs of about as many U-Net passes as the default's 512 queries cost, which learn from 8 steps of 10: report.passes_per_query.
    "learn-steps": (QUERIES, {
        "the first 8 steps": {},
        **{f"{count} step{'s' * (count > 1)} at random": {"learn_steps": count, "queries": queries}
           for count, queries in ((1, 1344), (2, 1088), (4, 768))},
        "8 of all 10 steps at random": {"skip_last_steps": 0, "learn_steps": 8},
        **{f"the first {count} step{'s' * (count > 1)}": {"skip_last_steps": 10 - count, "queries": queries}
           for count, queries in ((1, 1344), (2, 1088), (4, 768))}}),
    "sampling-steps": (QUERIES, {
        f"T = {steps}": {"sampling_steps": steps, "skip_last_steps": steps // 5, "eval_steps": 20, "queries": queries}
        for steps, queries in ((5, 1024), (10, 512), (20, 256))}),
    "groups": (1536, {"running statistics": RUNNING, **{
        f"groups of {count}": {**RUNNING, "images_per_prompt": count, "stats_buffer": 1, "stats_min_count": 1} for count in (4, 8)}}),
    "baseline": (640, {"per prompt": {}, "batch": {"baseline": "batch"}, "none": {"baseline": "none"}}),
}

# The same training on the embedded model and on its twin, with the two sigmas of --noise.
TWINS = {"diffusion": {}, "flow": {"model": str(EMOJI / "flow")}, "flow, cps": {"model": str(EMOJI / "flow"), "noise": "cps"}}


@dataclass(frozen=True, eq=False)
class Run:
    """A planned training run, which becomes one line of results/REWARD/STUDY.jsonl.

    flags: train.py's without name and seed, in the order in which they are shown.
    """
    study: str
    label: str
    seed: int
    flags: dict

    @property
    def name(self):
        """The name of its folder under runs/, which differs between runs of different settings or models."""
        words = "-".join("".join(c if c.isalnum() or c == "." else " " for c in self.label).split())
        # Of the settings that are not the default: a new setting, at its default, leaves the name as it is.
        own = {name: value for name, value in shared_settings(self.config).items()
               if (tuple(value) if isinstance(value, list) else value) != getattr(Config, name)}
        own["model"] = hash_of_model(self.config.model)
        own_hash = hashlib.sha1(json.dumps(own, sort_keys=True).encode()).hexdigest()[:6]
        return f"{self.study}-{short_name(self.flags['reward'])}-{words}-seed{self.seed}-{own_hash}"

    @property
    def arguments(self):
        """train.py's command line."""
        words = []
        for name, value in {**self.flags, "seed": self.seed}.items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{'' if value else 'no-'}{flag}")
            else:
                for one in value if isinstance(value, list) else [value]:
                    words += [f"--{flag}", f"{one}"]
        return words

    @property
    def config(self):
        return build_config({**self.flags, "seed": self.seed})

    @property
    def queries(self):
        return self.config.epochs * self.config.samples_per_epoch

    @property
    def key(self):
        """All that makes its numbers what they are, whatever study it was made for. Its line is found by this."""
        return hash_of_model(self.config.model), self.seed, json.dumps(shared_settings(self.config), sort_keys=True)


@cache
def hash_of_model(model):
    """A hash of the files of a model's folder: another one, at the same place, is another study's. Of a hub name it is that of no file."""
    files = sorted(path for path in Path(model).glob("*/*") if path.suffix in (".json", ".safetensors"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def planned_run(study, label, seed, flags, queries):
    """A run of that many reward queries. It is evaluated about eight times, or after each of fewer epochs.

    The flags may hold queries of their own.
    """
    flags = dict(flags)
    queries = flags.pop("queries", queries)
    samples = build_config(flags).samples_per_epoch
    if queries < samples or queries % samples:
        raise ValueError(f"--queries {queries} does not divide into epochs of {samples}, as {label} has them")
    epochs = queries // samples
    every = -(-epochs // 8)
    return Run(study, label, seed, {**flags, "epochs": epochs, "eval_every": every})


def planned_runs(args, common):
    """The runs of the study that is asked for, seed by seed: so a study that is cut short has fewer seeds."""
    # The queries of sweep and ablations divide into epochs of 64, the emoji preset's. For some rewards it has larger ones.
    shared = {**common, "samples_per_epoch": 64}
    if args.sweep:
        queries = queries_of(common["reward"])
        sweep, flags = (SWEEP, shared) if queries == QUERIES else (VLM_SWEEP, common)
        return [planned_run("sweep" + of_some(args.algorithms), f"{algorithm} {k + 1}", SWEEP_SEED, {**flags, "algorithm": algorithm, **choice}, queries)
                for algorithm in args.algorithms or sweep for k, choice in enumerate(sweep[algorithm])]
    if args.ablation:
        queries, choices = ABLATIONS[args.ablation]
        return [planned_run(args.ablation, label, seed, {**shared, **choice}, queries)
                for seed in range(args.seeds) for label, choice in choices.items()]
    methods = TWINS if args.twins else {algorithm: {"algorithm": algorithm} for algorithm in args.algorithms or ALGORITHMS}
    if not (args.algorithms or args.twins):  # the control: what RWR does to the images without any reward
        methods["no reward"] = {"algorithm": "rwr", "beta": 0.0}
    size = "" if args.queries == QUERIES else f"-{args.queries}"
    name = ("twins" if args.twins else "main") + size + of_some(args.algorithms)
    return [planned_run(name, label, seed, {**common, **flags}, args.queries)
            for seed in range(args.seeds) for label, flags in methods.items()]


def queries_of(reward):
    """The reward queries of a run of the comparison or the sweep."""
    return VLM_QUERIES if reward in PRESET_REWARDS["emoji"] else QUERIES


def of_some(algorithms):
    """What a study's name has more if it is of some algorithms alone: so its table does not replace the whole one's."""
    return "".join(f"-{algorithm}" for algorithm in algorithms or ())


# ---- Running what is missing ----

def train_missing(planned, log, jobs=1):
    """Train what no study of the reward has yet, and give each run a line in the log. Returns run.key -> line.

    jobs: runs at a time. A run whose command fails is reported and left out. Raises ValueError at the end if there were such runs.
    """
    own, others, failed = finished_runs(log), {}, []
    for other in sorted(log.parent.glob("*.jsonl")):
        others.update(finished_runs(other))
    for run in planned:
        if run.key in others and run.key not in own:
            own[run.key] = {**others[run.key], "label": run.label}
            runs.append_line(log, own[run.key])
    missing = [run for run in planned if run.key not in own]
    done, stopped = {run: 0 if run in missing else run.queries for run in planned}, threading.Event()
    total = sum(run.queries for run in planned)
    with tqdm(total=total, initial=sum(done.values()), unit="query", smoothing=0) as bar, ThreadPoolExecutor(jobs) as pool:
        def show(run, queries):
            if stopped.is_set():
                raise KeyboardInterrupt  # in the thread of a run, which ends its process
            done[run] = queries

        training = {pool.submit(train_run, run, partial(show, run)): run for run in missing}
        try:
            while training:
                for future in wait(training, timeout=1, return_when=FIRST_COMPLETED).done:
                    run = training.pop(future)
                    try:
                        own[run.key] = future.result()
                        runs.append_line(log, own[run.key])
                    except ValueError as error:
                        tqdm.write(f"compare.py: {error}", file=sys.stderr)
                        failed.append(run.name)
                    done[run] = run.queries
                bar.n = sum(done.values())
                bar.refresh()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # none begins any more
            stopped.set()
            raise
    if failed:
        raise ValueError(f"{len(failed)} of {len(planned)} runs failed ({', '.join(failed)}): no report was written")
    return own


def finished_runs(log):
    """run.key -> line, of one study's JSON lines."""
    lines = {}
    for line in runs.read_lines(log):
        try:  # a setting that came later has its default
            settings = shared_settings(Config(**line["settings"]))
        except (KeyError, TypeError):  # no run, or of a version that had other settings
            continue
        if "rows" in line:
            lines[line.get("model"), line["seed"], json.dumps(settings, sort_keys=True)] = line
    return lines


def train_run(run, show):
    """Train it: from the start, from where it was stopped, or not at all if it is done. Returns its line for the results."""
    folder, made_at = RUNS / run.name, commit()
    arguments = [*run.arguments, "--name", run.name]
    if (folder / "checkpoint" / "state.pt").exists():
        arguments, made_at = ["--resume", str(folder)], f"{made_at} (begun earlier)"
    elif folder.exists():  # stopped before there was anything to resume
        shutil.rmtree(folder)
    if not (folder / "model").exists():
        train_in_a_process(arguments, folder, show)
    rows = runs.read_rows(folder)
    seconds = sum(row[name] or 0 for row in rows for name in row if name.startswith("seconds_"))
    kept = ("epoch", "reward_queries", "eval_reward_mean", "watched", "reward_mean", "approx_kl", "grad_norm", "loss")
    return {"label": run.label, "seed": run.seed, "folder": run.name, "model": hash_of_model(run.config.model),
            "command": shlex.join(["python", "train.py", *run.arguments]).replace(f"{ROOT}/", ""), "commit": made_at, "machine": machine(),
            "minutes": round(seconds / 60, 2), "updates": run.config.epochs * run.config.updates_per_epoch,
            "rows": [{name: row[name] for name in kept} for row in rows], "settings": shared_settings(run.config),
            "units": {short_name(name): unit_of(name) for name in run.config.watch}}


def train_in_a_process(arguments, folder, show):
    """python train.py with those arguments; its reward queries are shown while it runs. Raises ValueError if it fails."""
    with tempfile.TemporaryFile("w+") as errors:  # a pipe that nobody reads would block it when full
        process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *arguments], stdout=subprocess.DEVNULL,
                                   stderr=errors, env={**os.environ, "TQDM_DISABLE": "1"})
        try:
            while process.poll() is None:
                rows = runs.read_rows(folder)
                show(rows[-1]["reward_queries"] if rows else 0)
                time.sleep(1)
        except BaseException:
            if process.poll() is None:
                process.terminate()  # it saves; after a Ctrl-C it is already saving, and a second signal does no harm
                process.wait()
            raise
        if process.returncode:
            errors.seek(0)
            said = errors.read().strip().splitlines() or [f"exit code {process.returncode}"]
            raise ValueError(f"{folder} stopped: {said[-1]}")


def commit():
    """The commit of the code, with -dirty if code or the embedded model is not as committed."""
    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "-s", "--", "*.py", "emoji")
        return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")
    except OSError:  # no git here
        return "unknown"


def machine():
    """What a run's minutes were measured on."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    threads = torch.get_num_threads()
    return (f"{os.cpu_count()} cores, {threads} thread{'s' * (threads > 1)}, {platform.machine()}, "
            f"torch {torch.__version__}{gpu}")


# ---- What is printed: a study, the drift, the variance ----

def study(args, common, command):
    """Run what is missing of a study, and report. Returns the table."""
    planned = planned_runs(args, common)
    path = RESULTS / short_name(args.reward) / planned[0].study
    lines = train_missing(planned, path.with_name(path.name + ".jsonl"), args.jobs)
    return report([lines[run.key] for run in planned], args.reward, RUNS, path, command)


def drift(args, common, command):
    """Write results/drift.md, from what the comparisons on compressibility and incompressibility have. Returns its table."""
    found = []
    for reward in ("compressibility", "incompressibility"):
        lines, planned = finished_runs(RESULTS / reward / "main.jsonl"), planned_runs(args, {**common, "reward": reward})
        if missing := [run.name for run in planned if run.key not in lines]:
            raise ValueError(f"{len(missing)} of {len(planned)} runs are not done yet ({missing[0]}): make the comparison on {reward} first")
        found.append([lines[run.key] for run in planned])
    text = without_drift(*found)
    runs.write_text(RESULTS / "drift.md", (
        f"# Compressibility and incompressibility together\n\n`{command}`, from their `main.jsonl`: the mean of a seed's gains "
        "on the two, in percent of the start. If a size falls under both rewards alike, that cancels. What is left is what the "
        f"reward itself did. The last column is what `--stop-below animal=90%` would have left. Intervals are 95 % over the seeds.\n\n{text}\n"))
    return text


def variance(args, common, command):
    """Measure the gradient's variance along the direction of the comparison's first run. Returns the table."""
    folder = RESULTS / short_name(args.reward)
    run = planned_run("main", "ddpo-is", 0, {**common, "algorithm": "ddpo-is"}, QUERIES)
    trained = RUNS / train_missing([run], folder / "main.jsonl")[run.key]["folder"]
    if not (trained / "model").exists():
        raise ValueError(f"the direction is that of {trained}, whose model/ is gone: make it again with "
                         f"{shlex.join(['python', 'train.py', *run.arguments, '--name', trained.name])}")
    return measure_variance(folder, command, trained, {"commit": commit(), "machine": machine()}, **common)


# ---- The command line ----

def parse(argv):
    """The arguments. Raises ValueError where they do not go together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", default="compressibility", help=f"{', '.join(REWARDS)}, or path/to/file.py:function")
    parser.add_argument("--watch", action="append", metavar="NAME", help="as in train.py (default: the preset's)")
    parser.add_argument("--seeds", type=int, help="number of seeds, from 0 up (default: 5; --twins and an ablation: 3)")
    parser.add_argument("--queries", type=int, help=f"reward queries of a run of the comparison or of --twins; they must divide into the epochs "
                        f"of all algorithms (default: {QUERIES}; on a VLM's reward {VLM_QUERIES})")
    parser.add_argument("--prompts", help="a set's name or a text file (default: the preset's)")
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, metavar="NAME",
                        help=f"of the comparison or the sweep: some of {', '.join(ALGORITHMS)} (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="runs to train at a time, which share the cores (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where to train")
    parser.add_argument("--precision", choices=PRECISIONS, help="of the networks (default: the preset's)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--sweep", action="store_true", help="the settings that the preset's were chosen from")
    which.add_argument("--drift", action="store_true", help="the mean gain over both JPEG rewards, in which a common change of the images cancels")
    which.add_argument("--twins", action="store_true", help="DDPO-IS on the embedded model and on its flow-matching twin, with both values of --noise")
    which.add_argument("--ablation", choices=[*ABLATIONS, "variance"], help="one question")
    args = parser.parse_args(argv)
    if args.queries is not None and (args.sweep or args.ablation or args.drift):
        raise ValueError("--queries is for the comparison: a sweep, --drift and each ablation have their own")
    if args.algorithms and (args.ablation or args.twins):
        raise ValueError("--algorithms is for the comparison and the sweep: --twins and each ablation have their own")
    if args.drift and args.reward != "compressibility":
        raise ValueError("--drift takes compressibility and incompressibility together: leave --reward out")
    if args.seeds is not None and (args.sweep or args.ablation == "variance"):
        raise ValueError("--seeds is for the comparison and the other ablations: a sweep and the variance have their own")
    for name in ("seeds", "jobs"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least 1")
    for name in (args.reward, *(() if args.watch == ["none"] else args.watch or ())):
        if name not in REWARDS:
            user_function(name)  # a name that does not exist is refused before anything is written
    args.seeds = args.seeds or (3 if args.ablation or args.twins else 5)
    args.queries = queries_of(args.reward) if args.queries is None else args.queries
    return args


def main(argv=None):
    """The command line. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill is passed on to the run under way, like Ctrl-C
    try:
        args = parse(argv)
        common = {name: getattr(args, name) for name in ("reward", "watch", "prompts", "device", "precision")
                  if getattr(args, name)}
        if args.jobs > 1:  # also what machine() tells
            torch.set_num_threads(max(1, torch.get_num_threads() // args.jobs))
            os.environ["OMP_NUM_THREADS"] = f"{torch.get_num_threads()}"
        work = drift if args.drift else variance if args.ablation == "variance" else study
        print(work(args, common, shlex.join(["python", "studies/compare.py", *argv])))
    except (ValueError, OSError, RewardError, FloatingPointError, torch.OutOfMemoryError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ncompare.py: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
