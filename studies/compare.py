"""Figure 4 of the paper on the toy model: its four algorithms, and nft, at the same number of reward queries.

    python studies/compare.py --reward compressibility          # the comparison: protocol.md
    python studies/compare.py --reward compressibility --sweep  # what its settings are chosen from
    python studies/compare.py --together [--sweep]              # both JPEG rewards' lines in one table
    python studies/compare.py --alignment                       # a VLM's reward
    python studies/compare.py --twins                           # DDPO-IS on a diffusion and on a flow model
    python studies/compare.py --ablation clip-range             # one question; --help names them all

Every run is `python train.py` with the flags that are written down with its numbers: nothing here trains. A
finished run has one line in studies/results/REWARD/STUDY.jsonl. It is not run again, for this or another
study of the reward, unless a setting that it reads, or the model, has changed. A run that was stopped is
resumed. From the lines come a table, STUDY.md, and figures. Other flags, as --precision bf16, go to all runs.
"""
import hashlib
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import fields, replace
from functools import cache, partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the method is, if run as a script
from emoji.preset import HERE as EMOJI
from rewards import unit_of
from studies import command_line
from studies.report import (comparison, config_of, differences, gain_in_time, gain_percent, judged_by,
                            points_gained, queries_to_a_fifth, report, scores)
from support import run_folder
from support.settings import (ALGORITHMS, ROOT, VLM, Config, build_config, facts, parse, saved_settings,
                              short_name)
from train import RUNS

RESULTS = Path(__file__).resolve().parent / "results"
QUERIES, MAIN_QUERIES = 512, 1024  # of the sweep, of the comparison
VLM_QUERIES = 3072                 # for a VLM's reward the preset has larger epochs
JPEG = ("compressibility", "incompressibility")
SWEEP_SEEDS, SEEDS = (100, 101), range(5, 10)  # of the sweep, of the comparison
RANDOM = f"--reward {shlex.quote(str(ROOT / 'studies/noise.py'))}:noise"


# ---- The studies: train.py's flags ----

def watching(*names):
    """The flags that watch functions of the toy model's judge."""
    return " ".join(f"--watch {shlex.quote(str(EMOJI / 'judge.py'))}:{name}" for name in names)


def rounds(count, queries):
    """RWR's flags for so many epochs. Its updates make five passes over the samples, as in the paper."""
    samples = queries // count
    return f"--samples-per-epoch {samples} --batch-size 32 --updates-per-epoch {round(5 * samples / 32)}"


# protocol.md, 1. Of each algorithm a middle setting, five changes of it, and what lies beyond the edge.
SWEEP = {
    "ddpo-is": ("--samples-per-epoch 64 --learning-rate 2e-4 --clip-range 2e-3 --updates-per-epoch 4", [
        "--learning-rate 1e-4", "--learning-rate 4e-4", "--clip-range 1e-3", "--clip-range 4e-3",
        "--updates-per-epoch 8", "--clip-range 8e-3", "--updates-per-epoch 2 --clip-range 4e-3"]),
    "ddpo-sf": ("--samples-per-epoch 16 --learning-rate 1e-4", [
        "--learning-rate 5e-5", "--learning-rate 2e-4", "--samples-per-epoch 8", "--samples-per-epoch 32",
        "--samples-per-epoch 64", "--samples-per-epoch 4 --images-per-prompt 4"]),
    "rwr": (f"{rounds(4, QUERIES)} --learning-rate 1e-4 --beta 120", [
        "--learning-rate 5e-5", "--learning-rate 2e-4", "--beta 60", "--beta 240", rounds(8, QUERIES),
        "--learning-rate 4e-4", f"{rounds(2, QUERIES)} --learning-rate 2e-4"]),
    "rwr-sparse": (f"{rounds(4, QUERIES)} --learning-rate 1e-4 --percentile 0.9", [
        "--learning-rate 5e-5", "--learning-rate 2e-4", "--percentile 0.5", "--percentile 0.75",
        rounds(8, QUERIES), rounds(16, QUERIES)]),
    "nft": (f"{rounds(8, QUERIES)} --learning-rate 1e-4 --nft-strength 1 --training-guidance 3", [
        "--learning-rate 5e-5", "--learning-rate 2e-4", "--nft-strength 0.3", "--training-guidance 1",
        "--training-guidance 1.4", "--nft-strength 0.09", "--nft-strength 0.3 --training-guidance 6.4"])}


# protocol.md, 2. What the images do without a reward.
CONTROLS = {
    **{f"{one}, random numbers":
       f"--algorithm {one} {RANDOM} {watching('animal', 'number')} --watch compressibility"
       for one in ("ddpo-is", "ddpo-sf", "nft")},
    "rwr, weights of 1": "--algorithm rwr --beta 0",
    "rwr-sparse, weights of 1": "--algorithm rwr-sparse --percentile 0"}

# protocol.md, 3. The random numbers' run has what the preset gives to alignment.
ALIGNMENT = {
    "ddpo-is": "--updates-per-epoch 4", "ddpo-sf": "--algorithm ddpo-sf --samples-per-epoch 64",
    "rwr-sparse": "--algorithm rwr-sparse",
    "random numbers": (f"{RANDOM} --watch alignment --prompts two_to_four_animals --sampling-steps 4 "
                       "--guidance-scale 1 --samples-per-epoch 256 --updates-per-epoch 4 --clip-range 2e-3")}
SEEN = ("animal", "number", "animal_and_number")
ALIGNMENT = {label: f"{flags} {watching(*SEEN)} --learning-rate 5e-5 --eval-prompts 270"
             for label, flags in ALIGNMENT.items()}

# Steps learned from, and the queries that then cost as many U-Net passes as 512 with the default's 8 steps.
AS_MANY_PASSES = {1: 1344, 2: 1088, 4: 768}

# One question each, on top of the emoji preset: the number of queries, the curves' labels and the flags
# behind them, some with a number of queries of their own. RWR changes the images without any reward, too:
# percentile 0 and beta 0 show how. A KL penalty is tried where learning rate and clip endanger the images.
ABLATIONS = {
    "guidance": (640, {
        f"{name} training{control}": f"--algorithm rwr-sparse {guided} {flags} {rounds(5, 640)}"
        for control, flags in (("", ""), (", no reward", "--percentile 0"))
        for name, guided in (("guided", "--training-guidance 3"), ("unguided", "--training-guidance 1"))}),
    "kl": (640, {f"KL weight {weight:g}": f"--learning-rate 4e-4 --clip-range 1e-2 --kl-weight {weight}"
                 for weight in (0.0, 0.1, 1.0, 10.0)}),
    "interleaving": (800, {
        f"{n} round{'s' * (n > 1)}{control}": f"--algorithm rwr {flags} {rounds(n, 800)}"
        for control, numbers, flags in (("", (1, 2, 5, 10, 20), ""), (", no reward", (1, 5, 20), "--beta 0"))
        for n in numbers}),
    "estimators": (640, {
        "DDPO-IS, 8 updates of 8 images": "--learning-rate 2e-4 --updates-per-epoch 8",
        **{f"DDPO-SF, an update of {n} images":
           f"--algorithm ddpo-sf --learning-rate 2e-4 --samples-per-epoch {n}" for n in (64, 8)}}),
    "clip-range": (640, {f"clip range {clip:g}": f"--clip-range {clip}" for clip in (5e-4, 2e-3, 1e-2, 1.0)}),
    "learn-steps": (QUERIES, {
        "the first 8 steps": "", "8 of all 10 steps at random": "--skip-last-steps 0 --learn-steps 8",
        **{f"{n} step{'s' * (n > 1)} at random": (f"--learn-steps {n}", own)
           for n, own in AS_MANY_PASSES.items()},
        **{f"the first {n} step{'s' * (n > 1)}": (f"--skip-last-steps {10 - n}", own)
           for n, own in AS_MANY_PASSES.items()}}),
    "sampling-steps": (QUERIES, {
        f"T = {T}": (f"--sampling-steps {T} --skip-last-steps {T // 5} --eval-steps 20", own)
        for T, own in ((5, 1024), (10, 512), (20, 256))}),
    **{study: (queries, {  # protocol.md, 4
        "running statistics": f"{images} --images-per-prompt 1 --stats-buffer 16 --stats-min-count 8",
        "groups of 8": f"{images} --images-per-prompt 8"})
       for study, queries, images in (("groups", 768, "--updates-per-epoch 8"),
                                      ("groups-256", 1536, "--updates-per-epoch 8 --samples-per-epoch 256"))},
    "baseline": (640, {"per prompt": "", "batch": "--baseline batch", "none": "--baseline none"})}

# The same training on the toy model and on its twin, with the two sigmas of --noise.
FLOW = f"--model {shlex.quote(str(EMOJI / 'flow'))}"
TWINS = {"diffusion": "", "flow": FLOW, "flow, cps": f"{FLOW} --noise cps"}


class Run:
    """A planned run of so many queries, evaluated so often. words: train.py's flags but its name.

    key: all that makes its numbers what they are, whatever study it is of. Its line is found by it.
    """

    def __init__(self, study, label, seed, words, queries, evaluations):
        samples = build_config(parse(words, "")).samples_per_epoch
        epochs, over = divmod(queries, samples)
        if over:
            raise ValueError(f"{queries} queries do not divide into epochs of {samples}, as {label} has them")
        self.study, self.label, self.seed = study, label, seed
        every = -(-epochs // evaluations)
        self.words = [*words, *f"--epochs {epochs} --eval-every {every} --seed {seed}".split()]
        self.config = build_config(parse(self.words, ""))
        self.model = hash_of_model(self.config.model)
        self.key = key_of(self.model, seed, self.config)
        title = "".join(c if c.isalnum() or c == "." else " " for c in label).split()
        own = hashlib.sha1(self.key.encode()).hexdigest()[:6]
        self.name = "-".join([study, short_name(self.config.reward), *title, f"seed{seed}", own])
        self.folder = RUNS / self.name


def key_of(model_hash, seed, config):
    return json.dumps([model_hash, seed, settings_of(config)], sort_keys=True)


def settings_of(config):
    """The settings that a line keeps: those behind its numbers, with the guidance weight that they make."""
    config = replace(config, guidance_scale=config.guidance_scale or config.sd_guidance)
    left_out = ("name", "seed", "device", "checkpoint_every", "tracker", "sd_guidance", *facts("speed"))
    read = [item.name for item in fields(Config)
            if config.algorithm in item.metadata.get("read_by", ALGORITHMS) and item.name not in left_out]
    return {name: value for name, value in saved_settings(config).items() if name in read}


@cache
def hash_of_model(model):
    """A hash of the files of a model's folder; of a hub name it is that of no file."""
    files = sorted(path for path in Path(model).glob("*/*") if path.suffix in (".json", ".safetensors"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def planned_runs(args):
    """The runs of the study that is asked for, seed by seed: a study that is cut short has fewer seeds."""
    reward = "alignment" if args.alignment else args.reward
    name, queries, seeds, choices, evaluations = study_of(args, reward)
    runs = []
    for seed, (label, own) in itertools.product(seeds[:args.seeds], choices.items()):
        flags, count = own if isinstance(own, tuple) else (own, queries)
        if args.ablation and "--samples-per-epoch" not in flags:
            flags += " --samples-per-epoch 64"  # into which their queries divide
        words = ["--reward", reward, *args.train, *shlex.split(flags)]
        runs.append(Run(name, label, seed, words, count, evaluations))
    return runs


def study_of(args, reward):
    """Its name, queries, seeds, label -> train.py's flags, and how often a run is evaluated."""
    some = args.algorithms or ALGORITHMS
    if args.sweep:
        return "sweep", QUERIES, SWEEP_SEEDS, {
            f"{one}: {own.replace('--', '') or 'middle'}": f"--algorithm {one} {SWEEP[one][0]} {own}"
            for one in some for own in ("", *SWEEP[one][1])}, 8
    if args.alignment:
        return "controlled", VLM_QUERIES, SEEDS, ALIGNMENT, 4
    if args.twins:
        of_vlm = reward in VLM
        return "twins-3072" if of_vlm else "twins", VLM_QUERIES if of_vlm else QUERIES, range(3), TWINS, 8
    if args.ablation:
        queries, choices = ABLATIONS[args.ablation]
        of_groups = args.ablation.startswith("groups")
        return args.ablation, queries, range(6 if of_groups else 3), choices, 12 if of_groups else 8
    choices = {one: f"--algorithm {one}" for one in some}
    if reward == JPEG[0]:  # of the other the controls are the same runs, with the other sign
        choices |= {label: flags for label, flags in CONTROLS.items() if label.partition(",")[0] in some}
    return "comparison", MAIN_QUERIES, SEEDS, choices, 8


# ---- Running what is missing ----

def train_missing(planned, log, jobs):
    """Train what no study of the reward has yet, `jobs` at a time. Returns the planned runs' lines.

    They are in the log then. ValueError at the end if some runs failed.
    """
    own, training, failed = finished_runs([log]), {}, []
    others = finished_runs(sorted(log.parent.glob("*.jsonl")))
    waiting = [run for run in planned if run.key not in own | others]

    def keep(run, line):
        own[run.key] = {**line, "label": run.label}
        run_folder.append_line(log, own[run.key])

    for run in planned:
        if run.key in others and run.key not in own:
            keep(run, others[run.key])
    try:
        while waiting or training:
            while waiting and len(training) < max(1, jobs):
                run = waiting.pop(0)
                training[run] = start(run)
            time.sleep(0.5)
            for run in [run for run, (process, _) in training.items() if process.poll() is not None]:
                _, made_at = training.pop(run)
                if (run.folder / "model").exists():  # what a run writes last
                    keep(run, line_of(run, made_at))
                else:
                    failed.append(run.name)
                print(f"{run.name} ended; {len(waiting)} wait", file=sys.stderr, flush=True)
    finally:  # an interrupt ends those under way; the same command goes on
        for process, _ in training.values():
            process.terminate()
            process.wait()
    if failed:
        raise ValueError(f"{len(failed)} of {len(planned)} runs failed ({', '.join(failed)}): no report")
    return [own[run.key] for run in planned]


def finished_runs(logs):
    """Run.key -> line, of the JSON lines of studies."""
    lines = [line for log in logs for line in run_folder.read_lines(log)]
    return {key_of(line.get("model"), line["seed"], config_of(line)): line for line in lines
            if {"rows", "seed", "settings"} <= line.keys()}


def start(run):
    """Start train.py, from the start or where it was stopped. Returns the process, and the code's commit."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "-s", "--", "*.py", "emoji")
    made_at = (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")
    words = [*run.words, "--name", run.name]
    if (run.folder / "checkpoint.pt").exists():
        words, made_at = ["--resume", str(run.folder)], f"{made_at} (begun earlier)"
    elif run.folder.exists():  # stopped before there was anything to resume
        shutil.rmtree(run.folder)
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *words], stdout=subprocess.DEVNULL,
                            env={**os.environ, "TQDM_DISABLE": "1"}), made_at


def line_of(run, made_at):
    """The line of a run that is finished."""
    rows = run_folder.read_rows(run.folder)
    minutes = round(run_folder.seconds_of(rows) / 60, 2)
    kept = "epoch reward_queries eval_reward_mean watched reward_mean approx_kl grad_norm loss".split()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores"
    return {"label": run.label, "seed": run.seed, "folder": run.name, "model": run.model, "commit": made_at,
            "command": shlex.join(["python", "train.py", *run.words]).replace(f"{ROOT}/", ""),
            "machine": f"{device}, threads: {torch.get_num_threads()}, torch {torch.__version__}",
            "minutes": minutes, "updates": run.config.epochs * run.config.updates_per_epoch,
            "rows": [{name: row[name] for name in kept} for row in rows], "settings": settings_of(run.config),
            "units": {short_name(name): unit_of(name) for name in run.config.watch}}


# ---- The commands ----

def study(command, args):
    """Run what is missing of a study, and report. Returns the table."""
    unit_of(args.reward)  # a name that does not exist is refused before anything is written
    planned = planned_runs(args)
    reward = planned[0].config.reward
    path = RESULTS / short_name(reward) / planned[0].study
    lines = train_missing(planned, Path(f"{path}.jsonl"), args.jobs)
    text = report([judged_by(line, short_name(reward)) for line in lines], reward, RUNS, path, command)
    if args.alignment:
        figures = {f"{name} (points)": partial(points_gained, name=name) for name in ("alignment", *SEEN)}
        text = differences(lines, "random numbers", figures)
    elif planned[0].study.startswith("groups"):
        text = differences(lines, "running statistics", {
            "queries to a gain of 20 %": queries_to_a_fifth, "gain (%)": gain_percent,
            "in time (%)": gain_in_time})
    else:
        return text
    run_folder.write_text(Path(f"{path}_paired.md"), f"`{command}`, 95 % intervals\n\n{text}\n")
    return text


def together(command, args):
    """Write sweep.md or comparison.md, of the last line of each label and seed under both JPEG rewards."""
    name = "sweep" if args.sweep else "comparison"
    small, large = ({(line["label"], line["seed"]): line for line in run_folder.read_lines(
        RESULTS / reward / f"{name}.jsonl")} for reward in JPEG)
    if args.sweep:
        text = scores([*small.values()], [*large.values()])
    else:
        mirrored = {key: judged_by(line, JPEG[0], -1) for key, line in small.items() if key[0] in CONTROLS}
        sides = [judged_by(line, JPEG[0]) for line in small.values()], [*(mirrored | large).values()]
        text = "\n\n".join(f"## After {queries:,} queries\n\n{comparison(*sides, queries)}"
                           for queries in (QUERIES, MAIN_QUERIES))
    run_folder.write_text(RESULTS / f"{name}.md", f"# Both JPEG rewards: {name}\n\n`{command}`; what the "
                          f"columns are: [the protocol](../protocol.md).\n\n{text}\n")
    return text


def work(args):
    """Do what is asked. Returns the table."""
    if sum(map(bool, (args.sweep, args.alignment, args.twins, args.ablation))) > 1:
        raise ValueError("--sweep, --alignment, --twins and --ablation are studies of their own: give one")
    if args.jobs > 1:  # also what a line tells
        torch.set_num_threads(max(1, torch.get_num_threads() // args.jobs))
        os.environ["OMP_NUM_THREADS"] = f"{torch.get_num_threads()}"
    command = shlex.join(["python", "studies/compare.py", *sys.argv[1:]])
    return (together if args.together else study)(command, args)


def main(argv=None):
    yes = {"action": "store_true"}
    return command_line(
        __doc__, work, argv,
        reward=dict(default="compressibility", help="as in train.py (default: compressibility)"),
        seeds=dict(type=int, help="how many of the study's seeds, from the first (default: all)"),
        algorithms=dict(nargs="+", choices=ALGORITHMS, help="of the comparison or the sweep (default: all)"),
        jobs=dict(type=int, default=1, help="runs to train at a time, which share the cores (default: 1)"),
        sweep=dict(help="the settings that the presets' are chosen from", **yes),
        together=dict(help="no runs: the comparison, or with --sweep the sweep, of both JPEG rewards", **yes),
        alignment=dict(help="a VLM's reward, and random numbers as its control", **yes),
        twins=dict(help="the toy model and its flow-matching twin, with both values of --noise", **yes),
        ablation=dict(choices=ABLATIONS, help="one question"))


if __name__ == "__main__":
    sys.exit(main())
