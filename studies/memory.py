"""How much GPU memory Stable Diffusion v1.4 needs here: counted without a GPU, and measured beside it where there is one.

    python studies/memory.py                               # the table: two minutes on a CPU
    python studies/memory.py --micro-batch 1 4 --sample-batch 4
    python studies/memory.py --host                        # the host's memory instead, measured; needs 15 GB of disk

Counted: train.py's own functions run on fake tensors, which have sizes and no contents, at the real size. The most bytes that were
alive at one time are the peak. Not counted: the CUDA context (about 0.5 GB), workspaces of the kernels, and what the allocator
wastes. Half precision is fp16 on a GPU and bf16 on fake tensors, which has the same size.

GB are 10^9 bytes. B images, T steps.
"""
import argparse
import contextlib
import sys
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the method is, if this file is run as a script
from ddpo import accumulate, clipped_loss, optimizer_step, surrogate
from models import decode, image_size, latent_shape, networks_of
from networks import silence_libraries
from runs import checkpoint_file, load_checkpoint, remove, save_settings
from sampling import Policy, Trajectory, as_policy, draw_chains
from schedules import chain_schedule
from settings import Config, build_config
from studies.random_networks import noise_scheduler, stable_diffusion, write_stable_diffusion
from train import RUNS, Experiment, adamw, policy_of

SILENT = SimpleNamespace(update=lambda n=1: None)  # a progress bar
WITH_GPU = torch.cuda.is_available()


# ---- Counting ----

class Counter(TorchDispatchMode):
    """Counts the bytes of the storages that are made under it: `now` alive, and `peak`."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.alive = {}  # storage -> its bytes

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._local_scalar_dense.default:
            return 1  # a fake tensor has no value; as a flag this one says that all is finite
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage):
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, key)

    def free(self, key):
        self.now -= self.alive.pop(key)


def in_fp32(norm):
    """A norm as autocast computes it on a GPU, but not on a CPU: in fp32."""
    def like_cuda(*args, **kwargs):
        args, kwargs = tree_map(lambda value: value.float() if isinstance(value, torch.Tensor) else value, (args, kwargs))
        with torch.autocast("cpu", enabled=False):
            return norm(*args, **kwargs)

    return like_cuda


def counted(work):
    """GB at the peak of each step of the generator work(), run on fake tensors on the CPU: name -> GB."""
    def convert(parameter, converted):  # Module.to swaps tensors, which torch refuses for a fake tensor
        parameter.data = converted.data

    peaks = {}
    with patch("torch.utils.swap_tensors", convert), patch.object(F, "group_norm", in_fp32(F.group_norm)), \
            patch.object(F, "layer_norm", in_fp32(F.layer_norm)), \
            FakeTensorMode(allow_non_fake_inputs=True), Counter() as counter:
        for name in work("cpu", "bf16"):
            peaks[name] = max(counter.peak / 1e9, peaks.get(name, 0))
            counter.peak = counter.now
    return peaks


def measured(work):
    """The same on this machine's GPU. {} if it has none; a step that does not fit is missing, and so are those after it."""
    peaks = {}
    if WITH_GPU:
        with contextlib.suppress(torch.OutOfMemoryError):
            for name in work("cuda", "fp16"):
                peaks[name] = max(torch.cuda.max_memory_allocated() / 1e9, peaks.get(name, 0))
                torch.cuda.reset_peak_memory_stats()
        torch.cuda.empty_cache()
    return peaks


# ---- What is counted ----

def epoch(preset, checkpointing, sample_batch, micro_batches):
    """The generator function of an epoch's parts under a preset's settings. It yields the name of a part after it."""
    steps = 2  # they need as much memory as all, but for the chain
    scheduler = DDIMScheduler.from_config(noise_scheduler().config, clip_sample=False)
    schedules = {device: chain_schedule(scheduler, steps, Config.eta, device) for device in ("cpu", *["cuda"] * WITH_GPU)}

    def work(device, precision):
        config, schedule = build_config({"preset": preset, "precision": precision, "device": device}), schedules[device]
        B, T = config.samples_per_epoch, config.sampling_steps
        pipeline = stable_diffusion().to(device)
        for network in networks_of(pipeline):
            network.eval().requires_grad_(False)
        policy = as_policy(Policy(pipeline, schedule, config.guidance_scale, precision), lora_rank=config.lora_rank,
                           gradient_checkpointing=checkpointing)
        texts = [f"animal {k}" for k in range(B)]
        latents, log_probs = (torch.zeros(shape, device=device) for shape in ((B, T + 1, *latent_shape(pipeline)), (B, T)))
        trajectory = Trajectory(latents[:, :steps + 1], log_probs[:, :steps], schedule.timesteps, tuple(texts))
        optimizer, scaler = adamw(policy, config), torch.amp.GradScaler(device, enabled=False)
        advantages = torch.ones(B, device=device)

        def learn(micro_batch):
            pairs = torch.cartesian_prod(torch.arange(micro_batch), torch.arange(steps))  # two parts: gradients add up
            accumulate(pairs, micro_batch, lambda part: surrogate(
                policy, trajectory, advantages, part, clipped_loss, config), scaler, SILENT)
            optimizer_step(policy.denoiser, optimizer, scaler, config.max_grad_norm)

        learn(1)
        yield "the first update"  # it makes the optimizer's moments, which stay
        batch = slice(0, sample_batch)
        with torch.no_grad():
            draw_chains(policy, texts[batch], [None] * sample_batch, trajectory.latents[batch], trajectory.log_probs[batch], SILENT)
        yield "sampling"
        images = torch.zeros(B - 4, 3, *image_size(pipeline), device=device)  # all but those that are decoded here
        decode(pipeline, trajectory.x_0[:4], precision)
        del images
        yield "decoding"
        for micro_batch in micro_batches:
            learn(micro_batch)
            yield f"learning, micro-batch {micro_batch}"

    return work


# ---- The host's memory ----

def host_rows():
    """Rows of another table: GB that this process holds beside files, at the peak of loading, saving and resuming all weights.

    On a CPU the weights that are loaded, and their moments, are in it. With a GPU they are there.
    """
    model, folder = RUNS / "random-stable-diffusion", RUNS / "memory-of-the-host"
    if not model.exists():
        write_stable_diffusion(model)
    config = build_config({"preset": "paper", "precision": "fp32", "model": str(model), "name": folder.name})
    with peak_of_host() as peak:
        experiment = Experiment(config, policy_of(config))
        yield "loading the pipeline", peak()
        for weight in experiment.policy.trained.values():
            experiment.optimizer.state[weight] = {"step": torch.ones(()), "exp_avg": torch.rand_like(weight),
                                                  "exp_avg_sq": torch.rand_like(weight)}
        yield "with the optimizer's moments", peak()
        experiment.folder, experiment.settings = folder, {}
        folder.mkdir(exist_ok=True)
        try:
            save_settings(folder, {})
            experiment.save()
            yield f"saving {checkpoint_file(folder).stat().st_size / 1e9:.1f} GB", peak()
            experiment.load_state_dict(load_checkpoint(folder))
            yield "resuming", peak()
        finally:
            remove(folder)


@contextlib.contextmanager
def peak_of_host():
    """The context in which a function tells the most GB that this process held since its last call. (Linux)"""
    def watch():
        while not ended.wait(0.02):
            line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
            seen.append(int(line.split()[1]) * 1024 / 1e9)

    def peak():
        time.sleep(0.1)
        most = max(seen)
        seen.clear()
        return most

    seen, ended = [], threading.Event()
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield peak
    finally:
        ended.set()


# ---- The command line ----

def rows(sample_batch, micro_batches):
    """The table's rows, one by one: what trains, gradient checkpointing, part of the epoch, GB counted, GB measured."""
    for preset, trains in (("paper", "all weights"), ("lora", "LoRA, rank 4")):
        for checkpointing in (False, True):
            work = epoch(preset, checkpointing, sample_batch, micro_batches)
            count, measure = counted(work), measured(work)
            for part, gigabytes in count.items():
                if part != "the first update" and ("learning" in part or not checkpointing):  # checkpointing changes learning alone
                    yield [trains, "yes" if checkpointing else "no", part, f"{gigabytes:.1f}",
                           f"{measure[part]:.1f}" if part in measure else "-"]


def main(argv=None):
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample-batch", type=int, default=Config.sample_batch, help="images drawn at a time (default: 16)")
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[1, 2, 4], help="pairs learned from at a time (default: 1 2 4)")
    parser.add_argument("--host", action="store_true", help="measure the host's memory instead")
    args = parser.parse_args(argv)
    silence_libraries()
    if args.host:
        print("| all weights, on the host | peak GB beside files |\n|---|---|")
        for part, gigabytes in host_rows():
            print(f"| {part} | {gigabytes:.1f} |", flush=True)
        return 0
    if min(args.sample_batch, *args.micro_batch) < 1 or max(args.sample_batch, *args.micro_batch) > Config.samples_per_epoch:
        print(f"memory.py: batches must be from 1 to {Config.samples_per_epoch}, the images of an epoch", file=sys.stderr)
        return 2
    where = torch.cuda.get_device_name() if WITH_GPU else "no GPU here"
    print(f"Stable Diffusion v1.4, 512 x 512 pixels, half precision, {args.sample_batch} images drawn at a time\n\n"
          f"| what trains | gradient checkpointing | part of an epoch | GB, counted | GB, measured ({where}) |\n|---|---|---|---|---|")
    for row in rows(args.sample_batch, args.micro_batch):
        print("| " + " | ".join(row) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
