"""Folders of strangers: damaged files, weights of another model, adapters, code. One line, and no random numbers."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import other_model_dir, tiny_adapter, tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import AddedToken, AutoConfig, AutoTokenizer, GPT2Config, Phi3Config

from selfsteer.models import (
    checkpoint,
    end_ids,
    load_model,
    load_tokenizer,
    position_limit,
    resolve,
    untrained_ids,
)
from selfsteer.recipe.sections import Policy
from selfsteer.store.durable import read_small


@pytest.fixture
def folder(tiny_folder: str, tmp_path: Path) -> Path:
    """The tiny model, to be spoilt."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def use(folder: Path) -> None:
    """What every command does with a model."""
    path = resolve(Policy(model=str(folder))).path
    end_ids(path, load_tokenizer(path))
    load_model(path, dtype=torch.float32)


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def reweigh(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "model.safetensors"
    weights = {name: weight.clone() for name, weight in load_file(file).items()}
    save_file(change(weights), file, metadata={"format": "pt"})


@pytest.mark.parametrize(("dtype", "name"), [(torch.int8, "I8"), (torch.bool, "BOOL"), (torch.complex64, "C64")])
def test_what_is_no_weight_and_nothing_says_how_to_read_it(dtype: torch.dtype, name: str, folder: Path):
    reweigh(folder, lambda weights: weights | {Q: (weights[Q] * 100).to(dtype)})
    with pytest.raises(
        ValueError, match=rf"model\.safetensors: {Q} is kept in {name}, and config\.json has no quantization_config"
    ):
        use(folder)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), "\ud800"])
def test_what_canonical_json_lacks_is_part_of_the_digest(value: object, folder: Path):
    """Infinity is a limit of Mamba's."""
    plain = checkpoint(folder).digest
    edit(folder / "config.json", time_step_limit=[0.0, value])
    assert checkpoint(folder).digest == checkpoint(folder).digest != plain
    use(folder)


@pytest.mark.parametrize("ends", [10**6, [2, 10**6], -1])
def test_an_end_that_is_no_token(folder: Path, ends: object):
    edit(folder / "generation_config.json", eos_token_id=ends)
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id (-1|1000000) is no token of its tokenizer"):
        use(folder)


# --- weights that do not fit -----------------------------------------------------------------------------------------------

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda w: {f"_orig_mod.{n}": v for n, v in w.items()},
            r"21 missing: lm_head.*; 20 not of this model: _orig_mod\.",
        ),
        (lambda w: {n: v for n, v in w.items() if n != Q}, rf"\. 1 missing: {Q}\. Save"),
        (
            lambda w: w | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)},
            r"\. 1 not of this model: .*q_proj\.bias\. Save",
        ),
        (lambda w: w | {Q: torch.zeros(16, 32)}, r"\. 1 of another shape: .* \(16x32 in the file, 32x32 by config\.json\)"),
        (lambda w: {}, r"speaks of 2 layers, the files hold 0 tensors"),
    ],
    ids=["prefix", "one missing", "one too many", "another shape", "none"],
)
def test_weights_under_other_names(change: Callable[[dict[str, Tensor]], dict[str, Tensor]], why: str, folder: Path):
    reweigh(folder, change)
    with pytest.raises(ValueError, match=why):
        use(folder)


LEFTOVERS = {
    "transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64).tril().bool(),
    "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    "transformer.h.0.attn.attention.masked_bias": torch.tensor(-1e9),
    "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 64, 64).tril(),
    "transformer.h.0.attn.causal_mask": torch.ones(1, 1, 64, 64).tril(),
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    "model.layers.0.self_attn.rotary_emb.cos_cached": torch.ones(1, 1, 64, 8),
    "transformer.position_ids": torch.arange(64)[None],
}


def test_constants_that_older_versions_kept_are_no_weights(tmp_path: Path):
    """Every old file of GPT-2 has its causal masks, some old Llama its frequencies."""
    folder = Path(other_model_dir(tmp_path / "gpt2", "gpt2"))
    reweigh(folder, lambda weights: weights | LEFTOVERS)
    load_model(str(folder), dtype=torch.float32)
    reweigh(folder, lambda weights: weights | {"transformer.h.0.attn.weight": torch.ones(32, 32)})
    with pytest.raises(ValueError, match=r"\. 1 not of this model: transformer\.h\.0\.attn\.weight\. Save"):
        load_model(str(folder), dtype=torch.float32)


def test_a_head_that_is_missing(folder: Path):
    """Saved tied, and the configuration says untied: the head would be drawn at random."""
    edit(folder / "config.json", tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"1 missing: lm_head\.weight"):
        use(folder)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"hidden_size": 64},
            r"of another shape: model\.embed_tokens\.weight \(400x32 in the file, 400x64 by config\.json\)",
        ),
        ({"vocab_size": 464}, r"of another shape: .*\(400x32 in the file, 464x32 by config\.json\)"),
        ({"num_hidden_layers": 3}, r"9 missing: model\.layers\.2"),
        ({"num_hidden_layers": 1}, r"9 not of this model: model\.layers\.1"),
        ({"num_hidden_layers": 10**9}, r"speaks of 1,000,000,000 layers, the files hold 20 tensors"),
        ({"intermediate_size": 10**9}, r"speaks of [\d,]+ weights, the files hold 31,392"),
        ({"hidden_size": "wide"}, r"config\.json can't be used"),
        ({"num_attention_heads": 0}, r"config\.json"),
        ({"model_type": "no-such-model"}, r"config\.json can't be used"),
        ({"model_type": None}, r"config\.json can't be used"),
        ({"rope_parameters": 7}, r"config\.json"),
        ({"text_config": {"vocab_size": 400}}, r"config\.json can't be used"),
        ({"sliding_window": "wide"}, r"the model can't be used \(TypeError"),
        ({"quantization_config": {"quant_method": "martian"}}, r"quantization_config is of a method .*martian"),
        ({"quantization_config": {"bits": 4}}, r"config\.json can't be used .*quant_method"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"are quantized; name the model that they were made"),
    ],
)
def test_a_configuration_of_another_model(changes: dict[str, object], why: str, folder: Path):
    edit(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=why) as error:
        use(folder)
    assert "\n" not in str(error.value)


def test_one_token_more_than_the_embedding(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True)])
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<|turn|>")
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"401 ids \(the last one is '<\|turn\|>'\).*400 rows.*tokenizer\.json"):
        use(folder)


def test_a_head_of_its_own_that_the_configuration_ties(folder: Path):
    """transformers keeps it, vLLM takes the embedding: two models of one folder."""
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    use(folder)
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lm_head\.weight is not model\.embed_tokens\.weight.*Set tie_word_embeddings to false"
    ):
        use(folder)
    edit(folder / "config.json", tie_word_embeddings=False)
    use(folder)


# --- damaged files ---------------------------------------------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 123\n"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_in_place_of_the_file(name: str, folder: Path):
    (folder / name).write_bytes(POINTER)
    with pytest.raises(ValueError, match=rf"{name}: only a Git LFS pointer.*git lfs pull"):
        use(folder)


def test_a_pointer_in_place_of_the_index(folder: Path):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_bytes(POINTER)
    with pytest.raises(ValueError, match=r"index\.json: only a Git LFS pointer.*git lfs pull"):
        use(folder)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content[:-1],
        lambda content: content[:1000],
        lambda content: content[:4],
        lambda content: b"",
        lambda content: b"\xff" * 8 + content[8:],
        lambda content: content[:8] + b"[" + content[9:],
        lambda content: content.replace(b'"shape":[400,32]', b'"shape":[999,32]'),
        lambda content: content.replace(b'"dtype":"F32"', b'"dtype":"F99"', 1),
    ],
)
def test_damaged_weights(spoil: Callable[[bytes], bytes], folder: Path):
    file = folder / "model.safetensors"
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged or cut off .*fetch it again"):
        use(folder)


def shards(folder: Path, metadata: object) -> None:
    """The one file as a shard of an index."""
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"metadata": metadata, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("metadata", [None, [], "x"])
def test_an_index_without_its_metadata(metadata: object, folder: Path):
    shards(folder, metadata)
    with pytest.raises(ValueError, match=r"index\.json: 'metadata' is missing or no object"):
        use(folder)


def test_weights_that_are_there_twice(folder: Path):
    """transformers would train the one file, and vLLM sample the shards."""
    single = (folder / "model.safetensors").read_bytes()
    shards(folder, {})
    use(folder)
    (folder / "model.safetensors").write_bytes(single)
    with pytest.raises(ValueError, match=r"there twice, model\.safetensors and the shards of .*take one of them away"):
        use(folder)


def test_a_shard_that_is_missing(folder: Path):
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {
        "metadata": {},
        "weight_map": {name: f"model-0000{1 + (name == names[0])}-of-00002.safetensors" for name in names},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match=r"index\.json: names 'model-00002-of-00002\.safetensors', which is not in the folder"
    ):
        use(folder)
    secret = {"metadata": {}, "weight_map": {"a": "../../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(secret))
    with pytest.raises(ValueError, match=r"index\.json: names '\.\./\.\./secret"):
        use(folder)


def test_shards_whose_index_is_missing_or_half(folder: Path):
    names = list(load_file(folder / "model.safetensors"))
    shard = (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    with pytest.raises(
        ValueError, match=r"neither model\.safetensors nor .*index\.json, only model-00001-of-00001\.safetensors"
    ):
        use(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, shard.name)}))
    with pytest.raises(ValueError, match=r"index\.json: 'metadata' is missing.*add \"metadata\": \{\}"):
        use(folder)
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, shard.name)}))
    use(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", ["[]", "null", "7", '"text"', "{", "", '{"a": %s}' % ("9" * 5000)])
def test_files_of_another_shape(name: str, content: str, folder: Path):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}: (holds .*not a JSON object|damaged, it can't be read as JSON)"):
        use(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"model": null}'),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": [], "merges": 3}}'),
        ("generation_config.json", '{"eos_token_id": {"a": 1}}'),
        ("generation_config.json", '{"eos_token_id": ["2"]}'),
        ("generation_config.json", '{"eos_token_id": NaN}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}'),
        ("tokenizer_config.json", '{"eos_token": 3}'),
        ("tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": "x"}'),
    ],
)
def test_contents_of_another_shape(name: str, content: str, folder: Path):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=str(folder)) as error:
        use(folder)
    assert "\n" not in str(error.value)


def test_an_adapter_without_its_base(folder: Path, tmp_path: Path):
    tiny_adapter(tmp_path, str(folder), seed=1)
    with pytest.raises(ValueError, match=r"a LoRA adapter alone, without its model.*merge_and_unload.*name the folder"):
        checkpoint(tmp_path / "adapter")


def test_an_adapter_beside_its_base(folder: Path, tmp_path: Path):
    """transformers would put it on without being asked."""
    tiny_adapter(tmp_path / "trained", str(folder), seed=1)
    for file in (tmp_path / "trained" / "adapter").iterdir():
        shutil.copy(file, folder)
    with pytest.raises(
        ValueError, match=r"adapter lies beside the model.*merge_and_unload.*take the files of the adapter away"
    ):
        use(folder)


def test_code_is_part_of_the_digest(folder: Path):
    (folder / "modeling_mine.py").write_text("# not named by any configuration\n")
    unnamed = checkpoint(folder)
    (folder / "modeling_mine.py").write_text("# changed\n")
    assert checkpoint(folder) == unnamed
    edit(folder / "config.json", auto_map={"AutoConfig": "modeling_mine.MineConfig"})
    named = checkpoint(folder)
    (folder / "modeling_mine.py").write_text("# changed again\n")
    assert checkpoint(folder).digest != named.digest


# --- files that are none ---------------------------------------------------------------------------------------------------


def test_a_pipe_or_a_device_is_no_file(folder: Path, tmp_path: Path):
    """A pipe would be waited for and a device read for ever."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero"), tmp_path):
        with pytest.raises((ValueError, IsADirectoryError), match=r"not a regular file|Is a directory"):
            read_small(path)
    with pytest.raises(ValueError, match=r"pipe: not a regular file"):
        load_tokenizer(str(folder), chat_template=str(pipe))
    large = tmp_path / "large"
    large.write_bytes(b"a" * 11)
    assert read_small(large, at_most=11) == b"a" * 11
    with pytest.raises(ValueError, match=r"large: larger than"):
        read_small(large, at_most=10)
    large.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"large: not UTF-8"):
        load_tokenizer(str(folder), chat_template=str(large))


# --- limits ----------------------------------------------------------------------------------------------------------------


def test_the_positions_of_a_model(folder: Path):
    assert position_limit(AutoConfig.from_pretrained(folder)) == 2048
    assert position_limit(GPT2Config(n_positions=64)) == 64
    assert position_limit(AutoConfig.for_model("bloom")) is None


def test_rotations_that_depend_on_the_length_end_the_positions():
    """Of Phi-3's 131,072 positions 4,096: beyond, a sequence turns its first tokens otherwise than those were sampled."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = Phi3Config(
        hidden_size=32, num_attention_heads=4, max_position_embeddings=131072, original_max_position_embeddings=4096
    )
    config.rope_parameters = {**rope, "rope_theta": 1e4, "original_max_position_embeddings": 4096}
    assert position_limit(config) == 4096
    config.rope_parameters = {"full_attention": config.rope_parameters}
    assert position_limit(config) == 4096
    config.rope_parameters = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096}
    assert position_limit(config) == 131072


def test_ids_that_no_token_has():
    tokenizer = tiny_tokenizer()
    assert len(tokenizer) == 400
    assert untrained_ids(tokenizer, tiny_model().config.vocab_size) == []
    assert untrained_ids(tokenizer, 403) == [400, 401, 402]
