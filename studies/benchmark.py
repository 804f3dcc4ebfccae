"""What a reward query costs on this machine, and whether the ratio is 1 here: seconds, memory, precision.

    python studies/benchmark.py                                        # the emoji preset
    python studies/benchmark.py --preset paper --model random          # Stable Diffusion v1.4's architecture, no download
    python studies/benchmark.py --preset paper --model random --algorithm rwr --images 256
    python studies/benchmark.py --reward aesthetic pickscore           # what it costs to judge an image, with random weights

For each precision it draws images as train.py does, scores them at other batch sizes than they were drawn at, learns from them,
and prints a row of a table. (Another batch size rounds differently, and under autocast the difference is not small.) `random` makes the
model once, under runs/: its images are noise, but they cost what real ones cost.
"""
import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the method is, if this file is run as a script
from networks import silence_libraries
from settings import ALGORITHMS, PRESETS, build_config, check_compiler

from policy import PRECISIONS
from prompts import load_prompts
from rewards import RewardError, load_reward, load_vlm
from sampling import rollout, score
from studies.random_networks import RANDOM_REWARDS, write_stable_diffusion
from train import RUNS, UPDATES, Experiment, policy_of

# TFLOP at 512 x 512: a guided forward of the U-Net; learning from a step, of all weights (three forwards) and of LoRA, whose
# backward pass needs no gradient of the frozen weights; decoding.
TFLOP_STEP, TFLOP_LEARN, TFLOP_LEARN_LORA, TFLOP_DECODE = 1.606, 4.82, 3.43, 2.5


def benchmark(config, images, passes, micro_batches, peak_tflops):
    """A row of the table: precision, seconds a query and peak GB of sampling and learning, largest |ratio - 1| per micro-batch.

    images: how many. passes: how often RWR and nft learn from an image that was drawn. Raises FloatingPointError or torch.OutOfMemoryError.
    """
    policy = policy_of(config)
    experiment = Experiment(config, policy)
    update, keep_chain = UPDATES[config.algorithm]
    texts = [prompt.text for prompt in (load_prompts(config.prompts) * images)[:images]]

    def draw():
        trajectory = rollout(policy, texts, torch.Generator().manual_seed(0), config.sample_batch, keep_chain)
        policy.decode(trajectory.x_0)
        return trajectory

    def learn(trajectory):
        return update(policy, trajectory, torch.rand(images), experiment.optimizer, experiment.scaler, experiment.rng,
                      config)

    learn(draw())  # to warm up: the first call of each kernel is slower than those of a whole epoch
    trajectory, sampling, memory_sampling = timed(config.device, draw)
    deviations = [ratio_deviation(policy, trajectory, size) for size in micro_batches] if keep_chain else []
    _, learning, memory_learning = timed(config.device, lambda: learn(trajectory))
    # Here whole batches make the passes a little more or less.
    share = 1 if keep_chain else passes * images / (config.updates_per_epoch * config.batch_size)
    cells = [config.precision, f"{sampling / images:.3g}", f"{share * learning / images:.3g}",
             *(f"{gigabytes:.1f}" if gigabytes else "-" for gigabytes in (memory_sampling, memory_learning)),
             *(f"{deviation:.1e}" for deviation in deviations)]
    if peak_tflops and keep_chain:
        query = config.sampling_steps * (TFLOP_STEP + (TFLOP_LEARN_LORA if config.lora_rank else TFLOP_LEARN)) + TFLOP_DECODE
        cells.append(f"{query / peak_tflops / ((sampling + learning) / images):.0%}")
    return cells


@torch.no_grad()
def ratio_deviation(policy, trajectory, micro_batch):
    """Largest |p_theta / p_old - 1| over all recorded steps, under the weights that drew them, scored micro_batch at a time."""
    B, A = trajectory.log_probs.shape
    scored = torch.stack([torch.cat([score(policy, trajectory, part, k)[0] for part in torch.arange(B).split(micro_batch)])
                          for k in range(A)], 1)
    return ((scored - trajectory.log_probs).exp() - 1).abs().max().item()


def benchmark_reward(name, images, side, device):
    """A row of the rewards' table. The network is made in a temporary folder, and loaded as train.py loads it."""
    silence_libraries()
    torch.manual_seed(0)
    prompts = (load_prompts("two_to_eight_animals") * images)[:images]
    with tempfile.TemporaryDirectory() as folder:
        reward = load_reward(name, device, **RANDOM_REWARDS[name](Path(folder)))
    noise = torch.rand(images, 3, side, side, device=device)
    reward(noise[:1], prompts[:1])  # to warm up
    _, seconds, gigabytes = timed(device, lambda: reward(noise, prompts))
    load_vlm.cache_clear()  # else the memory of the next one would include this one's
    return [name, f"{seconds / images:.3g}", f"{gigabytes:.1f}" if gigabytes else "-"]


def timed(device, work):
    """The result of work(), its seconds, and on a GPU its peak memory in GB (else 0)."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    result = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start, torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0


# ---- The command line ----

def parse(argv):
    """The arguments. Raises ValueError where they do not go together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="emoji", help="whose settings (default: emoji)")
    add("--model", help="folder or hub name, or random (default: the preset's)")
    add("--algorithm", choices=ALGORITHMS, default="ddpo-is")
    add("--lora-rank", type=int, help="as in train.py (default: the preset's)")
    add("--gradient-checkpointing", action="store_true", default=None, help="as in train.py")
    add("--compile", action="store_true", default=None, help="as in train.py")
    add("--precision", nargs="+", choices=PRECISIONS, help="default: fp32 on a CPU, all three on a GPU")
    add("--images", type=int, default=16, help="drawn and learned from (default: 16)")
    add("--sample-batch", type=int, help="images drawn at a time (default: the preset's)")
    add("--micro-batch", type=int, help="images learned from at a time (default: the preset's)")
    add("--ratio-batches", type=int, nargs="+", default=[1, 7, 16], help="images scored at a time (default: 1 7 16)")
    add("--peak-tflops", type=float, help="the card's, dense: to print what share of it 512 x 512 images reach")
    add("--reward", nargs="+", choices=RANDOM_REWARDS, help="instead: seconds and memory to judge 512 x 512 images, by networks "
        "of the published sizes with random weights (alignment and counting ask a VLM of 14 GB)")
    args = parser.parse_args(argv)
    for name in ("images", "sample_batch", "micro_batch", "ratio_batches"):
        if getattr(args, name) is not None and np.min(getattr(args, name)) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: must be at least 1")
    if args.peak_tflops and args.preset not in ("paper", "lora"):
        raise ValueError("--peak-tflops goes with --preset paper or lora: its arithmetic is that of 512 x 512 images")
    if "fp16" in (args.precision or ()) and not torch.cuda.is_available():
        raise ValueError("--precision fp16 needs a GPU")
    unread = [name for name in ("model", "precision", "sample_batch", "micro_batch", "peak_tflops", "lora_rank",
                                "gradient_checkpointing", "compile") if getattr(args, name)]
    if args.reward and unread:
        raise ValueError(f"--{unread[0].replace('_', '-')} does not go with --reward, which draws nothing and learns nothing")
    return args


def print_rows(args, device):
    """Print the table, row by row."""
    if args.reward:
        print("| reward | s/image | peak GB |\n|---|---|---|")
        for name in args.reward:
            try:
                cells = benchmark_reward(name, args.images, 512, device)
            except torch.OutOfMemoryError as error:  # the others are measured all the same
                cells = [name, "out of memory", str(error).splitlines()[0]]
            print("| " + " | ".join(cells) + " |", flush=True)
        return
    flags = {name: getattr(args, name) for name in ("preset", "model", "algorithm", "sample_batch", "micro_batch", "lora_rank",
                                                    "gradient_checkpointing", "compile") if getattr(args, name) is not None}
    if args.model == "random":
        flags["model"] = str(RUNS / "random-stable-diffusion")
        if not Path(flags["model"]).exists():
            write_stable_diffusion(Path(flags["model"]))
    config = build_config({**flags, "precision": "fp32"})
    precisions = args.precision or (PRECISIONS if device == "cuda" else ["fp32"])
    for precision in precisions if config.compile else ():
        check_compiler(config.device, precision)
    _, keep_chain = UPDATES[config.algorithm]
    passes = config.updates_per_epoch * config.batch_size / config.samples_per_epoch
    updates = 1 if keep_chain else max(1, round(passes * args.images) // config.batch_size)
    config = replace(config, samples_per_epoch=args.images, updates_per_epoch=updates)
    names = ["precision", "sampling (s/query)", "learning (s/query)", "peak GB sampling", "peak GB learning"]
    names += [f"largest \\|ratio - 1\\| at {size} images" for size in args.ratio_batches] if keep_chain else []
    names += ["share of peak"] if args.peak_tflops and keep_chain else []
    options = [f"LoRA of rank {config.lora_rank}"] * bool(config.lora_rank)
    options += ["gradient checkpointing"] * config.gradient_checkpointing + ["compiled"] * config.compile
    print(", ".join([f"{config.algorithm}, {args.images} images of {config.sampling_steps} steps, drawn {config.sample_batch} and "
                     f"learned from {config.micro_batch} at a time", *options]) + "\n\n| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    for precision in precisions:
        try:
            cells = benchmark(replace(config, precision=precision), args.images, passes, args.ratio_batches, args.peak_tflops)
        except (FloatingPointError, torch.OutOfMemoryError) as error:  # the other precisions are measured all the same
            cells = [precision, str(error).splitlines()[0]]
        print("| " + " | ".join(cells) + " |", flush=True)


def main(argv=None):
    """The command line. Returns the exit code."""
    try:
        print_rows(parse(argv), "cuda" if torch.cuda.is_available() else "cpu")
    except (ValueError, OSError, RewardError) as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
