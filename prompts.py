"""The prompt distributions of the paper (section 5 and appendix): what the policy is asked to draw.

    python prompts.py                  # the sets, with examples

A prompt set is a list of `Prompt`, sampled uniformly in training. To add one, write its list here and name it in
`PROMPT_SETS`. The English of it (articles, plurals) stands here too, since captions of the embedded model need it.
"""
import json
from dataclasses import dataclass
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"

_emoji = json.loads((ASSETS / "emoji_animals.json").read_text(encoding="utf-8"))
COMMON_ANIMALS = list(_emoji["common_animals"])  # the paper's 45 (section 5.3)
UNSEEN_ANIMALS = list(_emoji["unseen_animals"])  # 30 that the embedded model draws, and no training prompt names
EMOJI = {**_emoji["common_animals"], **_emoji["unseen_animals"]}

# For evaluation only, and our own lists: the paper has 38 animals and 50 objects too, which it does not name in full.
MORE_UNSEEN_ANIMALS = UNSEEN_ANIMALS + ["moose", "walrus", "ostrich", "iguana", "pigeon", "lemur", "pelican", "jellyfish"]
OBJECTS = ["apple", "armchair", "backpack", "balloon", "banana", "basket", "bench", "bicycle", "boat", "book", "bottle", "bowl",
           "bridge", "bus", "cake", "camera", "candle", "car", "castle", "chair", "clock", "cup", "door", "drum", "fountain",
           "guitar", "hammer", "hat", "house", "kettle", "key", "ladder", "lamp", "lighthouse", "mirror", "motorcycle",
           "mushroom", "piano", "pizza", "robot", "shoe", "suitcase", "table", "teapot", "telephone", "tent", "train", "tree",
           "umbrella", "violin"]
ACTIVITIES = ["riding a bike", "playing chess", "washing dishes"]

NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight"]
_IRREGULAR = {"mouse": "mice", "goose": "geese", "wolf": "wolves",
              **{word: word for word in ("fish", "sheep", "deer", "bison", "squid", "moose", "jellyfish")}}


def with_article(noun):
    """'a cat', 'an ant'."""
    return ("an " if noun[0].lower() in "aeiou" else "a ") + noun


def plural(noun):
    """'cats', 'mice', 'foxes', 'butterflies', 'monkeys'."""
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def counted(noun, number):
    """'a cat', 'two cats', 'three mice'."""
    return with_article(noun) if number == 1 else f"{NUMBER_WORDS[number]} {plural(noun)}"


@dataclass(frozen=True)
class Prompt:
    """What the policy is asked to draw, and, for a reward that asks about the picture, (question, right answers) pairs."""
    text: str
    questions: tuple = ()  # of (str, tuple of str)


def common_animals():
    """The paper's 45 common animals (aesthetic quality), as 'a cat'."""
    return [Prompt(with_article(animal)) for animal in COMMON_ANIMALS]


def imagenet_animals():
    """The 398 animal classes of ImageNet-1000, indices 0 to 397 (compressibility): the bare names, as torchvision has them."""
    return _lines(ASSETS / "imagenet_animals.txt")


def painted_animals():
    """'A painting of a cat' and so on, the 45 of a third party's figures of DDPO (PRDP, arXiv 2402.08714, table 1)."""
    return [Prompt(f"A painting of {with_article(animal)}") for animal in COMMON_ANIMALS]


def animal_activities():
    """The 45 animals in three activities each (prompt-image alignment), as 'an ant playing chess'."""
    return [Prompt(f"{with_article(animal)} {activity}") for animal in COMMON_ANIMALS for activity in ACTIVITIES]


def two_to_eight_animals():
    """Two to eight of the 45 animals (counting, appendix A), as 'three mice', with the questions that a VLM is asked."""
    return [_some(animal, number) for number in range(2, 9) for animal in COMMON_ANIMALS]


def two_to_four_animals():
    """Of these, what the embedded model can draw: two to four."""
    return [_some(animal, number) for number in range(2, 5) for animal in COMMON_ANIMALS]


def _some(animal, number):
    return Prompt(counted(animal, number), number_and_animal(animal, number))


def number_and_animal(animal, number):
    """The two questions of the counting reward, with the words that are right answers."""
    return (("How many animals are in this image?", (NUMBER_WORDS[number], str(number))),
            ("What animal is in this image?", (animal, plural(animal))))


def dpok():
    """The four prompts of the comparison with DPOK (appendix C), one model for all."""
    return [Prompt("a green colored rabbit"), Prompt("four wolves in the park"), Prompt("a dog and a cat"),
            Prompt("a dog on the moon")]


def unseen_animals():
    """38 animals that no training prompt names (generalisation, for evaluation only)."""
    return [Prompt(with_article(animal)) for animal in MORE_UNSEEN_ANIMALS]


def unseen_emoji_animals():
    """Of these, the 30 that the embedded model can draw."""
    return [Prompt(with_article(animal)) for animal in UNSEEN_ANIMALS]


def two_to_four_unseen_emoji_animals():
    """Two to four of each of these 30 (generalisation of counting and alignment, for evaluation only)."""
    return [_some(animal, number) for number in range(2, 5) for animal in UNSEEN_ANIMALS]


def objects():
    """50 common objects (generalisation, for evaluation only)."""
    return [Prompt(with_article(thing)) for thing in OBJECTS]


PROMPT_SETS = {function.__name__: function for function in (  # the next set goes here
    common_animals, imagenet_animals, painted_animals, animal_activities, two_to_eight_animals, two_to_four_animals, dpok,
    unseen_animals, unseen_emoji_animals, two_to_four_unseen_emoji_animals, objects)}


def load_prompts(name):
    """The prompts of a set in PROMPT_SETS, or of a text file with one prompt a line. Raises ValueError if neither."""
    if name in PROMPT_SETS:
        return PROMPT_SETS[name]()
    if not Path(name).is_file():
        raise ValueError(f"no prompts {name!r}: neither a prompt set ({', '.join(PROMPT_SETS)}) nor a text file")
    prompts = _lines(Path(name))
    if not prompts:
        raise ValueError(f"the prompt file {name!r} is empty: write one prompt a line")
    return prompts


def _lines(path):
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt file {str(path)!r} is not UTF-8 text") from error
    return [Prompt(line.strip()) for line in lines if line.strip()]


if __name__ == "__main__":
    for name, prompts in PROMPT_SETS.items():
        texts = [prompt.text for prompt in prompts()]
        print(f"{name}: {len(texts)}, as {', '.join(map(repr, texts[::len(texts) // 3][:3]))}\n    {prompts.__doc__}")
