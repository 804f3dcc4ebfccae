"""Rewards: images and prompts in, numbers out. They know nothing of the policy.

The contract, for every reward here and for your own:

    reward(images, prompts) -> values                or (values, notes)

    images   (B, 3, H, W) float32 in [0, 1], on the policy's device; any B
    prompts  B prompts.Prompt for the rewards of this file; B texts for a function of your own
    values   B numbers, higher is better; anything that torch.as_tensor takes
    notes    B strings, say what a judge answered: logged, and drawn under the pictures

To add one, write the function and name it in `REWARDS`.
"""
import functools
import importlib.util
import io
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import hub


class RewardError(Exception):
    """A reward broke the contract or failed; the message says how. The run stops, its state saved."""


def compressibility(images, prompts):
    """Minus the size of the image as a JPEG, in kB of 1,000 bytes (paper, section 5.1). About 0.1 ms for 64 x 64 pixels."""
    return [-jpeg_kilobytes(image) for image in images]


def incompressibility(images, prompts):
    """The size of the image as a JPEG, in kB of 1,000 bytes (paper, section 5.1). About 0.1 ms for 64 x 64 pixels."""
    return [jpeg_kilobytes(image) for image in images]


def jpeg_kilobytes(image):
    """Size of one image (3, H, W) in [0, 1] as a JPEG, headers included.

    The recipe, of which each part moves the number: round (not truncate) to 8 bits; Pillow's encoder at quality 95, its
    default 4:2:0 chroma subsampling, default Huffman tables (no optimize), baseline (not progressive).
    """
    file = io.BytesIO()
    to_pil(image).save(file, "JPEG", quality=95)
    return file.tell() / 1000


def to_pil(image):
    """(3, H, W) float in [0, 1], or bytes -> 8-bit RGB picture."""
    if image.dtype != torch.uint8:
        image = (image.float() * 255).round().clamp(0, 255).byte()
    return Image.fromarray(image.cpu().permute(1, 2, 0).numpy())


# ---- Learned rewards: published networks, loaded once, when the reward is asked for. ----

AESTHETIC_HEAD = "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"
REWARD_MODEL, BERT_MODEL = "reward model (--reward-model)", "BERTScore's encoder (--bert-model)"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
LLAVA, DEBERTA = "llava-hf/llava-1.5-7b-hf", "microsoft/deberta-xlarge-mnli"
MAX_ANSWER = 40  # tokens


class Aesthetic:
    """LAION's aesthetic predictor, about 1 to 10 (paper, section 5.2): an MLP on CLIP ViT-L/14's normalised image embedding.

    Fetches 1.7 GB of CLIP and 4 MB of MLP, the weights `sac+logos+ava1-l14-linearMSE`; 1.7 GB of memory (fp32).
    About 1 s an image on two cores (python benchmark.py --reward aesthetic --images 8). Its agreement with the published
    scores: not measured; the names and shapes are the published head's.
    reward_model: another CLIP, by hub name or folder; aesthetic_head: the MLP's weights as a file, safetensors or torch's.
    """

    def __init__(self, device, reward_model="", aesthetic_head=""):
        model = reward_model or "openai/clip-vit-large-patch14"
        self.processor, self.clip = load_clip(model, device)
        weights = load_weights(aesthetic_head or hub.file(*AESTHETIC_HEAD, "aesthetic head (--aesthetic-head)"))
        width = self.clip.config.projection_dim
        self.head = fitted(scoring_head(width), weights, "layers.", "aesthetic head").to(device)

    @torch.no_grad()
    def __call__(self, images, prompts):
        embeddings = image_embeddings(self.clip, preprocess(self.processor, images))
        return self.head(F.normalize(embeddings)).squeeze(1)


class PickScore:
    """PickScore v1 (Kirstain et al. 2023): cosine between a CLIP-H's embeddings of image and prompt, fine-tuned on preferences.

    About 0.2; the published scores are 100 times that. Fetches 3.9 GB; 3.9 GB of memory (fp32).
    About 2 s an image on two cores (python benchmark.py --reward pickscore --images 8). Its formula is the model card's; there
    is no package to compare with.
    reward_model: another CLIP with its processor and tokenizer, by hub name or folder.
    """

    def __init__(self, device, reward_model=""):
        from transformers import AutoTokenizer
        self.processor, self.clip = load_clip(reward_model or "yuvalkirstain/PickScore_v1", device, reward_model or CLIP_H)
        self.tokenizer = hub.from_pretrained(AutoTokenizer, reward_model or CLIP_H, REWARD_MODEL)

    @torch.no_grad()
    def __call__(self, images, prompts):
        tokens = self.tokenizer([prompt.text for prompt in prompts], padding="max_length", truncation=True, max_length=77,
                                return_tensors="pt").to(self.clip.device)
        texts = pooled(self.clip.get_text_features(**tokens))                # (B, E)
        return F.cosine_similarity(image_embeddings(self.clip, preprocess(self.processor, images)), texts)


class HPSv2(PickScore):
    """HPS v2 (Wu et al. 2023): as PickScore a cosine of CLIP-H's, about 0.28, in a checkpoint that has open_clip's names.

    Fetches 3.9 GB; 3.9 GB of memory (fp32). Time per image: as PickScore. The network is checked against the package hpsv2.
    reward_model: a folder with HPS_v2_compressed.pt and, as transformers saves them, the CLIP's config, processor, tokenizer.
    """

    def __init__(self, device, reward_model=""):
        hub.announce("HPS v2", reward_model or "xswu/HPSv2")
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPConfig, CLIPModel
        self.processor = hub.from_pretrained(AutoImageProcessor, reward_model or CLIP_H, REWARD_MODEL, backend="pil")
        self.tokenizer = hub.from_pretrained(AutoTokenizer, reward_model or CLIP_H, REWARD_MODEL)
        config = hub.from_pretrained(CLIPConfig, reward_model or CLIP_H, REWARD_MODEL)
        weights = load_weights(hub.file(reward_model or "xswu/HPSv2", "HPS_v2_compressed.pt", REWARD_MODEL))
        weights = as_in_transformers(weights.get("state_dict", weights))
        self.clip = fitted(CLIPModel(config), weights, "", REWARD_MODEL).to(device)


class ImageReward:
    """ImageReward v1.0 (Xu et al. 2023), for the comparison with DPOK: BLIP reads the prompt with an eye on the picture, and an
    MLP scores what comes of it; about 0 for the average picture, with a standard deviation of 1.

    Fetches 1.8 GB; 1.8 GB of memory (fp32). About 0.7 s an image on two cores (python benchmark.py --reward imagereward
    --images 8). The network is checked against the package image-reward.
    reward_model: a folder with ImageReward.pt and BERT's tokenizer.
    """
    MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the published score, in the package image-reward

    def __init__(self, device, reward_model=""):
        hub.announce("ImageReward", reward_model or "THUDM/ImageReward")
        from transformers import AutoTokenizer, BlipTextConfig, BlipVisionConfig, BlipVisionModel, CLIPImageProcessorPil
        from transformers.models.blip.modeling_blip_text import BlipTextModel
        self.tokenizer = hub.from_pretrained(AutoTokenizer, reward_model or "bert-base-uncased", REWARD_MODEL)
        weights = load_weights(hub.file(reward_model or "THUDM/ImageReward", "ImageReward.pt", REWARD_MODEL))

        # BLIP's own sizes, read off the weights; its heads are 64 wide.
        def size(name, axis=0):
            if f"blip.{name}" not in weights:
                raise ValueError(f"the reward model has no weights blip.{name}: is it ImageReward.pt?")
            return weights[f"blip.{name}"].shape[axis]

        def depth(prefix):
            return len({name.split(".")[prefix.count(".")] for name in weights if name.startswith(prefix)})

        patch, patches = size("visual_encoder.patch_embed.proj.weight", 3), size("visual_encoder.pos_embed", 1) - 1
        side, width = round(patches**0.5) * patch, size("visual_encoder.patch_embed.proj.weight")
        words = size("text_encoder.embeddings.word_embeddings.weight", 1)
        vision = BlipVisionModel(BlipVisionConfig(
            image_size=side, patch_size=patch, hidden_size=width, num_attention_heads=width // 64, layer_norm_eps=1e-6,
            intermediate_size=size("visual_encoder.blocks.0.mlp.fc1.bias"),
            num_hidden_layers=depth("blip.visual_encoder.blocks.")))
        text = BlipTextModel(BlipTextConfig(
            vocab_size=size("text_encoder.embeddings.word_embeddings.weight"), hidden_size=words, encoder_hidden_size=width,
            num_attention_heads=words // 64, max_position_embeddings=size("text_encoder.embeddings.position_embeddings.weight"),
            intermediate_size=size("text_encoder.encoder.layer.0.intermediate.dense.bias"),
            num_hidden_layers=depth("blip.text_encoder.encoder.layer.")), add_pooling_layer=False)
        names = {"^patch_embed.proj": "embeddings.patch_embedding", "^cls_token": "embeddings.class_embedding",
                 "^pos_embed": "embeddings.position_embedding", "^norm": "post_layernorm", "^blocks": "encoder.layers",
                 "attn.qkv": "self_attn.qkv", "attn.proj": "self_attn.projection", "norm([12])": r"layer_norm\1"}
        self.vision = fitted(vision, weights, "blip.visual_encoder.", REWARD_MODEL, names).to(device)
        self.text = fitted(text, weights, "blip.text_encoder.", REWARD_MODEL).to(device)
        self.head = fitted(scoring_head(words), weights, "mlp.layers.", REWARD_MODEL).to(device)
        self.processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})

    @torch.no_grad()
    def __call__(self, images, prompts):
        pixels = preprocess(self.processor, images).to(self.vision.device)
        tokens = self.tokenizer([prompt.text for prompt in prompts], padding="max_length", truncation=True, max_length=35,
                                return_tensors="pt").to(self.vision.device)
        return torch.cat([self.score(*part) for part in zip(
            pixels.split(32), tokens.input_ids.split(32), tokens.attention_mask.split(32))])

    def score(self, pixels, tokens, mask):
        """Pixels (B, 3, H, W), tokens (B, L) and their mask -> scores (B,)."""
        seen = self.vision(pixels).last_hidden_state                         # (B, P, E)
        read = self.text(tokens, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
        return (self.head(read[:, 0]).squeeze(1) - self.MEAN) / self.STD


class VLM:
    """A vision-language model that answers questions about pictures: LLaVA, or any other decoder-only image-text-to-text model
    of transformers that brings a chat template (some need torchvision, and say so).

    Half precision on a GPU; deterministic, no sampling. LLaVA 1.5 7B fetches 14 GB and takes 15 GB of a GPU.
    """

    def __init__(self, device, model):
        hub.announce("the vision-language model", model)
        from transformers import AutoModelForImageTextToText, AutoProcessor
        self.processor = hub.from_pretrained(AutoProcessor, model, REWARD_MODEL, backend="pil")
        dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
        self.network = hub.from_pretrained(AutoModelForImageTextToText, model, REWARD_MODEL, dtype=dtype).to(device).eval()
        config = self.network.config
        if not hasattr(self.processor, "image_processor") or config.is_encoder_decoder or not (
                self.processor.chat_template or config.model_type == "llava"):
            raise ValueError(f"{REWARD_MODEL} {model!r} is no decoder-only image-text-to-text model with a chat template")
        self.processor.tokenizer.padding_side = "left"  # so that all answers begin where the questions end

    @torch.no_grad()
    def answer(self, images, questions):
        """B images (3, H, W) and B questions -> B answers, greedily decoded, eight at a time."""
        answers, begin = [], self.processor.tokenizer.bos_token
        for start in range(0, len(questions), 8):
            pictures = [to_pil(image) for image in images[start:start + 8]]
            texts = [dialogue(self.processor, question) for question in questions[start:start + 8]]
            inputs = self.processor(images=pictures, text=texts, padding=True, return_tensors="pt",
                                    add_special_tokens=not (begin and texts[0].startswith(begin)))
            inputs = inputs.to(self.network.device, self.network.dtype)
            tokens = self.network.generate(**inputs, do_sample=False, max_new_tokens=MAX_ANSWER)
            answers += self.processor.batch_decode(tokens[:, inputs.input_ids.shape[1]:], skip_special_tokens=True)
        return [answer.strip() for answer in answers]


load_vlm = functools.cache(VLM)  # two rewards may ask the same one


def dialogue(processor, question):
    """The text of a question about a picture: by the processor's chat template, or LLaVA's, if it has none."""
    if not processor.chat_template:
        return f"USER: <image>\n{question} ASSISTANT:"
    return processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}], add_generation_prompt=True)


class BertRecall:
    """BERTScore recall (Zhang et al. 2020): how well each token of a reference is matched by some token of an answer, by the
    cosine of their contextual embeddings; the mean over the reference's tokens, without idf, as the package bert-score.

    model: any encoder of transformers, by hub name or folder (also the text encoder of a pipeline's folder).
    baseline: what unrelated sentences score, by which the recall r is rescaled to (r - baseline) / (1 - baseline).
    """

    def __init__(self, device, model, baseline=0.0):
        hub.announce("the encoder for BERTScore", model)
        from transformers import AutoConfig, AutoModel, AutoTokenizer
        pipeline = (Path(model) / "text_encoder").is_dir()
        places = [{"subfolder": name} if pipeline else {} for name in ("tokenizer", "text_encoder")]
        self.tokenizer = hub.from_pretrained(AutoTokenizer, model, BERT_MODEL, **places[0])
        config = hub.from_pretrained(AutoConfig, model, BERT_MODEL, **places[1])
        if config.model_type == "deberta" and config.num_hidden_layers == 48:
            config.num_hidden_layers = 40  # of deberta-xlarge-mnli bert-score takes this layer, chosen on human judgements
        self.encoder = hub.from_pretrained(AutoModel, model, BERT_MODEL, **places[1], config=config, dtype=torch.float32)
        self.encoder.to(device).eval()
        self.baseline = baseline
        try:
            self(["a cat"], ["a cat"])
        except Exception as error:
            raise ValueError(f"{BERT_MODEL} {model!r} encodes no text by itself: {_one_line(error)}") from error

    @torch.no_grad()
    def __call__(self, answers, references):
        """B answers and B references -> recall (B,), rescaled; that of an empty answer is 0 before."""
        reference, _, counts = self.embed(references)                        # (B, R, E), (B, R), (B, R)
        answer, is_token, answer_counts = self.embed(answers)                # (B, A, E), (B, A), (B, A)
        similarity = torch.einsum("bre,bae->bra", reference, answer) * is_token[:, None]
        recall = (similarity.amax(2) * counts).sum(1) / counts.sum(1)        # R_BERT, section 3
        recall = torch.where(answer_counts.sum(1) > 0, recall, 0.0)
        return (recall - self.baseline) / (1 - self.baseline)

    def embed(self, texts):
        """B texts -> unit vectors (B, L, E), which are tokens (B, L), and which of these are not special (B, L)."""
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_special_tokens_mask=True, return_tensors="pt")
        tokens = tokens.to(self.encoder.device)
        mask, special = tokens.attention_mask, tokens.pop("special_tokens_mask")
        return F.normalize(self.encoder(**tokens).last_hidden_state, dim=2), mask.float(), (mask * (1 - special)).float()


class Alignment:
    """Prompt-image alignment without labels (paper, section 5.2): a VLM says what it sees, and BERTScore's recall says how much
    of the prompt is in that. The answers are the notes. Time per image: 5 ms on one core with the embedded VLM (seconds_reward
    of the log), with LLaVA not measured. Unrelated sentences score about 0.52 with the default encoder, so the reward is flat
    at the bottom; bert_baseline takes that for 0.

    reward_model: the VLM, by hub name or folder; bert_model, bert_baseline: see BertRecall.
    wording: "code", as the authors' code asks and compares, or "paper", as the paper says.
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
    """The share of a prompt's own questions (how many, which animal) that a VLM answers rightly (paper, appendix A): 0, 1/2, 1.

    An answer is right if one of its words is one of those that the prompt names as right. The answers are the notes. Time per
    image, of two questions: 8 ms on one core with the embedded VLM (seconds_reward of the log), with LLaVA not measured.
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
        return [sum(mark) / len(mark) for mark in marks], [" / ".join(note) for note in notes]


def load_clip(model, device, processor=""):
    """A CLIP's image processor and the network, in fp32, by hub name or folder; the processor may be another model's."""
    hub.announce("CLIP", model)
    from transformers import AutoImageProcessor, CLIPModel
    return (hub.from_pretrained(AutoImageProcessor, processor or model, REWARD_MODEL, backend="pil"),
            hub.from_pretrained(CLIPModel, model, REWARD_MODEL, dtype=torch.float32).to(device).eval())


def preprocess(processor, images):
    """PIL pictures, or images (3, H, W) of bytes or of floats in [0, 1] -> what CLIP sees: (B, 3, 224, 224).

    All become 8-bit pictures first: a processor takes floats for bytes, and would scale [0, 1] down once more.
    """
    pictures = [image if isinstance(image, Image.Image) else to_pil(image) for image in images]
    return processor(pictures, return_tensors="pt").pixel_values


@torch.no_grad()
def image_embeddings(clip, pixels):
    """Pixels (B, 3, 224, 224) -> CLIP's image embeddings (B, E), some at a time."""
    return torch.cat([pooled(clip.get_image_features(part.to(clip.device, clip.dtype))) for part in pixels.split(32)]).float()


def pooled(features):
    """The embeddings in what CLIP returns: a tensor in older versions of transformers, an object that holds them in newer."""
    return features if isinstance(features, torch.Tensor) else features.pooler_output


def scoring_head(width):
    """The MLP of Aesthetic and ImageReward. The published names count the dropouts, which are out of use here: eval()."""
    return nn.Sequential(nn.Linear(width, 1024), nn.Dropout(), nn.Linear(1024, 128), nn.Dropout(), nn.Linear(128, 64),
                         nn.Dropout(), nn.Linear(64, 16), nn.Linear(16, 1))


def fitted(network, weights, prefix, what, names=None):
    """The network with those of the weights whose published name begins with the prefix, in evaluation mode.

    names: patterns of the published names, and what stands there in ours. Raises ValueError if one is missing or does not fit.
    """
    renamed = {}
    for name, weight in weights.items():
        if name.startswith(prefix) and not name.endswith("position_ids"):  # a buffer that older versions saved
            name = name.removeprefix(prefix)
            for theirs, ours in (names or {}).items():
                name = re.sub(theirs, ours, name)
            renamed[name] = weight
    try:
        network.load_state_dict(renamed)
    except RuntimeError as error:
        raise ValueError(f"the weights of the {what} do not fit: {' '.join(str(error).split())[:200]}") from error
    return network.eval()


def as_in_transformers(weights):
    """A CLIP's weights under open_clip's names -> under those of transformers' CLIPModel."""
    names = {"^token_embedding": "text_model.embeddings.token_embedding",
             "^positional_embedding": "text_model.embeddings.position_embedding.weight",
             "^ln_final": "text_model.final_layer_norm", "^transformer.resblocks": "text_model.encoder.layers",
             "^visual.class_embedding": "vision_model.embeddings.class_embedding",
             "^visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
             "^visual.conv1": "vision_model.embeddings.patch_embedding", "^visual.ln_pre": "vision_model.pre_layrnorm",
             "^visual.ln_post": "vision_model.post_layernorm", "^visual.transformer.resblocks": "vision_model.encoder.layers",
             "^text_projection": "text_projection.weight", "^visual.proj": "visual_projection.weight",
             "ln_([12])": r"layer_norm\1", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2", r"\.attn\.": ".self_attn."}
    renamed = {}
    for name, weight in weights.items():
        ours = name
        for pattern, replacement in names.items():
            ours = re.sub(pattern, replacement, ours)
        if "in_proj_" in ours:  # query, key and value in one
            for letter, third in zip("qkv", weight.chunk(3)):
                renamed[ours.replace("in_proj_", f"{letter}_proj.")] = third
        else:
            renamed[ours] = weight.T if ours in ("text_projection.weight", "visual_projection.weight") else weight
    return renamed


def load_weights(path):
    """A state dict from a file of safetensors, or of torch, weights only. Raises ValueError."""
    try:
        weights = load_file(path) if str(path).endswith(".safetensors") else torch.load(
            path, map_location="cpu", weights_only=True)
    except Exception as error:  # a missing file, safetensors' own, pickle's own
        raise ValueError(f"the weights {str(path)!r} cannot be loaded: {_one_line(error)}") from error
    if not isinstance(weights, dict):
        raise ValueError(f"the weights {str(path)!r} are a {type(weights).__name__}, not a state dict")
    return weights


LEARNED = {"aesthetic": Aesthetic, "pickscore": PickScore, "hpsv2": HPSv2, "imagereward": ImageReward, "alignment": Alignment,
           "counting": Counting}
REWARDS = {"compressibility": compressibility, "incompressibility": incompressibility, **LEARNED}  # the next reward goes here
DEFAULT_PROMPTS = {"compressibility": "imagenet_animals", "incompressibility": "imagenet_animals",  # the paper's
                   "aesthetic": "common_animals", "pickscore": "painted_animals", "hpsv2": "painted_animals",
                   "imagereward": "dpok", "alignment": "animal_activities", "counting": "two_to_eight_animals"}
UNITS = {"compressibility": (-1, "kB"), "incompressibility": (1, "kB")}  # how a person reads the number: factor, unit


def display(name, value):
    """A reward as a person reads it: '1.72 kB' for a compressibility of -1.72."""
    factor, unit = UNITS.get(name, (1, ""))
    return f"{factor * value:.2f} {unit}" if unit else f"{value:.3g}"


def load_reward(name, device="cpu", **options):
    """The function of a reward in REWARDS, or of 'path/to/file.py:function'. Raises ValueError if neither.

    A learned reward loads its network, on that device, with those options, or raises ValueError if it cannot be had.
    What it returns fulfils the contract in full: (values (B,) float32 on the CPU, list of B notes), or raises RewardError.
    """
    if name in REWARDS:
        return _checked(LEARNED[name](device, **options) if name in LEARNED else REWARDS[name], name)
    path, _, function = name.rpartition(":")
    if not path:
        raise ValueError(f"no reward {name!r}: choose {', '.join(REWARDS)}, or your own as path/to/file.py:function")
    own = _load_function(Path(path), function)
    return _checked(lambda images, prompts: own(images, [prompt.text for prompt in prompts]), name)


def _load_function(path, function):
    if not path.is_file():
        raise ValueError(f"no reward file {str(path)!r}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None:
        raise ValueError(f"the reward file {str(path)!r} is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"the reward file {str(path)!r} cannot be loaded: {_one_line(error)}") from error
    if not callable(getattr(module, function, None)):
        raise ValueError(f"the reward file {str(path)!r} has no function {function!r}")
    return getattr(module, function)


def _checked(reward, name):
    def checked(images, prompts):
        try:
            result = reward(images, prompts)
        except Exception as error:
            raise RewardError(f"the reward {name} failed: {_one_line(error)}") from error
        has_notes = isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], (list, tuple))
        values, notes = result if has_notes else (result, [""] * len(images))
        try:
            values = torch.as_tensor(values).detach().to("cpu", torch.float32)
        except Exception as error:
            raise RewardError(f"the reward {name} returned {type(values).__name__}, not numbers") from error
        if values.shape != (len(images),):
            raise RewardError(f"the reward {name} returned shape {tuple(values.shape)} for {len(images)} images; "
                              f"({len(images)},) was expected")
        if not values.isfinite().all():
            bad = (~values.isfinite()).nonzero()[0].item()
            raise RewardError(f"the reward {name} returned {values[bad].item()} for image {bad} "
                              f"({prompts[bad].text!r})")
        if len(notes) != len(images):
            raise RewardError(f"the reward {name} returned {len(notes)} notes for {len(images)} images")
        return values, [" ".join(str(note).split()) for note in notes]

    return checked


def _one_line(error):
    message = str(error).strip().splitlines()
    return f"{type(error).__name__}: {message[0]}" if message else type(error).__name__
