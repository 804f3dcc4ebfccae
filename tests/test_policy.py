"""policy.py: any text-to-image pipeline of diffusers is a policy. Nine tiny families, by the real loading."""
import logging
import re
import shutil
from types import SimpleNamespace

import diffusers
import pytest
import torch
import transformers
from diffusers.loaders import single_file, single_file_model
from safetensors.torch import load_file, save_file

import ddpo
import sampling
from baselines_rwr import rwr_update
from beyond.diffusion_nft import nft_update
from conftest import (EMOJI, LAYERS, STABLE_DIFFUSION, edit_json, edit_weights, learner, load_policy, rng,
                      tiny_pipeline, weights)
from policy import Policy
from support.loading import load_pipeline, save_pipeline
from support.schedulers import plain_scheduler, training_levels

CLOSE = dict(rtol=0, atol=1e-5)
FLOW = diffusers.FlowMatchEulerDiscreteScheduler
TEXTS = ["a cat", "two dogs on the moon"]
TOKENIZER = transformers.CLIPTokenizer.from_pretrained(EMOJI / "tokenizer")
TOKENIZER.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
GROUPED = dict(LAYERS, num_key_value_heads=2, vocab_size=len(TOKENIZER))
QWEN3 = transformers.Qwen3Config(**GROUPED, head_dim=8)
HEADS = dict(attention_head_dim=16, num_attention_heads=2)
FLUX = dict(**HEADS, in_channels=16, num_layers=1, num_single_layers=1)
PIXART = {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 8}


# ---- The families: a pipeline, its image's size, the options of its call ----

def vae(channels=4, kind=diffusers.AutoencoderKL):
    return kind.from_config(tiny_pipeline().vae.config, latent_channels=channels, shift_factor=0.06)


def t5():
    return transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=len(TOKENIZER), d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def flux():
    network = diffusers.FluxTransformer2DModel(**FLUX, joint_attention_dim=32, pooled_projection_dim=16,
                                               axes_dims_rope=[4, 4, 8], guidance_embeds=True)
    parts = vae(), tiny_pipeline().text_encoder, TOKENIZER, t5(), TOKENIZER, network
    return diffusers.FluxPipeline(FLOW(use_dynamic_shifting=True), *parts), 16, {"max_sequence_length": 8}


def klein():
    network = diffusers.Flux2Transformer2DModel(**FLUX, joint_attention_dim=32, axes_dims_rope=[4, 4, 4, 4],
                                                guidance_embeds=False)
    parts = vae(kind=diffusers.AutoencoderKLFlux2), transformers.Qwen3ForCausalLM(QWEN3), TOKENIZER, network
    return diffusers.Flux2KleinPipeline(FLOW(use_dynamic_shifting=True), *parts), 16, {
        "max_sequence_length": 16, "text_encoder_out_layers": [1, 2]}


def qwen():
    network = diffusers.QwenImageTransformer2DModel(**HEADS, in_channels=16, out_channels=4, num_layers=1,
                                                    joint_attention_dim=16, axes_dims_rope=(8, 4, 4))
    decoder = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.1] * 4, latents_std=[1.3] * 4)
    rope = {"mrope_section": [1, 1, 2], "type": "default"}
    text = transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(
        text_config=dict(**GROUPED, rope_theta=1e6, rope_scaling=rope, bos_token_id=0, eos_token_id=1),
        vision_config=dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16)))
    parts = FLOW(use_dynamic_shifting=True), decoder, text, TOKENIZER, network
    return diffusers.QwenImagePipeline(*parts), 16, {"negative_prompt": "a", "max_sequence_length": 256}


def z_image():
    network = diffusers.ZImageTransformer2DModel(
        dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32])
    torch.nn.init.ones_(network.x_pad_token), torch.nn.init.ones_(network.cap_pad_token)
    parts = vae(16), transformers.Qwen3Model(QWEN3), TOKENIZER, network
    return diffusers.ZImagePipeline(FLOW(shift=3.0), *parts), 32, {"max_sequence_length": 16}


def sana():
    network = diffusers.SanaTransformer2DModel(
        **HEADS, in_channels=4, out_channels=4, num_layers=1, num_cross_attention_heads=2,
        cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=16, sample_size=8)
    decoder = diffusers.AutoencoderDC(
        latent_channels=4, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), scaling_factor=0.41407)
    text = transformers.Gemma2Model(transformers.Gemma2Config(**GROUPED, head_dim=8))
    parts = TOKENIZER, text, decoder, network, diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    return diffusers.SanaPipeline(*parts), 32, {**PIXART, "complex_human_instruction": None}


def pixart():
    network = diffusers.PixArtTransformer2DModel(
        **HEADS, sample_size=8, num_layers=1, out_channels=8, caption_channels=32, cross_attention_dim=32)
    parts = TOKENIZER, t5(), vae(), network, diffusers.DPMSolverMultistepScheduler()
    return diffusers.PixArtSigmaPipeline(*parts), 16, PIXART


SD = {"sd": "tiny_model", "sdxl": "tiny_sdxl", "sd3": "tiny_sd3"}  # fixtures of conftest.py
OTHERS = {made.__name__: made for made in (flux, klein, qwen, z_image, sana, pixart)}


@pytest.fixture(scope="module", params=[*SD, *OTHERS])
def family(request, tmp_path_factory):
    """Name, folder, options of load_policy and those of LoRA; a policy."""
    name, options = request.param, {}
    if name in SD:
        folder = request.getfixturevalue(SD[name])
    else:
        torch.manual_seed(0)
        folder, (pipeline, size, call) = tmp_path_factory.mktemp("families") / name, OTHERS[name]()
        pipeline.save_pretrained(folder)
        options = {"height": size, "width": size, "call": call}
    policy, lora = load_policy(folder, 3, trains=False, sd_guidance=3.0, **options), 2 * (name != "pixart")
    return SimpleNamespace(name=name, folder=folder, options=options, policy=policy, lora={"lora_rank": lora})


def drawn_by_diffusers(folder, policy, lora=None):
    """Images of TEXTS by plain diffusers, with the policy's chain and options."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline.scheduler) is type(policy.pipeline.published_scheduler)
    pipeline.scheduler = plain_scheduler(pipeline.scheduler)
    if lora:
        pipeline.load_lora_weights(lora)
    options = {name: [value] * 2 if name == "negative_prompt" else value
               for name, value in policy.options.items()}
    return pipeline(prompt=TEXTS, num_inference_steps=3, output_type="pt", generator=rng(0), **options).images


def drawn_by_chain(policy):
    """The same by the policy's chain at eta 0, from the noise that the pipeline itself draws with seed 0."""
    chain = policy.with_chain(3, 0.0, scored=False)
    x_t = chain._call(TEXTS, timesteps=[])[0].latents.float()
    with torch.no_grad():
        for k in range(3):
            x_t, _ = sampling.p_mean_sigma(chain, x_t, k, TEXTS)
    return chain.decode(x_t)


def refused(model, load=load_pipeline, *steps, **options):
    """The line with which a model is refused."""
    with pytest.raises(ValueError) as caught:
        load(model, *steps, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- For each family ----

def test_without_noise_the_images_are_those_of_the_pipelines_own_call_and_a_gradient_goes_back(family):
    policy, t = family.policy, family.policy.schedule.timesteps[1]
    torch.testing.assert_close(drawn_by_chain(policy), drawn_by_diffusers(family.folder, policy), **CLOSE)
    x_t = torch.randn(1, *policy.latent_shape, generator=rng()).requires_grad_()
    for value in (policy.predict(x_t, t, TEXTS[:1]).square(), policy.decode_with_gradient(x_t)[:, 0]):
        gradient, = torch.autograd.grad(value.sum(), x_t)
        assert gradient.isfinite().all() and gradient.any()


def test_the_ratio_is_one_an_update_moves_it_and_plain_diffusers_draws_the_same_with_what_is_saved(family):
    policy = load_policy(family.folder, 3, kl_weight=1.0, **family.options, **family.lora)
    trajectory, before = sampling.rollout(policy, TEXTS, rng(), 2), drawn_by_chain(policy)
    extras = {**learner(policy, 1e-2, kl_weight=1.0, skip_last_steps=1), "loss": ddpo.clipped_loss}
    one, two = (ddpo.ddpo_update(policy, trajectory, torch.tensor([1.0, -1.0]), **extras) for _ in range(2))
    assert one["ratio_deviation"] <= 5e-6 < two["ratio_deviation"] and two["kl_pretrained"] > 1e-9
    after = drawn_by_chain(policy)
    assert not torch.allclose(before, after, atol=1e-4)
    with policy.with_weights(policy.reference):  # without a gradient, the pretrained policy to the last bit
        assert torch.equal(drawn_by_chain(policy), before)
    save_pipeline(policy.pipeline, "saved")
    folders = (family.folder, policy, "saved") if family.lora["lora_rank"] else ("saved", policy)
    torch.testing.assert_close(drawn_by_diffusers(*folders), after, **CLOSE)


def test_rwr_and_nft_learn_from_images_at_timesteps_of_their_own(family):
    policy = load_policy(family.folder, 3, **family.options, **family.lora)
    x_t, t = torch.randn(2, *policy.latent_shape, generator=rng()), policy.training_levels[0][[800, 100]]
    with torch.no_grad():
        alone = torch.cat([policy.predict(x_t[k:k + 1], t[k], TEXTS[k:k + 1]) for k in range(2)])
        torch.testing.assert_close(policy.predict(x_t, t, TEXTS), alone, rtol=1e-4, atol=2e-5)
    copies = {"z_image": 0, "flux": 1, "klein": 1, "qwen": 1}
    assert policy.copies_of_timesteps == copies.get(family.name, 2)
    trajectory = sampling.rollout(policy, TEXTS, rng(), 2, keep_chain=False)
    options = dict(nft_strength=1.0, updates_per_epoch=1, batch_size=3, micro_batch=2)
    for update in (rwr_update, nft_update):
        before = weights(policy)
        update(policy, trajectory, torch.tensor([0.2, 0.9]), **learner(policy, 1e-2, **options))
        assert any(not torch.equal(weight, before[name]) for name, weight in weights(policy).items())


def test_a_decoding_that_runs_out_of_memory_is_done_again_in_halves(family, monkeypatch, capsys):
    policy = load_policy(family.folder, 3, **family.options)
    latents, decode = torch.randn(2, *policy.latent_shape, generator=rng()), policy.pipeline.vae.decode
    whole = policy.decode(latents)

    def full(z, *given, **options):
        if len(z) > 1:
            raise torch.OutOfMemoryError  # which Sana's pipeline catches
        return decode(z, *given, **options)

    monkeypatch.setattr(policy.pipeline.vae, "decode", full)
    torch.testing.assert_close(policy.decode(latents), whole, rtol=0, atol=1e-5)
    assert policy.decode_batch == 1
    assert "out of memory with decode_batch 2, on with 1" in capsys.readouterr().err


def test_a_missing_weight_of_any_part_is_refused_by_its_name(family, tmp_path):
    for path in family.folder.glob("*/*.safetensors"):
        folder = shutil.copytree(family.folder, tmp_path / path.parent.name)
        lost = next(name for name in sorted(load_file(path))  # of a layer that is not tied to another
                    if name.endswith("weight") and not re.search("embed|shared", name))
        edit_weights(folder / folder.name, lambda all: {name: all[name] for name in all if name != lost})
        assert re.search(f"1 of its weights are missing, the first is .*{lost}", refused(folder))


def test_half_precision_with_checkpointing_has_a_ratio_near_one(family):
    options = {**family.options, **family.lora, "precision": "bf16", "gradient_checkpointing": True}
    policy = load_policy(family.folder, 3, **options)
    trajectory = sampling.rollout(policy, TEXTS, rng(), 2)
    assert trajectory.latents.dtype == policy.decode(trajectory.x_0).dtype == torch.float32
    assert {weight.dtype for weight in policy.trained.values()} == {torch.float32}
    info = ddpo.ddpo_update(policy, trajectory, torch.tensor([1.0, -1.0]), loss=ddpo.clipped_loss,
                            **learner(policy, updates_per_epoch=1, skip_last_steps=1))
    assert info["ratio_deviation"] < 1e-2 and info["grad_norm"] > 0


def test_the_prompt_guides_by_its_pipelines_default_and_stable_diffusions_is_ours(family):
    policy, t = family.policy, family.policy.schedule.timesteps[0]
    default = {"sd": 3.0, "sdxl": 5.0, "sd3": 7.0, "flux": 3.5, "klein": 4.0, "qwen": 4.0, "z_image": 5.0}
    assert policy.guidance_scale == default.get(family.name, 4.5)
    x_t = torch.randn(1, *policy.latent_shape, generator=rng())
    with torch.no_grad():
        two, three, four = (policy.with_guidance(w).predict(x_t, t, ["a cat"]) for w in (2.0, 3.0, 4.0))
        other = policy.with_guidance(2.0).predict(x_t, t, ["two dogs"])
    if family.name not in ("flux", "qwen"):  # FLUX's network reads the weight; Qwen-Image keeps the norm
        torch.testing.assert_close(three - two, four - three, rtol=1e-3, atol=1e-4)
    assert not torch.equal(two, three) and not torch.equal(two, other)


# ---- The chain and the call ----

def test_a_model_of_any_sampler_takes_stable_diffusions_chain_but_trailing_spacing_stays(tiny_policy):
    def chain(steps=4, sampler="DDIM", **settings):
        betas = {key: value for key, value in STABLE_DIFFUSION.items() if "beta" in key}
        kind = getattr(diffusers, f"{sampler}Scheduler")
        published = kind(**{"timestep_spacing": "leading", **betas, **settings})
        tiny_policy.pipeline.scheduler = plain_scheduler(published)
        return tiny_policy.with_chain(steps, 1.0).schedule

    want = tiny_policy.schedule
    for name in ("EulerAncestralDiscrete", "DPMSolverMultistep", "UniPCMultistep", "LCM", "DDPM"):
        got = chain(sampler=name)
        assert torch.equal(got.timesteps, want.timesteps) and torch.equal(got.sigma, want.sigma)
    assert chain(timestep_spacing="trailing").timesteps.tolist() == [999, 749, 499, 249]
    with pytest.raises(ValueError, match="61 sampling steps: diffusers makes 62; take another number"):
        chain(61, timestep_spacing="trailing")
    got = chain(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert got.timesteps[0] == 999 and got.a[0] == 0 and (got.sigma > 0).all()
    heun = plain_scheduler(diffusers.FlowMatchHeunDiscreteScheduler(shift=2.0))
    assert isinstance(heun, FLOW) and heun.config.shift == 2.0
    with pytest.raises(ValueError, match="EDMEulerScheduler.* has neither betas nor flow matching"):
        plain_scheduler(diffusers.EDMEulerScheduler())


def test_the_training_levels_of_a_flow_are_shifted_as_its_chain_is():
    for scheduler, mu in ((FLOW(shift=3.0), None), (FLOW(use_dynamic_shifting=True), 0.7)):
        _, t, a, b = training_levels(scheduler, mu)
        shift, s = 3.0 if mu is None else torch.tensor(mu).exp(), torch.arange(1, 1001) / 1000
        torch.testing.assert_close(b, shift * s / (1 + (shift - 1) * s))
        assert torch.allclose(t, 1000 * b) and torch.allclose(a + b, torch.ones(1000))


def test_policies_share_a_pipeline_and_an_exception_amid_a_call_leaves_it_whole(tiny_policy):
    eight, x_t, t = tiny_policy.with_chain(8, 1.0), torch.ones(1, 4, 8, 8), torch.tensor(500)
    with torch.no_grad():
        want, parts = tiny_policy.predict(x_t, t, ["a cat"]), {**vars(tiny_policy.pipeline)}
        with pytest.raises(RuntimeError):
            tiny_policy.predict(x_t[:, :2], t, ["a cat"])
        assert vars(tiny_policy.pipeline) == parts
        eight.predict(x_t, t, ["a dog"])
        assert torch.equal(tiny_policy.predict(x_t, t, ["a cat"]), want)


def test_prompts_are_encoded_once_for_all_steps_and_one_that_is_cut_is_told(tiny_policy, monkeypatch, capsys):
    network, encoded = tiny_policy.pipeline.text_encoder, []
    network.register_forward_hook(lambda *_: encoded.append(1))
    monkeypatch.setattr(logging.getLogger("diffusers.pipelines").handlers[0], "level", logging.NOTSET)
    trajectory = sampling.rollout(tiny_policy, ["a cat " * 50, "a dog " * 50] * 2, rng(), 2)
    assert len(encoded) == 2  # the prompts and the empty one, though there are two groups of four steps
    ddpo.ddpo_update(tiny_policy, trajectory, torch.ones(4), loss=ddpo.clipped_loss,
                     **learner(tiny_policy, micro_batch=4, updates_per_epoch=1))
    assert len(encoded) <= 4 and not any(weight.grad is not None for weight in network.parameters())
    assert capsys.readouterr().err.count("truncated") == 1
    with torch.autocast("cpu", torch.bfloat16):  # whose rounded states would be served to calls in fp32
        states, _ = tiny_policy.encode_prompt(["an ant"], "cpu", 1, False)
    assert torch.equal(states, tiny_policy.pipeline.encode_prompt(["an ant"], "cpu", 1, False)[0])


def test_stable_diffusion_3_that_is_not_square_draws_as_plain_diffusers_does(tiny_sd3):
    policy = load_policy(tiny_sd3, 3, height=8, width=16, trains=False)
    images = drawn_by_chain(policy)
    assert images.shape == (2, 3, 8, 16)
    torch.testing.assert_close(images, drawn_by_diffusers(tiny_sd3, policy), **CLOSE)


def test_other_options_of_the_call_are_used_and_what_it_does_not_know_is_refused(tiny_model):
    x_t, policies = torch.randn(1, 4, 8, 8, generator=rng()), [
        load_policy(tiny_model, 4, call=call) for call in ({}, {"negative_prompt": "a dog"})]
    with torch.no_grad():
        assert not torch.equal(*(policy.predict(x_t, torch.tensor(1), ["a cat"]) for policy in policies))
    policy = load_policy(tiny_model, 2, height=16, width=24)
    assert policy.decode(torch.zeros(1, *policy.latent_shape)).shape == (1, 3, 16, 24)
    assert "has no option negative_promt" in refused(tiny_model, load_policy, 4, call={"negative_promt": "x"})
    assert "guidance weight 0.6" in refused(tiny_model, load_policy, 4, guidance_scale=0.6)


def test_an_unknown_class_or_option_is_refused_if_it_depends_on_the_step(tiny_model, tiny_sd3, monkeypatch):
    class Rising(diffusers.StableDiffusionPipeline):
        guidance_scale = property(lambda self: self._guidance_scale + len(self.scheduler.steps))

    message = "it depends on more than timestep, latent and prompt"
    late = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.3, "skip_layer_guidance_stop": 0.9}
    assert message in refused(tiny_sd3, load_policy, 4, call=late)
    load_policy(tiny_sd3, 4, call={"max_sequence_length": 32})  # does not
    monkeypatch.setattr("policy.TESTED", ())
    load_policy(tiny_model, 4)
    made = load_pipeline(tiny_model)
    made.__class__ = Rising
    monkeypatch.setattr("policy.load_pipeline", lambda *_, **__: made)
    assert message in refused(tiny_model, load_policy, 4)


# ---- What is loaded, and what is refused ----

def test_precision_goes_by_part_and_what_overflows_stays_in_fp32(tiny_model, tiny_sdxl, tiny_sd3, tmp_path):
    def kinds(folder, **options):
        pipeline = load_pipeline(folder, precision="bf16", **options)
        return [str(part.dtype)[6:] for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)]

    assert kinds(tiny_model, in_fp32=True) == ["float32", "float32", "bfloat16"]
    block = load_pipeline(tiny_sd3, precision="fp16").text_encoder_3.encoder.block[0].layer
    assert (block[-1].DenseReluDense.wo.weight.dtype, block[0].SelfAttention.q.weight.dtype) == (
        torch.float32, torch.float16)  # in half precision T5's wo overflows
    folder = shutil.copytree(tiny_sdxl, tmp_path / "model")
    edit_json(folder / "vae" / "config.json", force_upcast=False)
    for path in folder.rglob("*.safetensors"):  # some models are published in half precision alone
        save_file(load_file(path), path.with_suffix(".fp16.safetensors"), {"format": "pt"})
        path.unlink()
    assert kinds(folder) == ["bfloat16"] * 3


def test_without_t5_it_is_not_needed_and_plain_diffusers_loads_what_is_saved(tiny_sd3, tiny_sdxl, tmp_path):
    folder = shutil.copytree(tiny_sd3, tmp_path / "model", ignore=shutil.ignore_patterns("*_3"))
    policy = load_policy(folder, 3, t5=False, trains=False)
    (states, _, pooled, _), (whole, _, whole_pooled, _) = (
        pipeline.encode_prompt(TEXTS, None, None) for pipeline in (policy.pipeline, load_pipeline(tiny_sd3)))
    assert states.shape == whole.shape and torch.equal(pooled, whole_pooled)
    assert torch.equal(states[:, :16], whole[:, :16])  # CLIP's tokens
    assert not states[:, 16:].any() and whole[:, 16:].any()
    save_pipeline(policy.pipeline, "saved")
    torch.testing.assert_close(drawn_by_chain(policy), drawn_by_diffusers("saved", policy), **CLOSE)
    assert "--no-t5 is for Stable Diffusion 3" in refused(tiny_sdxl, t5=False)


def test_a_tokenizer_takes_its_encoders_length_and_what_cannot_be_followed_is_refused(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    edit_json(folder / "tokenizer" / "tokenizer_config.json", model_max_length=None)
    assert load_pipeline(folder).tokenizer.model_max_length == 16  # the text encoder's
    edit_json(folder / "model_index.json", _class_name="StableDiffusionImg2ImgPipeline")
    assert "the call of a StableDiffusionImg2ImgPipeline with a text alone" in refused(folder, load_policy, 4)
    (folder / "tokenizer" / "tokenizer.json").unlink()
    assert "its tokenizer knows no words" in refused(folder)
    two = SimpleNamespace(components=dict.fromkeys(("transformer", "transformer_2"), torch.nn.Linear(1, 1)))
    with pytest.raises(ValueError, match="transformer and transformer_2: only a pipeline with one denoiser"):
        Policy(two, {})
    assert "model_index.json" in refused(tmp_path)


PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
OPEN_CLIP = {"text_model.encoder.layers": "transformer.resblocks", "text_model.final_layer_norm": "ln_final",
             "text_model.embeddings.token_embedding": "token_embedding", "layer_norm": "ln_", "fc1": "c_fc",
             "text_model.embeddings.position_embedding.weight": "positional_embedding", "fc2": "c_proj",
             "self_attn": "attn", "text_projection.weight": "text_projection"}


def in_one_file(pipeline):
    """A pipeline's weights under the names of the original code, in which U-Net and VAE keep diffusers'."""
    weights = {PREFIXES[part] + name: weight for part in PREFIXES
               for name, weight in pipeline.components[part].state_dict().items()}
    second = getattr(pipeline, "text_encoder_2", None)
    first = "conditioner.embedders.0.transformer." if second else "cond_stage_model.transformer."
    weights |= {f"{first}text_model.{k}": weight for k, weight in pipeline.text_encoder.state_dict().items()}
    thirds = {}
    for name, weight in sorted(second.state_dict().items() if second else (), reverse=True):
        for ours, theirs in OPEN_CLIP.items():
            name = name.replace(ours, theirs)
        if match := re.fullmatch(r"(.*attn\.)[qkv]_proj\.(\w+)", name):
            name = f"{match[1]}in_proj_{match[2]}"
            value, *others = thirds[name] = [*thirds.get(name, ()), weight]  # v, q, k, since reversed
            weight = torch.cat([*others, value])
        weights[f"conditioner.embedders.1.model.{name}"] = weight.T if name == "text_projection" else weight
    marker = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"  # of SDXL's size
    return {name: weight.contiguous() for name, weight in weights.items()} | (
        {marker: torch.zeros(24)} if second else {})


@pytest.mark.parametrize("model", ["tiny_model", "tiny_sdxl"])
def test_a_single_file_is_the_same_model_and_without_a_weight_or_of_another_kind_it_is_refused(
        model, request, monkeypatch):
    folder = request.getfixturevalue(model)
    for part, kind in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL")):
        monkeypatch.setitem(
            single_file_model.SINGLE_FILE_LOADABLE_CLASSES[kind], "checkpoint_mapping_fn",
            lambda checkpoint, prefix=PREFIXES[part], **_: {
                name.removeprefix(prefix): checkpoint[name] for name in checkpoint if prefix in name})
    monkeypatch.setattr(single_file, "fetch_diffusers_config", lambda _: {  # of the hub: what no file holds
        "pretrained_model_name_or_path": str(folder)})
    published = load_pipeline(folder)
    torch.save({"state_dict": in_one_file(published), "global_step": 7}, "dreams.ckpt")
    loaded = load_pipeline("dreams.ckpt", prediction_type="v_prediction")
    assert type(loaded) is type(published) and loaded.scheduler.config.prediction_type == "v_prediction"
    for part in {"unet", "vae", "text_encoder", "text_encoder_2"} & {*published.components}:
        one, other = (pipeline.components[part].state_dict() for pipeline in (published, loaded))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    weights = in_one_file(published)
    first, *_, last = sorted({name for name in weights if name.startswith("model.")})
    for names, message in (
            ({*weights} - {first}, "Cannot copy out of meta tensor"),
            (["lora_unet.lora_down.weight"], "it is a LoRA or a part of a model"),
            ([last, "conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias"], "xl_refiner")):
        save_file({name: weights.get(name, torch.zeros(4)) for name in names}, "other.safetensors")
        assert message in refused("other.safetensors")
