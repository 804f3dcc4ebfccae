"""models.py: what is loaded, from where, and what is refused."""
import json
import re
import shutil

import diffusers
import huggingface_hub.constants
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import models
import pipelines
import networks
import rewards
import sampling
import settings
from conftest import EMOJI, edit_weights, run, tiny_flags, without_seconds


def copied(folder, tmp_path):
    """A copy of a model's folder, to spoil."""
    return shutil.copytree(folder, tmp_path / "model")


def edit_json(path, **changes):
    """Set entries of a JSON file; None deletes one."""
    entries = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in entries.items() if value is not None}))


def refused(model, **options):
    """The line with which a model is refused."""
    with pytest.raises(ValueError) as caught:
        pipelines.load_pipeline(model, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- Every weight is loaded ----

def without_first(weights):
    return {name: weights[name] for name in sorted(weights)[1:]}


def with_prefix(prefix):
    return lambda weights: {prefix + name: weight for name, weight in weights.items()}


def with_lora(weights):
    return {re.sub(r"(to_q|q_proj)\.weight", r"\1.base_layer.weight", name): weight for name, weight in weights.items()}


def misshapen(weights):
    return {**weights, max(weights): torch.zeros(3, 5)}


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("edit, message", [
    (without_first, "1 of its weights are missing, the first is "), (misshapen, "1 of its weights have another shape"),
    (with_prefix("module."), r"missing.*saved from DataParallel"), (with_prefix("_orig_mod."), r"missing.*saved from torch.compile"),
    (with_lora, r"missing.*saved with a LoRA attached")])
def test_a_network_with_weights_missing_renamed_or_misshapen_is_refused(tiny_model, tmp_path, part, edit, message):
    folder = copied(tiny_model, tmp_path)
    edit_weights(folder / part, edit)
    assert re.search(f"the {part} of model .*{message}", refused(folder))


@pytest.mark.parametrize("part, name", [("unet", "down_blocks.0.attn.to_q_lora.down.weight"), ("unet", "add_embedding.weight"),
                                        ("vae", "decoder.more.weight"), ("text_encoder", "encoder.layers.1.mlp.fc1.weight"),
                                        ("text_encoder", "encoder.layers.0.mlp.fc1.lora_A.weight")])
def test_weights_that_the_network_would_need_but_has_no_place_for_are_refused(tiny_model, tmp_path, part, name):
    folder = copied(tiny_model, tmp_path)
    edit_weights(folder / part, lambda weights: {**weights, name: torch.zeros(2)})
    assert f"1 of its weights have no place in the network, the first is {name}" in refused(folder)


def test_a_text_encoder_out_of_a_whole_clip_with_an_old_buffer_is_accepted_and_is_the_same(tiny_model, tmp_path):
    folder = copied(tiny_model, tmp_path)
    edit_weights(folder / "text_encoder", lambda weights: {
        **{f"text_model.{name}": weight for name, weight in weights.items()}, "logit_scale": torch.zeros(()),
        "text_model.embeddings.position_ids": torch.arange(16)[None], "vision_model.embeddings.class_embedding": torch.zeros(3)})
    one, two = (models.encode_prompts(pipelines.load_pipeline(model), ["a cat"])[0][0] for model in (tiny_model, folder))
    assert torch.equal(one, two)


def test_a_vae_of_the_old_layout_is_accepted_and_is_the_same(tiny_model, tmp_path):
    folder, old = copied(tiny_model, tmp_path), {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    edit_weights(folder / "vae", lambda weights: {
        re.sub(r"\b(to_q|to_k|to_v|to_out\.0)\b", lambda match: old[match[0]], name): weight for name, weight in weights.items()})
    one, two = (pipelines.load_pipeline(model).vae.state_dict() for model in (tiny_model, folder))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("name", ["pickscore", "aesthetic", "counting"])
def test_a_learned_reward_with_a_weight_missing_is_refused(name, tiny_clip, tiny_vlm, tmp_path):
    folder = copied(tiny_vlm if name == "counting" else tiny_clip, tmp_path)
    edit_weights(folder, without_first)
    rewards.load_vlm.cache_clear()
    with pytest.raises(ValueError, match=r"reward model \(--reward-model\) .*: 1 of its weights are missing"):
        rewards.load_reward(name, reward_model=str(folder))


def test_bertscores_encoder_may_lack_the_pooler_that_nothing_reads_but_no_other_weight(tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    transformers.BertModel(config).save_pretrained(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda weights: {name: weight for name, weight in weights.items() if "pooler" not in name})
    rewards.BertRecall("cpu", str(tmp_path))
    edit_weights(tmp_path, without_first)
    with pytest.raises(ValueError, match="1 of its weights are missing"):
        rewards.BertRecall("cpu", str(tmp_path))


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_a_learned_reward_with_fewer_layers_in_its_config_than_in_its_file_is_refused(part, tiny_clip, tmp_path):
    folder = copied(tiny_clip, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", **{part: {**config[part], "num_hidden_layers": 1}})
    with pytest.raises(ValueError, match="of its weights have no place in the network"):
        rewards.load_reward("pickscore", reward_model=str(folder))


def test_a_tokenizer_without_its_vocabulary_or_with_too_large_a_one_is_refused(tiny_model, tmp_path):
    folder = copied(tiny_model, tmp_path)
    (folder / "tokenizer" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    assert "has no vocabulary: neither tokenizer.json nor vocab.json with merges.txt" in refused(folder)
    (tmp_path / "tokenizer.json").rename(folder / "tokenizer" / "tokenizer.json")
    edit_json(folder / "text_encoder" / "config.json", vocab_size=100)
    edit_weights(folder / "text_encoder", lambda weights: {
        name: weight[:100].clone() if "token_embedding" in name else weight for name, weight in weights.items()})
    assert "its tokenizer knows more tokens than its text_encoder has embeddings (100)" in refused(folder)


@pytest.mark.parametrize("part, change", [
    ("unet", {"attention_head_dim": 1}), ("unet", {"center_input_sample": True}), ("vae", {"scaling_factor": 1.0}),
    ("text_encoder", {"hidden_act": "gelu"}), ("text_encoder", {"use_attention_mask": True}), ("scheduler", {"num_train_timesteps": 500})])
def test_a_model_with_another_setting_is_another_model(part, change, tiny_model, tmp_path):
    folder = copied(tiny_model, tmp_path)
    identities = [sampling.load_policy(model, 4, 1.0, 5.0).pretrained for model in (tiny_model, folder)]
    edit_json(folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json"), **change)
    identities.append(sampling.load_policy(folder, 4, 1.0, 5.0).pretrained)
    assert identities[0] == identities[1] != identities[2]


# ---- Which files ----

FILES = {"full": ["model.safetensors"], "pickle": ["pytorch_model.bin"], "fp16": ["model.fp16.safetensors"],
         "shards": ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"], "bf16": ["model.bf16.safetensors"]}


@pytest.mark.parametrize("kinds, want", [
    (["full", "fp16", "pickle"], (None, True)), (["pickle", "fp16"], (None, False)), (["fp16"], ("fp16", True)), (["shards"], ("fp16", True)),
    (["bf16"], ("bf16", True)), (["bf16", "fp16"], ("fp16", True)), ([], (None, True))])
def test_full_weights_are_preferred_to_other_variants(kinds, want, tmp_path):
    for name in [file for kind in kinds for file in FILES[kind]] + ["ema.safetensors", "config.json"]:
        (tmp_path / name).touch()
    assert tuple(networks.variant_of(tmp_path)[key] for key in ("variant", "use_safetensors")) == want


def test_small_files_alone_or_pickles_alone_are_loaded_without_a_word(tiny_model, tmp_path, capfd):
    small, pickled = copied(tiny_model, tmp_path), shutil.copytree(tiny_model, tmp_path / "pickled")
    for path in small.rglob("*.safetensors"):
        save_file({name: weight.half() for name, weight in load_file(path).items()},
                  path.with_suffix(".fp16.safetensors"), {"format": "pt"})
        path.unlink()
    for path in pickled.rglob("*.safetensors"):
        name = "pytorch_model" if path.name == "model.safetensors" else path.stem  # transformers' name, or diffusers'
        torch.save(load_file(path), path.with_name(f"{name}.bin"))
        path.unlink()
    want = pipelines.load_pipeline(tiny_model).unet.state_dict()
    for folder, tolerance in ((small, 1e-3), (pickled, 0)):
        got = pipelines.load_pipeline(folder).unet.state_dict()
        assert all(torch.allclose(got[name], weight, rtol=tolerance, atol=tolerance) for name, weight in want.items())
        assert got["conv_in.weight"].dtype == torch.float32
    assert not capfd.readouterr().err


def test_a_hub_repository_with_small_files_alone_is_loaded(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / "models--someone--small" / "snapshots" / "abc"
    shutil.copytree(tiny_model, snapshot)
    for path in snapshot.rglob("*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # what was fetched before is there without a network
    assert pipelines.load_pipeline("someone/small").unet.dtype == torch.float32


def single_file(folder):
    """The weights of a pipeline's folder under the names that a single file has, those of the original code."""
    unet, vae, text = (pipelines.load_pipeline(folder).components[part].state_dict() for part in ("unet", "vae", "text_encoder"))
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


@pytest.fixture
def cached_settings(tiny_model, tmp_path, monkeypatch):
    """A hub's cache that holds the settings of the tiny model as if they were those of Stable Diffusion v1.5."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    shutil.copytree(tiny_model, repository / "snapshots" / "abc", ignore=shutil.ignore_patterns("*.safetensors"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_a_single_file_is_the_same_model_and_trains(tiny_model, tmp_path, cached_settings, ending, capsys):
    path = tmp_path / f"dreams.{ending}"
    if ending == "ckpt":
        torch.save({"state_dict": single_file(tiny_model), "global_step": 7}, path)
    else:
        save_file(single_file(tiny_model), path)
    one, two = pipelines.load_pipeline(tiny_model), pipelines.load_pipeline(path)
    for part in ("unet", "vae", "text_encoder"):
        got, want = two.components[part].state_dict(), one.components[part].state_dict()
        assert got.keys() == want.keys() and all(torch.equal(got[name], weight) for name, weight in want.items())
    assert "Stable Diffusion 1 by the names of its weights" in capsys.readouterr().err


def test_a_single_file_without_a_weight_is_refused(tiny_model, tmp_path, cached_settings):
    for missing, name in (("model.diffusion_model.out.2.bias", "conv_out.bias"), (
            "cond_stage_model.transformer.text_model.final_layer_norm.bias", "final_layer_norm.bias")):
        save_file({name: weight for name, weight in single_file(tiny_model).items() if name != missing}, tmp_path / "x.safetensors")
        assert f"1 of its weights are missing, the first is {name}" in refused(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["model.diffusion_model.middle_block.3.in_layers.0.weight",
                                  "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight"])
def test_a_single_file_with_a_weight_too_many_is_refused(name, tiny_model, tmp_path, cached_settings):
    save_file({**single_file(tiny_model), name: torch.zeros(2)}, tmp_path / "dreams.safetensors")
    assert "1 of its weights " in refused(tmp_path / "dreams.safetensors")


def test_a_single_file_without_network_or_cache_says_what_it_needs(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    save_file(single_file(tiny_model), tmp_path / "dreams.safetensors")
    told = refused(tmp_path / "dreams.safetensors")
    assert "settings and tokenizer come from the hub (stable-diffusion-v1-5/stable-diffusion-v1-5)" in told


@pytest.mark.parametrize("names, message", [
    (["lora_unet_down_blocks_0.lora_down.weight"], "is a LoRA"), (["decoder.conv_in.weight"], "a part of a model"),
    (["model.diffusion_model.out.2.bias", "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias",
      "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight"], "of the kind xl_base"),
    (["module.model.diffusion_model.out.2.bias"], "saved from DataParallel")])
def test_a_single_file_of_another_kind_is_told_by_its_keys(names, message, tmp_path):
    save_file({name: torch.zeros(4, 4) for name in names}, tmp_path / "other.safetensors")
    assert message in refused(tmp_path / "other.safetensors")


def test_a_file_that_holds_no_weights_is_refused(tmp_path):
    (tmp_path / "text.safetensors").write_text("no weights")
    assert "cannot be loaded" in refused(tmp_path / "text.safetensors")


# ---- Schedulers ----

SAMPLERS = {"Euler a": "EulerAncestralDiscreteScheduler", "DPM++ 2M": "DPMSolverMultistepScheduler", "UniPC": "UniPCMultistepScheduler",
            "Heun": "HeunDiscreteScheduler", "LMS": "LMSDiscreteScheduler", "DDPM": "DDPMScheduler", "Euler": "EulerDiscreteScheduler"}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_model_saved_with_any_sampler_takes_stable_diffusions_chain_and_says_so(name, tiny_model, tmp_path, capsys):
    folder, want = copied(tiny_model, tmp_path), sampling.load_policy(tiny_model, 4, 1.0, 5.0).schedule
    own = pipelines.load_pipeline(tiny_model).scheduler.config
    betas = {key: own[key] for key in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "prediction_type")}
    if name == "LMS":  # diffusers' own needs scipy, which we do not
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": SAMPLERS[name], **betas}))
    else:
        getattr(diffusers, SAMPLERS[name])(**betas).save_pretrained(folder / "scheduler")
    assert not capsys.readouterr().err
    got = sampling.load_policy(folder, 4, 1.0, 5.0).schedule
    assert torch.equal(got.timesteps, want.timesteps) and torch.equal(got.sigma, want.sigma)
    told = capsys.readouterr().err.strip()
    if name != "DDPM":  # its spacing is Stable Diffusion's already
        assert "Stable Diffusion's are taken (timestep_spacing leading, steps_offset 1" in told and "\n" not in told


def test_an_old_scheduler_config_without_offset_is_corrected_as_diffusers_does(tiny_model, tmp_path, capsys):
    folder, want = copied(tiny_model, tmp_path), sampling.load_policy(tiny_model, 4, 1.0, 5.0).schedule
    edit_json(folder / "scheduler" / "scheduler_config.json", steps_offset=None, timestep_spacing=None)
    assert torch.equal(sampling.load_policy(folder, 4, 1.0, 5.0).schedule.timesteps, want.timesteps)
    edit_json(folder / "scheduler" / "scheduler_config.json", set_alpha_to_one=None)
    assert torch.equal(sampling.load_policy(folder, 4, 1.0, 5.0).schedule.timesteps, want.timesteps)


def test_a_zero_terminal_snr_model_keeps_trailing_spacing_and_its_first_step_is_pure_noise(tiny_model, tmp_path):
    folder = copied(tiny_model, tmp_path)
    own = pipelines.load_pipeline(tiny_model).scheduler.config
    diffusers.EulerDiscreteScheduler(**{key: own[key] for key in ("beta_start", "beta_end", "beta_schedule")}, timestep_spacing="trailing",
                                     prediction_type="v_prediction", rescale_betas_zero_snr=True).save_pretrained(folder / "scheduler")
    schedule = sampling.load_policy(folder, 4, 1.0, 5.0).schedule
    assert schedule.timesteps.tolist() == [999, 749, 499, 249] and schedule.a[0] == 0 and (schedule.sigma > 0).all()


def test_the_same_chain_is_taken_for_training_and_for_drawing_without_noise(tiny_model, tmp_path):
    folder = copied(tiny_model, tmp_path)  # its own settings would do for eta 0, but the run was trained with others
    edit_json(folder / "scheduler" / "scheduler_config.json", set_alpha_to_one=True)
    trained, drawn = sampling.load_policy(folder, 4, 1.0, 5.0), sampling.load_policy(folder, 4, 0.0, 5.0, scored=False)
    assert torch.equal(trained.schedule.a_prev, drawn.schedule.a_prev)
    one = sampling.load_policy(folder, 1, 0.0, 5.0, scored=False)  # its only step is no action, which matters to training alone
    assert one.pretrained == trained.pretrained != sampling.load_policy(tiny_model, 4, 1.0, 5.0).pretrained


@pytest.mark.parametrize("scheduler, message", [
    (diffusers.EDMEulerScheduler(), "scheduler of model .* is a EDMEulerScheduler, which has neither betas nor flow matching"),
    (diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting")])
def test_a_schedule_whose_noise_is_not_known_is_refused(scheduler, message, tiny_model, tmp_path):
    folder = copied(tiny_model, tmp_path)
    scheduler.save_pretrained(folder / "scheduler")
    with pytest.raises(ValueError, match=message):
        sampling.load_policy(folder, 4, 1.0, 5.0)


# ---- Architectures ----

@pytest.mark.parametrize("changes, message", [
    ({"time_cond_proj_dim": 8}, "a latent consistency model"), ({"class_embed_type": "timestep"}, "asks for class labels"),
    ({"num_class_embeds": 10}, "asks for class labels"), ({"class_embed_type": "projection", "projection_class_embeddings_input_dim": 8},
                                                          "as unCLIP does"),
    ({"out_channels": 8}, "predicts 8 channels"), ({"in_channels": 9}, "takes 9 channels"),
    ({"encoder_hid_dim": 16, "encoder_hid_dim_type": "text_proj"}, "other than text states"),
    ({"cross_attention_dim": (16, 24)}, "text states of width 16, 24, but"), ({"cross_attention_dim": 24}, "of width 24, but the text")])
def test_a_unet_that_asks_for_more_is_refused(changes, message, tiny_model, tmp_path):
    folder = copied(tiny_model, tmp_path)
    config = diffusers.UNet2DConditionModel.load_config(folder / "unet")
    diffusers.UNet2DConditionModel.from_config({**config, **changes}).save_pretrained(folder / "unet")
    assert message in refused(folder)


def test_a_list_of_equal_widths_is_one_width(tiny_model, tmp_path):
    folder = copied(tiny_model, tmp_path)
    edit_json(folder / "unet" / "config.json", cross_attention_dim=[16, 16])
    assert pipelines.load_pipeline(folder).unet.config.cross_attention_dim == [16, 16]


def test_a_pipeline_of_another_kind_is_refused_by_its_name(tiny_model, tmp_path):
    folder = copied(tiny_model, tmp_path)
    edit_json(folder / "model_index.json", _class_name="PixArtAlphaPipeline", unet=["diffusers", "PixArtTransformer2DModel"])
    assert "it is a PixArtAlphaPipeline, whose unet is PixArtTransformer2DModel" in refused(folder)


# ---- Texts ----

def test_a_tokenizer_that_does_not_say_its_length_takes_the_text_encoders(tiny_model, tmp_path):
    folder = copied(tiny_model, tmp_path)
    edit_json(folder / "tokenizer" / "tokenizer_config.json", model_max_length=None)
    assert models.encode_prompts(pipelines.load_pipeline(folder), ["a cat " * 50])[0][0].shape == (1, 16, 16)
    edit_json(folder / "tokenizer" / "tokenizer_config.json", model_max_length=77)  # of another text encoder
    assert pipelines.load_pipeline(folder).tokenizer.model_max_length == 16


def test_a_text_encoder_that_wants_an_attention_mask_gets_it(tiny_model, tmp_path):
    folder = copied(tiny_model, tmp_path)
    edit_json(folder / "text_encoder" / "config.json", use_attention_mask=True)
    pipeline = pipelines.load_pipeline(folder)
    tokens = pipeline.tokenizer(["a cat"], padding="max_length", max_length=16, return_tensors="pt")
    masked = pipeline.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
    (states,), _ = models.encode_prompts(pipeline, ["a cat"])
    assert torch.allclose(states, masked, atol=1e-6)
    assert not torch.allclose(states, pipeline.text_encoder(tokens.input_ids)[0], atol=1e-3)


def test_all_vectors_of_a_textual_inversion_token_are_read(tiny_model, tmp_path):
    pipeline = pipelines.load_pipeline(tiny_model)
    save_file({"<toy>": torch.randn(3, 16, generator=torch.Generator().manual_seed(0))}, tmp_path / "toy.safetensors")
    pipeline.load_textual_inversion(tmp_path / "toy.safetensors", token="<toy>")
    pipeline.save_pretrained(tmp_path / "with_toy")
    pipeline = pipelines.load_pipeline(tmp_path / "with_toy")
    (tokens,), = models.tokens_of(pipeline, ["a <toy>"])
    assert len(set(tokens)) == len(tokens) == 6  # begin, a, three vectors, end
    padded = torch.tensor([[*tokens, *[tokens[-1]] * 10]])
    assert torch.equal(models.encode_prompts(pipeline, ["a <toy>"])[0][0][0], pipeline.text_encoder(padded.repeat(2, 1))[0][0])


def test_clip_skip_is_diffusers_and_a_saved_model_is_not_shortened_again(tmp_path):
    pipeline = pipelines.load_pipeline(EMOJI)
    tokens = pipeline.tokenizer(["a cat", ""], padding="max_length", return_tensors="pt").input_ids
    states = pipeline.text_encoder(tokens, output_hidden_states=True).hidden_states
    want = pipeline.text_encoder.final_layer_norm(states[-2])  # as in diffusers' encode_prompt with clip_skip=1
    skipping = pipelines.load_pipeline(EMOJI, clip_skip=1)
    assert torch.equal(models.encode_prompts(skipping, ["a cat"])[0][0][0], want[0])
    skipping.save_pretrained(tmp_path / "saved")
    for options in ({"clip_skip": 1}, {}):
        saved = pipelines.load_pipeline(tmp_path / "saved", **options)
        assert torch.equal(models.encode_prompts(saved, ["a cat"])[0][0][0], want[0])
    assert "--clip-skip 2: the text encoder has only 2 layers" in refused(EMOJI, clip_skip=2)
    edit_json(tmp_path / "saved" / "text_encoder" / "config.json", clip_skip=2)
    assert "without its last 2 layers, which cannot come back" in refused(tmp_path / "saved", clip_skip=1)


# ---- Image sizes ----

def test_a_rectangular_model_and_height_and_width_give_images_of_diffusers_size(tiny_model, tmp_path):
    folder = copied(tiny_model, tmp_path)
    edit_json(folder / "unet" / "config.json", sample_size=[8, 12])
    drawn = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)("a cat", num_inference_steps=2)
    policies = [sampling.load_policy(folder, 2, 1.0, 5.0), sampling.load_policy(tiny_model, 2, 1.0, 5.0, width=24)]
    for policy in policies:
        trajectory = sampling.rollout(policy, ["a cat"], torch.Generator(), 1)
        image = networks.to_pil(models.decode(policy.pipeline, trajectory.x_0)[0])
        assert image.size == drawn.images[0].size == (24, 16)
    policies[1].pipeline.save_pretrained(tmp_path / "wide")
    assert models.latent_shape(pipelines.load_pipeline(tmp_path / "wide")) == (4, 8, 12)
    assert "--height 15: must be a multiple of 2 pixels" in refused(tiny_model, height=15)


# ---- Compiled ----

def test_a_compiled_unet_samples_learns_and_is_saved_as_the_plain_one(tiny_model, monkeypatch):
    phases = []

    def compiled_by_hand(network):  # the real one takes minutes
        def call(*inputs, **options):
            phases.append(torch.is_grad_enabled())
            return network._call_impl(*inputs, **options)

        network._compiled_call_impl = call

    monkeypatch.setattr(torch.nn.Module, "compile", compiled_by_hand)
    plain = run(*tiny_flags(tiny_model, name="plain", epochs=1))
    compiled = run(*tiny_flags(tiny_model, name="compiled", epochs=1), "--compile")
    assert without_seconds(compiled) == without_seconds(plain) and set(phases) == {True, False}
    saved = [load_file(f"runs/{name}/model/unet/diffusion_pytorch_model.safetensors") for name in ("plain", "compiled")]
    assert saved[0].keys() == saved[1].keys() and all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


@pytest.mark.parametrize("device, precision, there, message", [
    ("cuda", "bf16", ["g++"], "--compile needs the package triton"), ("cpu", "fp32", [], "C\\+\\+ compiler"),
    ("cpu", "bf16", ["g++"], "only the outer level")])
def test_compile_is_refused_without_a_compiler_or_where_it_loses_gradients(device, precision, there, message, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: name if name in there else None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        settings.check_compiler(device, precision)
