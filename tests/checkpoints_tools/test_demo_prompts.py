"""Prompts for training draft heads: what the file holds, and what stops it from being written."""

import collections
import json
import pathlib
import random
import subprocess
import sys

import pytest

from checkpoints_tools import demo_prompts
from experiments.inputs import questions
from specmq_jax.errors import UserError


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("gsm8k") / "train.jsonl"
    rows = [{"question": f"Ana has {n} cups and breaks {{one}}. How many are left?", "answer": str(n - 1)}
            for n in range(2, 60)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def lines(gsm8k) -> list[dict]:
    path = demo_prompts.write(gsm8k.parent / "out.jsonl", 250, 0, gsm8k)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_each_source_has_its_share_and_every_line_is_one_to_three_turns_that_fit_the_training_length(lines):
    assert collections.Counter(line["source"] for line in lines) == {"gsm8k": 47, "code": 50, "chat": 153}
    assert all(set(line) == {"source", "turns"} and 1 <= len(line["turns"]) <= 3 for line in lines)
    assert all(turn.strip() and len(turn) <= 1500 for line in lines for turn in line["turns"])
    assert 0.3 < sum(len(line["turns"]) > 1 for line in lines if line["source"] == "chat") / 153 < 0.7


def test_the_lines_can_be_asked_as_questions(lines, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(json.dumps({"question_id": i, "category": line["source"], "turns": line["turns"]})
                              for i, line in enumerate(lines)))
    assert [list(question.turns) for question in questions.load(path)] == [line["turns"] for line in lines]


def test_no_two_dialogues_start_alike_and_the_sources_are_mixed(lines):
    assert len({line["turns"][0] for line in lines}) == len(lines)
    assert {line["source"] for line in lines[:40]} == {"gsm8k", "code", "chat"}


def test_questions_are_set_into_their_frames_as_they_are(lines):
    assert all("breaks {one}. How" in line["turns"][0] for line in lines if line["source"] == "gsm8k")


def test_a_seed_gives_the_same_file_in_another_process_and_another_seed_gives_another(gsm8k, tmp_path):
    command = [sys.executable, "-m", "checkpoints_tools.demo_prompts", tmp_path / "a.jsonl", f"--gsm8k={gsm8k}",
               "--count=60", "--seed=3"]
    subprocess.run(command, check=True, capture_output=True)
    again, other = (demo_prompts.write(tmp_path / f"{seed}.jsonl", 60, seed, gsm8k).read_bytes() for seed in (3, 4))
    assert (tmp_path / "a.jsonl").read_bytes() == again != other


def test_every_opening_of_the_chats_can_be_filled_and_leaves_no_slot():
    composer = demo_prompts.Composer(0)
    chats = composer.chat()
    left = [turn for _ in range(3000) for turn in next(chats).turns if demo_prompts.SLOT.search(turn)]
    assert left == []


def test_marked_slots_agree_others_differ_and_articles_fit():
    lists = {"city": ["Oslo", "Rome"], "thing": ["apple", "unicorn", "pear"]}
    for seed in range(20):
        slots = demo_prompts.Slots(lists, random.Random(seed), {"own": "{city}"})
        first, second, third, own = slots.fill("{city#x} {city#x} {city#y} {own}").split()
        assert first == second != third
        assert own == "{city}"
        assert {slots.fill("a {thing}") for _ in range(3)} == {"an apple", "a unicorn", "a pear"}
        assert int(slots.fill("{10..30/10}")) in (10, 20, 30)


def test_without_gsm8k_a_notice_says_that_it_is_left_out(tmp_path, capsys):
    path = demo_prompts.write(tmp_path / "out.jsonl", 20, 0, None)
    assert '"gsm8k"' not in path.read_text()
    assert len(path.read_text(encoding="utf-8").splitlines()) >= 20
    notice = capsys.readouterr().err
    assert "--gsm8k=FILE" in notice and notice.count("\n") == 1


@pytest.mark.parametrize(("content", "fault"), [
    (None, "does not exist"), (b"\xff\xfe", "is not UTF-8 text"), (b"what?\n", "line 1: it is not valid JSON"),
    (b'{"question": "a"}\n{"text": "b"}\n', "line 2: 'question' is missing"), (b"[1]\n", "line 1: expected a JSON object"),
    (b'{"question": 1}\n', "line 1: 'question' must be a text; found 1"), (b"\n", "holds no questions"),
])
def test_a_bad_gsm8k_file_is_named_and_nothing_is_written(tmp_path, content, fault):
    path = tmp_path / "train.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=fault) as error:
        demo_prompts.write(tmp_path / "out.jsonl", 10, 0, path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_parquet_file_is_read_and_a_damaged_one_is_an_error(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow belongs to the extra train")
    from pyarrow import parquet
    path = tmp_path / "train.parquet"
    parquet.write_table(pyarrow.table({"question": ["How many?", "How far?"]}), path)
    assert demo_prompts.read_gsm8k(path) == ["How many?", "How far?"]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="damaged parquet file"):
        demo_prompts.read_gsm8k(path)


def test_without_pyarrow_a_parquet_file_names_the_extra(tmp_path, monkeypatch):
    path = tmp_path / "train.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"specmq-jax\[train\]"):
        demo_prompts.read_gsm8k(path)


@pytest.mark.parametrize("count", [0, -3, 10**9])
def test_a_count_that_cant_be_made_is_an_error(tmp_path, count):
    with pytest.raises(UserError, match=f"--count={count} can't be made; choose a number from 1 to"):
        demo_prompts.write(tmp_path / "out.jsonl", count, 0, None)


def test_an_existing_file_is_kept(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("mine")
    command = [sys.executable, "-m", "checkpoints_tools.demo_prompts", path, "--count=5"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == f"error: {path} exists already; choose another name or remove it\n"
    assert path.read_text() == "mine"
