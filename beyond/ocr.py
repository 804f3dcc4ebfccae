"""The reward that reads: does the image say the text that its prompt asks for? Contract: rewards.py.

    pip install rapidocr onnxruntime
"""
import re

import numpy as np



class OCR:
    """1 - (edit distance of what is read to the text) / (letters of the text), at least 0: Flow-GRPO's rule.

    The text is the prompt's field `text` of a JSON-lines file, or what stands in double quotes in it; without
    one the image cannot be judged: NaN. Spaces and case do not count. If the text is read exactly, what is
    read around it costs nothing. The notes are what was read. The networks, PP-OCRv6 of rapidocr 3.10, come
    with the package. They run on the CPU.
    """
    unit = "%"

    def __init__(self, device):
        try:
            import rapidocr
            self.read = rapidocr.RapidOCR(params={"Global.log_level": "error"})
        except ImportError as error:
            raise ValueError(f"ocr needs two packages: pip install rapidocr onnxruntime ({error})") from error

    def __call__(self, images, prompts):
        pixels = (images.permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy()
        notes = [" ".join(self.read(image[..., ::-1]).txts or ()) for image in pixels]  # BGR
        return [share_read(text_of(prompt), note) for prompt, note in zip(prompts, notes)], notes


def text_of(prompt):
    """The text that a prompt asks for; empty if none."""
    quoted = re.search(r'["“](.+?)["”]', prompt.text)
    return str(prompt.metadata.get("text") or (quoted[1] if quoted else "")).strip()


def share_read(text, read):
    """The share of a text's letters that was read, from 0 to 1; NaN if the text is empty."""
    text, read = ("".join(words.split()).lower() for words in (text, read))
    if not text:
        return np.nan
    return 1.0 if text in read else max(0.0, 1 - edit_distance(text, read) / len(text))


def edit_distance(a, b):
    """How many letters must be put in, left out or changed to make one word of the other (Levenshtein)."""
    row = range(len(b) + 1)
    for i, letter in enumerate(a, 1):
        last, row = row, [i]
        for j, other in enumerate(b, 1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (letter != other)))
    return row[-1]
