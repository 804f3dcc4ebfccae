"""What several test files share: tiny random models, a file of small rewards, train.py in this process."""
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import (AutoencoderKL, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler,
                       SD3Transformer2DModel, StableDiffusion3Pipeline, StableDiffusionPipeline,
                       StableDiffusionXLPipeline, UNet2DConditionModel, UniPCMultistepScheduler)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tqdm import tqdm
from transformers import (CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPTextModel,
                          CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionConfig, LlamaConfig,
                          LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast,
                          T5Config, T5EncoderModel)

import policy
import train
from ddpo import Learner
from support import run_folder
from support.settings import Config, build_config

torch.set_num_threads(1)  # pytest runs two processes (pyproject.toml); the forked ones must round as these do
ROOT = Path(__file__).resolve().parent
EMOJI, EMOJI_FLOW, EMOJI_VLM = (ROOT / "emoji" / name for name in ("model", "flow", "vlm"))
STABLE_DIFFUSION = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                        set_alpha_to_one=False, clip_sample=False)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def with_a_lock_of_its_own():
    """For tqdm: an interrupted test may leave its lock locked, and a later test's threads would wait."""
    tqdm.set_lock(threading.RLock())


IMAGES = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(7))


# ---- Tiny random models of the published architectures ----

LAYERS = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
SMALL = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder with tiny_pipeline."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


def tiny_pipeline():
    """A pipeline of Stable Diffusion's architecture and its sampler, PNDM: 8 x 8 latents."""
    tokenizer = CLIPTokenizer.from_pretrained(EMOJI / "tokenizer")
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=2, cross_attention_dim=16, up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"))
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), norm_num_groups=4, sample_size=16)
    text_encoder = CLIPTextModel(CLIPTextConfig(
        **LAYERS | dict(num_hidden_layers=1), vocab_size=len(tokenizer), projection_dim=16,
        max_position_embeddings=tokenizer.model_max_length))
    scheduler = PNDMScheduler(skip_prk_steps=True, **without(STABLE_DIFFUSION, "clip_sample"))
    return StableDiffusionPipeline(vae, text_encoder, tokenizer, unet, scheduler, None, None,
                                   requires_safety_checker=False)


def without(options, *names):
    """The options but for some."""
    return {name: value for name, value in options.items() if name not in names}


def edit_weights(folder, edit):
    """Replace the weights of a network's folder by edit(weights)."""
    path, = folder.glob("*.safetensors")
    save_file(edit(load_file(path)), path, {"format": "pt"})


def edit_json(path, **changes):
    """Set entries of a JSON file; None deletes one."""
    entries = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in entries.items() if value is not None}))


@pytest.fixture
def tiny_policy(tiny_model):
    return load_policy(tiny_model, steps=4)


@pytest.fixture(scope="session")
def tiny_flow(tiny_model, tmp_path_factory):
    """The same with flow matching: a folder that plain diffusers draws from. Its last step is no action."""
    folder = tmp_path_factory.mktemp("models") / "flow"
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    pipeline.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True,
                                                 flow_shift=2.0, steps_offset=1)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory):
    """A folder with a pipeline of SDXL's architecture and its sampler, Euler: 8 x 8 latents."""
    torch.manual_seed(0)
    part, (_, large), folder = tiny_pipeline(), tiny_clips(), tmp_path_factory.mktemp("models") / "sdxl"
    unet = UNet2DConditionModel(**{
        **part.unet.config, "cross_attention_dim": 16 + 24, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 24})
    scheduler = EulerDiscreteScheduler(timestep_spacing="leading",
                                       **without(STABLE_DIFFUSION, "set_alpha_to_one", "clip_sample"))
    StableDiffusionXLPipeline(part.vae, part.text_encoder, large, part.tokenizer, part.tokenizer, unet,
                              scheduler, force_zeros_for_empty_prompt=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory):
    """A folder with a pipeline of Stable Diffusion 3's architecture: 8 x 8 latents, three text encoders."""
    torch.manual_seed(0)
    part, (small, large), folder = tiny_pipeline(), tiny_clips(), tmp_path_factory.mktemp("models") / "sd3"
    vae = AutoencoderKL(**{
        **part.vae.config, "latent_channels": 16, "shift_factor": 0.06, "scaling_factor": 1.5,
        "use_quant_conv": False, "use_post_quant_conv": False})
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=48, caption_projection_dim=16, pos_embed_max_size=8,
        pooled_projection_dim=16 + 24, qk_norm="rms_norm")
    words = tokenizer_of("<pad> </s> <unk> a an one two three cat cats dog dogs ant mice", eos_token="</s>")
    t5 = T5EncoderModel(T5Config(vocab_size=len(words), d_model=48, d_kv=8, d_ff=16, num_layers=1,
                                 num_heads=2))
    scheduler, clip = FlowMatchEulerDiscreteScheduler(shift=3.0), part.tokenizer
    parts = transformer, scheduler, vae, small, clip, large, clip, t5, words
    StableDiffusion3Pipeline(*parts).save_pretrained(folder)
    return folder


def tiny_clips():
    """Two text encoders with projections, of widths 16 and 24."""
    tokenizer = CLIPTokenizer.from_pretrained(EMOJI / "tokenizer")
    return [CLIPTextModelWithProjection(CLIPTextConfig(
        **LAYERS | dict(hidden_size=size), vocab_size=len(tokenizer), projection_dim=size,
        max_position_embeddings=tokenizer.model_max_length, eos_token_id=tokenizer.eos_token_id))
            for size in (16, 24)]


def tokenizer_of(words, **special):
    """A tokenizer that knows these words alone."""
    words = {word: k for k, word in enumerate(dict.fromkeys(words.split()))}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = Lowercase(), Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>",
                                   **special)


@pytest.fixture(params=["tiny_model", "tiny_flow"], ids=["diffusion", "flow"])
def either_model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """A folder with a CLIP of 32 x 32 pixels, its image processor and the toy model's tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "clip"
    vision = dict(image_size=32, patch_size=8, **LAYERS)
    CLIPModel(CLIPConfig(projection_dim=24, vision_config=vision, text_config=LAYERS)).save_pretrained(folder)
    SMALL.save_pretrained(folder)
    CLIPTokenizer.from_pretrained(EMOJI / "tokenizer", model_max_length=77).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_vlm(tmp_path_factory):
    """A folder with a model of LLaVA's architecture, 32 x 32 pixels, its processor and a small tokenizer."""
    torch.manual_seed(0)
    folder, layers = tmp_path_factory.mktemp("models") / "vlm", LAYERS | dict(intermediate_size=32)
    words = tokenizer_of(
        "<pad> <unk> <s> </s> <image> user : assistant ? . how many animals are in this image what animal is "
        "a an one two three four cat cats dog dogs happening answer concisely going on", bos_token="<s>",
        eos_token="</s>", additional_special_tokens=["<image>"])
    LlavaForConditionalGeneration(LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=32, patch_size=8, **layers), image_token_index=4,
        text_config=LlamaConfig(vocab_size=len(words), max_position_embeddings=128, pad_token_id=0,
                                bos_token_id=2, eos_token_id=3, **layers))).save_pretrained(folder)
    LlavaProcessor(SMALL, words, patch_size=8, vision_feature_select_strategy="default",
                   num_additional_image_tokens=1).save_pretrained(folder)
    return folder


# ---- Learning, by the functions ----

def load_policy(model, steps, eta=1.0, guidance_scale=0.0, trains=True, scored=True, call=None, **settings):
    """The policy of a model, in fp32 on the CPU."""
    given = {"precision": "fp32", "device": "cpu", **settings}
    config = Config(model=str(model), sampling_steps=steps, eta=eta, guidance_scale=guidance_scale,
                    call=json.dumps(call or {}), **given)
    return policy.load_policy(config, None if trains else str(model), scored)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def learner(policy, learning_rate=1e-3, sgd=None, **changes):
    """What ddpo_update and rwr_update take besides a trajectory and advantages or weights.

    sgd: learning rate of plain SGD in AdamW's place, which would hide a wrong scale of the gradient.
    """
    given = dict(learning_rate=learning_rate, updates_per_epoch=2, micro_batch=8, clip_range=1e-2,
                 skip_last_steps=0, batch_size=8)
    config = replace(build_config({"precision": "fp32"}), **given | changes)
    learner = Learner(policy, config)
    if sgd:
        learner.optimizer = torch.optim.SGD(learner.weights, lr=sgd)
    return dict(learner=learner, rng=rng(), config=config)


def weights(policy):
    return {name: weight.detach().clone() for name, weight in policy.denoiser.state_dict().items()}


# ---- Training, by the command ----

REWARDS = """
import random
def redness(images, prompts):
    values = (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))
    return values, [prompt.upper() for prompt in prompts]
def shuffled(images, prompts):
    values = redness(images, prompts)[0].tolist()
    random.shuffle(values)
    return values
def is_cat(images, prompts): return [1.0 if prompt == "a cat" else float("nan") for prompt in prompts]
is_cat.unit = "%"
def unknown(images, prompts): return [float("nan")] * len(prompts)
def brightness(images, prompts): return images.mean((1, 2, 3))
brightness.unit = "lux"
def letters(images, prompts): return [len(prompt) for prompt in prompts]
def noise(images, prompts): return [random.random() for _ in prompts]
"""


@pytest.fixture
def own_reward(tmp_path):
    """The name of a function of REWARDS, as for --reward."""
    (tmp_path / "own.py").write_text(REWARDS)
    return "own.py:{}".format


def run(*flags, code=0):
    """train.py in this process. Returns the run's log."""
    assert train.main([str(flag) for flag in flags]) == code
    folders = sorted(Path("runs").glob("*"), key=lambda folder: folder.stat().st_mtime)
    return run_folder.read_rows(folders[-1]) if folders else []


def forked(count, *flags, send=None):
    """train.py in forked processes, several as torchrun would start them; a start of Python takes seconds.

    send: (signal, rows, seconds): the last process gets it, so long after the log of runs/r has so many rows.
    Returns their exit codes, and what each said on stderr.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = {"WORLD_SIZE": f"{count}", "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": f"{free.getsockname()[1]}"}
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=forked_one, args=(rank, world, flags)) for rank in range(count)]
    for child in children:
        child.start()
    if send:
        number, rows, seconds = send
        while len(run_folder.read_rows(Path("runs/r"))) < rows and children[-1].is_alive():
            time.sleep(0.005)
        time.sleep(seconds)
        if children[-1].is_alive():
            os.kill(children[-1].pid, number)
    for child in children:
        child.join(60)
        child.kill()  # if it waits for another that has failed: torchrun would end it
        child.join()
    return [child.exitcode for child in children], [Path(f"err_{rank}").read_text() for rank in range(count)]


def forked_one(rank, world, flags):
    """One of these processes."""
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs without it
    os.environ |= {**world, "RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
    sys.stdout, sys.stderr = (open(f"{stream}_{rank}", "w", buffering=1) for stream in ("out", "err"))
    sys.__stderr__ = sys.stderr
    try:
        code = train.main([str(flag) for flag in flags])
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.exit(code)


def tiny_flags(tiny_model, **changes):
    """train.py's flags for a run of two epochs on a tiny model. A list gives a flag more than once."""
    flags = {"model": tiny_model, "epochs": 2, "samples-per-epoch": 4, "images-per-prompt": 2,
             "updates-per-epoch": 2, "sampling-steps": 3, "eval-prompts": 3, "eval-every": 1, "name": "r",
             **changes}
    return [part for name, value in flags.items() for one in (value if isinstance(value, list) else [value])
            for part in (f"--{name}", str(one))]


def without_seconds(rows):
    return [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in rows]


def rounded(value, rel=1e-5):
    """A log that equals another one that differs in rounding alone."""
    if isinstance(value, list):
        return [rounded(part, rel) for part in value]
    if isinstance(value, dict):
        return {name: rounded(part, rel) for name, part in value.items()}
    return pytest.approx(value, rel=rel, abs=1e-5) if isinstance(value, float) else value
