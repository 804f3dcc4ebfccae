"""The prompt distributions of the paper (section 5 and appendix): what the policy is asked to draw.

A prompt set is a list of `Prompt`, sampled uniformly in training. To add one, write its list here and name it in
`PROMPT_SETS`. The English of it (articles, plurals) stands here too, since captions of the embedded model need it.
"""
import json
from dataclasses import dataclass
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"

_emoji = json.loads((ASSETS / "emoji_animals.json").read_text(encoding="utf-8"))
COMMON_ANIMALS = list(_emoji["common_animals"])  # the paper's 45 (section 5.3)
UNSEEN_ANIMALS = list(_emoji["unseen_animals"])  # 30 that no training prompt names
EMOJI = {**_emoji["common_animals"], **_emoji["unseen_animals"]}

NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight"]
_IRREGULAR = {"mouse": "mice", "goose": "geese", "wolf": "wolves",
              **{word: word for word in ("fish", "sheep", "deer", "bison", "squid")}}


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
    """What the policy is asked to draw; question and answer are for rewards that ask about the picture."""
    text: str
    question: str = ""
    answer: str = ""


def common_animals():
    """The paper's 45 common animals (aesthetic quality), as 'a cat'."""
    return [Prompt(with_article(animal)) for animal in COMMON_ANIMALS]


def imagenet_animals():
    """The 398 animal classes of ImageNet-1000, indices 0 to 397 (compressibility): the bare names, as torchvision has them."""
    return _lines(ASSETS / "imagenet_animals.txt")


PROMPT_SETS = {"common_animals": common_animals, "imagenet_animals": imagenet_animals}  # the next set goes here


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
