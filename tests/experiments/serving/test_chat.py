"""The terminal chat: what is shown, what the commands do, and what a mistake says."""

import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import types

import pytest
from byte_tokens import END, answer_text, ids
from rich.console import Console

from experiments.chat import Chat
from experiments.serving.answer_view import AnswerView
from specmq_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[3]


class FakeModel:
    """Answers with `reply`, four bytes a round behind the first; `at_round` is called before each."""

    max_length, name, methods = 120, "fake", ("baseline", "spec")

    def __init__(self, reply="Gern, 5 €."):
        self.reply, self.prompts, self.seeds, self.made, self.at_round, self.closed = reply, [], [], [], lambda _: None, 0

    def encode(self, messages):
        return list("".join(f"{m['role'][0]}: {m['content']}\n" for m in messages).encode())

    def answer_text(self):
        return answer_text()

    def ready(self, method):
        if method not in self.methods:
            raise UserError(f"method {method!r} is not known")
        self.made.append(method)
        return types.SimpleNamespace(stream=self.stream)

    def stream(self, prompt, seed, rounds):
        assert rounds == 1
        self.prompts.append(bytes(prompt).decode())
        self.seeds.append(seed)
        tokens = (ids(self.reply) + [END])[:self.max_length - len(prompt)]
        try:
            for place, start in enumerate((0, *range(1, len(tokens), 4))):
                self.at_round(place)
                yield tokens[start:start + (4 if start else 1)]
        finally:
            self.closed += 1


def chat(model, lines, *, terminal=False):
    """The chat behind these lines, what it answered and what else it said."""
    console = Console(file=io.StringIO(), width=40, force_terminal=terminal, color_system="standard" if terminal else None,
                      _environ={})
    aside = console if terminal else Console(file=io.StringIO(), width=200)
    waiting = iter(lines)

    def read():
        line = next(waiting, None)
        if line is None:
            raise EOFError
        if isinstance(line, BaseException):
            raise line
        return line

    held = Chat(model, "baseline", seed=5, console=console, aside=aside)
    held.run(read)
    return held, console.file.getvalue(), aside.file.getvalue()


def test_answers_go_out_as_text_and_become_part_of_the_dialogue():
    model = FakeModel()
    held, answers, aside = chat(model, ["Was kostet das?\n", "", "Danke."])
    assert answers == "Gern, 5 €.\nGern, 5 €.\n"
    assert model.prompts == ["u: Was kostet das?\n", "u: Was kostet das?\na: Gern, 5 €.\nu: Danke.\n"]
    assert [m["content"] for m in held.messages] == ["Was kostet das?", "Gern, 5 €.", "Danke.", "Gern, 5 €."]
    count = len("Gern, 5 €.".encode()) + 1
    assert aside.count(f"{count} tokens, ") == 2 and f"accept length {(count - 1) / 3:.2f}" in aside
    assert model.seeds == [6, 7]  # else sampled answers to one question would be alike


def test_reset_begins_anew_and_method_changes_what_answers():
    model = FakeModel()
    held, _, aside = chat(model, ["a", "/reset", "/method spec", "b", "/method", "/quit", "c"])
    assert model.prompts == ["u: a\n", "u: b\n"] and model.made == ["baseline", "spec"] and held.method == "spec"
    assert "baseline, [spec]" in aside


def test_a_dialogue_is_saved_as_json_and_no_file_of_others_is_replaced(tmp_path):
    path, other = tmp_path / "talk.json", tmp_path / "other.json"
    other.write_text("mine")
    _, _, aside = chat(FakeModel(), ["é", f"/save {path}", "b", f"/save {path}", f"/save {other}", "/save",
                                     f"/save {tmp_path}/none/a.json"])
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert saved["model"] == "fake" and saved["method"] == "baseline"
    assert [m["content"] for m in saved["messages"]] == ["é", "Gern, 5 €.", "b", "Gern, 5 €."]
    assert other.read_text() == "mine" and f"error: {other} exists" in aside
    assert "error: /save needs the name of a file" in aside and "a.json can't be written: No such file" in aside
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.json", "talk.json"]


def test_mistakes_are_one_line_and_leave_everything_as_it_was():
    model = FakeModel()
    held, answers, aside = chat(model, ["/sing", "/method sepc", "a"])
    assert "error: /sing is not a command; /help lists them" in aside and "error: method 'sepc' is not known" in aside
    assert held.method == "baseline" and answers == "Gern, 5 €.\n"
    _, _, aside = chat(model, ["/help"])
    assert all(f"\n/{name}" in f"\n{aside}" for name in ("save", "reset", "method", "help", "quit"))


def test_a_dialogue_that_no_longer_fits_ends_in_a_line_of_advice():
    model = FakeModel()
    held, _, aside = chat(model, ["a", "long " * 30, "b"])
    (line,) = (line for line in aside.splitlines() if line.startswith("error: "))
    assert "and the cache holds 120" in line and all(word in line for word in ("/save", "/reset", "--max_length"))
    assert [m["content"] for m in held.messages] == ["a", "Gern, 5 €.", "b", "Gern, 5 €."]


def test_an_answer_that_fills_the_cache_says_so():
    held, answers, aside = chat(FakeModel("word " * 50), ["a"])
    assert answers.strip() == ("word " * 50)[:120 - len("u: a\n")].strip() and "(the cache of 120 tokens is full" in aside


def test_ctrl_c_stops_the_answer_and_not_the_chat():
    model = FakeModel("one two three four")
    model.at_round = lambda place: place == 2 and os.kill(os.getpid(), signal.SIGINT)
    before = signal.getsignal(signal.SIGINT)
    held, answers, aside = chat(model, ["a", KeyboardInterrupt(), "b"])
    assert answers == "one two t\none two t\n" and aside.count("(stopped)") == 2 and "/quit or Ctrl-D leaves" in aside
    assert model.prompts[1] == "u: a\na: one two t\nu: b\n" and model.closed == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_leaves_a_round_that_does_not_end():
    model = FakeModel()
    model.at_round = lambda place: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)] if place else None
    held, _, aside = chat(model, ["a", "/help"])
    assert "(interrupted)" in aside and "/quit" in aside and not held.messages and model.closed == 1


def screen(printed):
    """What a terminal of 40 columns shows at the end, and the rows' text."""
    rows, row, column = [""], 0, 0
    while printed:
        if printed.startswith("\x1b["):
            end = next(i for i, letter in enumerate(printed[2:], start=2) if letter.isalpha())
            number, letter = printed[2:end], printed[end]
            if letter == "A":
                row -= int(number or 1)
            elif letter == "K":
                rows[row] = "" if number == "2" else rows[row][:column]
            printed = printed[end + 1:]
            continue
        letter, printed = printed[0], printed[1:]
        if letter == "\n":
            row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
        elif letter == "\r":
            column = 0
        else:
            rows[row] = rows[row][:column].ljust(column) + letter + rows[row][column + 1:]
            column += 1
    return [row.rstrip() for row in rows]


def test_a_terminal_shows_drafts_in_another_shade_and_keeps_the_whole_text():
    text = "The first line.\n\nThen a paragraph that is much longer than the width of this terminal, and goes on."
    console = Console(file=io.StringIO(), width=40, force_terminal=True, color_system="standard", _environ={})
    with AnswerView(console, console) as view:
        view.committed(1)
        view.add(text[:1], drafted=False)
        for start in range(1, len(text), 4):
            part = text[start:start + 4]
            view.committed(4)
            for place, letter in enumerate(part):
                view.add(letter, drafted=place < 3)
    printed = console.file.getvalue()
    kept = [row for row in screen(printed) if row]
    assert " ".join(kept[:-1]).split() == text.split() and all(len(row) <= 40 for row in kept[:-1])
    assert "accept length 4.00" in kept[-1] and "tokens/s" in kept[-1]
    assert "\x1b[36m" in printed  # the drafts' shade


@pytest.mark.slow
def test_the_command_answers_what_is_piped_to_it(tmp_path):
    source = ROOT / "tests" / "data" / "checkpoints" / "fp16"
    said = f"one two three\n/method spec\n/reset\none two three\n/save {tmp_path / 'talk.json'}\n"
    result = subprocess.run([sys.executable, "-m", "experiments.chat", f"--model={source}", "--draft_precision=w4a16-g64",
                             "--max_length=80"], cwd=ROOT, input=said, text=True, capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr
    talk = json.loads((tmp_path / "talk.json").read_text())
    assert talk["method"] == "spec" and [m["role"] for m in talk["messages"]] == ["user", "assistant"]
    answer = talk["messages"][1]["content"]
    assert answer and result.stdout == f"{answer}\n" * 2  # speculation changes nothing
    assert "memory: " in result.stderr and "accept length" in result.stderr


def test_what_is_no_text_is_one_line_and_the_chat_goes_on(tmp_path):
    model = FakeModel()
    held, answers, aside = chat(model, ["hi \udcff", "/\ud83d", f"/save {tmp_path}/\ud83d", "a"])
    assert aside.count("error: the line is not text in the terminal's encoding") == 3
    assert model.prompts == ["u: a\n"] and answers == "Gern, 5 €.\n" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a\0b", "~no-such-user/talk", "x" * 300, "talk/" * 2])
def test_a_name_that_no_file_can_have_is_one_line(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, _, aside = chat(FakeModel(), [f"/save {name}", "/quit"])
    assert re.search("error: .* can't be written: .*; choose another name\n$", aside), aside
    assert not list(tmp_path.iterdir())


def test_an_answer_that_ends_inside_a_character_is_told_as_decoding_it_tells():
    begun = "word " * 22 + "ok "
    held, answers, _ = chat(FakeModel(begun + "😀"), ["a"])  # the cache ends behind the second of four bytes
    assert answers == f"{begun}\ufffd\n" and held.messages[1]["content"] == f"{begun}\ufffd"


def run_chat(given, **environment):
    source = ROOT / "tests" / "data" / "checkpoints" / "fp16"
    return subprocess.Popen([sys.executable, "-m", "experiments.chat", f"--model={source}", "--method=baseline",
                             "--max_length=80"], cwd=ROOT, env=os.environ | environment, stdin=given,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_bytes_that_are_no_text_and_a_terminal_of_another_encoding_end_no_chat():
    process = run_chat(subprocess.PIPE, PYTHONIOENCODING="ascii")
    out, err = process.communicate(b"hi \xff\none two\n/quit\n", timeout=300)
    assert process.returncode == 0 and b"Traceback" not in err, err.decode()
    assert err.count(b"error: the line is not text") == 1 and out.strip()
    out.decode("ascii")


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_the_chat_without_a_traceback():
    process = run_chat(subprocess.PIPE)
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(b"one two\n" * 50, timeout=300)
    assert process.returncode and b"Traceback" not in err and b"BrokenPipe" not in err, err.decode()
