"""rewards.py: learned rewards, tiny, against their authors' package or formula; a user's own file."""
import contextlib
import json
import re
import shutil
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (AutoTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel,
                          CLIPTokenizer, DebertaConfig, DebertaModel)

import rewards
from baselines_rwr import rwr_weights
from conftest import EMOJI, IMAGES, LAYERS, ROOT, rng, run, tiny_flags
from ddpo import PromptStatistics
from prompts import Prompt, load_prompts
from support import networks

CATS, ORACLES = [Prompt("a cat")] * 3, ROOT / "oracles"


def pillow_pixels(folder):
    """CLIP's input of IMAGES as transformers makes it of Pillow's images."""
    pillow = [rewards.to_pil(image) for image in IMAGES]
    return CLIPImageProcessorPil.from_pretrained(folder)(pillow, return_tensors="pt").pixel_values


def test_the_aesthetic_reward_is_a_linear_chain_on_the_normalised_clip_embedding(tiny_clip, tiny_model):
    torch.manual_seed(1)
    head = {f"layers.{name}": weight for name, weight in networks.scoring_head(24).state_dict().items()}
    torch.save(head, "head.pth"), save_file(head, "head.safetensors")
    reward, same = (rewards.load_reward("aesthetic", reward_model=str(tiny_clip), aesthetic_head=path)
                    for path in ("head.pth", "head.safetensors"))
    values, clip = reward(IMAGES, CATS)[0], CLIPModel.from_pretrained(tiny_clip)
    with torch.no_grad():
        x = clip.visual_projection(clip.vision_model(pillow_pixels(tiny_clip)).pooler_output)
        x = x / x.norm(dim=1, keepdim=True)
        for k in (0, 2, 4, 6, 7):
            x = x @ head[f"layers.{k}.weight"].T + head[f"layers.{k}.bias"]
    torch.testing.assert_close(values.float(), x.squeeze(1), rtol=1e-4, atol=1e-4)
    assert torch.equal(reward(IMAGES, ["a dog"] * 3)[0], values)  # no look at the prompt, and no dropout
    assert torch.equal(same(IMAGES, CATS)[0], values)
    images = IMAGES.clone().requires_grad_()
    with_gradient = reward.with_gradient(images, CATS)
    torch.testing.assert_close(with_gradient.double(), values, rtol=1e-5, atol=1e-5)
    gradient, = torch.autograd.grad(with_gradient.sum(), images)
    assert (reward(IMAGES + 0.05 * gradient.sign(), CATS)[0] > values).all()
    run(*tiny_flags(tiny_model, epochs=1, **{
        "reward": "aesthetic", "reward-model": tiny_clip, "aesthetic-head": "head.pth"}))


@pytest.mark.parametrize("height, width", [(40, 40), (24, 24), (48, 64)])
def test_clips_pixels_are_those_of_pillows_images_with_the_gradient_of_a_resize(tiny_clip, height, width):
    processor = CLIPImageProcessorPil.from_pretrained(tiny_clip)
    for images in (IMAGES, (IMAGES * 255).round().byte()):
        assert torch.equal(networks.clip_pixels(processor, images), pillow_pixels(tiny_clip))
    images = F.avg_pool2d(torch.rand(3, 3, height + 4, width + 4, generator=rng()), 5, 1).requires_grad_()
    pixels = networks.clip_pixels_with_gradient(processor, images)
    torch.testing.assert_close(pixels, networks.clip_pixels(processor, images), rtol=0, atol=1e-4)
    # A brighter image has pixels brighter by as much, whatever way they are weighed.
    weights, step = torch.rand(pixels.shape, generator=rng(1)), torch.rand((3, 3, 1, 1), generator=rng(2)) / 5
    step = step + F.avg_pool2d(torch.rand(images.shape, generator=rng(3)), 7, 1, 3) / 5
    gradient, = torch.autograd.grad((weights * pixels).sum(), images)
    more, less = ((weights * networks.clip_pixels(processor, images + sign * step)).sum() for sign in (1, -1))
    assert (gradient * step).sum().item() == pytest.approx((more - less).item() / 2, rel=0.01)


def test_pickscore_is_the_cosine_of_clips_own_forward(tiny_clip):
    texts, clip = ["a cat", "two dogs", "an ant"], CLIPModel.from_pretrained(tiny_clip)
    values, _ = rewards.load_reward("pickscore", reward_model=str(tiny_clip))(IMAGES, texts)
    tokens = CLIPTokenizer.from_pretrained(tiny_clip)(texts, padding="max_length", max_length=77,
                                                      return_tensors="pt")
    with torch.no_grad():
        theirs = clip(**tokens, pixel_values=pillow_pixels(tiny_clip)).logits_per_image.diag()
    torch.testing.assert_close(values.float(), theirs / clip.logit_scale.exp().item(), rtol=1e-4, atol=1e-6)


def test_imagereward_is_that_of_the_package_image_reward(tiny_vlm, tmp_path):
    weights = load_file(ORACLES / "imagereward.safetensors")
    pixels, tokens, mask = (weights.pop(name) for name in ("pixels", "tokens", "mask"))
    AutoTokenizer.from_pretrained(tiny_vlm).save_pretrained(tmp_path)
    torch.save(weights, tmp_path / "ImageReward.pt")
    reward = rewards.load_reward("imagereward", reward_model=str(tmp_path))
    with torch.no_grad():
        ours = reward.function.rate(pixels, tokens, mask)
    theirs = json.loads((ORACLES / "imagereward.json").read_text())["scores"]
    assert ours.tolist() == pytest.approx(theirs, abs=1e-5) and max(theirs) - min(theirs) > 0.05
    values, alone = reward(IMAGES, ["two cats", "a dog", "a cat"])[0], reward(IMAGES[1:2], ["a dog"])[0]
    assert values[1].item() == pytest.approx(alone.item(), abs=1e-5) and len(set(values.tolist())) == 3
    del weights["blip.visual_encoder.norm.bias"]
    torch.save(weights, tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match="do not fit.*post_layernorm.bias"):
        rewards.load_reward("imagereward", reward_model=str(tmp_path))


def test_hpsv2_is_that_of_the_package_hpsv2(tiny_clip, tmp_path):
    weights = load_file(ORACLES / "hpsv2.safetensors")
    pixels, tokens = weights.pop("pixels"), weights.pop("tokens")
    shutil.copytree(tiny_clip, tmp_path, dirs_exist_ok=True)  # processor and tokenizer
    layers = dict(LAYERS, hidden_size=32, intermediate_size=128, projection_dim=24, hidden_act="gelu")
    CLIPConfig(projection_dim=24, vision_config=dict(image_size=32, patch_size=8, **layers), text_config=dict(
        vocab_size=60, max_position_embeddings=16, eos_token_id=59, **layers)).save_pretrained(tmp_path)
    torch.save({"epoch": 1, "state_dict": weights}, tmp_path / "HPS_v2_compressed.pt")
    clip = rewards.load_reward("hpsv2", reward_model=str(tmp_path)).function.clip
    with torch.no_grad():
        ours = F.cosine_similarity(clip.get_image_features(pixels).pooler_output,
                                   clip.get_text_features(tokens).pooler_output)
    theirs = json.loads((ORACLES / "hpsv2.json").read_text())["scores"]
    assert ours.tolist() == pytest.approx(theirs, abs=1e-5) and max(theirs) - min(theirs) > 0.1
    (tmp_path / "HPS_v2_compressed.pt").rename(tmp_path / "HPS_v2.1_compressed.pt")  # the newer weights
    rewards.load_reward("hpsv2", reward_model=str(tmp_path))


def test_a_vlm_answers_the_same_whatever_it_is_asked_beside_it(tiny_vlm, monkeypatch):
    vlm, asked = rewards.VLM("cpu", str(tiny_vlm)), []
    ask = vlm.network.generate
    monkeypatch.setattr(vlm.network, "generate", lambda **inputs: asked.append(inputs) or ask(**inputs))
    questions = ["what is happening in this image?", "how many animals?", "what animal is in this image?"]
    together = vlm.answer(IMAGES, questions)
    assert (asked[0]["max_new_tokens"], asked[0]["do_sample"]) == (64, False)  # 64 as in the authors' code
    assert (asked[0]["input_ids"] == 4).sum(1).tolist() == [16] * 3  # one token for each 8 x 8 patch
    alone = [vlm.answer(IMAGES[k:k + 1], [question])[0] for k, question in enumerate(questions)]
    assert together == alone and all(together)
    assert vlm.answer(IMAGES.repeat(3, 1, 1, 1), questions * 3) == together * 3  # eight at a time


def test_bertscore_recall_is_that_of_the_package_and_can_be_rescaled():
    recall = rewards.BertRecall("cpu", str(EMOJI))
    answers, references, theirs = zip(*json.loads((ORACLES / "bert_score_recall.json").read_text())["cases"])
    assert recall(answers, references).tolist() == pytest.approx(theirs, abs=1e-5) and len(theirs) == 21
    same, *others, empty = recall(["three cats", "two cats", "three dogs", ""], ["three cats"] * 4).tolist()
    assert same == pytest.approx(1, abs=1e-5) and max(others) < 0.95 and empty == 0
    rescaled = rewards.BertRecall("cpu", str(EMOJI), baseline=0.5)(["two cats"], ["three cats"])
    assert rescaled.item() == pytest.approx(2 * (others[0] - 0.5), abs=1e-5)


def test_bertscore_takes_layer_40_of_deberta_xlarge_as_the_package_does(tmp_path):
    torch.manual_seed(0)
    deberta = DebertaModel(DebertaConfig(vocab_size=900, **{**LAYERS, "num_hidden_layers": 48})).eval()
    for part in (deberta, CLIPTokenizer.from_pretrained(EMOJI / "tokenizer")):
        part.save_pretrained(tmp_path)
    recall = rewards.BertRecall("cpu", str(tmp_path))
    tokens = recall.tokenizer(["three cats"], return_tensors="pt")
    with torch.no_grad():
        theirs = deberta(**tokens, output_hidden_states=True).hidden_states[40]  # bert-score: model2layers
        torch.testing.assert_close(recall.encoder(**tokens).last_hidden_state, theirs)


def test_alignment_is_the_recall_of_what_the_vlm_says(tiny_vlm, monkeypatch):
    asked, texts, recall = [], ["two cats", "a dog", "two cats"], rewards.BertRecall("cpu", str(EMOJI))
    options = dict(reward_model=str(tiny_vlm), bert_model=str(EMOJI))
    monkeypatch.setattr(rewards.VLM, "answer", lambda *args: asked.extend(args[2]) or ["two cats"] * 3)
    for wording, question, reference in (
            ("paper", "What is happening in this image?", "{}"),
            ("code", "Answer concisely: what is going on in this image?", "The image contains {}")):
        values, notes = rewards.load_reward("alignment", wording=wording, **options)(IMAGES, texts)
        torch.testing.assert_close(values.float(), recall(notes, [reference.format(text) for text in texts]))
        assert notes == ["two cats"] * 3 and values[0] != values[1] and asked[-3:] == [question] * 3


def test_counting_marks_each_answer_right_or_wrong_by_the_prompts_own_words(tiny_vlm, monkeypatch):
    answers = {"How many animals are in this image?": ["Three.", "2", "There are fourteen"],
               "What animal is in this image?": ["a cat", "dogs", "A mouse"]}
    monkeypatch.setattr(rewards.VLM, "answer", lambda *args: [answers[asked].pop(0) for asked in args[2]])
    known = {prompt.text: prompt for prompt in load_prompts("two_to_four_animals")}
    asked = [*map(known.get, ("three cats", "two cats", "four mice")), Prompt("a cat")]
    reward = rewards.load_reward("counting", reward_model=str(tiny_vlm), nan_allowed=True)
    values, notes = reward(IMAGES[[0, 1, 2, 0]], asked)
    assert values[:3].tolist() == [1, 0.5, 0.5] and values[3].isnan()  # that has no questions
    assert notes == ["Three. / a cat", "2 / dogs", "There are fourteen / A mouse", ""]


# ---- A user's file ----

def loaded(text, function="reward", **options):
    """The Reward of a function in a file of that text."""
    Path("own.py").write_text(text)
    return rewards.load_reward(f"{Path('own.py').resolve()}:{function}", **options)


@pytest.mark.parametrize("returned, notes", [
    ("torch.tensor([1, 2, 3])", ["", "", ""]), ("numpy.array([1.0, 2.0, 3.0])", ["", "", ""]),
    ("[1, 2.0, torch.tensor(3.0)]", ["", "", ""]), ("([1, 2, 3], {'seen': 1})", ["", "", ""]),
    ("(torch.ones(3).cumsum(0), ['x', 'y \\n z', 3])", ["x", "y z", "3"])])
def test_any_b_numbers_are_rewards_and_a_list_their_notes(returned, notes):
    values, got = loaded(f"import numpy, torch\ndef reward(images, prompts): return {returned}")(IMAGES, CATS)
    assert values.dtype == torch.float64 and values.tolist() == [1, 2, 3] and got == notes


@pytest.mark.parametrize("returned, message", [
    ("[1.0, 2.0, float('nan')]", "reward returned nan"), ("[1.0, 2.0, float('inf')]", "reward returned inf"),
    ("[1.0, 2.0]", r"returned \[2\] values"), ("[[1.0]] * 3", r"returned \[3, 1\] values"),
    ("([1.0] * 3, ['x'])", "1 notes for 3 images")])
def test_what_is_not_b_finite_numbers_is_refused_but_if_watched_it_may_be_nan(returned, message):
    code = f"def reward(images, prompts): return {returned}"
    with pytest.raises(ValueError, match=message):
        loaded(code)(IMAGES, CATS)
    with contextlib.nullcontext() if "nan" in returned else pytest.raises(ValueError, match=message):
        loaded(code, nan_allowed=True)(IMAGES, CATS)


OWN = """
import dataclasses, torch
from beside import mean
calls = []
@dataclasses.dataclass
class Options: scale: "float" = 2.0
def reward(images, prompts):
    assert prompts == ["a cat"] * 3 and not torch.is_grad_enabled()
    calls.append(1)
    return mean(images.mul_(Options().scale))
def count(images, prompts): return [len(calls)] * 3
def wanted(images, prompts, fields): return [one["wanted"] for one in fields]
def fails(images, prompts): return {}["quota"]
reward.unit, count.unit = "points", "%"
"""


def test_a_function_gets_copies_texts_and_metadata_shares_its_file_and_its_own_error_passes():
    Path("beside.py").write_text("def mean(images): return images.mean((1, 2, 3))")
    images, asked = IMAGES.clone(), [Prompt("a cat", (), {"wanted": k}) for k in range(3)]
    reward, count, wanted, fails = (loaded(OWN, name) for name in ("reward", "count", "wanted", "fails"))
    torch.testing.assert_close(reward(images, asked)[0].float(), 2 * IMAGES.mean((1, 2, 3)))
    assert torch.equal(images, IMAGES) and count(images, asked)[0].tolist() == [1, 1, 1]
    assert wanted(images, asked)[0].tolist() == [0, 1, 2]
    assert (reward.unit, count.unit, fails.unit) == ((1, "points"), (100, "%"), (1, ""))
    with pytest.raises(KeyError, match="quota"):
        fails(images, asked)


def test_rewards_take_plain_texts_and_the_weighted_sum_of_the_docstring_is_one(monkeypatch):
    code = re.search(r"adds two, with weights:\n\n(.*?)\n\nTo add a reward", rewards.__doc__, re.S)[1]
    monkeypatch.setitem(rewards.LEARNED, "aesthetic", lambda device: lambda images, prompts: [7.0] * 3)
    values, sizes = loaded(textwrap.dedent(code), "weighted_sum"), rewards.load_reward("compressibility")
    torch.testing.assert_close(values(IMAGES, CATS)[0], 7.0 + 0.1 * sizes(IMAGES, ["a cat"] * 3)[0])


def test_small_differences_of_large_rewards_reach_advantages_and_weights():
    values, _ = loaded("def reward(images, prompts): return [1e9, 1e9 + 0.25, 1e9 + 0.5]")(IMAGES, CATS)
    advantages, _ = PromptStatistics(32, 1, 10.0).advantages(["a cat"] * 3, values)
    assert advantages.tolist() == pytest.approx([-1.5**0.5, 0, 1.5**0.5])
    weights = rwr_weights(["a cat"] * 3, values, beta=4.0)
    torch.testing.assert_close(weights, 3 * torch.softmax(torch.tensor([0.0, 1.0, 2.0]), 0))
