"""How much GPU memory a model needs here, in GB (10^9 bytes), counted without a GPU.

    python studies/memory.py             # Stable Diffusion v1.4, all weights and LoRA: minutes on a CPU
    python studies/memory.py --models    # the README's models, LoRA with gradient checkpointing: 20 minutes

policy.py, sampling.py and ddpo.py run on fake tensors, which have sizes and no contents, at the real size.
The most bytes that were alive at one time are the peak. Not counted: the CUDA context (about 0.5 GB),
workspaces of the kernels, and what the allocator wastes. Half precision is fp16 on a GPU and bf16 here, which
has the same size. Text encoders count with their weights alone.
"""
import inspect
import sys
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import diffusers
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the method is, if run as a script
from ddpo import Learner, clipped_loss, ddpo_update
from sampling import Trajectory, rollout
from studies import command_line
from studies.random_networks import noise_scheduler, stable_diffusion
from support.loading import networks_of, plain_scheduler
from support.networks import silence_libraries
from support.settings import build_config
from train import policy_of


class Counter(TorchDispatchMode):
    """Counts the bytes of the storages that are made under it: `now` alive, and `peak`."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.alive = 0, 0, {}  # alive: storage -> its bytes

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._local_scalar_dense.default:
            return 1  # a fake tensor has no value; as a flag this one says that all is finite
        result = operation(*args, **(kwargs or {}))
        for storage in [leaf.untyped_storage() for leaf in tree_leaves(result) if torch.is_tensor(leaf)]:
            if storage._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata)
        return result

    def free(self, key):
        self.now -= self.alive.pop(key)


def in_fp32(norm):
    """A norm as autocast computes it on a GPU, but not on a CPU: in fp32. (Decoding is outside autocast.)"""
    def like_cuda(*args, **options):
        if torch.is_autocast_enabled("cpu"):
            args, options = tree_map(lambda x: x.float() if torch.is_tensor(x) else x, (args, options))
        with torch.autocast("cpu", enabled=False):
            return norm(*args, **options)

    return like_cuda


@patch.object(F, "group_norm", in_fp32(F.group_norm))
@patch.object(F, "layer_norm", in_fp32(F.layer_norm))
# Module.to swaps tensors, which torch refuses for a fake tensor.
@patch("torch.utils.swap_tensors", lambda parameter, converted: setattr(parameter, "data", converted.data))
def counted(name, config, micro_batches):
    """GB at the peak of sampling, decoding, and learning at each micro-batch, of a model and settings."""
    make, *parts, encoding, encoders = MODELS[name]
    B, T, n = config.samples_per_epoch, config.sampling_steps, config.sample_batch
    # 3 steps need as much memory as all, but for the chains.
    config = replace(config, sampling_steps=3, updates_per_epoch=1, skip_last_steps=1, learn_steps=2)
    with FakeTensorMode(allow_non_fake_inputs=True), Counter() as counter:
        pipeline, _resident = make(*parts), half(int(encoders * 1e9))
        for part, network in networks_of(pipeline).items():
            trains = part in ("unet", "transformer") and not config.lora_rank
            is_fp32 = trains or part == "vae" and network.config.get("force_upcast")
            network.eval().requires_grad_(False).to(torch.float32 if is_fp32 else torch.bfloat16)
        pipeline.encode_prompt = lambda *args, **named: encoding(len(args[0] if args else named["prompt"]))
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = plain_scheduler(pipeline.scheduler)
        with patch("policy.load_pipeline", lambda *_, **__: pipeline), patch("policy.refuse_other_steps"):
            policy = policy_of(config)
        learner, chains = Learner(policy, config), torch.zeros(B, T + 1, *policy.latent_shape)

        def decode():
            return torch.zeros(B, 3, *policy.image_size), policy.decode(chains[:8, 0])

        def learn(size):
            n, learner.micro_batch = max(2, size), size  # two steps: gradients add up
            some = Trajectory(chains[:n, :4], torch.zeros(n, policy.schedule.actions), ("a cat",) * n)
            ddpo_update(policy, some, torch.ones(n), learner, torch.Generator(), config, clipped_loss)

        learn(1)  # it makes the optimizer's moments, which stay
        peaks, sample = [], partial(rollout, policy, ["a cat"] * n, torch.Generator(), n, keep_chain=False)
        for work in (sample, decode, *(partial(learn, size) for size in micro_batches)):
            counter.peak = counter.now
            work()
            peaks.append(counter.peak / 1e9)
    return peaks


def half(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16)


def kl_vae(channels=16):
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=channels,
        shift_factor=0.1)


def pipeline_of(kind, denoiser, vae, scheduler, sizes):
    """A pipeline of the class `kind` of diffusers, and with a network of the class `denoiser`."""
    arguments = inspect.signature(getattr(diffusers, kind)).parameters
    parts = {part: None for part in arguments if arguments[part].default is inspect.Parameter.empty}
    name = "unet" if "unet" in parts else "transformer"
    parts |= {name: getattr(diffusers, denoiser)(**sizes), "vae": vae(), "scheduler": scheduler}
    pipeline = getattr(diffusers, kind)(**parts)
    if name == "unet":  # SDXL's call asks the width of the pooled state
        encoder = pipeline.text_encoder_2 = torch.nn.Module()
        encoder.config, encoder.device = SimpleNamespace(projection_dim=1280), torch.device("cpu")
    return pipeline


PNDM, FLOW = noise_scheduler(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
SHIFTED = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
# The published sizes. name: what makes the pipeline; what its encode_prompt returns of n prompts; billions of
# weights of its text encoders.
MODELS = {
    "Stable Diffusion v1.4": (stable_diffusion, lambda n: (half(n, 77, 768),) * 2, 0),  # it has its encoder
    "SDXL": (
        pipeline_of, "StableDiffusionXLPipeline", "UNet2DConditionModel", partial(kl_vae, 4), PNDM,
        dict(sample_size=128, block_out_channels=(320, 640, 1280), attention_head_dim=(5, 10, 20),
             down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 2), use_linear_projection=True,
             up_block_types=(*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"), addition_embed_type="text_time",
             transformer_layers_per_block=(1, 2, 10), cross_attention_dim=2048, addition_time_embed_dim=256,
             projection_class_embeddings_input_dim=2816),
        lambda n: (*[half(n, 77, 2048)] * 2, *[half(n, 1280)] * 2), 0.82),
    "Stable Diffusion 3.5 medium": (
        pipeline_of, "StableDiffusion3Pipeline", "SD3Transformer2DModel", kl_vae, FLOW,
        dict(sample_size=128, num_layers=24, attention_head_dim=64, num_attention_heads=24, out_channels=16,
             joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
             pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"),
        lambda n: (*[half(n, 333, 4096)] * 2, *[half(n, 2048)] * 2), 5.58),
    "FLUX.1 dev": (
        pipeline_of, "FluxPipeline", "FluxTransformer2DModel", kl_vae, SHIFTED, dict(guidance_embeds=True),
        lambda n: (half(n, 512, 4096), half(n, 768), half(512, 3)), 4.88),
    "FLUX.2 Klein 4B": (
        pipeline_of, "Flux2KleinPipeline", "Flux2Transformer2DModel", diffusers.AutoencoderKLFlux2, SHIFTED,
        dict(num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680,
             guidance_embeds=False), lambda n: (half(n, 512, 7680), half(n, 512, 4)), 4.02),
    "Qwen-Image": (
        pipeline_of, "QwenImagePipeline", "QwenImageTransformer2DModel", partial(
            diffusers.AutoencoderKLQwenImage, latents_mean=[0.0] * 16, latents_std=[1.0] * 16), SHIFTED, {},
        lambda n: (half(n, 128, 3584), None), 8.29),
    "Z-Image": (pipeline_of, "ZImagePipeline", "ZImageTransformer2DModel", kl_vae, FLOW, {},
                lambda n: ([half(128, 2560)] * n,) * 2, 4.02),
    "Sana 1.6B": (
        pipeline_of, "SanaPipeline", "SanaTransformer2DModel", diffusers.AutoencoderDC, FLOW, {},
        lambda n: (half(n, 300, 2304), torch.ones(n, 300)) * 2, 2.61)}


def print_rows(args):
    """Print the table, row by row."""
    silence_libraries()
    first = "Stable Diffusion v1.4"
    rows = [(first, preset, again) for preset in ("paper", "lora") for again in (False, True)]
    if args.models:
        presets = ["lora", "sdxl", *["flow"] * (len(MODELS) - 2)]
        rows = [(name, preset, True) for name, preset in zip(MODELS, presets)]
    head = ["model", "preset", "gradient checkpointing", "sampling", "decoding"]
    head += [f"learning from {size}" for size in args.learning]
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for name, preset, again in rows:
        call = {"call": '{"use_resolution_binning": false}'} if name.startswith("Sana") else {}
        config = build_config({"preset": preset, "precision": "bf16", "device": "cpu",
                               "gradient_checkpointing": again, **call, **args.flags})
        cells = [f"{peak:.1f}" for peak in counted(name, config, args.learning)]
        print(f"| {name} | {preset} | {again} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    sys.exit(command_line(
        __doc__, print_rows, None,
        models=dict(action="store_true", help="count the README's models, with their presets"),
        learning=dict(type=int, nargs="+", default=[1, 2, 4], help="micro-batches: a column each")))
