"""Rewards: images and prompts in, numbers out. They know nothing of the policy.

The contract, for every reward here and for your own:

    reward(images, prompts) -> values                or (values, notes)

    images   (B, 3, H, W) float32 in [0, 1], on the policy's device, for any B
    prompts  B prompts.Prompt for the rewards of this project; B texts for a function of your own
    values   B finite numbers, higher is better: a tensor, an array or a list
    notes    B strings, for example the answers of a vision-language model; those of the trained reward are
             logged, and drawn under the images. A dictionary is taken, and not kept

A reward that is only watched (--watch) may return NaN for an image that it cannot judge. A function of your
own with a third parameter gets `metadata`: B dictionaries, the other fields of a JSON-lines prompt file. It
may say its unit: `my_reward.unit = "points"`, or "%" for shares from 0 to 1. It runs without gradients, on a
copy of the images, after Python's, numpy's and torch's generators were seeded from the run's seed and the
epoch. For universal guidance (beyond/) it must compute in torch alone, and say so by
`my_reward.differentiable = True`; another reward it then calls by `with_gradient`.

A function of your own may call others, with plain texts. This one adds two, with weights:

    from rewards import load_reward
    aesthetic, small = load_reward("aesthetic", "cuda"), load_reward("compressibility")

    def weighted_sum(images, prompts):
        return aesthetic(images, prompts)[0] + 0.1 * small(images, prompts)[0]

To add a reward to this file, write a function and name it in REWARDS; or a class that loads a network, and
name it in LEARNED, here and in support/settings.py (its options are settings, its default prompts a rule).
"""
import functools
import inspect
import io
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from beyond.ocr import OCR
from beyond.preference_rewards import HPSv2, ImageReward, PickScore
from prompts import Prompt
from support import processes
from support.networks import (clip_pixels, clip_pixels_with_gradient, from_pretrained, hub_file,
                              image_embeddings, load_clip, load_weights, read_weights, scoring_head)
from support.settings import short_name
from support.user_files import user_function

AESTHETIC_HEAD = "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"
LLAVA, DEBERTA = "llava-hf/llava-1.5-7b-hf", "microsoft/deberta-xlarge-mnli"
MAX_ANSWER = 64  # tokens, as in the authors' code


# ---- JPEG size (paper, section 5.1) ----

def compressibility(images, prompts):
    """Minus the size of the image as a JPEG, in kB of 1,000 bytes."""
    return [-jpeg_kilobytes(image) for image in images]


def incompressibility(images, prompts):
    """The size of the image as a JPEG, in kB of 1,000 bytes."""
    return [jpeg_kilobytes(image) for image in images]


compressibility.unit, incompressibility.unit = (-1, "kB"), (1, "kB")


def jpeg_kilobytes(image):
    """Size of one image (3, H, W) in [0, 1] as a JPEG, headers included.

    Each part of the recipe changes the number: rounded to 8 bits; Pillow at quality 95, with its defaults
    (4:2:0 chroma subsampling, no optimize, not progressive). The authors' PyTorch port does the same. Their
    JAX code truncates to 8 bits. (oracles/authors_oracle.json has both sizes of five images.)
    """
    file = io.BytesIO()
    to_pil(image).save(file, "JPEG", quality=95)
    return file.tell() / 1000


def to_pil(image):
    """An image (3, H, W), float in [0, 1] or uint8 -> 8-bit RGB image of Pillow, rounded, not truncated."""
    if image.dtype != torch.uint8:
        image = (image.float() * 255).round().clamp(0, 255).byte()
    return Image.fromarray(image.cpu().permute(1, 2, 0).numpy())


# ---- Aesthetic quality (section 5.2) ----

class Aesthetic:
    """LAION's aesthetic predictor, about 1 to 10: an MLP on the normalised image embedding of CLIP ViT-L/14.

    Fetches 1.7 GB of CLIP and 4 MB of MLP, the weights `sac+logos+ava1-l14-linearMSE`. On a GPU it
    takes 2.4 GB in fp32 (studies/results/gpu.md). We have not compared it with the published scores; names
    and shapes of the weights are the published head's. reward_model: another CLIP. aesthetic_head: a file of
    the MLP's weights.
    """
    differentiable = True

    def __init__(self, device, reward_model="", aesthetic_head=""):
        model = reward_model or "openai/clip-vit-large-patch14"
        self.processor, self.clip = load_clip(model, device)
        weights = read_weights(aesthetic_head or hub_file(*AESTHETIC_HEAD))
        head = scoring_head(self.clip.config.projection_dim)
        self.head = load_weights(head, weights, "layers.").to(device)
        for network in (self.clip, self.head):
            network.requires_grad_(False)  # universal guidance needs a gradient to the images alone

    def __call__(self, images, prompts):
        pixels = (clip_pixels_with_gradient if images.requires_grad else clip_pixels)(self.processor, images)
        embeddings = image_embeddings(self.clip, pixels)
        return self.head(F.normalize(embeddings)).squeeze(1)


# ---- Rewards by a vision-language model: alignment (section 5.3) and counting (appendix A) ----

class VLM:
    """A vision-language model that answers questions about images. (The authors send a JPEG. We do not.)

    LLaVA, or any other decoder-only image-text-to-text model of transformers that has a chat template (some
    need torchvision, and say so). It decodes greedily, so the same image gets the same answer. Half precision
    on a GPU. LLaVA 1.5 7B fetches 14 GB, which is also what its weights need of a GPU.
    """

    def __init__(self, device, model):
        from transformers import AutoModelForImageTextToText, AutoProcessor
        self.processor = from_pretrained(AutoProcessor, model, backend="pil")
        dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
        network = from_pretrained(AutoModelForImageTextToText, model, dtype=dtype)
        self.network = network.to(device)
        config = self.network.config
        if not hasattr(self.processor, "image_processor") or config.is_encoder_decoder or not (
                self.processor.chat_template or config.model_type == "llava"):
            raise ValueError(f"network {model!r} is no decoder-only VLM with a chat template")
        self.processor.tokenizer.padding_side = "left"  # every answer begins where the padded questions end

    @torch.no_grad()
    def answer(self, images, questions):
        """B images (3, H, W) and B questions -> B answers. Eight go through at a time."""
        answers, bos_token = [], self.processor.tokenizer.bos_token
        for start in range(0, len(questions), 8):
            pil_images = [to_pil(image) for image in images[start:start + 8]]
            texts = [dialogue(self.processor, question) for question in questions[start:start + 8]]
            inputs = self.processor(images=pil_images, text=texts, padding=True, return_tensors="pt",
                                    add_special_tokens=not (bos_token and texts[0].startswith(bos_token)))
            inputs = inputs.to(self.network.device, self.network.dtype)
            tokens = self.network.generate(**inputs, do_sample=False, max_new_tokens=MAX_ANSWER)
            tokens = tokens[:, inputs.input_ids.shape[1]:]
            answers += self.processor.batch_decode(tokens, skip_special_tokens=True)
        return [answer.strip() for answer in answers]


load_vlm = functools.cache(VLM)  # two rewards may ask the same one


def dialogue(processor, question):
    """The text that asks a question about an image: by the processor's chat template, else by LLaVA's."""
    if not processor.chat_template:
        return f"USER: <image>\n{question} ASSISTANT:"
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


class BertRecall:
    """BERTScore recall (Zhang et al. 2020): how well an answer's tokens match each token of a reference.

    A match is the cosine of two contextual embeddings. The recall is the mean over the reference's tokens,
    without idf weights, as in the package bert-score. model: an encoder of transformers, or a pipeline's
    folder. baseline: what unrelated sentences score; a recall r becomes (r - baseline) / (1 - baseline).
    """

    def __init__(self, device, model, baseline=0.0):
        from transformers import AutoConfig, AutoModel, AutoTokenizer
        is_pipeline = (Path(model) / "text_encoder").is_dir()
        parts = ("tokenizer", "text_encoder")
        tokenizer, options = ({"subfolder": part} if is_pipeline else {} for part in parts)
        self.tokenizer = from_pretrained(AutoTokenizer, model, **tokenizer)
        options["config"] = config = from_pretrained(AutoConfig, model, **options)
        unused = r"\bpooler\b"
        if config.model_type == "deberta" and config.num_hidden_layers == 48:
            config.num_hidden_layers = 40  # bert-score takes this layer of deberta-xlarge-mnli
            unused = r"\blayer\.4[0-7]\b"
        options["dtype"] = torch.float32
        self.encoder = from_pretrained(AutoModel, model, unused, **options).to(device)
        self.baseline = baseline

    @torch.no_grad()
    def __call__(self, answers, references):
        """B answers and B references -> rescaled recall (B,). An empty answer has a recall of 0."""
        reference, _, is_word = self.embed(references)                       # (B, R, E), (B, R), (B, R)
        answer, is_token, is_answer_word = self.embed(answers)               # (B, A, E), (B, A), (B, A)
        similarity = torch.einsum("bre,bae->bra", reference, answer) * is_token[:, None]
        recall = (similarity.amax(2) * is_word).sum(1) / is_word.sum(1)      # R_BERT, section 3
        recall = torch.where(is_answer_word.sum(1) > 0, recall, 0.0)
        return (recall - self.baseline) / (1 - self.baseline)

    def embed(self, texts):
        """B texts -> unit vectors (B, L, E), masks (B, L): without padding, and without special tokens."""
        options = dict(padding=True, truncation=True, return_special_tokens_mask=True, return_tensors="pt")
        tokens = self.tokenizer(texts, **options).to(self.encoder.device)
        mask, special = tokens.attention_mask, tokens.pop("special_tokens_mask")
        states = F.normalize(self.encoder(**tokens).last_hidden_state, dim=2)
        return states, mask.float(), (mask * (1 - special)).float()


class Alignment:
    """Alignment without labels (section 5.3): a VLM says what it sees, BERTScore compares with the prompt.

    The recall says how much of the prompt is in the answer. The answers are the notes. Unrelated sentences
    score above 0; bert_baseline moves that value to 0. reward_model: the VLM. bert_model, bert_baseline: see
    BertRecall. wording: "code", as the authors' code asks and compares, or "paper", as the paper says.
    """
    WORDINGS = {"code": ("Answer concisely: what is going on in this image?", "The image contains {}"),
                "paper": ("What is happening in this image?", "{}")}

    def __init__(self, device, reward_model="", wording="code", bert_model="", bert_baseline=0.0):
        self.question, self.reference = self.WORDINGS[wording]
        self.vlm = load_vlm(device, reward_model or LLAVA)
        self.recall = BertRecall(device, bert_model or DEBERTA, bert_baseline)

    def __call__(self, images, prompts):
        answers = self.vlm.answer(images, [self.question] * len(prompts))
        return self.recall(answers, [self.reference.format(prompt.text) for prompt in prompts]), answers


class Counting:
    """The share of a prompt's questions that a VLM answers rightly (appendix A): 0, 1/2 or 1.

    An answer is right if one of its words is among the prompt's right answers. The answers are the notes. A
    prompt without questions cannot be judged: NaN. reward_model: the VLM.
    """
    unit = "%"

    def __init__(self, device, reward_model=""):
        self.vlm = load_vlm(device, reward_model or LLAVA)

    def __call__(self, images, prompts):
        asked = [(k, *question) for k, prompt in enumerate(prompts) for question in prompt.questions]
        answers = self.vlm.answer([images[k] for k, _, _ in asked], [question for _, question, _ in asked])
        marks, notes = [[] for _ in prompts], [[] for _ in prompts]
        for (k, _, right), answer in zip(asked, answers):
            marks[k].append(float(not set(right).isdisjoint(re.findall("[a-z0-9]+", answer.lower()))))
            notes[k].append(answer)
        return [np.mean(mark) if mark else np.nan for mark in marks], [" / ".join(note) for note in notes]


# ---- The table of rewards: the next one goes here ----

LEARNED = {"aesthetic": Aesthetic, "alignment": Alignment, "counting": Counting, "pickscore": PickScore,
           "hpsv2": HPSv2, "imagereward": ImageReward, "ocr": OCR}  # classes, made with a device and options
REWARDS = {"compressibility": compressibility, "incompressibility": incompressibility, **LEARNED}


@dataclass
class Reward:
    """A loaded reward. It checks that its function keeps the contract."""
    name: str                  # in REWARDS, or a function's own
    function: object           # images (B, 3, H, W) and B prompts.Prompt -> values, or (values, notes)
    unit: tuple = (1, "")      # of unit_of
    nan_allowed: bool = False  # where NaN means that an image cannot be judged: watched rewards, evaluate.py
    at_once: int = 256         # images, in parts: 10,000 of 512 x 512 pixels would fill 31 GB

    def __call__(self, images, prompts):
        """Values (B,) on the CPU, in float64 for their small differences, and B notes. prompts: or texts."""
        values, notes = [], []
        for part in processes.parts(slice(0, len(images)), self, "at_once"):
            with part as rows:
                some, words = self.checked(images[rows].clone(), prompts[rows])
                values.append(some)
                notes += words
        return torch.cat(values), notes

    @torch.no_grad()
    def checked(self, images, prompts):
        """Values and notes of images that go to the function together."""
        values, notes = self.called(images, prompts)
        values = torch.as_tensor(values, dtype=torch.float64, device="cpu")
        if values.shape != (len(images),) or len(notes) != len(images):
            raise ValueError(f"the reward {self.name} returned {list(values.shape)} values and {len(notes)} "
                             f"notes for {len(images)} images")
        wrong = values.isinf() if self.nan_allowed else ~values.isfinite()
        if wrong.any():
            raise ValueError(f"the reward {self.name} returned {values[wrong][0]} for an image")
        return values, notes

    def with_gradient(self, images, prompts):
        """The values alone, (B,), with a gradient to the images."""
        if not getattr(self.function, "differentiable", False):
            raise ValueError(f"the reward {self.name} has no gradient; aesthetic has one, and a function "
                             "of your own in torch, if it says so by .differentiable = True")
        return self.called(images, prompts)[0]

    def called(self, images, prompts):
        """What the function returns, as values and notes of one line each, empty if it has none."""
        prompts = [Prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        result = self.function(images, prompts)
        has_notes = isinstance(result, tuple) and isinstance(result[-1], (list, tuple, dict))
        values, notes = result if has_notes else (result, {})
        notes = [""] * len(prompts) if isinstance(notes, dict) else notes
        return values, [" ".join(str(note).split()) for note in notes]


def load_reward(name, device="cpu", nan_allowed=False, **options):
    """The Reward of a name in REWARDS, or of 'path/to/file.py:function'.

    A learned reward loads its network, on that device and with those options.
    """
    if name in LEARNED:
        function = LEARNED[name](device, **options)
    else:
        function = REWARDS.get(name) or of_texts(user_function(name, tuple(REWARDS)))
    return Reward(short_name(name), function, unit_of(name), nan_allowed)


def of_texts(function):
    """A user's function as a reward of ours. It takes texts, and metadata if it has a third parameter."""
    asks = len(inspect.signature(function).parameters) > 2

    @functools.wraps(function)  # which keeps its unit, and whether it is differentiable
    def reward(images, prompts):
        metadata = [[prompt.metadata for prompt in prompts]] if asks else []
        return function(images, [prompt.text for prompt in prompts], *metadata)

    return reward


def unit_of(name):
    """How people read a reward: a factor, and the unit's name."""
    unit = getattr(REWARDS.get(name) or user_function(name, tuple(REWARDS)), "unit", "")
    return unit if isinstance(unit, tuple) else (100 if unit == "%" else 1, unit)


def display(value, unit):
    """A reward as people read it: '1.72 kB' for a compressibility of -1.72, '96 %' for 0.96, '-' for NaN."""
    factor, name = unit                                                      # of unit_of
    if value is None or value != value:
        return "-"
    shown = {"%": f"{factor * value:.0f} %", "": f"{value:.3g}"}
    return shown.get(name, f"{factor * value:.2f} {name}")
