"""Rewards: images and prompts in, numbers out. They know nothing of the policy.

The contract, for every reward here and for your own:

    reward(images, prompts) -> values                or (values, notes)

    images   (B, 3, H, W) float32 in [0, 1], on the policy's device, for any B
    prompts  B prompts.Prompt for the rewards of this project; B texts for a function of your own
    values   B real numbers, higher is better: a tensor, an array, a list or a generator
    notes    B strings, for example the answers of a vision-language model; those of the trained reward are logged, and drawn
             under the images. Or a dictionary of lists of length B

A reward that is only watched (--watch) may return NaN for an image that it cannot judge. A function of your own may have a third
parameter, `metadata`: B dictionaries, the other fields of a JSON-lines prompt file. It may say its unit, in which its values are
shown: `my_reward.unit = "points"`, or "%" for shares from 0 to 1. It runs without gradients, on a copy of the images. What it
changes of the working folder, torch's settings, the random states and the signals is put back when it returns. A function that
computes in torch alone may say `my_reward.differentiable = True`. DDPO does not need it. Universal guidance does
(baselines_guidance.py). If it calls another reward, it does so by `with_gradient`.

Rewards can be called from a function of your own, with plain texts. This one adds two, with weights:

    import torch
    from rewards import load_reward

    parts = [(1.0, load_reward("aesthetic", "cuda" if torch.cuda.is_available() else "cpu")),
             (0.1, load_reward("compressibility"))]

    def weighted_sum(images, prompts):
        return sum(weight * reward(images, prompts)[0] for weight, reward in parts)

To add a reward, write a function here and name it in REWARDS; or a class that loads a network, and name it in LEARNED. Its options
belong in settings.REWARD_SETTINGS, its unit in UNITS, its prompts in DEFAULT_PROMPTS.
"""
import ast
import contextlib
import copy
import functools
import hashlib
import importlib.util
import inspect
import io
import re
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from networks import (REWARD_MODEL, announce, clip_pixels, clip_pixels_with_gradient, from_pretrained, hub_file, image_embeddings, load_clip,
                      load_network, load_weights, read_weights, scoring_head, to_pil, type_and_message)
from preference_rewards import HPSv2, ImageReward, PickScore
from process import global_rng_states, importable, process_unchanged, set_global_rng_states
from prompts import Prompt

BERT_MODEL = "BERTScore's encoder (--bert-model)"
AESTHETIC_HEAD = "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"
LLAVA, DEBERTA = "llava-hf/llava-1.5-7b-hf", "microsoft/deberta-xlarge-mnli"
HAS_GRADIENT = "aesthetic has one, and so has a function of your own that computes in torch and says it by .differentiable = True"
MAX_ANSWER = 64  # tokens, as in the authors' code


class RewardError(Exception):
    """A reward failed or broke the contract; the message says how. The run stops, and its state is saved."""


# ---- JPEG size (paper, section 5.1) ----

def compressibility(images, prompts):
    """Minus the size of the image as a JPEG, in kB of 1,000 bytes."""
    return [-jpeg_kilobytes(image) for image in images]


def incompressibility(images, prompts):
    """The size of the image as a JPEG, in kB of 1,000 bytes."""
    return [jpeg_kilobytes(image) for image in images]


def jpeg_kilobytes(image):
    """Size of one image (3, H, W) in [0, 1] as a JPEG, headers included.

    Each part of the recipe changes the number: round to 8 bits; Pillow's encoder at quality 95, its default 4:2:0 chroma
    subsampling, default Huffman tables (no optimize), baseline (not progressive). The authors' PyTorch port does the same. Their
    JAX code truncates to 8 bits. (oracles/authors_oracle.json has both sizes of five images.)
    """
    file = io.BytesIO()
    to_pil(image).save(file, "JPEG", quality=95)
    return file.tell() / 1000


# ---- Aesthetic quality (section 5.2) ----

class Aesthetic:
    """LAION's aesthetic predictor, about 1 to 10: an MLP on the normalised image embedding of CLIP ViT-L/14.

    Fetches 1.7 GB of CLIP and 4 MB of MLP, the weights `sac+logos+ava1-l14-linearMSE`. Needs 1.7 GB of memory (fp32).
    1 s an image on two cores (python studies/benchmark.py --reward aesthetic --images 8, random weights of that size). We have
    not compared it with the published scores; the names and shapes of the weights are those of the published head.
    reward_model: another CLIP, by hub name or folder. aesthetic_head: the MLP's weights as a file of safetensors or torch.
    """
    differentiable = True

    def __init__(self, device, reward_model="", aesthetic_head=""):
        self.processor, self.clip = load_clip(reward_model or "openai/clip-vit-large-patch14", device, REWARD_MODEL)
        described_as = "aesthetic head (--aesthetic-head)"
        weights = read_weights(aesthetic_head or hub_file(*AESTHETIC_HEAD, described_as))
        head = scoring_head(self.clip.config.projection_dim)
        self.head = load_weights(head, weights, "layers.", described_as).to(device)
        for network in (self.clip, self.head):  # a gradient to the images needs none to the weights, nor the memory for it
            network.requires_grad_(False)

    def __call__(self, images, prompts):
        pixels = (clip_pixels_with_gradient if images.requires_grad else clip_pixels)(self.processor, images)
        embeddings = image_embeddings(self.clip, pixels)
        return self.head(F.normalize(embeddings)).squeeze(1)


# ---- Rewards by a vision-language model: alignment (section 5.3) and counting (appendix A) ----

class VLM:
    """A vision-language model that answers questions about images. (The authors send theirs a JPEG of quality 80. We do not.)

    LLaVA, or any other decoder-only image-text-to-text model of transformers that has a chat template (some need torchvision,
    and say so). It decodes greedily, so the same image gets the same answer. Half precision on a GPU.
    LLaVA 1.5 7B fetches 14 GB, which is also what its weights need of a GPU.
    """

    def __init__(self, device, model):
        announce("the vision-language model", model)
        from transformers import AutoModelForImageTextToText, AutoProcessor
        self.processor = from_pretrained(AutoProcessor, model, REWARD_MODEL, backend="pil")
        dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
        self.network = load_network(AutoModelForImageTextToText, model, REWARD_MODEL, dtype=dtype).to(device)
        config = self.network.config
        if not hasattr(self.processor, "image_processor") or config.is_encoder_decoder or not (
                self.processor.chat_template or config.model_type == "llava"):
            raise ValueError(f"{REWARD_MODEL} {model!r} is not a decoder-only image-text-to-text model with a chat template")
        self.processor.tokenizer.padding_side = "left"  # so that every answer begins where the padded questions end

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
            answers += self.processor.batch_decode(tokens[:, inputs.input_ids.shape[1]:], skip_special_tokens=True)
        return [answer.strip() for answer in answers]


load_vlm = functools.cache(VLM)  # two rewards may ask the same one


def dialogue(processor, question):
    """The text that asks a question about an image: by the processor's chat template, or by LLaVA's if it has none."""
    if not processor.chat_template:
        return f"USER: <image>\n{question} ASSISTANT:"
    return processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}], add_generation_prompt=True)


class BertRecall:
    """BERTScore recall (Zhang et al. 2020): how well each token of a reference is matched by some token of an answer.

    A match is the cosine of two contextual embeddings. The recall is the mean over the reference's tokens, without idf weights,
    as in the package bert-score.
    model: any encoder of transformers, by hub name or folder. It may be a pipeline's folder, whose text encoder is taken.
    baseline: what unrelated sentences score. A recall r is rescaled to (r - baseline) / (1 - baseline).
    """

    def __init__(self, device, model, baseline=0.0):
        announce("the encoder for BERTScore", model)
        from transformers import AutoConfig, AutoModel, AutoTokenizer
        is_pipeline = (Path(model) / "text_encoder").is_dir()
        tokenizer, encoder = ({"subfolder": name} if is_pipeline else {} for name in ("tokenizer", "text_encoder"))
        self.tokenizer = from_pretrained(AutoTokenizer, model, BERT_MODEL, **tokenizer)
        config = from_pretrained(AutoConfig, model, BERT_MODEL, **encoder)
        unused = r"\bpooler\b"
        if config.model_type == "deberta" and config.num_hidden_layers == 48:
            config.num_hidden_layers = 40  # bert-score takes this layer of deberta-xlarge-mnli: it agrees best with people
            unused = r"\blayer\.4[0-7]\b"
        self.encoder = load_network(AutoModel, model, BERT_MODEL, unused, **encoder, config=config, dtype=torch.float32)
        self.encoder.to(device)
        self.baseline = baseline
        try:
            self(["a cat"], ["a cat"])
        except Exception as error:
            raise ValueError(f"{BERT_MODEL} {model!r} encodes no text by itself: {type_and_message(error)}") from error

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
        """B texts -> unit vectors (B, L, E), the mask of tokens without padding (B, L), and without special tokens (B, L)."""
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_special_tokens_mask=True, return_tensors="pt")
        tokens = tokens.to(self.encoder.device)
        mask, special = tokens.attention_mask, tokens.pop("special_tokens_mask")
        return F.normalize(self.encoder(**tokens).last_hidden_state, dim=2), mask.float(), (mask * (1 - special)).float()


class Alignment:
    """Prompt-image alignment without labels (section 5.3): a VLM says what it sees, BERTScore compares that with the prompt.

    The recall says how much of the prompt is in the answer. The answers are the notes. With the default encoder unrelated
    sentences score about 0.52, so the reward is flat at the bottom; bert_baseline moves that value to 0. 5 ms an image on one core
    with the embedded VLM (`seconds_reward` of the log); not measured with LLaVA.
    reward_model: the VLM, by hub name or folder. bert_model, bert_baseline: see BertRecall.
    wording: "code", as the authors' code asks and compares, or "paper", as the paper says.
    """
    WORDINGS = {"code": ("Answer concisely: what is going on in this image?", "The image contains {}"),
                "paper": ("What is happening in this image?", "{}")}

    def __init__(self, device, reward_model="", wording="code", bert_model="", bert_baseline=0.0):
        if not 0 <= bert_baseline < 1:
            raise ValueError(f"--bert-baseline {bert_baseline:g}: must be in [0, 1)")
        self.question, self.reference = self.WORDINGS[wording]
        self.vlm = load_vlm(device, reward_model or LLAVA)
        self.recall = BertRecall(device, bert_model or DEBERTA, bert_baseline)

    def __call__(self, images, prompts):
        answers = self.vlm.answer(images, [self.question] * len(prompts))
        return self.recall(answers, [self.reference.format(prompt.text) for prompt in prompts]), answers


class Counting:
    """The share of a prompt's own questions (how many, which animal) that a VLM answers rightly (appendix A): 0, 1/2 or 1.

    An answer is right if one of its words is among the prompt's right answers. The answers are the notes. A prompt without
    questions cannot be judged: NaN. 8 ms an image of two questions on one core with the embedded VLM (`seconds_reward` of the
    log); not measured with LLaVA.
    reward_model: the VLM, by hub name or folder.
    """

    def __init__(self, device, reward_model=""):
        self.vlm = load_vlm(device, reward_model or LLAVA)

    def __call__(self, images, prompts):
        asked = [(k, question, right) for k, prompt in enumerate(prompts) for question, right in prompt.questions]
        answers = self.vlm.answer([images[k] for k, _, _ in asked], [question for _, question, _ in asked])
        marks, notes = [[] for _ in prompts], [[] for _ in prompts]
        for (k, _, right), answer in zip(asked, answers):
            marks[k].append(float(not set(right).isdisjoint(re.findall("[a-z0-9]+", answer.lower()))))
            notes[k].append(answer)
        return [sum(mark) / len(mark) if mark else float("nan") for mark in marks], [" / ".join(note) for note in notes]


# ---- The table of rewards: the next one goes here ----

LEARNED = {"aesthetic": Aesthetic, "pickscore": PickScore, "hpsv2": HPSv2, "imagereward": ImageReward, "alignment": Alignment,
           "counting": Counting}  # classes, made with a device and with options
REWARDS = {"compressibility": compressibility, "incompressibility": incompressibility, **LEARNED}
DEFAULT_PROMPTS = {"compressibility": "imagenet_animals", "incompressibility": "imagenet_animals",  # the paper's
                   "aesthetic": "common_animals", "pickscore": "painted_animals", "hpsv2": "painted_animals",
                   "imagereward": "dpok", "alignment": "animal_activities", "counting": "two_to_eight_animals"}
UNITS = {"compressibility": (-1, "kB"), "incompressibility": (1, "kB"), "counting": (100, "%")}  # see unit_of


# ---- A reward by its name ----

@dataclass
class Reward:
    """A loaded reward. It checks that its function keeps the contract, and puts back what the function changed of the process.

    process.process_unchanged says what.
    """
    name: str               # in REWARDS, or a function's own
    function: object        # images (B, 3, H, W) and B prompts.Prompt -> values, or (values, notes)
    unit: tuple = (1, "")   # see unit_of
    nan_allowed: bool = False  # where NaN means that an image cannot be judged: watched rewards, evaluate.py
    source: str = ""        # of a user's function, its file; else the name
    identity: str = ""      # differs if the file differs
    rng_states: dict = None  # the reward's own stream of the libraries' global generators, from its first call on

    def __call__(self, images, prompts):
        """Values (B,) float64 on the CPU, and B notes. Raises RewardError if the function fails or breaks the contract.

        prompts: B prompts.Prompt or texts. In float64 rewards of a large offset keep their differences until they are whitened.
        """
        prompts = as_prompts(prompts)
        return self.checked(self.called(images, prompts, torch.no_grad()), prompts)

    @property
    def differentiable(self):
        """Whether with_gradient can be called: the function says so itself, by its attribute `differentiable`."""
        return getattr(self.function, "differentiable", False)

    def with_gradient(self, images, prompts):
        """The values alone, (B,), with a gradient to the images. Raises RewardError, also if the reward is not differentiable."""
        if not self.differentiable:
            raise RewardError(f"the reward {self.name} is not differentiable, as far as it says, and has no gradient: {HAS_GRADIENT}")
        prompts = as_prompts(prompts)
        result = self.called(images, prompts, torch.enable_grad())
        self.checked(result, prompts)
        values = values_and_notes(result)[0]
        if not getattr(values, "requires_grad", False):
            raise RewardError(f"the reward {self.name} says that it is differentiable, but its values have no gradient")
        return values

    def called(self, images, prompts, gradients):
        """What the function returns for images and prompts, in that context of torch. Raises RewardError."""
        try:
            with process_unchanged(), gradients:
                if self.rng_states:
                    set_global_rng_states(self.rng_states)
                result = self.function(images, prompts)
                self.rng_states = global_rng_states()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit in a reward is an error of the reward, too
            raise RewardError(f"the reward {self.name} failed: {type_and_message(error)}{self.line_of(error)}") from error
        if torch.is_inference_mode_enabled():
            raise RewardError(f"the reward {self.name} left torch's inference mode on, in which nothing can be learned")
        return result

    def checked(self, result, prompts):
        """What the function returned for B prompts -> values (B,) float64 and B notes. Raises RewardError."""
        B = len(prompts)
        values, notes = values_and_notes(result)
        try:
            if isinstance(values, Iterator) or getattr(values, "dtype", None) == object:  # a generator, an array of objects
                values = list(values)
            values = values.detach().cpu() if isinstance(values, torch.Tensor) else values
            if np.iscomplexobj(values):  # torch would drop the imaginary part
                raise TypeError("complex numbers have no order")
            values = torch.as_tensor(values, dtype=torch.float64)
        except Exception as error:
            raise RewardError(f"the reward {self.name} returned {type(values).__name__}, not numbers") from error
        if values.shape != (B,):
            raise RewardError(f"the reward {self.name} returned shape {tuple(values.shape)} for {B} images; ({B},) was expected")
        wrong = values.isinf() if self.nan_allowed else ~values.isfinite()
        if wrong.any():
            k = wrong.nonzero()[0].item()
            raise RewardError(f"the reward {self.name} returned {values[k].item()} for image {k} ({prompts[k].text!r})")
        return values, self.one_note_an_image({} if notes is None else notes, B)

    def one_note_an_image(self, notes, B):
        """B notes of one line. A dictionary's entries are put together, as in 'name: value; ...'. Raises RewardError."""
        columns = notes if isinstance(notes, dict) else {"": notes}
        for name, column in columns.items():
            is_list = not isinstance(column, dict) and column is not None and is_notes(column)
            if not is_list or len(column) != B:
                counted = len(column) if is_list else f"one {type(column).__name__}, not a list of"
                raise RewardError(f"the reward {self.name} returned {counted} notes{f' {name!r}' if name else ''} for {B} images")
        texts = [[f"{name}: {column[k]}" if name else str(column[k]) for name, column in columns.items()] for k in range(B)]
        return [" ".join("; ".join(text).split()) for text in texts]

    def line_of(self, error):
        """' (red.py, line 3)': where in the user's file an error came from, or an empty text."""
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == self.source]
        return f" ({Path(self.source).name}, line {lines[-1]})" if lines else ""


def as_prompts(prompts):
    """Texts or prompts.Prompt -> prompts.Prompt."""
    return [Prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]


def values_and_notes(result):
    """What a reward returned -> its values and its notes, None if it has none."""
    has_notes = isinstance(result, tuple) and len(result) == 2 and is_notes(result[1])
    return result if has_notes else (result, None)


def is_notes(value):
    """Whether the second of two returned things can be notes: none, a list, an array, or a dictionary of such."""
    return value is None or isinstance(value, (list, tuple, dict)) or getattr(value, "ndim", 0) > 0


def load_reward(name, device="cpu", nan_allowed=False, **options):
    """The Reward of a name in REWARDS, or of 'path/to/file.py:function'. Raises ValueError if it is neither.

    A learned reward loads its network, on that device and with those options, or raises ValueError if it cannot.
    """
    if name in LEARNED:
        return Reward(name, LEARNED[name](device, **options), unit_of(name), nan_allowed, name, name)
    if name in REWARDS:
        return Reward(name, REWARDS[name], unit_of(name), nan_allowed, name, name)
    function, path = user_function(name), Path(name.rpartition(":")[0]).resolve()
    identity = " ".join([short_name(name), *(hashlib.sha256(file.read_bytes()).hexdigest() for file in files_of(path))])
    called = called_as_it_asks(function, path.parent)
    return Reward(short_name(name), called, user_unit(function), nan_allowed, str(path), identity)


# ---- A user's function ----

def user_function(name):
    """The function of 'path/to/file.py:function'. The file is run once, as Python would import it. Raises ValueError."""
    path, _, function = name.rpartition(":")
    if not path:
        raise ValueError(f"no reward {name!r}: choose {', '.join(REWARDS)}, or your own as path/to/file.py:function")
    if not Path(path).is_file():
        raise ValueError(f"no reward file {path!r}")
    path = Path(path).resolve()
    if path.suffix != ".py":
        raise ValueError(f"the reward file {str(path)!r} is not a Python file (.py)")
    try:
        function = getattr(user_module(path, path.read_bytes()), function, None)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit, too
        raise ValueError(f"the reward file {str(path)!r} cannot be loaded: {type_and_message(error)}") from error
    if not callable(function):
        raise ValueError(f"the reward file {str(path)!r} has no function {name.rpartition(':')[2]!r}")
    return function


def files_of(path):
    """A Python file, and the modules and packages beside it that it imports, with what these import.

    If one of them changes, the reward is another.
    """
    files, to_do = [], [path]
    while to_do:
        file = to_do.pop()
        if file in files or not file.is_file() or str(file) == getattr(sys.modules.get(file.stem), "__file__", None):
            continue  # the last: a module of this project, if the file is in its folder
        files.append(file)
        with contextlib.suppress(SyntaxError):
            for node in ast.walk(ast.parse(file.read_bytes())):
                names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and not node.level:  # a relative import stays in a package that is here whole
                    names = [node.module]
                for place in (path.parent / name.split(".")[0] for name in names):
                    to_do += [place.with_suffix(".py"), *place.rglob("*.py")]
    return [path, *sorted(set(files) - {path})]


@functools.cache
def user_module(path, text):
    """The module of a Python file. text: what it holds now; only the cache looks at it, so that an edited file is loaded anew.

    Two functions of one file share the module.
    """
    name = path.stem.replace(".", "_")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    with process_unchanged(), importable(path.parent):
        sys.modules[name] = module  # where dataclasses and the processes of a pool look for it
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return module


def metadata_parameter(function):
    """How a user's function takes metadata: "third" parameter, "named" (by keyword only), or "" if not at all.

    Raises ValueError if it cannot be called with images and prompts.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some callables in C have none
        return ""
    parameters = signature.parameters.values()
    positional = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    named = {one.name: one for one in parameters if one.kind == one.KEYWORD_ONLY}
    needed = sum(one.default is one.empty for one in positional)
    third = len(positional) > 2 and (needed > 2 or positional[2].name == "metadata")
    starred = any(one.kind == one.VAR_POSITIONAL for one in parameters)
    unknown = [name for name, one in named.items() if one.default is one.empty and name != "metadata"]
    swapped = any(one.name == "metadata" for one in positional[:2])
    if needed > 3 or len(positional) < 2 and not starred or unknown or swapped or inspect.iscoroutinefunction(function):
        raise ValueError(f"the reward {getattr(function, '__name__', function)} must be a plain function of (images, prompts) or "
                         f"(images, prompts, metadata), but is one of {signature}")
    return "third" if third else "named" if "metadata" in named else ""


def called_as_it_asks(function, folder):
    """A user's function in the shape of this project's: it gets a copy of the images, texts, and metadata if it asks for them."""
    asks = metadata_parameter(function)

    def reward(images, prompts):
        # Copies: a function that works in place would spoil the images that are saved, or judged by the next reward.
        given = images.clone(), [prompt.text for prompt in prompts]
        metadata = [copy.deepcopy(prompt.metadata) for prompt in prompts] if asks else []
        with importable(folder):
            if asks == "named":
                return function(*given, metadata=metadata)
            return function(*given, metadata) if asks else function(*given)

    reward.differentiable = getattr(function, "differentiable", False)
    return reward


# ---- Names and units ----

def short_name(name):
    """'compressibility', or the function's name of 'path/to/file.py:function'."""
    return name.rpartition(":")[2]


def unit_of(name):
    """How people read a reward, by its name in REWARDS or by 'path/to/file.py:function': a factor, and the unit's name."""
    return UNITS.get(name, (1, "")) if name in REWARDS else user_unit(user_function(name))


def user_unit(function):
    """The factor and the unit's name of a user's function, by its attribute `unit`. Raises ValueError if that is not a word."""
    unit = getattr(function, "unit", "")
    if not isinstance(unit, str) or len(unit.split()) > 1:
        raise ValueError(f"the unit of the reward {getattr(function, '__name__', function)} is {unit!r}, but must be a word, as in .unit = \"%\"")
    return (100 if unit == "%" else 1), unit


def display(value, unit):
    """A reward as people read it: '1.72 kB' for a compressibility of -1.72, '96 %' for a share of 0.96, '-' for NaN or None."""
    factor, name = unit                                                      # of unit_of
    if value is None or value != value:
        return "-"
    if name == "%":
        return f"{factor * value:.0f} %"
    return f"{factor * value:.2f} {name}" if name else f"{value:.3g}"
