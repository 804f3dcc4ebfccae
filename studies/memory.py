"""How much GPU memory a model needs here: counted without a GPU, and measured beside it where there is one.

    python studies/memory.py                               # Stable Diffusion v1.4, all weights and LoRA: two minutes on a CPU
    python studies/memory.py --micro-batch 1 4 --sample-batch 4
    python studies/memory.py --models                      # the README's models, LoRA with gradient checkpointing: three minutes
    python studies/memory.py --host                        # the host's memory instead, measured; needs 15 GB of disk

Counted: policy.py, sampling.py and ddpo.py run on fake tensors, which have sizes and no contents, at the real size. The most bytes that
were alive at one time are the peak. Not counted: the CUDA context (about 0.5 GB), workspaces of the kernels, and what the allocator
wastes. Half precision is fp16 on a GPU and bf16 on fake tensors, which has the same size. Text encoders count with their weights alone.

GB are 10^9 bytes. B images, T steps.
"""
import argparse
import contextlib
import sys
import threading
import time
import weakref
from pathlib import Path
from unittest.mock import patch

import diffusers
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the method is, if this file is run as a script
from networks import silence_libraries
from settings import Config, build_config

from ddpo import clipped_loss, ddpo_update
from policy import Policy, add_lora, guidance_options, networks_of, plain_scheduler
from runs import checkpoint_file, load_checkpoint, remove, save_settings
from sampling import Trajectory, rollout
from studies.random_networks import noise_scheduler, stable_diffusion, write_stable_diffusion
from train import RUNS, Experiment, adamw, policy_of

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
        if not torch.is_autocast_enabled("cpu"):  # decoding is outside it
            return norm(*args, **kwargs)
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

def zeros(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16)


def stable_diffusion_3():
    network = diffusers.SD3Transformer2DModel(
        sample_size=128, num_layers=24, attention_head_dim=64, num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536,
        pooled_projection_dim=2048, out_channels=16, pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm")
    return diffusers.StableDiffusion3Pipeline(network, FLOW, kl_vae(16), *[None] * 6)


def sdxl():
    network = diffusers.UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
        up_block_types=(*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"), transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048, use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816)
    made = diffusers.StableDiffusionXLPipeline(kl_vae(4), None, None, None, None, network, plain_scheduler(noise_scheduler()))
    made.text_encoder_2 = torch.nn.Module()  # of which its call asks the width of the pooled state
    made.text_encoder_2.config, made.text_encoder_2.device = type("Config", (), {"projection_dim": 1280}), torch.device("cpu")
    return made


def flux():
    return diffusers.FluxPipeline(DYNAMIC, kl_vae(16), None, None, None, None, diffusers.FluxTransformer2DModel(guidance_embeds=True))


def klein():
    network = diffusers.Flux2Transformer2DModel(num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680,
                                                guidance_embeds=False)
    return diffusers.Flux2KleinPipeline(DYNAMIC, diffusers.AutoencoderKLFlux2(), None, None, network)


def qwen_image():
    vae = diffusers.AutoencoderKLQwenImage(latents_mean=[0.0] * 16, latents_std=[1.0] * 16)
    return diffusers.QwenImagePipeline(DYNAMIC, vae, None, None, diffusers.QwenImageTransformer2DModel())


def z_image():
    return diffusers.ZImagePipeline(FLOW, kl_vae(16), None, None, diffusers.ZImageTransformer2DModel())


def sana():
    return diffusers.SanaPipeline(None, None, diffusers.AutoencoderDC(), diffusers.SanaTransformer2DModel(), FLOW)


def kl_vae(channels):
    return diffusers.AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                                   block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=channels,
                                   shift_factor=0.1)


FLOW = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
DYNAMIC = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
# name: the pipeline at its published size, without text encoders; what its encode_prompt returns of N prompts; billions of weights of
# its text encoders; pixels of a side; other options of its call.
MODELS = {
    "Stable Diffusion 1.5": (stable_diffusion, lambda n: (zeros(n, 77, 768), zeros(n, 77, 768)), 0.12, 512, {}),
    "SDXL": (sdxl, lambda n: (zeros(n, 77, 2048), zeros(n, 77, 2048), zeros(n, 1280), zeros(n, 1280)), 0.82, 1024, {}),
    "Stable Diffusion 3.5 medium": (stable_diffusion_3, lambda n: (zeros(n, 333, 4096), zeros(n, 333, 4096), zeros(n, 2048), zeros(n, 2048)),
                                    5.58, 512, {}),
    "FLUX.1 dev": (flux, lambda n: (zeros(n, 512, 4096), zeros(n, 768), zeros(512, 3)), 4.88, 512, {}),
    "FLUX.2 Klein 4B": (klein, lambda n: (zeros(n, 512, 7680), zeros(n, 512, 4)), 4.02, 512, {}),
    "Qwen-Image": (qwen_image, lambda n: (zeros(n, 128, 3584), None), 8.29, 512, {}),
    "Z-Image": (z_image, lambda n: ([zeros(128, 2560)] * n, [zeros(128, 2560)] * n), 4.02, 512, {}),
    "Sana 1.6B": (sana, lambda n: (zeros(n, 300, 2304), torch.ones(n, 300), zeros(n, 300, 2304), torch.ones(n, 300)), 2.61, 512,
                  {"use_resolution_binning": False})}


def epoch(name, config, checkpointing, sample_batch, micro_batches):
    """The generator function of an epoch's parts, for a model of MODELS and a run's settings. It yields the name of a part after it."""
    make, encoding, encoders, side, options = MODELS[name]
    steps = 3  # they need as much memory as all, but for the chain

    def work(device, precision):
        pipeline, half = make(), torch.float16 if precision == "fp16" else torch.bfloat16
        for part, network in networks_of(pipeline).items():
            kept = part == "vae" and network.config.get("force_upcast") or part in ("unet", "transformer") and not config.lora_rank
            network.eval().requires_grad_(False).to(device, *[] if kept else [half])
        resident = torch.zeros(int(encoders * 1e9), dtype=half, device=device)
        pipeline.encode_prompt = lambda *args, **kwargs: tree_map(
            lambda value: value.to(device) if isinstance(value, torch.Tensor) else value, encoding(len(args[0] if args else kwargs["prompt"])))
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = plain_scheduler(pipeline.scheduler)
        pixels = {"height": side, "width": side}
        if config.lora_rank:
            add_lora(pipeline, config.lora_rank, config.lora_rank, 0)
        policy = Policy(pipeline, {**guidance_options(pipeline, 5.0 if name.startswith("Stable Diffusion 1") else 0), **pixels, **options},
                        precision).with_chain(steps, 1.0)
        if not config.lora_rank:
            policy.denoiser.requires_grad_(True)
        if checkpointing:
            policy.denoiser.enable_gradient_checkpointing()
        prompts = tuple(f"animal {k}" for k in range(config.samples_per_epoch))
        chains = torch.zeros(len(prompts), config.sampling_steps + 1, *policy.latent_shape, device=device)
        optimizer, scaler = adamw(policy, config), torch.amp.GradScaler(device, enabled=False)

        def learn(micro_batch):
            n = max(2, micro_batch)  # two calls: gradients add up
            some = Trajectory(chains[:n, :steps + 1], torch.zeros(n, policy.schedule.actions, device=device), prompts[:n])
            config.micro_batch, config.updates_per_epoch, config.skip_last_steps, config.learn_steps = micro_batch, 1, 1, 2
            ddpo_update(policy, some, torch.ones(n), optimizer, scaler, torch.Generator(), config, clipped_loss)

        learn(1)
        yield "the first update"  # it makes the optimizer's moments, which stay
        rollout(policy, list(prompts[:sample_batch]), torch.Generator(), sample_batch, keep_chain=False)
        yield "sampling"
        height, width = policy.image_size
        images = torch.zeros(config.samples_per_epoch, 3, height, width, device=device)
        policy.decode(chains[:8, 0])
        del images
        yield "decoding"
        for micro_batch in micro_batches:
            learn(micro_batch)
            yield f"learning, micro-batch {micro_batch}"
        del resident

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
            work = epoch("Stable Diffusion 1.5", build_config({"preset": preset, "precision": "bf16", "device": "cpu"}), checkpointing,
                         sample_batch, micro_batches)
            count, measure = counted(work), measured(work)
            for part, gigabytes in count.items():
                if part != "the first update" and ("learning" in part or not checkpointing):  # checkpointing changes learning alone
                    yield [trains, "yes" if checkpointing else "no", part, f"{gigabytes:.1f}",
                           f"{measure[part]:.1f}" if part in measure else "-"]


def model_rows():
    """Another table's rows: model, pixels, GB of the text encoders alone, GB counted of sampling, decoding and learning, and the most."""
    for name, (_, _, encoders, side, _) in MODELS.items():
        preset = {"Stable Diffusion 1.5": "lora", "SDXL": "sdxl"}.get(name, "flow")
        config = build_config({"preset": preset, "precision": "bf16", "device": "cpu"})
        count = counted(epoch(name, config, True, min(config.sample_batch, 8), [1]))
        parts = [count[part] for part in ("sampling", "decoding", "learning, micro-batch 1")]
        yield [name, f"{side} x {side}", f"{2 * encoders:.1f}", *(f"{gigabytes:.1f}" for gigabytes in parts), f"**{max(parts):.0f}**"]


def main(argv=None):
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample-batch", type=int, default=Config.sample_batch, help="images drawn at a time (default: 16)")
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[1, 2, 4], help="images learned from at a time (default: 1 2 4)")
    parser.add_argument("--models", action="store_true", help="count the README's models instead, in bf16, with the settings of their presets")
    parser.add_argument("--host", action="store_true", help="measure the host's memory instead")
    args = parser.parse_args(argv)
    silence_libraries()
    if args.host:
        print("| all weights, on the host | peak GB beside files |\n|---|---|")
        for part, gigabytes in host_rows():
            print(f"| {part} | {gigabytes:.1f} |", flush=True)
        return 0
    if args.models:
        print("| model | pixels | text encoders | sampling | decoding | learning | most |\n|---|---|---|---|---|---|---|")
        for row in model_rows():
            print("| " + " | ".join(row) + " |", flush=True)
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
