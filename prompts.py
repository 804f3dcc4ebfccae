"""The prompt sets of the paper (section 5, appendix D.6): what the policy is asked to draw.

    python prompts.py                  # the sets, with examples

To add a set, write it into PROMPT_SETS. Or give a file of your own: a text with one prompt a line, or JSON
lines as

    {"prompt": "two cats", "questions": [["How many animals are in this image?", ["two", "2"]]], "mine": 1}

in which "prompt" may be called "text", "questions" is what the counting reward asks (each with the words that
are right answers, or {"question": ..., "answer": ...}), and all other fields are metadata for a reward of
your own.
"""
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

# The paper's 45 common animals (section 6.1, appendix D.6), in the order of the authors' list.
COMMON_ANIMALS = """
    cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf
    lizard beetle ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck
    goose bee pig turkey fly llama camel bat gorilla hedgehog kangaroo""".split()
ACTIVITIES = ["riding a bike", "playing chess", "washing dishes"]  # section 5.3; code: "washing the dishes"

# For evaluation only. The paper has 38 animals and 50 objects, but does not name them all: these are ours.
UNSEEN_EMOJI_ANIMALS = """
    elephant penguin octopus panda koala owl crab flamingo peacock parrot swan otter sloth skunk badger
    hippo rhino giraffe leopard crocodile snail scorpion lobster squid seal beaver bison eagle ladybug
    rooster""".split()
UNSEEN_ANIMALS = UNSEEN_EMOJI_ANIMALS + "moose walrus ostrich iguana pigeon lemur pelican jellyfish".split()

# Fields with which other programs change a prompt's image.
OPTIONS = {"negative_prompt", "guidance_scale", "num_inference_steps", "height", "width", "seed"}
NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight"]
IRREGULAR_PLURALS = {"mouse": "mice", "goose": "geese", "wolf": "wolves",
                     **{word: word for word in "fish sheep deer bison squid moose jellyfish".split()}}


@dataclass(frozen=True)
class Prompt:
    """What the policy is asked to draw. For a reward that asks about the image: (question, answers) pairs."""
    text: str
    questions: tuple = ()  # of (str, tuple of str)
    metadata: dict = field(default_factory=dict, hash=False)  # of a user's file, for a user's reward


# ---- English ----

def with_article(noun):
    """'a cat', 'an ant'."""
    return ("an " if noun[0].lower() in "aeiou" else "a ") + noun


def plural(noun):
    """'cats', 'mice', 'foxes', 'butterflies', 'monkeys'."""
    if noun in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def with_number(noun, number):
    """'a cat', 'two cats', 'three mice'."""
    return with_article(noun) if number == 1 else f"{NUMBER_WORDS[number]} {plural(noun)}"


# ---- Files ----

def read_prompts(path):
    """One Prompt for each line of a text file, or of JSON lines (.jsonl), that is not blank."""
    lines = path.read_text(encoding="utf-8-sig").split("\n")  # str.splitlines would split at U+2028, too
    lines = [line.strip() for line in lines if line.strip()]
    is_table = path.suffix in (".json", ".csv") or path.suffix != ".jsonl" and lines and lines[0][0] == "{"
    if not lines or is_table:  # of a table each line would be a prompt
        raise ValueError(f"the file {path.name!r} must be text, a prompt a line, or JSON lines (.jsonl)")
    if path.suffix != ".jsonl":
        return [Prompt(line) for line in lines]
    prompts = [prompt_of_json(line, path.name) for line in lines]
    if unused := sorted(OPTIONS & {name for prompt in prompts for name in prompt.metadata}):
        print(f"{path.name}: {', '.join(unused)} of a prompt changes no image here: train.py's flags hold "
              "for all prompts", file=sys.stderr)
    return prompts


def question_of_json(asked):
    """(question, right answers), of a pair or of {"question": ..., "answer": ...}; an answer, or a list."""
    question, right = (asked["question"], asked["answer"]) if isinstance(asked, dict) else asked
    right = [right] if isinstance(right, (str, int)) else right
    if not isinstance(asked, (list, dict)) or not isinstance(question, str) or not right:
        raise ValueError(f"no question with its answers: {asked}")
    return question, tuple(str(answer).lower() for answer in right)


def prompt_of_json(line, file):
    """The Prompt of a line of JSON in that file."""
    try:
        fields = dict(json.loads(line))
        text = fields.pop("prompt" if "prompt" in fields else "text").strip()
        questions = tuple(map(question_of_json, fields.pop("questions", ())))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file}: {line[:60]}: must be as prompts.py says ({error})") from error
    if any(not re.fullmatch("[a-z0-9]+", answer) for _, right in questions for answer in right):
        raise ValueError(f"{file}: {line[:60]}: right answers must be single words")  # as counting compares
    return Prompt(text, questions, fields)


# ---- The sets ----

def counting_questions(animal, number):
    """The two questions of the counting reward, each with the words that are right answers.

    The authors name the animal in the first ("How many cats are there in this image?"), and mark by
    substring. We mark by whole words, since "fourteen" is not four.
    """
    return (("How many animals are in this image?", (NUMBER_WORDS[number], str(number))),
            ("What animal is in this image?", (animal, plural(animal))))


def counted(animals, most):
    """Two to so many of each animal, as in "three mice", with questions."""
    return [Prompt(with_number(animal, number), counting_questions(animal, number))
            for number in range(2, most + 1) for animal in animals]


# name -> what it is, and its texts, or prompts. The next set goes here.
PROMPT_SETS = {
    "common_animals": ("aesthetic quality: the 45 animals as bare names, as in the authors' code",
                       COMMON_ANIMALS),
    "emoji_animals": ("these with an article, as the toy model was trained to read them",
                      [with_article(animal) for animal in COMMON_ANIMALS]),
    "imagenet_animals": ("JPEG size: the whole labels of ImageNet-1000's animals, as in the authors' code",
                         read_prompts(Path(__file__).parent / "support" / "imagenet_animals.txt")),
    "painted_animals": ("on which PRDP (arXiv 2402.08714, table 1) measured DDPO",
                        [f"A painting of {with_article(animal)}" for animal in COMMON_ANIMALS]),
    "animal_activities": ("prompt-image alignment: each animal in three activities",
                          [f"{with_article(animal)} {activity}"
                           for animal in COMMON_ANIMALS for activity in ACTIVITIES]),
    "two_to_eight_animals": ("counting (appendix A), with questions", counted(COMMON_ANIMALS, 8)),
    "two_to_four_animals": ("counting for the toy model, which draws at most four",
                            counted(COMMON_ANIMALS, 4)),
    "dpok": ("the comparison with DPOK (appendix C): one model is trained on all four",
             ["a green colored rabbit", "four wolves in the park", "a dog and a cat", "a dog on the moon"]),
    "signs": ("the reward ocr: signs, posters and book covers, their texts in quotes",
              read_prompts(Path(__file__).parent / "support" / "signs.txt")),
    "unseen_animals": ("generalisation: animals that no training prompt names", UNSEEN_ANIMALS),
    "objects": ("generalisation: common objects",
                read_prompts(Path(__file__).parent / "support" / "objects.txt")),
    "unseen_emoji_animals": ("generalisation of the toy model: other animals that it can draw",
                             [with_article(animal) for animal in UNSEEN_EMOJI_ANIMALS]),
    "two_to_four_unseen_emoji_animals": ("generalisation of alignment and counting",
                                         counted(UNSEEN_EMOJI_ANIMALS, 4))}


def load_prompts(name):
    """The prompts of a set in PROMPT_SETS, or of a file. ValueError, in one line, if it is neither."""
    if name in PROMPT_SETS:
        return [Prompt(text) if isinstance(text, str) else text for text in PROMPT_SETS[name][1]]
    if not Path(name).is_file():
        raise ValueError(f"no prompts {name!r}: neither a set ({', '.join(PROMPT_SETS)}) nor a file")
    return read_prompts(Path(name))


if __name__ == "__main__":
    for name, (what, _) in PROMPT_SETS.items():
        texts = [prompt.text for prompt in load_prompts(name)]
        examples = ", ".join(map(repr, texts[::len(texts) // 3][:3]))
        print(f"{name}: {len(texts)}, as {examples}\n    {what}")
