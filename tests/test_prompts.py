"""prompts.py: what files become prompts, and which are refused. (The sets themselves are checked in test_ddpo.py.)"""
import pytest

from prompts import Prompt, load_prompts


def written(path, content):
    """The name of a file with that text or those bytes."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def texts(name):
    return [prompt.text for prompt in load_prompts(name)]


@pytest.mark.parametrize("content", [
    b"\xef\xbb\xbfa cat\r\na dog\r\n", "a cat\ra dog", "\n\na cat\n  \n\ufeffa dog\t\n", "a cat\n\ufeff\na dog"])
def test_byte_order_marks_blank_lines_and_line_ends_of_any_system_are_no_part_of_a_prompt(content, tmp_path):
    assert texts(written(tmp_path / "p.txt", content)) == ["a cat", "a dog"]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"])
def test_what_unicode_calls_a_line_end_does_not_end_a_prompt(separator, tmp_path):
    assert texts(written(tmp_path / "p.txt", f"a cat{separator}on a mat\na dog")) == [f"a cat{separator}on a mat", "a dog"]


def test_json_lines_give_prompts_with_questions_and_metadata(tmp_path):
    name = written(tmp_path / "p.jsonl", '\ufeff{"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "two cats"}\r\n'
                   '\n{"text": "three mice", "questions": [["How many?", ["Three", 3]], ["What?", "mice"]]}\n')
    assert load_prompts(name) == [
        Prompt("two cats", (), {"tag": "counting", "include": [{"class": "cat", "count": 2}]}),
        Prompt("three mice", (("How many?", ("three", "3")), ("What?", ("mice",))))]


@pytest.mark.parametrize("line, message", [
    ("{", "line 2 is not JSON"), ("[1]", "line 2 is not a JSON object"), ('{"caption": "a cat"}', 'line 2 has no text in a field "prompt"'),
    ('{"prompt": "\\ud800"}', "line 2 is not JSON"), ('{"a":' * 9999, "line 2 is not JSON"), ('{"prompt": 3}', "line 2 has no text"), ('{"prompt": " "}', "line 2 has no text"),
    ('{"prompt": "a", "questions": "how many?"}', "questions must be a list"), ('{"prompt": "a", "questions": [["how?"]]}', "must be a list"),
    ('{"prompt": "a", "questions": [["how?", ["polar bear"]]]}', "must be single words, not ['polar bear']"),
    ('{"prompt": "a", "questions": [["how?", []]]}', "must be single words"), ('{"prompt": "a", "questions": 7}', "must be a list")])
def test_a_malformed_json_line_is_refused_by_its_number(line, message, tmp_path):
    with pytest.raises(ValueError) as caught:
        load_prompts(written(tmp_path / "p.jsonl", f'{{"prompt": "a cat"}}\n{line}'))
    assert message in str(caught.value) and "p.jsonl" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name, content, message", [
    ("p.json", '["a cat"]', "save it as text"), ("p.csv", "prompt,id\na cat,1", "save it as text"), ("P.TSV", "a cat\t1", "save it as text"),
    ("p.txt", '{"prompt": "a cat"}\n{"prompt": "a dog"}', "looks like JSON"), ("p.txt", '[\n  "a cat",\n  "a dog"\n]', "looks like JSON"),
    ("p.txt", 'a cat\n{"prompt": "a dog"},', "looks like JSON"),
    ("p.txt", '[\n  "a cat",\n  "a dog",\n]', "looks like JSON"), ("p.txt", '{\n  "prompt": "a cat"\n}\n{', "looks like JSON"),
    ("p.txt", "{'prompt': 'a cat'}", "looks like JSON"), ("p.txt", '["a cat",\n"a dog"', "looks like JSON"), ("p.txt", "a cat".encode("utf-16"), "not UTF-8"),
    ("p.txt", "a cat".encode("utf-16-le"), "not UTF-8"), ("p.txt", "\ufeff\n \n", "is empty"), ("p.jsonl", "", "is empty")])
def test_a_file_of_another_kind_is_refused_with_what_to_do(name, content, message, tmp_path):
    with pytest.raises(ValueError) as caught:
        load_prompts(written(tmp_path / name, content))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_prompt_may_hold_braces_brackets_and_quotes(tmp_path):
    lines = ["{a red cat}", "[cat:dog:0.5]", '"a cat"', "a {red|blue} cat", "(cat:1.2)"]
    assert texts(written(tmp_path / "p.txt", "\n".join(lines))) == lines
