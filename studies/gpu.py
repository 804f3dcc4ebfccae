"""What this project wants to know of a GPU, in one command of at most ten minutes.

    pip install trl==0.23.1                          # for the comparison with TRL; without it that step fails, and the others do not
    python studies/gpu.py runs/gpu                   # on a machine with a GPU; about 30 GB of disk for networks with random weights
    python studies/gpu.py runs/gpu --dry-run         # the same steps on a CPU, at small sizes, to see that they work

The steps stand in the order of their worth. Each is a command of this project; what it prints goes to STEP.txt in the folder. (The
random networks and the training of the embedded model go to runs/, as always.) A step that finds no time is left out, and one that
takes too long is stopped; the program says so. Put the tables into studies/results/gpu.md, with the card's name and the commit
(about.txt).
"""
import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 10


def steps(dry_run, peak_tflops):
    """(name, script, flags) of each step."""
    benchmark, checkpointing = "studies/benchmark.py", "--gradient-checkpointing"
    if dry_run:
        full, lora, fp16, bf16 = [], ["--lora-rank", "4"], [], []
        images, large, memory = ["--images", "1"], ["--micro-batch", "8"], ["--micro-batch", "1"]
        beside, rewards = ["--images", "8"], ["aesthetic"]
        training = ["--epochs", "1", "--samples-per-epoch", "8", "--eval-prompts", "3"]
    else:
        random = ["--model", "random", *(["--peak-tflops", str(peak_tflops)] if peak_tflops else [])]
        full, lora = ["--preset", "paper", *random], ["--preset", "lora", *random]
        fp16, bf16 = ["--precision", "fp16"], ["--precision", "bf16"]
        images, large, memory = ["--images", "8"], ["--micro-batch", "16"], ["--micro-batch", "1", "4", "16"]
        beside = ["--preset", "paper", "--model", "runs/random-stable-diffusion", "--precision", "fp16", "--images", "8"]
        rewards, training = ["aesthetic", "pickscore", "imagereward", "counting"], []
    yield "all weights", benchmark, [*full, *fp16, *images]
    yield "all weights, large batch", benchmark, [*full, *fp16, *images, *large]
    yield "LoRA, large batch", benchmark, [*lora, *fp16, *images, *large]
    yield "LoRA in 8 GB", benchmark, [*lora, *fp16, *images, checkpointing]
    yield "all weights in 24 GB", benchmark, [*full, *fp16, *images, checkpointing]
    if not dry_run:  # it takes minutes on a CPU
        yield "all weights, large batch, compiled", benchmark, [*full, *fp16, *images, *large, "--compile"]
        yield "LoRA, large batch, compiled", benchmark, [*lora, *fp16, *images, *large, "--compile"]
    yield "beside TRL", "studies/beside_trl.py", beside
    yield "embedded model", "train.py", ["--reward", "compressibility", *training]
    yield "rewards", benchmark, ["--reward", *rewards, *images]
    yield "all weights in bf16", benchmark, [*full, *bf16, *images, *large]
    yield "all weights in fp32", benchmark, [*full, "--precision", "fp32", *images]
    yield "memory", "studies/memory.py", memory


def run_step(script, flags, output, seconds):
    """Run a command with its output in a file, for at most so many seconds. Returns how it ended, in words."""
    with open(output, "w", encoding="utf-8") as file:
        file.write(f"$ python {' '.join([script, *flags])}\n\n")
        file.flush()
        try:
            done = subprocess.run([sys.executable, str(ROOT / script), *flags], stdout=file, stderr=subprocess.STDOUT, timeout=seconds)
        except subprocess.TimeoutExpired:
            return "stopped, since the time was up"
    return "done" if done.returncode == 0 else f"failed with exit code {done.returncode}"


def about():
    """What the figures depend on, in lines."""
    import diffusers
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return f"{card}\ncommit {commit.stdout.strip() or 'unknown'}\ntorch {torch.__version__}, diffusers {diffusers.__version__}\n"


def main(argv=None):
    """The command line. Returns the exit code: 1 if a step failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the folder of the outputs")
    parser.add_argument("--peak-tflops", type=float, help="the card's, dense in half precision (H100 and H200 SXM: 989)")
    parser.add_argument("--dry-run", action="store_true", help="small sizes, for a CPU")
    args = parser.parse_args(argv)
    if not args.dry_run and not torch.cuda.is_available():
        print("gpu.py: torch sees no GPU; --dry-run goes through the steps on a CPU", file=sys.stderr)
        return 2
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "about.txt").write_text(about(), encoding="utf-8")
    except OSError as error:
        print(f"gpu.py: {args.output} cannot hold the outputs: {error}", file=sys.stderr)
        return 2
    end, failed = time.monotonic() + 60 * MINUTES, False
    for name, script, flags in steps(args.dry_run, args.peak_tflops):
        start = time.monotonic()
        output = args.output / f"{name.replace(',', '').replace(' ', '_')}.txt"
        ended = run_step(script, flags, output, end - start) if end - start > 15 else "left out: no time"
        failed |= ended.startswith("failed")
        print(f"{name}: {ended}, {time.monotonic() - start:.0f} s", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
