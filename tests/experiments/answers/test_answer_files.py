"""Answer files that were cut, mixed or damaged: a run goes on or says in one line why not, and loses nothing."""

import contextlib
import copy
import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile

import pytest
from benches import FakeBench, fake_plan, make_settings
from fuzzing import lengths, searching
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from experiments.answers import answer_files, answer_format
from experiments.answers.answer_files import AnswerFile
from experiments.reporting import answer_runs
from experiments.running import runner
from experiments.timing import device
from specmq_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _no_bandwidth_measurement(monkeypatch):
    monkeypatch.setattr(device, "device_bandwidth", lambda: 1e11)


def run(settings, bench=None, console=None):
    return runner.run(settings, load=lambda _: bench or FakeBench(), plan=fake_plan, console=console or Console(quiet=True))


@pytest.fixture
def finished(tmp_path):
    """Settings of a finished run of one method."""
    settings = make_settings(tmp_path, methods=("spec",))
    run(settings)
    return settings


def texts(path):
    return [(answer.question_id, answer.texts) for answer in answer_files.read(path)]


@pytest.mark.parametrize("cut", [
    lambda content: content[:-20],
    lambda content: content[:content.rfind(b"\n", 0, -1) + 1],
    lambda content: content[:30],
    lambda content: b"",
    lambda content: content[:-20] + bytes(20),
    lambda content: content[:content.rfind(b"\n", 0, -1) + 1] + bytes(300),
])
def test_a_finished_run_whose_answers_were_cut_off_says_so_and_does_the_rest(finished, capsys, cut):
    path, console = finished.answers("spec"), Console(width=500)
    whole = texts(path)
    path.write_bytes(cut(path.read_bytes()))
    kept, bench = path.read_bytes().count(b"\n"), FakeBench()
    (result,) = run(finished, bench, console)
    said = f"spec: {kept} of 3 answers found in {path}, where a run had finished: the others are gone"
    assert said in capsys.readouterr().out
    assert texts(path) == whole and len(result.answers) == 3 and result.measured
    assert len(bench.decoders["spec"].prompts) == 5 - [0, 2, 3][kept]


def test_a_finished_run_whose_answers_were_removed_says_so(finished, capsys):
    finished.answers("spec").unlink()
    run(finished, console=Console(width=500))
    assert "spec: 0 of 3 answers found" in capsys.readouterr().out


def test_a_run_that_does_the_rest_counts_as_unfinished_until_it_has_measured(finished):
    path = finished.answers("spec")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(KeyboardInterrupt):
        run(finished, FakeBench(kill_at=1))
    assert json.loads(path.with_suffix(".settings.json").read_text())["measured"] is None


def test_a_last_answer_without_a_line_end_is_kept(finished):
    path = finished.answers("spec")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert runner.run(finished, load=None, console=Console(quiet=True))[0].answers == tuple(answer_files.read(path))
    first = whole[:whole.find(b"\n")]
    path.write_bytes(first)
    run(finished)
    assert path.read_bytes().startswith(first + b"\n") and len(texts(path)) == 3


@pytest.mark.parametrize(("damage", "message"), [
    (lambda lines: [*lines, lines[0]], "answers question 1 twice"),
    (lambda lines: [lines[0].replace('"question_id": 1', '"question_id": 9')], "answers question 9, which is not among the 3"),
    (lambda lines: [lines[0], lines[1].replace("-fp16-spec", "-fp16-other")], "answers by .*-spec' and by .*-other'"),
    (lambda lines: [lines[0].replace('"turns"', '"said"').replace('"token_ids"', '"ids"')], "another program wrote"),
    (lambda lines: [lines[0][:40] + "\n", lines[1]], "line 1: no answer of this format"),
    (lambda lines: ["[" + lines[0].strip() + "]"], "line 1: no answer of this format"),
    (lambda lines: [lines[0].strip() + lines[1].strip()], "line 1: no answer of this format"),
    (lambda lines: [lines[0].replace('"new_tokens": [9, 9]', '"new_tokens": "99"')], "'new_tokens' must be a list of whole"),
    (lambda lines: [lines[0].replace('"wall_time": [0.2', '"wall_time": [NaN')], "'wall_time' must be a list of seconds"),
    (lambda lines: [lines[0].replace('"prompt_tokens": [', '"prompt_tokens": [1, ')], "'prompt_tokens' has 3 entries for 2"),
    (lambda lines: [lines[0].replace('"question_id": 1', '"question_id": []')], "question_id must be a number or a text"),
    (lambda lines: ["[" * 100_000 + "\n"], "line 1: no answer of this format"),
])
def test_answers_that_no_run_can_go_on_with_are_one_line_and_stay(finished, damage, message):
    path = finished.answers("spec")
    path.write_text("".join(damage(path.read_text().splitlines(keepends=True))))
    before = path.read_bytes()
    with pytest.raises(UserError, match=message) as caught:
        runner.run(finished, load=None, console=Console(quiet=True))
    assert "\n" not in str(caught.value) and "--noresume to replace them" in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [
    None, "", "[]", "3", '{"settings": {}}', '{"settings": [], "measured": null}', '{"settings": {}, "measured": [1]}',
    "[" * 10**5, '{"settings": {}, "measured": {"device": "x"}}', b"\xff\xfe"])
def test_a_sidecar_that_tells_nothing_is_one_line(finished, content):
    path = finished.answers("spec")
    sidecar, before = path.with_suffix(".settings.json"), path.read_bytes()
    sidecar.unlink()
    if content is not None:
        sidecar.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"spec.settings.json, which tells how they were made, is missing or damaged; give"):
        runner.run(finished, load=None, console=Console(quiet=True))
    assert path.read_bytes() == before


def test_a_refused_run_changes_no_byte(finished):
    path = finished.answers("spec")
    path.write_bytes(path.read_bytes() + b'{"question_id": ')
    before = path.read_bytes()
    with pytest.raises(UserError, match="max_new_tokens 9 there and 8 here"):
        run(dataclasses.replace(finished, max_new_tokens=8))
    assert path.read_bytes() == before


def test_texts_that_utf8_can_not_hold_are_kept(tmp_path):
    file = AnswerFile(tmp_path / "a.jsonl", {}, resume=True)
    file.start()
    written = file.append(json.loads(json.dumps(LINE).replace("blue", "\\ud800blue")))
    assert written.texts == ("\ud800blue",) and answer_files.read(file.path) == [written]


CHOICE = {"index": 0, "turns": ["blue"], "token_ids": [[5, 6]], "prompt_tokens": [4], "new_tokens": [2], "wall_time": [0.5],
          "accept_lengths": [2], "draft_accept_lengths": [], "prefill_time": [0.1], "cut": None}
LINE = {"question_id": 1, "category": "math", "model_id": "m-fp16-spec", "choices": [CHOICE]}
SETTINGS = {"seed": 0}
MEASURED = {"device": "CPU", "jax": "1", "precision": "fp16", **dict.fromkeys(
    ("device_bandwidth", "max_length", "phase_prompt_tokens", "prefill", "draft", "verify", "round", "live_length",
     "bytes_per_round"), 1), "verify": -1.5e-5}


def kept_run(directory):
    """A finished run's answer file."""
    path = directory / "a.jsonl"
    path.write_text("".join(json.dumps(LINE | {"question_id": number}) + "\n" for number in (1, 2, 3)))
    path.with_suffix(".settings.json").write_text(json.dumps({"settings": SETTINGS, "measured": MEASURED}))
    return path


def test_every_beginning_of_an_answer_file_can_be_gone_on_with(tmp_path):
    whole = kept_run(tmp_path).read_bytes()
    for end in range(len(whole)):
        path = kept_run(tmp_path)
        path.write_bytes(whole[:end])
        file = AnswerFile(path, SETTINGS, resume=True, asked=(1, 2, 3))
        assert path.read_bytes() == whole[:end] and file.lost == (len(file.found) < 3)
        if file.found and file.lost:
            file.start()
            assert path.read_bytes() == whole[:whole.find(b"\n") * len(file.found) + len(file.found)]


values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3))


@st.composite
def mutated_json(draw, value):
    """The value with a part replaced, taken away or doubled, as JSON."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        parent = value
        while True:
            keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(parent[key], dict | list) and parent[key] and draw(st.booleans()):
                parent = parent[key]
                continue
            match draw(st.integers(0, 2)):
                case 0:
                    parent[key] = draw(values)
                case 1:
                    del parent[key]
                case 2 if isinstance(parent, list):
                    parent.append(parent[key])
            break
    return json.dumps(value).encode()


@st.composite
def mutated_bytes(draw, content):
    """The content with bytes replaced, cut out, doubled or put in."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        start, end = sorted(draw(st.tuples(*[st.integers(0, len(content))] * 2)))
        content[start:end] = draw(st.binary(max_size=8) | st.just(bytes(content[start:end]) * 2) | st.sampled_from(
            [b"\n", b"\r", b"\0" * 9, b"{", b"[" * 3000, b"1e999", b"\xff"]))
    return bytes(content)


@lengths
def test_no_answer_file_is_a_traceback_or_loses_a_byte_by_being_looked_at(examples):
    with tempfile.TemporaryDirectory() as scratch:
        path = kept_run(pathlib.Path(scratch))
        lines, sidecar = path.read_bytes(), path.with_suffix(".settings.json")
        held = sidecar.read_bytes()
        line = st.one_of(mutated_json(LINE), st.just(json.dumps(LINE | {"question_id": 2}).encode()))

        @searching(examples)
        @given(st.one_of(mutated_bytes(lines), st.lists(line, max_size=3).map(b"\n".join)),
               st.one_of(st.just(held), mutated_bytes(held), mutated_json(json.loads(held))), st.booleans())
        def look(content, beside, unfinished):
            path.write_bytes(content)
            sidecar.write_bytes(beside)
            for reader in (answer_files.read, answer_runs.read):
                with contextlib.suppress(UserError):
                    reader(path, unfinished=unfinished)
            with contextlib.suppress(UserError):
                file = AnswerFile(path, SETTINGS, resume=True, asked=(1, 2, 3))
                assert not file.measured or len(file.found) == 3
            assert path.read_bytes() == content and sidecar.read_bytes() == beside

        look()


@lengths
def test_what_is_appended_behind_any_beginning_is_read_again(examples):
    with tempfile.TemporaryDirectory() as scratch:
        path = kept_run(pathlib.Path(scratch))
        whole = path.read_bytes()

        @searching(examples)
        @given(st.integers(0, len(whole)), st.binary(max_size=6))
        def go_on(end, rubbish):
            path.write_bytes(whole[:end] + rubbish)
            with contextlib.suppress(UserError):
                file = AnswerFile(path, SETTINGS, resume=True, asked=(1, 2, 3))
                before = list(file.found)
                file.start()
                for number in {1, 2, 3} - file.answered:
                    file.append(LINE | {"question_id": number})
                assert answer_files.read(path) == file.found and file.found[:len(before)] == before

        go_on()


FULL = """
import json, pathlib, resource, signal, sys
from experiments.answers.answer_files import AnswerFile
from specmq_jax.errors import UserError
path, limit, finish = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "finish"
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
line = json.loads(sys.argv[4])
try:
    file = AnswerFile(path, {"seed": 0}, resume=True, asked=range(1, 20))
    file.start()
    for number in sorted(set(range(1, 20)) - file.answered):
        file.append(line | {"question_id": number})
    if finish:
        file.finish({"much": "x" * limit})
except UserError as error:
    print(error)
"""


def on_a_full_disk(path, limit, finish=""):
    result = subprocess.run([sys.executable, "-c", FULL, path, str(limit), finish, json.dumps(LINE)], cwd=ROOT, text=True,
                            capture_output=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_full_disk_is_one_line_and_the_same_command_goes_on_behind_the_whole_answers(tmp_path):
    path = tmp_path / "a.jsonl"
    said = on_a_full_disk(path, 1000)
    assert said == f"{path} can't be written: File too large; the answers it holds are kept, and the same command goes on " \
                   "behind them\n"
    assert path.stat().st_size == 1000 and not path.read_bytes().endswith(b"\n")
    file = AnswerFile(path, SETTINGS, resume=True)
    assert [answer.question_id for answer in file.found] == [1, 2, 3]
    assert on_a_full_disk(path, 10**6) == ""
    assert [answer.question_id for answer in answer_files.read(path)] == list(range(1, 20))


def test_a_full_disk_at_the_end_keeps_the_answers_and_their_sidecar(tmp_path):
    path = tmp_path / "a.jsonl"
    assert "a.settings.json can't be written: File too large" in on_a_full_disk(path, 7000, "finish")
    file = AnswerFile(path, SETTINGS, resume=True)
    assert len(file.found) == 19 and file.measured is None
    assert sorted(found.name for found in tmp_path.iterdir()) == ["a.jsonl", "a.settings.json"]


def test_a_line_is_read_as_it_is_written():
    assert answer_format.parse(json.dumps(LINE), "").texts == ("blue",)
