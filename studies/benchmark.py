"""What a reward query costs on this machine, and whether the ratio is 1 here: seconds, memory, precision.

    python studies/benchmark.py                                # the emoji preset
    python studies/benchmark.py --preset paper --model random  # Stable Diffusion v1.4's size, no download
    python studies/benchmark.py --preset paper --model random --algorithm rwr --images 256

For each precision it draws images as train.py does, scores them at other batch sizes than they were drawn at,
learns from them, and prints a row of a table. (Another batch size rounds differently, and under autocast the
difference is not small.) `random` makes the model once, under runs/: its images are noise, but they cost what
real ones cost. Other flags are train.py's.
"""
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the method is, if run as a script
from ddpo import Learner
from policy import load_policy
from prompts import load_prompts
from sampling import rollout, score
from studies import command_line
from studies.random_networks import stable_diffusion
from support.loading import PRECISIONS
from support.run_folder import write_atomically
from support.settings import build_config
from train import ALGORITHMS, RUNS


def benchmark(config, images, args):
    """A row of the table. One update is measured, of RWR and nft on as many images as it has."""
    policy, rng = load_policy(config), torch.Generator().manual_seed(0)
    learner, (_, update, keep_chain) = Learner(policy, config), ALGORITHMS[config.algorithm]
    texts = [prompt.text for prompt in (load_prompts(config.prompts) * images)[:images]]
    # Of learning, an image of an epoch costs so many images of the update that is measured.
    share = 1 / images if keep_chain else config.updates_per_epoch / config.samples_per_epoch
    once = replace(config, updates_per_epoch=1)

    def draw():
        trajectory = rollout(policy, texts, rng, config.sample_batch, keep_chain)
        policy.decode(trajectory.x_0)
        return trajectory

    def learn():
        return update(policy, trajectory, torch.rand(images), learner, rng, once)

    trajectory = draw()
    learn()  # to warm up: the first call of each kernel is slower than those of a whole epoch
    trajectory, sampling, memory_sampling = timed(policy.device, draw)
    deviations = [ratio_deviation(policy, trajectory, size) for size in args.ratio_batches if keep_chain]
    _, learning, memory_learning = timed(policy.device, learn)
    sampling, learning = sampling / images, share * learning
    return [config.precision, f"{sampling:.3g}", f"{learning:.3g}",
            *(f"{gigabytes:.1f}" if gigabytes else "-" for gigabytes in (memory_sampling, memory_learning)),
            *(f"{deviation:.1e}" for deviation in deviations)]


@torch.no_grad()
def ratio_deviation(policy, trajectory, batch):
    """Largest |p_theta / p_old - 1| over all recorded steps, under the weights that drew them."""
    B, A = trajectory.log_probs.shape
    parts, steps = torch.arange(B).split(batch), range(A)
    scored = [torch.cat([score(policy, trajectory, part, k)[0] for part in parts]) for k in steps]
    return ((torch.stack(scored, 1) - trajectory.log_probs).exp() - 1).abs().max().item()


def timed(device, work):
    """The result of work(), its seconds, and on a GPU its peak memory in GB (else 0)."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start, result = time.perf_counter(), work()
    if on_gpu:
        torch.cuda.synchronize()
    return result, time.perf_counter() - start, torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0


def print_rows(args):
    """Print the table, row by row."""
    if args.flags.get("model") == "random":
        folder = RUNS / "random-stable-diffusion"
        args.flags["model"] = str(folder)
        if not folder.exists():
            write_atomically(folder, stable_diffusion().save_pretrained)
    precisions = args.precision or (PRECISIONS if torch.cuda.is_available() else ["fp32"])
    configs = [build_config({**args.flags, "precision": precision}) for precision in precisions]
    c, head = configs[0], ["precision", "sampling (s/query)", "learning (s/query)", "peak GB sampling",
                           "peak GB learning"]
    if ALGORITHMS[c.algorithm][2]:
        head += [f"largest \\|ratio - 1\\| at {size} images" for size in args.ratio_batches]
    print(f"{c.algorithm}, {args.images} images of {c.sampling_steps} steps, drawn {c.sample_batch} and "
          f"learned from {c.micro_batch} at a time\n\n| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for config in configs:
        try:
            cells = benchmark(config, args.images, args)
        except torch.OutOfMemoryError:  # the other precisions are measured all the same
            cells = [config.precision, "out of memory"]
        print("| " + " | ".join(cells) + " |", flush=True)


def main(argv=None):
    return command_line(
        __doc__, print_rows, argv,
        precision=dict(nargs="+", choices=PRECISIONS, help="some of them (default: fp32; on a GPU all)"),
        images=dict(type=int, default=16, help="drawn and learned from (default: 16)"),
        ratio_batches=dict(type=int, nargs="+", default=[1, 7, 16], help="images scored at a time"))


if __name__ == "__main__":
    sys.exit(main())
