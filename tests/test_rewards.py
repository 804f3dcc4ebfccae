"""rewards.py: the learned rewards, each as its authors' package or formula gives it, on tiny networks; and a user's own."""
import contextlib
import json
import os
import random
import re
import shutil
import signal
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import networks
import numpy as np
import preference_rewards
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
    DebertaConfig,
    DebertaModel,
)

import prompts
import rewards
import train
from baselines_rwr import rwr_weights, sparse_weights
from conftest import EMOJI, IMAGES, ROOT, rng, run, tiny_flags
from ddpo import PromptStatistics


@pytest.fixture(scope="session")
def tiny_head(tmp_path_factory):
    """The aesthetic head's weights under the published file's names, for embeddings of 24 numbers."""
    torch.manual_seed(1)
    sizes = {0: (1024, 24), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    head = {f"layers.{k}.weight": torch.randn(shape) / shape[1]**0.5 for k, shape in sizes.items()}
    head |= {f"layers.{k}.bias": torch.randn(shape[0]) for k, shape in sizes.items()}
    path = tmp_path_factory.mktemp("models") / "head.pth"
    torch.save(head, path)
    save_file(head, path.with_suffix(".safetensors"))
    return path


def test_the_aesthetic_reward_is_a_linear_chain_on_the_normalised_clip_embedding(tiny_clip, tiny_head):
    reward = rewards.load_reward("aesthetic", reward_model=str(tiny_clip), aesthetic_head=str(tiny_head))
    values, _ = reward(IMAGES, [prompts.Prompt("a cat")] * 3)
    clip, processor = CLIPModel.from_pretrained(tiny_clip), CLIPImageProcessorPil.from_pretrained(tiny_clip)
    pixels = processor([networks.to_pil(image) for image in IMAGES], return_tensors="pt").pixel_values
    with torch.no_grad():
        x = clip.visual_projection(clip.vision_model(pixels).pooler_output)
        x, head = x / x.norm(dim=1, keepdim=True), torch.load(tiny_head)
        for k in (0, 2, 4, 6, 7):
            x = x @ head[f"layers.{k}.weight"].T + head[f"layers.{k}.bias"]
    torch.testing.assert_close(values.float(), x.squeeze(1), rtol=1e-4, atol=1e-4)
    assert torch.equal(values, reward(IMAGES, [prompts.Prompt("a dog")] * 3)[0])  # no dropout, and no look at the prompt
    same = rewards.load_reward("aesthetic", reward_model=str(tiny_clip),
                               aesthetic_head=str(tiny_head.with_suffix(".safetensors")))
    assert torch.equal(values, same(IMAGES, [prompts.Prompt("a cat")] * 3)[0])


def test_pil_bytes_and_floats_look_the_same_to_clip(tiny_clip):
    processor = CLIPImageProcessorPil.from_pretrained(tiny_clip)
    pil_images = [networks.to_pil(image) for image in IMAGES]
    uint8_images = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in pil_images]
    seen = [networks.clip_pixels(processor, images) for images in (pil_images, uint8_images, IMAGES)]
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    assert seen[0].std() > 0.3  # scaled down once, not twice


@pytest.mark.parametrize("height, width", [(40, 40), (24, 24), (48, 64)])
def test_clips_pixels_with_a_gradient_are_the_processors(tiny_clip, height, width):
    processor = CLIPImageProcessorPil.from_pretrained(tiny_clip)
    images = F.avg_pool2d(torch.rand(3, 3, height + 4, width + 4, generator=rng()), 5, 1).requires_grad_()
    pixels = networks.clip_pixels_with_gradient(processor, images)
    torch.testing.assert_close(pixels, networks.clip_pixels(processor, images), rtol=0, atol=1e-4)
    # And the gradient is that of a resize: a brighter image has pixels brighter by as much, whatever way they are weighed.
    weights = torch.rand(pixels.shape, generator=rng(1))
    step = 0.2 * torch.rand((3, 3, 1, 1), generator=rng(2)) + F.avg_pool2d(torch.rand(images.shape, generator=rng(3)), 7, 1, 3) / 5
    gradient, = torch.autograd.grad((weights * pixels).sum(), images)
    change = (weights * (networks.clip_pixels(processor, images + step) - networks.clip_pixels(processor, images - step))).sum() / 2
    assert (gradient * step).sum().item() == pytest.approx(change.item(), rel=0.01)


def test_the_aesthetic_reward_is_the_same_with_a_gradient(tiny_clip, tiny_head):
    reward = rewards.load_reward("aesthetic", reward_model=str(tiny_clip), aesthetic_head=str(tiny_head))
    images = torch.rand(3, 3, 40, 40, generator=rng()).requires_grad_()
    values = reward.with_gradient(images, ["a cat"] * 3)
    torch.testing.assert_close(values.double(), reward(images, ["a cat"] * 3)[0], rtol=1e-5, atol=1e-5)
    gradient, = torch.autograd.grad(values.sum(), images)
    assert gradient.abs().amax((1, 2, 3)).min() > 1e-4
    with torch.no_grad():
        better = reward(images + 0.05 * gradient.sign(), ["a cat"] * 3)[0]
    assert (better > values).all()


def test_pickscore_is_the_cosine_of_clips_own_forward(tiny_clip, monkeypatch):
    texts = [prompts.Prompt(text) for text in ("a cat", "two dogs", "an ant")]
    reward = rewards.load_reward("pickscore", reward_model=str(tiny_clip))
    values, _ = reward(IMAGES, texts)
    clip, processor = CLIPModel.from_pretrained(tiny_clip), CLIPImageProcessorPil.from_pretrained(tiny_clip)
    tokens = CLIPTokenizer.from_pretrained(tiny_clip)([prompt.text for prompt in texts], padding="max_length", max_length=77,
                                                      return_tensors="pt")
    pixels = processor([networks.to_pil(image) for image in IMAGES], return_tensors="pt").pixel_values
    with torch.no_grad():
        theirs = clip(**tokens, pixel_values=pixels).logits_per_image.diag() / clip.logit_scale.exp()
    torch.testing.assert_close(values.float(), theirs, rtol=1e-4, atol=1e-6)
    new = CLIPModel.get_image_features  # older versions of transformers return the tensor itself
    monkeypatch.setattr(CLIPModel, "get_image_features", lambda self, pixels: new(self, pixels).pooler_output)
    assert torch.equal(reward(IMAGES, texts)[0], values)


def test_imagereward_is_that_of_the_package_image_reward(tiny_vlm, tmp_path):
    weights = load_file(ROOT / "oracles" / "imagereward.safetensors")
    pixels, tokens, mask = (weights.pop(name) for name in ("pixels", "tokens", "mask"))
    AutoTokenizer.from_pretrained(tiny_vlm).save_pretrained(tmp_path)
    torch.save({name: weight.float() for name, weight in weights.items()}, tmp_path / "ImageReward.pt")
    reward = preference_rewards.ImageReward("cpu", str(tmp_path))
    with torch.no_grad():
        ours = reward.rate(pixels, tokens, mask)
    theirs = json.loads((ROOT / "oracles" / "imagereward.json").read_text())["scores"]
    assert ours.tolist() == pytest.approx(theirs, abs=1e-5) and max(theirs) - min(theirs) > 0.05
    texts = [prompts.Prompt(text) for text in ("two cats", "a dog", "a cat")]
    values, _ = rewards.load_reward("imagereward", reward_model=str(tmp_path))(IMAGES, texts)
    alone, _ = rewards.load_reward("imagereward", reward_model=str(tmp_path))(IMAGES[1:2], texts[1:2])
    assert values[1].item() == pytest.approx(alone.item(), abs=1e-5) and len(set(values.tolist())) == 3
    del weights["blip.visual_encoder.norm.bias"]
    torch.save(weights, tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match="do not fit.*post_layernorm.bias"):
        rewards.load_reward("imagereward", reward_model=str(tmp_path))


def test_hpsv2_is_that_of_the_package_hpsv2(tiny_clip, tmp_path):
    weights = load_file(ROOT / "oracles" / "hpsv2.safetensors")
    pixels, tokens = weights.pop("pixels"), weights.pop("tokens")
    weights = {name: weight.float() for name, weight in weights.items()}
    layers = dict(hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, projection_dim=24)
    layers["hidden_act"] = "gelu"
    CLIPConfig(projection_dim=24, vision_config=dict(image_size=32, patch_size=8, **layers), text_config=dict(
        vocab_size=60, max_position_embeddings=16, eos_token_id=59, **layers)).save_pretrained(tmp_path)
    for part in (CLIPImageProcessorPil.from_pretrained(tiny_clip), CLIPTokenizer.from_pretrained(tiny_clip)):
        part.save_pretrained(tmp_path)
    torch.save({"epoch": 1, "state_dict": weights}, tmp_path / "HPS_v2_compressed.pt")
    clip = preference_rewards.HPSv2("cpu", str(tmp_path)).clip
    with torch.no_grad():
        images, texts = map(networks.clip_embedding, (clip.get_image_features(pixels), clip.get_text_features(tokens)))
    theirs = json.loads((ROOT / "oracles" / "hpsv2.json").read_text())["scores"]
    assert torch.cosine_similarity(images, texts).tolist() == pytest.approx(theirs, abs=1e-5)
    assert max(theirs) - min(theirs) > 0.1


def test_networks_saved_in_half_precision_are_used_in_full(tiny_clip, tmp_path):
    CLIPModel.from_pretrained(tiny_clip).half().save_pretrained(tmp_path / "clip")
    CLIPImageProcessorPil.from_pretrained(tiny_clip).save_pretrained(tmp_path / "clip")
    assert networks.load_clip(str(tmp_path / "clip"), "cpu", "CLIP")[1].dtype == torch.float32
    CLIPTextModel.from_pretrained(EMOJI / "text_encoder").half().save_pretrained(tmp_path / "bert")
    CLIPTokenizer.from_pretrained(EMOJI / "tokenizer").save_pretrained(tmp_path / "bert")
    assert rewards.BertRecall("cpu", str(tmp_path / "bert")).encoder.dtype == torch.float32


def test_a_vlm_is_asked_in_its_own_form(tiny_vlm, tmp_path):
    llava = rewards.VLM("cpu", str(tiny_vlm))
    with_template = AutoProcessor.from_pretrained(tiny_vlm, backend="pil")
    with_template.chat_template = (
        "{% for message in messages %}USER: {% for part in message.content %}{% if part.type == 'image' %}<image>\n"
        "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}")
    assert rewards.dialogue(with_template, "how many?") == rewards.dialogue(llava.processor, "how many?")
    shutil.copytree(tiny_vlm, tmp_path / "vlm")
    with_template.chat_template = "<s>" + with_template.chat_template  # a template may write the beginning itself
    with_template.save_pretrained(tmp_path / "vlm")
    other = rewards.VLM("cpu", str(tmp_path / "vlm"))
    assert rewards.dialogue(other.processor, "how many?").startswith("<s>USER: <image>")
    assert len(other.answer(IMAGES[:1], ["how many?"])) == 1


def test_a_vlm_answers_the_same_whatever_it_is_asked_beside_it(tiny_vlm, monkeypatch):
    vlm = rewards.VLM("cpu", str(tiny_vlm))
    questions = ["what is happening in this image?", "how many animals?", "what animal is in this image? answer concisely."]
    asked, generate = [], vlm.network.generate
    monkeypatch.setattr(vlm.network, "generate", lambda **options: asked.append(options) or generate(**options))
    together = vlm.answer(IMAGES, questions)
    assert (asked[0]["max_new_tokens"], asked[0]["do_sample"]) == (64, False)  # 64 as in the authors' code
    alone = [vlm.answer(IMAGES[k:k + 1], [question])[0] for k, question in enumerate(questions)]
    assert together == alone and all(together)
    assert vlm.answer(IMAGES.repeat(4, 1, 1, 1), questions * 4) == together * 4  # more than go through at a time
    text = rewards.dialogue(vlm.processor, "what?")
    tokens = vlm.processor(images=[networks.to_pil(IMAGES[0])], text=[text], return_tensors="pt")
    assert (tokens.input_ids == 4).sum() == 16  # one for each 8 x 8 patch


def test_bertscore_recall_knows_three_cats_from_two_cats_and_from_three_dogs():
    recall = rewards.BertRecall("cpu", str(EMOJI))
    answers = ["three cats", "two cats", "three dogs", "four owls", ""]
    same, *others, empty = recall(answers, ["three cats"] * 5).tolist()
    assert same == pytest.approx(1, abs=1e-5) and max(others) < 0.95 and empty == 0
    assert recall(["an ant", *answers], ["two ants", *["three cats"] * 5])[1:].tolist() == pytest.approx([same, *others, empty])
    rescaled = rewards.BertRecall("cpu", str(EMOJI), baseline=0.5)(answers[:2], ["three cats"] * 2)
    assert rescaled.tolist() == pytest.approx([1, 2 * (others[0] - 0.5)], abs=1e-5)


def test_bertscore_recall_is_that_of_the_package_bert_score():
    cases = json.loads((ROOT / "oracles" / "bert_score_recall.json").read_text())["cases"]
    answers, references, theirs = zip(*cases)
    ours = rewards.BertRecall("cpu", str(EMOJI))(list(answers), list(references))
    assert ours.tolist() == pytest.approx(theirs, abs=1e-5) and len(cases) == 21


def test_bertscore_takes_layer_40_of_deberta_xlarge_as_the_package_does(tmp_path):
    torch.manual_seed(0)
    deberta = DebertaModel(DebertaConfig(
        vocab_size=900, hidden_size=16, intermediate_size=16, num_hidden_layers=48, num_attention_heads=2,
        relative_attention=True, pos_att_type=["c2p", "p2c"], position_biased_input=False)).eval()
    deberta.save_pretrained(tmp_path)
    CLIPTokenizer.from_pretrained(EMOJI / "tokenizer").save_pretrained(tmp_path)
    recall = rewards.BertRecall("cpu", str(tmp_path))
    tokens = recall.tokenizer(["three cats"], return_tensors="pt")
    with torch.no_grad():
        theirs = deberta(**tokens, output_hidden_states=True).hidden_states[40]  # bert-score: model2layers
        torch.testing.assert_close(recall.encoder(**tokens).last_hidden_state, theirs)


def test_alignment_is_the_recall_of_what_the_vlm_says(tiny_vlm, monkeypatch):
    asked = []
    monkeypatch.setattr(rewards.VLM, "answer", lambda self, images, questions: asked.extend(questions) or ["two cats"] * 3)
    texts = [prompts.Prompt(text) for text in ("two cats", "a dog", "two cats")]
    for wording, reference in (("paper", "{}"), ("code", "The image contains {}")):
        reward = rewards.load_reward("alignment", reward_model=str(tiny_vlm), bert_model=str(EMOJI), wording=wording)
        values, notes = reward(IMAGES, texts)
        recall = rewards.BertRecall("cpu", str(EMOJI))
        torch.testing.assert_close(values.float(), recall(["two cats"] * 3, [reference.format(prompt.text) for prompt in texts]))
        assert notes == ["two cats"] * 3 and values[0] == values[2] != values[1]
    assert set(asked) == {"What is happening in this image?", "Answer concisely: what is going on in this image?"}


def test_counting_marks_each_answer_right_or_wrong_by_the_prompts_own_words(tiny_vlm, monkeypatch):
    answers = {"How many animals are in this image?": ["Three.", "2", "There are fourteen"],
               "What animal is in this image?": ["a cat", "dogs", "A mouse"]}
    monkeypatch.setattr(rewards.VLM, "answer", lambda self, images, asked: [answers[question].pop(0) for question in asked])
    sets = {prompt.text: prompt for prompt in prompts.load_prompts("two_to_four_animals")}
    values, notes = rewards.load_reward("counting", reward_model=str(tiny_vlm))(
        IMAGES, [sets[text] for text in ("three cats", "two cats", "four mice")])
    assert values.tolist() == [1, 0.5, 0.5] and notes == ["Three. / a cat", "2 / dogs", "There are fourteen / A mouse"]


@pytest.mark.parametrize("name", rewards.LEARNED)
def test_a_missing_reward_model_is_reported_before_a_run_is_created(name, tmp_path, capsys):
    assert train.main(["--reward", name, "--reward-model", str(tmp_path), "--prompts", "two_to_four_animals"]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("train.py: ") and str(tmp_path) in told and not Path("runs").exists()


@pytest.mark.parametrize("name, given, published", [
    ("aesthetic", [], "openai/clip-vit-large-patch14"),
    ("aesthetic", ["reward_model"], "trl-lib/ddpo-aesthetic-predictor"),
    ("pickscore", [], "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    ("hpsv2", [], "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    ("imagereward", [], "bert-base-uncased"),
    ("counting", [], "llava-hf/llava-1.5-7b-hf"),
    ("alignment", [], "llava-hf/llava-1.5-7b-hf"),
    ("alignment", ["reward_model"], "microsoft/deberta-xlarge-mnli")])
def test_without_options_the_published_networks_are_asked_for(name, given, published, tiny_clip, tiny_vlm, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=re.escape(f"'{published}'")):
        rewards.load_reward(name, **dict.fromkeys(given, str(tiny_vlm if name == "alignment" else tiny_clip)))


def test_the_published_files_of_the_preference_models(tiny_clip, tiny_vlm, monkeypatch):
    """If the processor is in another repository, it is loaded before the network."""
    asked = []
    monkeypatch.setattr(preference_rewards, "from_pretrained", lambda *args, **options: SimpleNamespace())
    monkeypatch.setattr(preference_rewards, "hub_file", lambda *args: asked.append(args[:2]) or 1 / 0)
    monkeypatch.setattr(preference_rewards, "load_clip", lambda model, *args, **options: asked.append((model, options)) or 1 / 0)
    for reward in (preference_rewards.PickScore, preference_rewards.HPSv2, preference_rewards.ImageReward):
        with pytest.raises(ZeroDivisionError):
            reward("cpu")
    assert asked == [("yuvalkirstain/PickScore_v1", {"processor": preference_rewards.CLIP_H}),
                     ("xswu/HPSv2", "HPS_v2_compressed.pt"), ("THUDM/ImageReward", "ImageReward.pt")]


def test_a_run_trains_on_a_learned_reward(tiny_model, tiny_clip, tiny_head, capsys):
    assert train.main(["--reward", "aesthetic", "--reward-model", str(tiny_clip), "--aesthetic-head", str(tiny_head), "--model",
                       str(tiny_model), "--epochs", "1", "--samples-per-epoch", "8", "--updates-per-epoch", "2",
                       "--sampling-steps", "4", "--eval-prompts", "9"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("aesthetic: ")


# ---- A user's file ----

STATES = [torch.is_grad_enabled, torch.get_default_dtype, torch.get_default_device, os.getcwd, random.getstate,
          lambda: torch.get_rng_state().tolist(), lambda: np.random.get_state()[1].tolist()]


def loaded(text, function="reward", name="own.py", **options):
    """The Reward of a function in a file of that text."""
    Path(name).write_text(text)
    return rewards.load_reward(f"{name}:{function}", **options)


MEAN = "def reward(images, prompts): return images.mean((1, 2, 3))\n"


def test_a_reward_that_works_in_place_gets_copies():
    images, asked = IMAGES.clone(), [prompts.Prompt("a cat", (), {"ids": [1]})] * 3
    loaded("def reward(images, prompts, metadata):\n    images.sub_(1)\n    prompts.clear()\n    metadata[0]['ids'].append(2)\n"
           "    return images.mean((1, 2, 3))\n")(images, asked)
    assert torch.equal(images, IMAGES) and asked[0] == prompts.Prompt("a cat", (), {"ids": [1]}) and len(asked) == 3


def test_what_a_reward_changes_of_the_process_is_put_back_even_if_it_fails(monkeypatch):
    code = ("import os, random, torch, numpy\ntorch.set_default_dtype(torch.float64)\nos.chdir('/')\nrandom.seed(1)\n"
            "def reward(images, prompts):\n    torch.set_grad_enabled(True)\n    torch.set_default_dtype(torch.float64)\n"
            "    torch.set_default_device('meta')\n    os.chdir('/')\n    random.random(), numpy.random.rand(), torch.manual_seed(3)\n"
            "    if prompts[0] == 'fail': raise KeyError('weights')\n    return images.mean((1, 2, 3))\n")
    before = [state() for state in STATES]
    reward = loaded(code)
    assert [state() for state in STATES] == before
    for asked in (["a cat"] * 3, ["fail"] * 3):
        with contextlib.suppress(rewards.RewardError):
            reward(IMAGES, asked)
        assert [state() for state in STATES] == before


def test_a_reward_runs_without_gradients():
    reward = loaded("import torch\nnetwork = torch.nn.Linear(1, 1)\ndef reward(images, prompts):\n    assert not torch.is_grad_enabled()\n"
                    "    out = network(images.mean((1, 2, 3))[:, None])[:, 0]\n    assert not out.requires_grad\n    return out\n")
    reward(IMAGES, ["a cat"] * 3)


def test_a_reward_that_draws_random_numbers_has_a_stream_of_its_own():
    reward = loaded("import torch\ndef reward(images, prompts): return torch.rand(len(images))\n")
    first, _ = reward(IMAGES, ["a cat"] * 3)
    states, _ = reward.rng_states, torch.rand(5)
    second, _ = reward(IMAGES, ["a cat"] * 3)
    assert not torch.equal(first, second)
    reward.rng_states = states
    assert torch.equal(reward(IMAGES, ["a cat"] * 3)[0], second)


def test_a_file_behaves_as_python_would_run_it():
    Path("elsewhere").mkdir()
    Path("elsewhere/sibling.py").write_text("scale = 2.0\n")
    Path("elsewhere/later.py").write_text("def f(x): return float(x)\n")
    reward = loaded("from __future__ import annotations\nfrom dataclasses import dataclass\nfrom multiprocessing import Pool\n"
                    "import sibling\n@dataclass\nclass Options:\n    scale: float = sibling.scale\n"
                    "def one(x): return Options().scale * x\n"
                    "def reward(images, prompts):\n    from later import f\n    with Pool(2) as pool:\n"
                    "        return pool.map(one, map(f, images.mean((1, 2, 3))))\n", name="elsewhere/own_pool.py")
    path = list(sys.path)
    assert torch.allclose(reward(IMAGES, ["a cat"] * 3)[0].float(), 2 * IMAGES.mean((1, 2, 3)))
    assert sys.path == path


def test_two_folders_may_each_have_a_helper_even_of_a_name_of_this_project():
    values = []
    for folder in ("one", "two"):
        Path(folder).mkdir()
        Path(folder, "policy.py").write_text(f"VALUE = {len(values) + 1}\n")
        Path(folder, "later.py").write_text(f"VALUE = {len(values) + 1}\n")
        values.append(loaded("from policy import VALUE\ndef reward(images, prompts):\n    import later\n"
                             "    return [VALUE + 10 * later.VALUE] * 3\n", name=f"{folder}/own_{folder}.py"))
    assert [reward(IMAGES, ["a"] * 3)[0][0].item() for reward in values * 2] == [11, 22, 11, 22]
    import policy
    assert hasattr(policy, "Policy") and "later" not in sys.modules


def test_a_changed_helper_is_another_reward():
    code = "from helper import f\ndef reward(images, prompts):\n    import package.part\n    return f(images)\n"
    Path("helper.py").write_text("def f(images): return images.mean((1, 2, 3))\n")
    Path("package").mkdir()
    Path("package/__init__.py").touch()
    Path("package/part.py").touch()
    identities = [loaded(code).identity, loaded(code).identity]
    for file in ("helper.py", "package/part.py"):
        Path(file).write_text(Path(file).read_text() + "#")
        identities.append(loaded(code).identity)
    assert identities[0] == identities[1] and len(set(identities)) == 3


@pytest.mark.parametrize("change, name", [
    ("torch.set_float32_matmul_precision('medium')", "get_float32_matmul_precision"), ("torch.set_num_threads(1)", "get_num_threads"),
    ("torch.use_deterministic_algorithms(True)", "are_deterministic_algorithms_enabled"),
    ("torch.set_autocast_enabled('cpu', True)", "is_autocast_enabled"), ("torch.autograd.set_detect_anomaly(True)", "is_anomaly_enabled")])
def test_the_policys_arithmetic_is_not_changed_by_a_reward(change, name):
    state = getattr(torch, name)
    before = state()
    loaded(f"import torch\n{change}\ndef reward(images, prompts):\n    {change}\n    return [1.0] * 3\n")(IMAGES, ["a"] * 3)
    assert state() == before


def test_a_reward_cannot_take_away_the_signals_that_save():
    before = signal.getsignal(signal.SIGTERM)
    loaded("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_DFL)\n" + MEAN.replace(":", ":\n    signal.signal(signal.SIGTERM, "
           "signal.SIG_IGN);", 1))(IMAGES, ["a"] * 3)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("returned, want", [
    ("(x for x in (1.0, 2.0, 3.0))", [1, 2, 3]), ("map(float, '123')", [1, 2, 3]), ("numpy.array([1, 2, 3], object)", [1, 2, 3]),
    ("([1.0, 2.0, 3.0], None)", [1, 2, 3]), ("([1.0, 2.0, 3.0], numpy.array(['x', 'y', 'z']))", [1, 2, 3]), ("(1.0, 2.0, 3.0)", [1, 2, 3])])
def test_any_b_numbers_are_rewards(returned, want):
    reward = loaded(f"import numpy\ndef reward(images, prompts): return {returned}\n")
    assert reward(IMAGES, ["a"] * 3)[0].tolist() == want


@pytest.mark.parametrize("returned", ["[1j] * 3", "torch.ones(3) * 1j", "numpy.ones(3) * 1j", "'abc'", "{'a': 1}", "[[1.0]] * 3"])
def test_what_is_not_b_numbers_is_refused(returned):
    with pytest.raises(rewards.RewardError, match="not numbers|shape"):
        loaded(f"import numpy, torch\ndef reward(images, prompts): return {returned}\n")(IMAGES, ["a"] * 3)


@pytest.mark.parametrize("name", ["rewards.py", "time.py", "colorsys.py"])
def test_a_file_with_the_name_of_another_module_does_not_replace_it(name):
    module = __import__(name.removesuffix(".py"))
    assert loaded(MEAN, name=name)(IMAGES, ["a cat"] * 3)[0].shape == (3,)
    assert sys.modules[name.removesuffix(".py")] is module and hasattr(module, "__doc__")


def test_two_functions_of_one_file_share_it_and_a_file_that_was_edited_is_run_again():
    code = "calls = []\ndef reward(images, prompts):\n    calls.append(1)\n    return [len(calls)] * len(images)\ndef other(images, prompts): return reward(images, prompts)\n"
    one, two = loaded(code), loaded(code, "other")
    assert one(IMAGES, ["a"] * 3)[0][0] == 1 and two(IMAGES, ["a"] * 3)[0][0] == 2
    assert loaded(code.replace("len(calls)]", "9]"))(IMAGES, ["a"] * 3)[0][0] == 9
    assert loaded(code).identity != loaded(code + "#").identity


@pytest.mark.parametrize("body, message", [
    ("import sys; sys.exit('quota exceeded')", "failed: SystemExit: quota exceeded (own.py, line 3)"),
    ("raise GeneratorExit", "failed: GeneratorExit"), ("x = 1\n    return {}[x]", "failed: KeyError: 1 (own.py, line 4)")])
def test_an_exit_or_an_error_inside_a_reward_is_told_with_its_line(body, message):
    with pytest.raises(rewards.RewardError) as caught:
        loaded(f"\ndef reward(images, prompts):\n    {body}\n")(IMAGES, ["a cat"] * 3)
    assert message in str(caught.value)


def test_an_exit_while_a_file_is_loaded_is_a_users_mistake_and_ctrl_c_is_not():
    with pytest.raises(ValueError, match="cannot be loaded: SystemExit: 3"):
        loaded("raise SystemExit(3)")
    with pytest.raises(KeyboardInterrupt):
        loaded("def reward(images, prompts): raise KeyboardInterrupt")(IMAGES, ["a cat"] * 3)


@pytest.mark.parametrize("notes, want", [
    ("{}", ["", "", ""]), ("{'seen': ['x', 'y', 'z'], 'sure': torch.arange(3)}", ["seen: x; sure: 0", "seen: y; sure: 1", "seen: z; sure: 2"]),
    ("['x', 'y\\n', 'z']", ["x", "y", "z"])])
def test_notes_may_be_a_list_or_a_dictionary_of_lists(notes, want):
    assert loaded(f"import torch\ndef reward(images, prompts): return [1.0] * 3, {notes}\n")(IMAGES, ["a cat"] * 3)[1] == want


@pytest.mark.parametrize("notes, message", [
    ("{'seen': ['x']}", "returned 1 notes 'seen' for 3 images"), ("{'mean': 0.5}", "returned one float, not a list of notes 'mean' for 3"),
    ("{'seen': 'abc'}", "one str, not a list of notes 'seen'"), ("{'mean': torch.tensor(1.0)}", "notes 'mean' for 3"), ("['x']", "1 notes for 3")])
def test_notes_of_another_number_are_refused(notes, message):
    with pytest.raises(rewards.RewardError, match=message):
        loaded(f"import torch\ndef reward(images, prompts): return [1.0] * 3, {notes}\n")(IMAGES, ["a cat"] * 3)


@pytest.mark.parametrize("parameters, given", [
    ("images, prompts, metadata", 3), ("images, prompts, more", 3), ("images, prompts, metadata=None", 3), ("images, prompts, scale=2.0", 2),
    ("*arguments", 2), ("images, prompts, *, scale=2.0", 2), ("images, prompts, **options", 2), ("images, prompts, *, metadata=None", 3)])
def test_a_function_gets_metadata_if_it_has_a_third_parameter_for_it(parameters, given):
    reward = loaded(f"seen = []\ndef reward({parameters}):\n    seen.append(len([x for x in locals().values() if isinstance(x, list) and x "
                    "and isinstance(x[0], dict)]))\n    return [float(seen[-1])] * 3\n")
    values, _ = reward(IMAGES, [prompts.Prompt("a cat", (), {"id": 1})] * 3)
    assert values.tolist() == [float(given == 3)] * 3


@pytest.mark.parametrize("parameters", ["", "images", "images, prompts, metadata, more", "images, prompts, *, scale",
                                        "images, metadata, prompts"])
def test_a_function_with_other_parameters_is_refused_before_anything_is_made(parameters):
    with pytest.raises(ValueError, match=r"must be a plain function of \(images, prompts\) or"):
        loaded(f"def reward({parameters}): return [1.0] * 3\n")


def test_an_async_function_is_refused():
    with pytest.raises(ValueError, match="must be a plain function"):
        loaded("async def reward(images, prompts): return [1.0] * 3\n")


def test_the_fields_of_a_jsonl_file_reach_a_users_reward(tiny_model):
    Path("p.jsonl").write_text('{"prompt": "a cat", "wanted": 1}\n{"prompt": "a dog", "wanted": 5}\n')
    Path("own.py").write_text("def wanted(images, prompts, metadata): return [fields['wanted'] for fields in metadata]\n")
    rows = run(*tiny_flags(tiny_model, prompts="p.jsonl", reward="own.py:wanted", **{"eval-prompts": 2}))
    assert rows[0]["eval_reward_mean"] == 3 and {note[0] for note in rows[0].get("eval_notes", [])} == set()


# ---- Rewards of rewards ----

def test_the_projects_rewards_take_plain_texts_and_the_weighted_sum_of_the_docstring_is_one(monkeypatch, tiny_clip):
    code = re.search(r"This one adds two, with weights:\n\n(.*?)\n\nTo add a reward", rewards.__doc__, re.S)[1]
    monkeypatch.setitem(rewards.LEARNED, "aesthetic", lambda device: lambda images, prompts: [7.0] * len(images))
    values, _ = loaded(textwrap.dedent(code), "weighted_sum")(IMAGES, ["a cat"] * 3)
    sizes, _ = rewards.load_reward("compressibility")(IMAGES, ["a cat"] * 3)
    assert len(code.strip().splitlines()) <= 10 and torch.allclose(values, 7.0 + 0.1 * sizes)


def test_small_differences_of_large_rewards_reach_advantages_and_weights():
    reward = loaded("def reward(images, prompts): return [1e9, 1e9 + 0.25, 1e9 + 0.5]\n")
    values, _ = reward(IMAGES, ["a cat"] * 3)
    assert (values - 1e9).tolist() == [0, 0.25, 0.5]
    advantages, _ = PromptStatistics(32, 1, 10.0).advantages(["a cat"] * 3, values)
    assert torch.allclose(advantages, torch.tensor([-1.0, 0.0, 1.0]) * 1.5**0.5)
    weights = rwr_weights(["a cat"] * 3, values, beta=4.0)
    assert torch.allclose(weights, 3 * torch.softmax(torch.tensor([0.0, 1.0, 2.0]), 0))
    assert sparse_weights(["a cat"] * 3, values, 0.9).tolist() == [0, 0, 3]
