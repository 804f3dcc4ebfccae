"""Makes bert_score_recall.json: recalls by the package bert-score (0.3.13).

rewards.BertRecall is tested against them.

    pip install bert-score==0.3.13 pandas && python oracles/bert_score_recall.py

The encoder is the bundled toy model's text encoder. All tokens count but its begin and end: the package gives
idf 0 to a tokenizer's [CLS] and [SEP], which CLIP's tokenizer calls bos and eos.
"""
import json
from collections import defaultdict
from pathlib import Path

import bert_score
from bert_score.utils import bert_cos_score_idf
from transformers import CLIPTextModel, CLIPTokenizer

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "emoji" / "model"
ANSWERS = ["three cats", "two cats", "three dogs", "a cat", "two", "the image contains four owls",
           "an elephant and a cat"]
REFERENCES = ["three cats", "a cat", "two owls"]

tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
encoder = CLIPTextModel.from_pretrained(MODEL / "text_encoder").eval()
idf = defaultdict(lambda: 1.0, {tokenizer.bos_token_id: 0.0, tokenizer.eos_token_id: 0.0})
pairs = [(answer, reference) for answer in ANSWERS for reference in REFERENCES]
answers, references = map(list, zip(*pairs))
_, recall, _ = bert_cos_score_idf(encoder, references, answers, tokenizer, idf, device="cpu").T
(HERE / "bert_score_recall.json").write_text(json.dumps({
    "made_by": f"bert-score {bert_score.__version__}",
    "cases": [[*pair, round(value, 6)] for pair, value in zip(pairs, recall.tolist())]}, indent=1) + "\n")
