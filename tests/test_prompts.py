"""prompts.py: what files become prompts, and which are refused. (The sets themselves: test_ddpo.py.)"""
import json

import pytest

from prompts import Prompt, load_prompts


@pytest.mark.parametrize("content", [
    "\ufeffa cat\r\na dog\u2028on a mat\r\n", "\n\na cat\n  \na dog\u2028on a mat\t"])
def test_a_line_of_text_is_a_prompt_whatever_system_wrote_it(content, tmp_path):
    (tmp_path / "p.txt").write_bytes(content.encode())
    assert load_prompts(str(tmp_path / "p.txt")) == [Prompt("a cat"), Prompt("a dog\u2028on a mat")]


def test_json_lines_give_prompts_with_questions_and_metadata(tmp_path):
    (tmp_path / "p.jsonl").write_text("""{"tag": "count", "include": [{"class": "cat"}], "prompt": "two cats"}

        {"text": "mice", "questions": [["How many?", ["Three", 3]]]}""")
    assert load_prompts(str(tmp_path / "p.jsonl")) == [
        Prompt("two cats", (), {"tag": "count", "include": [{"class": "cat"}]}),
        Prompt("mice", (("How many?", ("three", "3")),))]


@pytest.mark.parametrize("asked", [
    ["how many?", ["Two", 2]], {"question": "how many?", "answer": ["two", "2"]},
    {"answer": "two", "question": "how many?", "choices": ["one", "two"]}], ids=str)
def test_questions_may_be_pairs_or_objects_as_others_write_them(asked, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "two cats", "questions": [asked]}))
    (question, answers), = load_prompts(str(tmp_path / "p.jsonl"))[0].questions
    assert question == "how many?" and answers in (("two", "2"), ("two",))


def test_a_field_that_changes_images_elsewhere_is_told_once(tmp_path, capsys):
    line = json.dumps({"prompt": "a cat", "negative_prompt": "blurry", "seed": 3, "mine": 1})
    (tmp_path / "p.jsonl").write_text(f"{line}\n{line}")
    assert load_prompts(str(tmp_path / "p.jsonl"))[0].metadata["negative_prompt"] == "blurry"
    told, = capsys.readouterr().err.splitlines()
    assert told.startswith("p.jsonl: negative_prompt, seed of a prompt changes no image here")


@pytest.mark.parametrize("name, content", [
    ("p.txt", ""), ("p.jsonl", "\ufeff\n \n"), ("p.jsonl", '{"prompt": "a cat"}\n[1]'), ("p.jsonl", "{"),
    ("p.jsonl", '{"caption": "a cat"}'), ("p.jsonl", '{"prompt": 3}'),
    ("p.jsonl", '{"prompt": "a", "questions": 7}'),
    ("p.jsonl", '{"prompt": "a", "questions": [["how?", ["polar bear"]]]}'),
    ("p.jsonl", '{"prompt": "a", "questions": ["ab"]}'),
    ("p.jsonl", '{"prompt": "a", "questions": [["how?", []]]}'),
    ("p.jsonl", '{"prompt": "a", "questions": [[3, ["two"]]]}'),
    ("p.jsonl", '{"prompt": "a", "questions": [{"q": "how many?", "a": "two"}]}'),
    ("p.jsonl", '{"prompt": "a", "questions": {"question": "how many?", "answer": "two"}}')])
def test_what_is_no_set_and_no_file_of_prompts_is_refused_in_one_line(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    for asked in (name, "nothing.txt"):
        with pytest.raises(ValueError) as caught:
            load_prompts(str(tmp_path / asked))
        assert asked in str(caught.value) and "\n" not in str(caught.value)
