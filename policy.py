"""The policy: a text-to-image pipeline of diffusers, whose own call predicts and decodes.

The `__call__` of each such pipeline encodes the prompts, prepares the latents, sets the timesteps, then for
each timestep makes a guided prediction and hands it to `scheduler.step`, then decodes. One call, with a
stand-in for its scheduler (a tap), gives all that we need:

    the guided prediction for x_t at t    one timestep in the chain: prepare_latents hands in x_t, and the
                                          tap keeps what its step gets
    the image of x_0                      no timestep in the chain: prepare_latents hands in x_0
    the chain: T timesteps, a and b       what the pipeline itself set in the tap, shifts included

So an architecture costs no code here. `_call` and `tapped` read diffusers' internals, which are pinned.

N images that go through the network together. Latents (N, D...) are as the scheduler sees them.
"""
import contextlib
import copy
import functools
import inspect

import torch
from torch.utils._pytree import tree_leaves

from sampling import make_schedule, mean_sigma
from support import processes
from support.loading import (PRECISIONS, add_lora, denoiser_of, is_lora, load_lora, load_pipeline,
                             networks_of)
from support.networks import one_line_errors
from support.schedulers import chain_levels, training_levels
from support.settings import call_options

KEPT_NUMBERS = 2**27  # of results of encode_prompt: half a GB in fp32. More are dropped, all at once
PROBE = "a photo"  # a prompt for calls whose image nobody looks at
# Their prediction depends on timestep, latent and prompts alone: tests/test_policy.py. Any other is tried.
TESTED = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline",
          "Flux2KleinPipeline", "QwenImagePipeline", "ZImagePipeline", "SanaPipeline", "PixArtSigmaPipeline")


class Policy:
    """A pipeline with a chain to draw. Only weights of its denoiser train: all, or LoRA's.

    pipeline: as load_pipeline returns it. options: of its call. precision: of the denoiser's autocast;
    trained weights, latents and the step's arithmetic are fp32. schedule: a sampling.Schedule. reference: the
    weights of the pretrained policy, for a penalty on the KL to it. training_levels: see the function.
    latent_shape: D... of a latent. image_size: [height, width] in pixels.
    """

    def __init__(self, pipeline, options, precision="fp32"):
        self.pipeline, self.options, self.precision, self.reference = pipeline, options, precision, None
        self.denoiser, self.encode_prompt = denoiser_of(pipeline), remembered_encoding(pipeline)
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
        """The same policy, network and all, with a chain of that many steps: see sampling.make_schedule."""
        policy, name = copy.copy(self), type(self.pipeline).__name__
        policy.steps = steps
        with one_line_errors(f"the call of a {name} with a text alone and the options", self.options):
            tap, _ = policy._call([PROBE], timesteps=[])
        policy.latent_shape = tap.latents.shape[1:]
        image = policy.decode_with_gradient(torch.zeros(1, *policy.latent_shape, device=self.device))
        _, channels, *policy.image_size = image.shape
        if channels != 3 or len(policy.image_size) != 2:
            raise ValueError(f"a {name} draws no image of three colours")
        policy.decode_batch = min(8, max(1, 2**19 // (image.shape[2] * image.shape[3])))  # two of 512 x 512
        timesteps, scheduler = tap.chain, self.pipeline.scheduler
        if len(timesteps) != steps:  # diffusers' "trailing" rounds so for a few numbers, such as 61
            raise ValueError(f"{steps} sampling steps: diffusers makes {len(timesteps)}; take another number")
        kind, *levels = training_levels(scheduler, tap.mu)
        policy.schedule = make_schedule(timesteps, *chain_levels(tap, timesteps), kind, eta, noise, scored)
        policy.training_levels = [values.to(self.device) for values in levels]
        return policy

    def with_guidance(self, scale):
        """The same policy with another guidance weight."""
        policy, name = copy.copy(self), guidance_name(self.pipeline)
        policy.options = {**guidance_options(self.pipeline, scale), **self.options, name: scale}
        policy.__dict__.pop("copies_of_timesteps", None)
        return policy

    # ---- Predicting and decoding, by the pipeline's own call ----

    def predict(self, x_t, t, prompts):
        """The denoiser's prediction, guided as the pipeline guides it (Ho and Salimans 2021): (N, D...) fp32.

        x_t: (N, D...). t: a timestep, or (N,) of them. prompts: N texts. With a gradient, if it is enabled.
        """
        if t.dim() and not self.copies_of_timesteps:  # this network takes one timestep a call
            rows = [(t == level).nonzero().flatten() for level in t.unique()]
            parts = [self.predict(x_t[row], t[row[0]], [prompts[i] for i in row.tolist()]) for row in rows]
            return torch.cat(parts)[torch.cat(rows).argsort()]
        with self.autocast():
            chain = t.repeat(self.copies_of_timesteps)[None] if t.dim() else t[None]
            tap, _ = self._call(prompts, x_t, chain)
        return tap.prediction.float()

    def autocast(self):
        """The context of a call: torch's autocast in the policy's precision."""
        return torch.autocast(self.device.type, PRECISIONS[self.precision], enabled=self.precision != "fp32")

    @functools.cached_property
    def copies_of_timesteps(self):
        """How the network takes N timesteps at once: 1, as they are; 2, twice, if guided; 0, not."""
        x_t, t = torch.zeros(2, *self.latent_shape, device=self.device), self.training_levels[0][[0, -1]]
        for copies in (1, 2):
            self.__dict__["copies_of_timesteps"] = copies
            try:
                with torch.no_grad():
                    self.predict(x_t, t, [PROBE] * 2)
                return copies
            except torch.OutOfMemoryError:
                raise
            except Exception:  # the wrong number raises one of many
                del self.__dict__["copies_of_timesteps"]
        return 0

    @torch.no_grad()
    def decode(self, x_0):
        """Latents (B, D...) -> images (B, 3, height, width), fp32 in [0, 1]; decode_batch at a time.

        FloatingPointError if one is not finite: as 8-bit pixels it would look like a black one.
        """
        images = []
        for part in processes.parts(slice(0, len(x_0)), self, "decode_batch"):
            with part as rows:
                images.append(self.decode_with_gradient(x_0[rows]))
        return torch.cat(images)

    def decode_with_gradient(self, x_0):
        """As decode, all at once, with a gradient to the latents, for beyond/universal_guidance.py."""
        vae = getattr(self.pipeline, "vae", None)
        x_0 = x_0 if vae is None else x_0.to(vae.dtype)
        _, images = self._call([PROBE] * len(x_0), x_0, timesteps=[], output="pt")
        if not images.isfinite().all():
            raise FloatingPointError("an image is not finite: --precision fp32 may help, or another VAE")
        return images.float()

    def _call(self, prompts, latents=None, timesteps=None, output="latent"):
        """One call of the pipeline, with our latents and timesteps for its own. Returns tap and images.

        latents: None leaves its own. timesteps: None leaves the whole chain, with its scheduler's steps.
        """
        pipeline, scheduler, tap = self.pipeline, self.pipeline.scheduler, copy.copy(self.pipeline.scheduler)
        tap.__class__, tap.wanted, tap.steps = tapped(type(scheduler)), timesteps, []

        def prepare_latents(*args, **options):
            made = type(pipeline).prepare_latents(pipeline, *args, **options)
            first, *rest = made if isinstance(made, tuple) else (made,)  # with position ids, or without
            tap.latents = first if latents is None else latents
            return (tap.latents, *rest) if isinstance(made, tuple) else tap.latents

        negatives = {name: [text] * len(prompts) for name, text in self.options.items()
                     if name.startswith("negative_prompt") and isinstance(text, str)}
        ours = {"prepare_latents": prepare_latents, "encode_prompt": self.encode_prompt}
        vars(pipeline).update(ours, scheduler=tap)
        try:  # without its no_grad; with a generator of its own: the global one is the rewards'
            made = type(pipeline).__call__.__wrapped__(
                pipeline, prompt=list(prompts), num_inference_steps=self.steps, output_type=output,
                generator=torch.Generator().manual_seed(0), **{**self.options, **negatives})
        except UnboundLocalError as error:
            if output == "pt":  # Sana's catches the lack of memory in its decoding, and goes on
                raise torch.OutOfMemoryError(str(error)) from error
            raise
        finally:
            vars(pipeline).update(scheduler=scheduler)
            for name in ours:
                del vars(pipeline)[name]
        return tap, made[0]

    # ---- A second set of weights ----

    def weights(self):
        """A copy of the weights that train, name -> tensor: all, or LoRA's alone."""
        return {name: weight.detach().clone() for name, weight in self.trained.items()}

    @contextlib.contextmanager
    def with_weights(self, weights):
        """The context in which the policy predicts with other weights, if any. No gradient in it."""
        trained = self.trained
        mine = {name: trained[name].data for name in weights}
        for name, weight in weights.items():
            trained[name].data = weight
        try:
            yield
        finally:
            for name, weight in mine.items():
                trained[name].data = weight


@functools.cache
def tapped(kind):
    """The class of a tap: a scheduler's, whose step keeps the prediction and returns the latents.

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

    def scale_model_input(tap, sample, timestep=None):  # a U-Net's pipeline asks a flow's scheduler, too
        return sample

    return type("Tap", (kind,), dict(init_noise_sigma=1.0, scale_model_input=scale_model_input,
                                     set_timesteps=set_timesteps, step=step))


def remembered_encoding(pipeline):
    """The pipeline's encode_prompt, with a memory. Encoders on the CPU visit the denoiser's device."""
    encode, device, kept = pipeline.encode_prompt, denoiser_of(pipeline).device, {}
    guests = [network for name, network in networks_of(pipeline).items()
              if name.startswith("text_encoder") and network.device != device]

    @functools.wraps(encode)
    def encode_prompt(*args, **options):
        if any(isinstance(value, torch.Tensor) for value in (*args, *options.values())):
            return encode(*args, **options)
        key = repr((args, sorted(options.items())))
        if key not in kept:
            if sum(value.numel() for value in tree_leaves(kept) if torch.is_tensor(value)) > KEPT_NUMBERS:
                kept.clear()
            try:
                for network in guests:
                    network.to(device)
                # Outside autocast: states of half precision would be served to calls in fp32.
                with torch.no_grad(), torch.autocast(device.type, enabled=False):
                    kept[key] = encode(*args, **options)
            finally:
                for network in guests:
                    network.to("cpu")
        return kept[key]

    return encode_prompt


# ---- Guidance ----

def guidance_name(pipeline):
    """Which option of the pipeline's call is the guidance weight; None if none is."""
    options = inspect.signature(type(pipeline).__call__).parameters
    names = sorted({"guidance_scale", "true_cfg_scale"} & set(options), reverse=not is_distilled(pipeline))
    return names[0] if names else None


def is_distilled(pipeline):
    """Whether the denoiser reads the guidance weight as an input, as FLUX.1 dev does."""
    return denoiser_of(pipeline).config.get("guidance_embeds")


def guidance_options(pipeline, scale):
    """The options of the call that guide with that weight; 0: the pipeline's own default."""
    name = guidance_name(pipeline)
    if name is None:
        if scale:
            raise ValueError(f"--guidance-scale {scale:g}: a {type(pipeline).__name__} takes none")
        return {}
    scale = scale or inspect.signature(type(pipeline).__call__).parameters[name].default
    if 0 < scale < 1 and not is_distilled(pipeline):
        raise ValueError(f"guidance weight {scale:g}: pipelines guide above 1; for others use --call")
    return {name: scale, **({"negative_prompt": " "} if name == "true_cfg_scale" and scale > 1 else {})}


# ---- A policy by the name of its model ----

def load_policy(config, model=None, scored=True):
    """The policy of a run's settings (support.settings.Config) before its training, ready to be trained.

    model: another one that only draws: a hub name, a folder, a single file, or adapters for the config's own.
    scored: see sampling.make_schedule. With config.kl_weight policy.reference keeps the pretrained weights.
    """
    adapters, trains, c = model not in (None, config.model) and is_lora(model), model is None, config
    source = c.model if trains or adapters else model
    in_fp32 = not c.lora_rank  # to evaluate, too: as it was trained
    pipeline = load_pipeline(source, c.device, c.precision, c.t5, c.prediction_type, in_fp32)
    name = type(pipeline).__name__
    with one_line_errors("model", source):
        guidance = c.guidance_scale or (c.sd_guidance if name == "StableDiffusionPipeline" else 0)
        size = {side: getattr(c, side) for side in ("height", "width") if getattr(c, side)}
        options = {**guidance_options(pipeline, guidance), **size, **call_options(c)}
        unknown = set(options) - set(inspect.signature(type(pipeline).__call__).parameters)
        if unknown:  # some calls take any, and ignore it
            raise ValueError(f"the call of a {name} has no option {', '.join(unknown)}")
        policy = Policy(pipeline, options, c.precision).with_chain(c.sampling_steps, c.eta, c.noise, scored)
        if not size.items() <= dict(zip(("height", "width"), policy.image_size)).items():
            raise ValueError(f"it draws {policy.image_size} pixels (height, width) when asked for {size}")
        if name not in TESTED or c.call:
            refuse_other_steps(policy)
        if adapters:
            load_lora(pipeline, model)
        elif trains and c.lora_rank:
            add_lora(pipeline, c.lora_rank, c.lora_alpha or c.lora_rank, c.seed, c.model)
        elif trains:
            policy.denoiser.requires_grad_(True)
    if trains and c.kl_weight:
        policy.reference = policy.weights()
    if trains and c.gradient_checkpointing:
        policy.denoiser.enable_gradient_checkpointing()
    if trains and c.compile:
        policy.denoiser.compile()
    return policy


@torch.no_grad()
def refuse_other_steps(policy):
    """ValueError if the pipeline's own call makes other predictions or steps than the policy.

    In a tapped call the loop's index is 0. What depends on it is lost in silence: guidance that begins late,
    layers that are skipped. (Diffusers' own DDIM step is right under "trailing" spacing if T divides 1,000.)
    """
    four = policy.with_chain(4, 0.0, scored=False)
    x_T = torch.randn(1, *four.latent_shape, generator=torch.Generator().manual_seed(0)).to(four.device)
    with four.autocast():
        tap, _ = four._call([PROBE], x_T)
    for k, (x_t, prediction, x_prev) in enumerate(tap.steps):
        ours = four.predict(x_t, four.schedule.timesteps[k], [PROBE])
        mean, _ = mean_sigma(x_t, prediction, k, four.schedule)
        apart = max((ours - prediction).abs().max().item(), (mean - x_prev).abs().max().item())
        if not apart <= 1e-3:
            raise ValueError(f"in step {k} of 4 the pipeline's call, with {policy.options}, and the policy "
                             f"are {apart:.2g} apart: it depends on more than timestep, latent and prompt")
