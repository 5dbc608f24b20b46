"""The tokenizer of a directory is its tokenizer.json, and the files beside it name its special tokens and chat template."""

import json
import pathlib
import shutil
import threading
import time

import pytest
from fakes import DATA
from fuzzing import lengths, searching
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from specmq_jax.errors import UserError
from specmq_jax.tokenizer import TextStream, decode, encode_chat, load_tokenizer, stop_tokens

SOURCE = DATA / "checkpoints" / "fp16"
TEXT = "In 2024, x=12345.\n\n  def f():\tpass it'll 日本語 <s> café"
DIGITS = {"type": "Sequence", "pretokenizers": [
    {"type": "Digits", "individual_digits": True},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]}
BOS_FIRST = {"type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
             "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
             "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}}
SAY = [{"role": "user", "content": "hello"}]


@pytest.fixture
def directory(tmp_path):
    made = tmp_path / "model"
    made.mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(SOURCE / name, made / name)
    return made


def change(path, **entries):
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | entries))


def ids_of_file(directory, text=TEXT):
    backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.no_truncation()
    backend.no_padding()
    return backend.encode(text).ids


CONFIGS = [
    *({"tokenizer_class": name} for name in ("PreTrainedTokenizerFast", "GPT2Tokenizer", "LlamaTokenizerFast",
                                             "Qwen2Tokenizer", "LlamaTokenizer", "NoSuchTokenizer", "", None, 7)),
    {"add_bos_token": True, "add_eos_token": True},
    {"add_prefix_space": True, "split_special_tokens": True, "legacy": False},
    {"auto_map": {"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]}, "tokenizer_class": "Tokenizer"},
    {"added_tokens_decoder": {"3": {"content": "<new>", "special": True}, "900": {"content": "2024", "special": False}}},
    {"additional_special_tokens": ["<a>", "2024"], "extra_special_tokens": {"image_token": "hello"}},
    {"pad_token": "[PAD]", "bos_token": "[BOS]", "unk_token": {"content": "[UNK]", "lstrip": True}},
    {"model_max_length": 4, "padding_side": "left", "truncation_side": "left", "clean_up_tokenization_spaces": True},
    {"tokenizer_file": "/nowhere", "name_or_path": "no/such-model", "tokenizer_object": 1},
]


@pytest.mark.parametrize("changed", [{}, {"pre_tokenizer": DIGITS}, {"post_processor": BOS_FIRST}, {"post_processor": None}],
                         ids=["as it is", "digits", "with a BOS", "no post-processor"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: ",".join(map(str, config)))
def test_the_ids_are_those_of_tokenizer_json(directory, config, changed):
    change(directory / "tokenizer.json", **changed)
    change(directory / "tokenizer_config.json", **config)
    tokenizer, expected = load_tokenizer(directory), ids_of_file(directory)
    assert tokenizer.encode(TEXT) == expected
    assert tokenizer.get_vocab() == Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab()
    assert encode_chat(tokenizer, [{"role": "user", "content": TEXT}]) == expected
    spaced = tokenizer.encode("a , b ! it 's", add_special_tokens=False)
    assert decode(tokenizer, spaced) == "a , b ! it 's"


def test_no_text_is_cut_or_padded(directory):
    change(directory / "tokenizer.json",
           truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
           padding={"strategy": {"Fixed": 200}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 2,
                    "pad_type_id": 0, "pad_token": "<pad>"})
    tokenizer = load_tokenizer(directory)
    assert 4 < len(ids_of_file(directory)) < 200
    assert tokenizer.encode(TEXT) == encode_chat(tokenizer, [{"role": "user", "content": TEXT}]) == ids_of_file(directory)


def test_code_of_a_directory_is_neither_run_nor_asked_about(directory, monkeypatch, capfd):
    ran = directory / "ran"
    (directory / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass Tokenizer: pass\n")
    for name in ("config.json", "tokenizer_config.json"):
        change(directory / name, auto_map={"AutoTokenizer": [None, "code.Tokenizer"], "AutoConfig": "code.Tokenizer"},
               tokenizer_class="Tokenizer")

    def asked(*_):
        raise AssertionError("something was asked")

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr("sys.stdin", None)
    assert load_tokenizer(directory).encode(TEXT) == ids_of_file(directory)
    assert not ran.exists() and "custom code" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("file", ["tokenizer.model", "vocab.json"])
def test_without_tokenizer_json_a_directory_is_refused(directory, file):
    (directory / "tokenizer.json").rename(directory / file)
    with pytest.raises(UserError, match=rf"has {file} and no tokenizer.json.*; copy the tokenizer.json of .* or write one"):
        load_tokenizer(directory)


def test_special_tokens_may_be_text_or_objects_and_stand_in_an_older_file(directory):
    (directory / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": None}))
    (directory / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": "not a token"}))
    tokenizer = load_tokenizer(directory)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token) == (0, 1, None)
    assert stop_tokens(tokenizer, directory)[0] == 1
    change(directory / "tokenizer_config.json", added_tokens_decoder={})
    assert load_tokenizer(directory).eos_token is None


@pytest.mark.parametrize(("value", "message"), [
    *((value, "tokenizer_config.json: eos_token must be a token's text or an object")
      for value in (7, ["</s>"], {"text": "</s>"}, True)),
    ("\ud800", "tokenizer_config.json is not valid JSON: .*half of a surrogate")])
def test_a_special_token_that_is_no_text_is_one_line(directory, value, message):
    change(directory / "tokenizer_config.json", eos_token=value)
    with pytest.raises(UserError, match=message):
        load_tokenizer(directory)


NAMED = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "config {{ bos_token }}"}]


@pytest.mark.parametrize("entry, files, expected", [
    ("config {{ messages[0]['content'] }}", {}, "config hello"),
    (NAMED, {}, "config <s>"),
    ({part["name"]: part["template"] for part in NAMED}, {}, "config <s>"),
    (NAMED, {"chat_template.jinja": "file"}, "file"),
    (None, {"chat_template.jinja": "file", "additional_chat_templates/rag.jinja": "rag"}, "file"),
    (None, {"chat_template.json": json.dumps({"chat_template": "older"})}, "older"),
    ("config", {"chat_template.json": json.dumps({"chat_template": "older"})}, "config"),
], ids=range(7))
def test_the_chat_template_is_found_wherever_it_stands(directory, entry, files, expected):
    change(directory / "tokenizer_config.json", chat_template=entry)
    for name, text in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)
    tokenizer = load_tokenizer(directory)
    assert encode_chat(tokenizer, SAY) == tokenizer.encode(expected, add_special_tokens=False)


@pytest.mark.parametrize("value", [7, ["a"], [{"name": "default"}], {"default": None}, [{"template": "a"}]])
def test_a_chat_template_that_is_no_text_is_one_line(directory, value):
    change(directory / "tokenizer_config.json", chat_template=value)
    with pytest.raises(UserError, match=r"tokenizer_config.json: chat_template must be text, or objects of a name"):
        load_tokenizer(directory)


@pytest.mark.parametrize("template, reason", [
    ("{% if %}", "Expected an expression"), ("{{ messages[7].content }}", "no element 7"), ("{{ 1 / 0 }}", "division by zero"),
    ([{"name": "rag", "template": "a"}], "no default")])
def test_a_template_that_fails_is_one_line(directory, template, reason):
    change(directory / "tokenizer_config.json", chat_template=template)
    tokenizer = load_tokenizer(directory)
    with pytest.raises(UserError, match=f"^the chat template refuses the conversation: .*{reason}") as caught:
        encode_chat(tokenizer, SAY)
    assert "\n" not in str(caught.value)


def test_half_a_surrogate_pair_is_one_line(directory):
    tokenizer = load_tokenizer(directory)
    with pytest.raises(UserError, match=r"the text holds '\\ud83d', half of a surrogate pair") as caught:
        encode_chat(tokenizer, [{"role": "user", "content": "hi \ud83d"}])
    str(caught.value).encode()


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("value", [[[1], 2], "1", ["1"], True, [True], 1.0, [1, 2.5], -1, 512, [1, 10**30], {"a": 1}, [None]])
def test_a_stop_token_that_is_no_id_of_the_vocabulary_is_one_line(directory, file, value):
    change(directory / file, eos_token_id=value)
    with pytest.raises(UserError, match=f"{file}: eos_token_id must be a token's id or a list of ids, each from 0 to 511; "):
        stop_tokens(load_tokenizer(directory), directory)


def test_a_stop_token_may_lie_in_a_vocabulary_that_is_larger_than_the_tokenizers(directory):
    change(directory / "config.json", vocab_size=600)
    change(directory / "generation_config.json", eos_token_id=[599, 1])
    assert stop_tokens(load_tokenizer(directory), directory) == (1, 599)
    change(directory / "generation_config.json", eos_token_id=[])
    change(directory / "config.json", eos_token_id=None)
    assert stop_tokens(load_tokenizer(directory), directory) == (1,)


def places(value, path=()):
    """Where a JSON value may be changed, of a long object or list the beginning alone."""
    yield path
    if isinstance(value, dict | list):
        entries = list(value.items() if isinstance(value, dict) else enumerate(value))[:12]
        for name, entry in entries:
            yield from places(entry, (*path, name))


FILES = {name: json.loads((SOURCE / name).read_text())
         for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json")}
FILES["tokenizer_config.json"] |= {"chat_template": "{{ messages[0]['content'] }}", "added_tokens_decoder": {}}
PLACES = [(name, place) for name, content in FILES.items() for place in places(content)]
OTHER = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
                  st.sampled_from([[], {}, [[1]], ["a"], {"a": 1}, {"type": "ByteLevel"}, 2**40, "<s>", "\ud800"]))


@lengths
def test_changed_files_load_or_are_refused(tmp_path, examples):
    @searching(examples)
    @given(st.sampled_from(PLACES), OTHER)
    def check(place, value):
        changed, path = place
        for name, content in FILES.items():
            (tmp_path / name).write_text(json.dumps(put(content, path, value) if name == changed else content))
        try:
            tokenizer = load_tokenizer(tmp_path)
            tokens = encode_chat(tokenizer, [{"role": "user", "content": "hello <s> 😀 12"}])
            stop_tokens(tokenizer, tmp_path)
        except UserError as error:
            assert "\n" not in str(error)
            return
        stream = TextStream(tokenizer)
        assert stream.add(tokens) + stream.rest() == decode(tokenizer, tokens)

    check()


def put(content, path, value):
    if not path:
        return value
    changed = content.copy()
    changed[path[0]] = put(content[path[0]], path[1:], value)
    return changed


def test_every_file_is_left_as_it_was(directory):
    before = {path.name: path.read_bytes() for path in pathlib.Path(directory).iterdir()}
    load_tokenizer(directory)
    assert {path.name: path.read_bytes() for path in pathlib.Path(directory).iterdir()} == before


def test_other_threads_run_while_a_long_text_is_encoded(directory):
    tokenizer = load_tokenizer(directory)
    text = " ".join(f"word{number}" for number in range(60_000))
    expected = tokenizer.encode(text)
    found = []
    thread = threading.Thread(target=lambda: found.extend(encode_chat(tokenizer, [{"role": "user", "content": text}])))
    start = last = time.perf_counter()
    longest = 0.0
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
        longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
    assert found == expected and longest < 0.7 * (last - start)
