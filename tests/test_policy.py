"""policy.py: any text-to-image pipeline of diffusers is a policy. Nine families, tiny and random, through the real loading code."""
import json
import re
import shutil
from types import SimpleNamespace

import diffusers
import huggingface_hub.constants
import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

import baselines_rwr
import ddpo
import rewards
import sampling
from conftest import EMOJI, edit_json, edit_weights, learner, rng, run, tiny_flags, weights
from policy import Policy, load_pipeline, load_policy, plain_scheduler, training_levels

TEXTS = ["a cat", "two dogs on the moon"]
WORDS = ["<pad>", "</s>", "<unk>", "<bos>", *"a an one two three cat cats dog dogs ant mice on the moon photo".split()]
LAYERS = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
QWEN3 = dict(**LAYERS, num_key_value_heads=2, head_dim=8, vocab_size=len(WORDS), max_position_embeddings=512)


# ---- The families: a pipeline and the flags that it needs ----

def tokenizer(length=16, chat=False):
    core = Tokenizer(WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token="</s>", bos_token="<bos>",
                                   model_max_length=length)
    if chat:
        made.chat_template = ("{% for m in messages %}{{ m['content'] if m['content'] is string else m['content'][0]['text'] }} "
                              "{% endfor %}")
    return made


def kl_vae(channels):
    return AutoencoderKL(block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                         layers_per_block=1, latent_channels=channels, norm_num_groups=2, sample_size=32, scaling_factor=1.5,
                         shift_factor=0.06)


def t5():
    return T5EncoderModel(T5Config(vocab_size=len(WORDS), d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def flux():
    clip = CLIPTextModel(CLIPTextConfig(vocab_size=len(WORDS), hidden_size=32, intermediate_size=16, num_hidden_layers=1, projection_dim=32,
                                        num_attention_heads=2, max_position_embeddings=16, eos_token_id=1, bos_token_id=3))
    network = FluxTransformer2DModel(patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
                                     num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
                                     guidance_embeds=True)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return FluxPipeline(scheduler, kl_vae(4), clip, tokenizer(), t5(), tokenizer(), network), 16, {"max_sequence_length": 8}


def klein():
    network = Flux2Transformer2DModel(patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
                                      num_attention_heads=2, joint_attention_dim=48, axes_dims_rope=[4, 4, 4, 4], guidance_embeds=False)
    vae = AutoencoderKLFlux2(sample_size=32, down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
                             block_out_channels=(4,), layers_per_block=1, latent_channels=4, norm_num_groups=1, use_quant_conv=False,
                             use_post_quant_conv=False)
    text = Qwen3ForCausalLM(Qwen3Config(**{**QWEN3, "num_hidden_layers": 3}))
    return Flux2KleinPipeline(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae, text, tokenizer(64, chat=True), network), 16, {
        "max_sequence_length": 16, "text_encoder_out_layers": [1, 2, 3]}


def qwen():
    network = QwenImageTransformer2DModel(patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
                                          num_attention_heads=3, joint_attention_dim=16, guidance_embeds=False, axes_dims_rope=(8, 4, 4))
    vae = AutoencoderKLQwenImage(base_dim=24, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
                                 latents_mean=[0.1] * 4, latents_std=[1.3] * 4)
    text = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=dict(**LAYERS, num_key_value_heads=2, rope_theta=1e6, vocab_size=len(WORDS), bos_token_id=3, eos_token_id=1,
                         rope_scaling={"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}),
        vision_config=dict(depth=2, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16),
        vision_end_token_id=4, vision_start_token_id=5, vision_token_id=6))
    return QwenImagePipeline(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae, text, tokenizer(128), network), 32, {
        "negative_prompt": "a", "max_sequence_length": 16}


def z_image():
    network = ZImageTransformer2DModel(dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[8, 4, 4],
                                       axes_lens=[256, 32, 32])
    torch.nn.init.ones_(network.x_pad_token), torch.nn.init.ones_(network.cap_pad_token)
    return ZImagePipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), kl_vae(16), Qwen3Model(Qwen3Config(**QWEN3)), tokenizer(64, chat=True),
                          network), 32, {"max_sequence_length": 16}


def sana():
    network = SanaTransformer2DModel(patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
                                     num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
                                     sample_size=32)
    vae = AutoencoderDC(in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
                        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
                        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
                        encoder_layers_per_block=(1, 1), decoder_layers_per_block=[1, 1], downsample_block_type="conv",
                        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41407)
    text = Gemma2Model(Gemma2Config(head_dim=4, hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1,
                                    num_key_value_heads=2, vocab_size=len(WORDS), pad_token_id=0, bos_token_id=3, eos_token_id=1))
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    return SanaPipeline(tokenizer(), text, vae, network, scheduler), 32, {
        "use_resolution_binning": False, "complex_human_instruction": None, "clean_caption": False, "max_sequence_length": 8}


def pixart():
    network = PixArtTransformer2DModel(sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=3, caption_channels=32,
                                       cross_attention_dim=24, out_channels=8)
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    return PixArtSigmaPipeline(tokenizer(), t5(), kl_vae(4), network, scheduler), 16, {
        "use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 8}


SD = {"sd": "tiny_model", "sdxl": "tiny_sdxl", "sd3": "tiny_sd3"}  # fixtures of conftest.py
OTHERS = {made.__name__: made for made in (flux, klein, qwen, z_image, sana, pixart)}


@pytest.fixture(scope="module", params=[*SD, *OTHERS])
def family(request, tmp_path_factory):
    """folder, and the options of load_policy: an image size, options of the call, LoRA if diffusers has it for the network."""
    name = request.param
    if name in SD:
        return SimpleNamespace(name=name, folder=request.getfixturevalue(SD[name]), options={}, lora={"lora_rank": 2})
    torch.manual_seed(0)
    folder, (pipeline, size, call) = tmp_path_factory.mktemp("families") / name, OTHERS[name]()
    pipeline.save_pretrained(folder)
    return SimpleNamespace(name=name, folder=folder, options={"height": size, "width": size, "call": call},
                           lora={} if name == "pixart" else {"lora_rank": 2})


def plain(folder, policy):
    """The pipeline as plain diffusers loads it, with the policy's scheduler; and a function that draws TEXTS with it."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = plain_scheduler(pipeline.scheduler)
    options = {name: [value] * 2 if name == "negative_prompt" else value for name, value in policy.options.items()}
    return pipeline, lambda: pipeline(prompt=TEXTS, num_inference_steps=4, output_type="pt", generator=rng(0), **options).images


def drawn_without_noise(policy):
    """Images of TEXTS by the chain at eta = 0, from the noise that the pipeline draws for itself with the seed 0."""
    four = policy.with_chain(4, 0.0, scored=False)
    tap, _ = four._call(TEXTS, timesteps=[])
    x_t = tap.latents.float()
    with torch.no_grad():
        for k in range(4):
            x_t, _ = sampling.p_mean_sigma(four, x_t, k, TEXTS)
    return four.decode(x_t)


# ---- For each family ----

def test_without_noise_the_images_are_those_of_the_pipelines_own_call(family):
    policy = load_policy(family.folder, 4, trains=False, **family.options)
    torch.testing.assert_close(drawn_without_noise(policy), plain(family.folder, policy)[1](), rtol=0, atol=1e-5)


def test_the_ratio_is_one_an_update_moves_it_and_plain_diffusers_draws_the_same_with_what_is_saved(family, tmp_path):
    policy = load_policy(family.folder, 4, keep_reference=True, **family.options, **family.lora)
    trajectory, before = sampling.rollout(policy, TEXTS * 2, rng(), 4), drawn_without_noise(policy)
    extras = learner(policy, 1e-2, kl_weight=1.0, skip_last_steps=1)
    infos = [ddpo.ddpo_update(policy, trajectory, torch.randn(4, generator=rng()), loss=ddpo.clipped_loss, **extras) for _ in range(2)]
    assert infos[0]["ratio_deviation"] <= 5e-6 < infos[1]["ratio_deviation"]
    assert infos[1]["kl_pretrained"] > 1e-9
    after = drawn_without_noise(policy)
    assert not torch.allclose(before, after, atol=1e-4)
    with policy.with_weights(policy.reference):  # without a gradient, the pretrained policy to the last bit
        assert torch.equal(drawn_without_noise(policy), before)
    policy.save(tmp_path / "saved")
    pipeline, draw = plain(family.folder if family.lora else tmp_path / "saved", policy)
    if family.lora:
        pipeline.load_lora_weights(tmp_path / "saved")
    torch.testing.assert_close(draw(), after, rtol=0, atol=1e-5)


def test_rwr_and_nft_learn_from_images_at_timesteps_of_their_own(family):
    policy = load_policy(family.folder, 4, **family.options, **family.lora)
    timesteps, x_t = policy.training_levels[0][[100, 800]], torch.randn(2, *policy.latent_shape, generator=rng())
    with torch.no_grad():
        alone = [policy.predict(x_t[k:k + 1], timesteps[k], TEXTS[k:k + 1]) for k in range(2)]
        torch.testing.assert_close(policy.predict(x_t, timesteps, TEXTS), torch.cat(alone), rtol=1e-4, atol=2e-5)
    assert policy.copies_of_timesteps == {"z_image": 0, "flux": 1, "klein": 1, "qwen": 1}.get(family.name, 2)
    trajectory = sampling.rollout(policy, TEXTS * 2, rng(), 4, keep_chain=False)
    for update in (baselines_rwr.rwr_update, baselines_rwr.nft_update):
        before = weights(policy)
        update(policy, trajectory, torch.rand(4, generator=rng()), **learner(policy, 1e-2, nft_strength=1.0, micro_batch=3))
        assert any(not torch.equal(weight, before[name]) for name, weight in weights(policy).items())


def test_a_gradient_goes_through_prediction_and_decoding_to_the_latents(family):
    policy = load_policy(family.folder, 4, trains=False, **family.options)
    x_t = torch.randn(1, *policy.latent_shape, generator=rng()).requires_grad_()
    one, = torch.autograd.grad(policy.predict(x_t, policy.schedule.timesteps[1], TEXTS[:1]).square().sum(), x_t)
    two, = torch.autograd.grad(policy.decode_with_gradient(x_t)[:, 0].sum(), x_t)
    assert one.isfinite().all() and one.any() and two.isfinite().all() and two.any()


def test_a_run_by_the_command_is_resumed_to_the_last_bit(family, capsys):
    options = {key: json.dumps(value) if key == "call" else value for key, value in {
        **family.options, "lora-rank": family.lora.get("lora_rank", 0)}.items()}
    flags = {"sampling-steps": 4, "skip-last-steps": 1, "watch": "none", "learning-rate": 1e-2, **options}
    whole = run(*tiny_flags(family.folder, name="whole", **flags))
    run(*tiny_flags(family.folder, name="parts", epochs=1, **flags))
    parts = run("--resume", "runs/parts", "--epochs", 2)
    assert [row["eval_reward_mean"] for row in whole] == [row["eval_reward_mean"] for row in parts]
    one, two = (torch.load(f"runs/{name}/checkpoint/state.pt", weights_only=True)["weights"] for name in ("whole", "parts"))
    assert one and all(torch.equal(one[name], two[name]) for name in one)


def test_a_missing_weight_of_any_part_is_refused_by_its_name(family, tmp_path):
    folder = shutil.copytree(family.folder, tmp_path / "model")
    for part in sorted(path.parent for path in folder.glob("*/*.safetensors")):
        kept = (next(part.glob("*.safetensors")).read_bytes())
        missing = []
        edit_weights(part, lambda weights: {name: weights[name] for name in weights if name != missing_of(weights, missing)})
        with pytest.raises(ValueError, match=f"1 of its weights are missing, the first is .*{re.escape(missing[0].split('.', 1)[1])}"):
            load_pipeline(folder)
        next(part.glob("*.safetensors")).write_bytes(kept)


def missing_of(weights, missing):
    """A weight to leave out: the first of a layer that is not tied to another."""
    missing[:] = [next(name for name in sorted(weights) if name.endswith("weight") and "embed" not in name and "shared" not in name)]
    return missing[0]


def test_half_precision_with_checkpointing_has_a_ratio_near_one(family):
    policy = load_policy(family.folder, 4, precision="bf16", gradient_checkpointing=True, **family.options, **family.lora)
    trajectory = sampling.rollout(policy, TEXTS, rng(), 2)
    assert trajectory.latents.dtype == torch.float32
    assert {weight.dtype for weight in policy.trained.values()} == {torch.float32}
    info = ddpo.ddpo_update(policy, trajectory, torch.tensor([1.0, -1.0]), loss=ddpo.clipped_loss,
                            **learner(policy, updates_per_epoch=1, skip_last_steps=1))
    assert info["ratio_deviation"] < 1e-2 and info["grad_norm"] > 0
    assert policy.decode(trajectory.x_0).dtype == torch.float32


# ---- The chain ----

SAMPLERS = {"Euler a": "EulerAncestralDiscreteScheduler", "DPM++ 2M": "DPMSolverMultistepScheduler", "UniPC": "UniPCMultistepScheduler",
            "Heun": "HeunDiscreteScheduler", "LCM": "LCMScheduler", "DDPM": "DDPMScheduler", "Euler": "EulerDiscreteScheduler"}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_model_saved_with_any_sampler_takes_stable_diffusions_chain(name, tiny_model, tmp_path):
    folder, want = shutil.copytree(tiny_model, tmp_path / "model"), load_policy(tiny_model, 4)
    own = want.pipeline.scheduler.config
    betas = {key: own[key] for key in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "prediction_type")}
    if name == "LCM":  # its own defaults are these
        betas = {}
    getattr(diffusers, SAMPLERS[name])(**betas, timestep_spacing="leading").save_pretrained(folder / "scheduler")
    edit_json(folder / "model_index.json", scheduler=["diffusers", SAMPLERS[name]])
    got = load_policy(folder, 4)
    assert torch.equal(got.schedule.timesteps, want.schedule.timesteps) and torch.equal(got.schedule.sigma, want.schedule.sigma)
    got.save(tmp_path / "saved")  # with the sampler that it came with
    assert json.loads((tmp_path / "saved" / "model_index.json").read_text())["scheduler"] == ["diffusers", SAMPLERS[name]]


def test_trailing_spacing_stays_and_a_few_step_model_begins_at_999(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    edit_json(folder / "scheduler" / "scheduler_config.json", timestep_spacing="trailing")
    assert load_policy(folder, 4).schedule.timesteps.tolist() == [999, 749, 499, 249]
    with pytest.raises(ValueError, match="61 sampling steps: with this model's spacing diffusers makes 62 of them; take one more"):
        load_policy(folder, 61)
    edit_json(folder / "scheduler" / "scheduler_config.json", timestep_spacing="leading", rescale_betas_zero_snr=True,
              prediction_type="v_prediction", _class_name="DDIMScheduler")
    schedule = load_policy(folder, 4).schedule
    assert schedule.timesteps[0] == 999 and schedule.a[0] == 0 and (schedule.sigma > 0).all()


def test_the_training_levels_of_a_flow_are_shifted_as_its_chain_is():
    for scheduler, mu in ((FlowMatchEulerDiscreteScheduler(shift=3.0), None),
                          (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 0.7)):
        kind, t, a, b = training_levels(scheduler, mu)
        shift = 3.0 if mu is None else torch.tensor(mu).exp()
        s = torch.arange(1, 1001) / 1000
        torch.testing.assert_close(b, shift * s / (1 + (shift - 1) * s))
        torch.testing.assert_close(t, 1000 * b)
        assert kind == "flow" and torch.allclose(a + b, torch.ones(1000))


def test_a_scheduler_whose_noise_is_not_known_is_refused(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    diffusers.EDMEulerScheduler().save_pretrained(folder / "scheduler")
    edit_json(folder / "model_index.json", scheduler=["diffusers", "EDMEulerScheduler"])
    assert "its scheduler is a EDMEulerScheduler, which has neither betas nor flow matching" in refused(folder)


def test_two_policies_of_other_chains_share_a_pipeline_and_an_exception_amid_a_call_leaves_it_whole(tiny_policy):
    eight, x_t = tiny_policy.with_chain(8, 1.0), torch.randn(1, *tiny_policy.latent_shape, generator=rng())
    scheduler, t = tiny_policy.pipeline.scheduler, tiny_policy.schedule.timesteps[1]
    with torch.no_grad():
        want = tiny_policy.predict(x_t, t, ["a cat"])
        with pytest.raises(RuntimeError):
            tiny_policy.predict(x_t[:, :2], t, ["a cat"])
        assert tiny_policy.pipeline.scheduler is scheduler and "prepare_latents" not in vars(tiny_policy.pipeline)
        eight.predict(x_t, eight.schedule.timesteps[1], ["a dog"])
        assert torch.equal(tiny_policy.predict(x_t, t, ["a cat"]), want)


# ---- What is asked of the call ----

def test_guidance_is_the_pipelines_own_default_and_stable_diffusions_is_ours(family):
    policy = load_policy(family.folder, 4, trains=False, sd_guidance=3.0, **family.options)
    default = {"sd": 3.0, "sdxl": 5.0, "sd3": 7.0, "flux": 3.5, "klein": 4.0, "qwen": 4.0, "z_image": 5.0, "sana": 4.5, "pixart": 4.5}
    assert policy.guidance_scale == default[family.name]
    x_t, t = torch.randn(1, *policy.latent_shape, generator=rng()), policy.schedule.timesteps[0]
    with torch.no_grad():
        two, three, four = (policy.with_guidance(w).predict(x_t, t, ["a cat"]) for w in (2.0, 3.0, 4.0))
    if family.name not in ("flux", "qwen"):  # a network that reads the weight need not be linear in it; Qwen-Image keeps the norm
        torch.testing.assert_close(three - two, four - three, rtol=1e-3, atol=1e-4)
    assert not torch.equal(two, three)


def test_each_group_of_prompts_is_encoded_once_for_all_its_steps(tiny_policy, monkeypatch):
    encoded, forward = [], type(tiny_policy.pipeline.text_encoder).forward
    monkeypatch.setattr(type(tiny_policy.pipeline.text_encoder), "forward",
                        lambda *args, **options: encoded.append(1) or forward(*args, **options))
    trajectory = sampling.rollout(tiny_policy, TEXTS * 2, rng(), 2)
    assert len(encoded) == 2  # the prompts and the empty one, though there are two groups of four steps
    ddpo.ddpo_update(tiny_policy, trajectory, torch.ones(4), loss=ddpo.clipped_loss, **learner(tiny_policy, micro_batch=4, updates_per_epoch=1))
    assert len(encoded) <= 4 and not any(weight.grad is not None for weight in tiny_policy.pipeline.text_encoder.parameters())


def test_a_guidance_weight_at_which_pipelines_do_not_guide_is_refused(tiny_model, capsys):
    with pytest.raises(ValueError, match="guidance weight 0.6: most pipelines guide only above 1; take 1"):
        load_policy(tiny_model, 4, guidance_scale=0.6)


def test_other_options_of_the_call_are_used_and_unknown_ones_are_refused(tiny_model, capsys):
    x_t, predictions = torch.randn(1, 4, 8, 8, generator=rng()), []
    for call in ({}, {"negative_prompt": "a dog"}):
        policy = load_policy(tiny_model, 4, call=call)
        with torch.no_grad():
            predictions.append(policy.predict(x_t, policy.schedule.timesteps[0], ["a cat"]))
    assert not torch.equal(*predictions)
    run(*tiny_flags(tiny_model, call='{"negative_promt": "x"}'), code=2)
    assert "the call of a StableDiffusionPipeline has no option negative_promt" in capsys.readouterr().err
    run(*tiny_flags(tiny_model, call='{"guidance_scale": 3}', **{"guidance-scale": 2}), code=2)
    assert "guidance_scale is given by --call and by a flag of its own" in capsys.readouterr().err
    run(*tiny_flags(tiny_model, call="[1]"), code=2)
    assert "--call [1]: must be a JSON object" in capsys.readouterr().err


def test_an_option_that_depends_on_the_loops_index_is_refused(tiny_sd3):
    assert "the prediction depends on more than timestep, latent and prompt" in refused(
        tiny_sd3, call={"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.3, "skip_layer_guidance_stop": 0.9}, policy=True)
    load_policy(tiny_sd3, 4, call={"max_sequence_length": 32})  # which does not


def test_height_and_width_are_the_images(tiny_model):
    policy = load_policy(tiny_model, 2, height=16, width=24)
    assert policy.decode(sampling.rollout(policy, ["a cat"], rng(), 1).x_0).shape == (1, 3, 16, 24)


# ---- What is loaded, and what is refused ----

def refused(model, policy=False, **options):
    """The line with which a model is refused."""
    with pytest.raises(ValueError) as caught:
        load_policy(model, 4, **options) if policy else load_pipeline(model, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["pickscore", "aesthetic", "counting"])
def test_a_learned_reward_with_a_weight_missing_is_refused(name, tiny_clip, tiny_vlm, tmp_path):
    folder, missing = shutil.copytree(tiny_vlm if name == "counting" else tiny_clip, tmp_path / "model"), []
    edit_weights(folder, lambda weights: {name: weights[name] for name in weights if name != missing_of(weights, missing)})
    rewards.load_vlm.cache_clear()
    with pytest.raises(ValueError, match=r"reward model \(--reward-model\) .*: 1 of its weights are missing, the first is"):
        rewards.load_reward(name, reward_model=str(folder))


@pytest.mark.parametrize("terminal", [False, True])
def test_weights_missing_in_several_layers_are_refused_on_a_terminal_too(terminal, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    folder = shutil.copytree(EMOJI, tmp_path / "model")  # its text encoder has two layers, which transformers tells together
    edit_weights(folder / "text_encoder", lambda weights: {name: weight for name, weight in weights.items() if "mlp.fc1.weight" not in name})
    assert re.search("of its weights are missing, the first is .*fc1.weight", refused(folder))


def test_a_tokenizer_without_its_vocabulary_is_refused(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    assert "its tokenizer knows no words" in refused(folder)


def test_a_tokenizer_that_does_not_say_its_length_takes_the_text_encoders(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    edit_json(folder / "tokenizer" / "tokenizer_config.json", model_max_length=None)
    assert load_pipeline(folder).tokenizer.model_max_length == 16


def test_a_prompt_that_is_cut_is_told_once_in_the_librarys_words(tiny_policy, capsys):
    import logging
    logging.getLogger("diffusers.pipelines").handlers[0].told = False
    for text in ("a cat " * 50, "a dog " * 50):
        sampling.rollout(tiny_policy, [text], rng(), 1)
    assert capsys.readouterr().err.count("truncated") == 1


def test_half_precision_files_alone_are_loaded(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    for path in folder.rglob("*.safetensors"):
        save_file({name: weight.half() for name, weight in load_file(path).items()}, path.with_suffix(".fp16.safetensors"), {"format": "pt"})
        path.unlink()
    got, want = load_pipeline(folder).unet.state_dict(), load_pipeline(tiny_model).unet.state_dict()
    assert all(torch.allclose(got[name], weight, atol=1e-3) and got[name].dtype == torch.float32 for name, weight in want.items())


def test_precision_goes_by_part_and_a_vae_that_overflows_stays_in_fp32(tiny_model, tiny_sdxl, tmp_path):
    def kinds(folder, **options):
        pipeline = load_pipeline(folder, precision="bf16", **options)
        return [str(part.dtype)[6:] for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)]

    assert kinds(tiny_model) == ["bfloat16", "float32", "bfloat16"] and kinds(tiny_model, in_fp32=True)[0] == "float32"
    folder = shutil.copytree(tiny_sdxl, tmp_path / "model")
    edit_json(folder / "vae" / "config.json", force_upcast=False)
    assert kinds(folder) == ["bfloat16"] * 3


def test_without_t5_it_is_neither_loaded_nor_needed_and_plain_diffusers_loads_what_is_saved(tiny_sd3, tmp_path):
    folder = shutil.copytree(tiny_sd3, tmp_path / "model")
    shutil.rmtree(folder / "text_encoder_3"), shutil.rmtree(folder / "tokenizer_3")
    policy = load_policy(folder, 4, t5=False)
    states, _, pooled, _ = policy.pipeline.encode_prompt(TEXTS, None, None, device="cpu")
    whole, _, whole_pooled, _ = load_pipeline(tiny_sd3).encode_prompt(TEXTS, None, None, device="cpu")
    clips = policy.pipeline.tokenizer.model_max_length
    assert states.shape == whole.shape and torch.equal(pooled, whole_pooled) and torch.equal(states[:, :clips], whole[:, :clips])
    assert (states[:, clips:] == 0).all() and (whole[:, clips:] != 0).any()
    policy.save(tmp_path / "saved")
    torch.testing.assert_close(plain(tmp_path / "saved", policy)[1](), drawn_without_noise(policy), rtol=0, atol=1e-5)


def test_without_t5_is_refused_for_another_model(tiny_sdxl):
    assert "--no-t5 is for Stable Diffusion 3, and this is a StableDiffusionXLPipeline" in refused(tiny_sdxl, t5=False)


def test_a_pipeline_that_cannot_be_followed_is_refused_in_one_line(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    image_to_image = shutil.copytree(tiny_model, tmp_path / "image")
    edit_json(image_to_image / "model_index.json", _class_name="StableDiffusionImg2ImgPipeline")
    assert "the call of a StableDiffusionImg2ImgPipeline fails with a text alone, 4 steps" in refused(image_to_image, policy=True)
    two = SimpleNamespace(components={"transformer": torch.nn.Linear(1, 1), "transformer_2": torch.nn.Linear(1, 1)})
    with pytest.raises(ValueError, match="has transformer and transformer_2: only a pipeline with one denoiser can be trained"):
        Policy(two, {})
    assert "no/such" in refused("no/such") and "model_index.json" in refused(tmp_path)


# ---- A pipeline in one file ----

@pytest.fixture
def cached_settings(tiny_model, tmp_path, monkeypatch):
    """The hub's cache, with what a single file does not hold. There is no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    shutil.copytree(tiny_model, repository / "snapshots" / "abc", ignore=shutil.ignore_patterns("*.safetensors"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")


def single_file(folder):
    """The weights of a pipeline's folder under the names that a single file has, those of the original code."""
    unet, vae, text = (load_pipeline(folder).components[part].state_dict() for part in ("unet", "vae", "text_encoder"))
    weights = {}
    resnet = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
              "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    places = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
              "conv_norm_out": "out.0", "conv_out": "out.2", "mid_block.resnets.0": "middle_block.0",
              "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2",
              # two blocks of one layer, the second with attention; and on the way up of two layers, the first with attention
              "down_blocks.0.resnets.0": "input_blocks.1.0", "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
              "down_blocks.1.resnets.0": "input_blocks.3.0", "down_blocks.1.attentions.0": "input_blocks.3.1",
              **{f"up_blocks.0.resnets.{k}": f"output_blocks.{k}.0" for k in range(2)},
              **{f"up_blocks.0.attentions.{k}": f"output_blocks.{k}.1" for k in range(2)},
              "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
              **{f"up_blocks.1.resnets.{k}": f"output_blocks.{k + 2}.0" for k in range(2)}}
    for name, weight in unet.items():
        place = next(place for place in places if name.startswith(place + "."))
        rest = name.removeprefix(place + ".")
        if "resnets" in place:
            part, _, ending = rest.rpartition(".")
            rest = f"{resnet[part]}.{ending}"
        weights[f"model.diffusion_model.{places[place]}.{rest}"] = weight
    for name, weight in vae.items():
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{1 - int(m[1])}.block.{m[2]}", name)  # of two
        name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{1 - int(m[1])}.upsample", name)
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        if "mid_block.attentions.0" in name:
            for old, new in {"mid_block.attentions.0": "mid.attn_1", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v",
                             "to_out.0": "proj_out"}.items():
                name = name.replace(old, new)
            weight = weight[:, :, None, None] if weight.ndim == 2 else weight
        weights[f"first_stage_model.{name}"] = weight
    for name, weight in text.items():
        weights[f"cond_stage_model.transformer.text_model.{name}"] = weight
    return {name: weight.clone().contiguous() for name, weight in weights.items()}


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_a_single_file_is_the_same_model(tiny_model, tmp_path, cached_settings, ending):
    path = tmp_path / f"dreams.{ending}"
    if ending == "ckpt":
        torch.save({"state_dict": single_file(tiny_model), "global_step": 7}, path)
    else:
        save_file(single_file(tiny_model), path)
    one, two = load_pipeline(tiny_model), load_pipeline(path)
    for part in ("unet", "vae", "text_encoder"):
        got, want = two.components[part].state_dict(), one.components[part].state_dict()
        assert got.keys() == want.keys() and all(torch.equal(got[name], weight) for name, weight in want.items())
    assert load_policy(path, 4, prediction_type="v_prediction").schedule.prediction_type == "v_prediction"
    assert load_policy(path, 4).schedule.prediction_type == "epsilon"


def test_a_single_file_without_a_weight_is_refused(tiny_model, tmp_path, cached_settings):
    for missing, name in (("model.diffusion_model.out.2.bias", "conv_out.bias"), (
            "cond_stage_model.transformer.text_model.final_layer_norm.bias", "final_layer_norm.bias")):
        save_file({name: weight for name, weight in single_file(tiny_model).items() if name != missing}, tmp_path / "x.safetensors")
        assert re.search(f"1 of its weights are missing, the first is .*{name}", refused(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("names, message", [
    (["lora_unet_down_blocks_0.lora_down.weight"], "it is a LoRA"), (["decoder.conv_in.weight"], "a part of a model"),
    (["model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias"],
     "of the kind xl_refiner")])
def test_a_single_file_of_another_kind_is_told_by_its_keys(names, message, tmp_path):
    save_file({name: torch.zeros(4, 4) for name in names}, tmp_path / "other.safetensors")
    assert message in refused(tmp_path / "other.safetensors")
