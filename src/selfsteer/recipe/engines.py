"""The engine sections of a recipe: one a kind, so that each has only the fields that it uses.

Which kind a section is stands in its `kind`; without one it is the embedded engine. The engines are in `engines/`.
"""

from typing import Annotated, Any, Literal, Self, cast
from urllib.parse import urlsplit

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from selfsteer.recipe.text import FilePath, Section

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]


class TransformersSection(Section):
    """The embedded engine: the model is sampled in this process, on any device, without anything to set up."""

    kind: Literal["transformers"] = "transformers"
    """The embedded engine; the other kinds are vllm, openai and ray, each with fields of its own (docs/engines.md)."""
    batch_size: int = Field(default=64, ge=1)
    """Responses sampled side by side."""
    dtype: DTypeName = "auto"
    """auto: bfloat16 where the hardware multiplies it fast (CUDA; CPUs by a measured product), else float32; float32 also
    where bfloat16 would undo what was trained."""


class VllmSection(Section):
    """vLLM's server on this machine, which ends with the stage, so that training has the GPU memory to itself."""

    kind: Literal["vllm"]
    """vLLM on this node; it may be installed in another Python environment."""
    python: FilePath | None = None
    """The interpreter of the environment that holds vLLM; this one's when empty."""
    replicas: int = Field(default=1, ge=1)
    """Copies of the model behind one server, each on GPUs of its own (data parallelism)."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs over which each copy is spread."""
    dtype: DTypeName = "auto"
    """As for the embedded engine."""
    max_num_seqs: int = Field(default=256, ge=1)
    """Responses that a copy samples side by side."""
    max_model_len: int | None = Field(default=None, ge=1)
    """Longest prompt and response together, in tokens; the model's own limit when empty."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of a GPU's memory that vLLM takes; on CPUs, of the machine's memory."""
    enable_prefix_caching: bool = True
    """Compute the beginning that prompts share (principles, few-shot examples) once."""
    enforce_eager: bool = False
    """Start sooner and run slower, without compilation and CUDA graphs."""
    start_seconds: float = Field(default=1800, gt=0)
    """Time until the server must be ready."""
    extra: dict[str, Any] = Field(default_factory=dict[str, Any])
    """Further engine arguments as vLLM's EngineArgs names them (quantization, kv_cache_dtype, ...)."""

    @model_validator(mode="after")
    def _extra_is_extra(self) -> Self:
        ours = type(self).model_fields.keys() | {"model", "skip_tokenizer_init", "trust_remote_code", "data_parallel_size"}
        ours |= {"api_key", "host", "port"}
        if taken := sorted(ours & {key.replace("-", "_") for key in self.extra}):
            raise ValueError(f"extra sets {', '.join(taken)}, which the recipe sets elsewhere")
        return self


_FIELDS = frozenset(
    ("model", "messages", "prompt", "n", "stream", "temperature", "top_p", "max_tokens", "seed", "logprobs", "top_logprobs")
)
"""Of a request, and set elsewhere in a recipe, or by us."""


class OpenAISection(Section):
    """Any OpenAI-compatible server: one that runs already, or one that each stage starts and stops."""

    kind: Literal["openai"]
    """A server with OpenAI's HTTP interface (vLLM, SGLang, TGI, a router before a fleet of them, a hosted API)."""
    base_url: str | None = None
    """Address of a server that runs already, up to and including the version, such as http://localhost:8000/v1."""
    model: str | None = None
    """The model's name on that server; with serve, the first that the server lists when empty."""
    serve: str | None = None
    """Command that serves the folder {model} on port {port} of this machine; the stage starts it and ends it."""
    serve_adapters: str | None = None
    """With serve, what it takes to serve adapters on one model, such as --enable-lora --lora-modules {adapters}; when empty,
    each of a dual generator's adapters is served merged, one after the other."""
    start_seconds: float = Field(default=1800, gt=0)
    """With serve, the time until the server must be ready."""
    api_key_env: str | None = None
    """Environment variable that holds the API key; no key is sent when empty."""
    send: Literal["messages", "token_ids"] = "messages"
    """Chat messages, rendered by the server's template; or the prompt's token ids at /completions (vLLM, SGLang)."""
    concurrency: int = Field(default=64, ge=1)
    """Requests in flight at most."""
    tries: int = Field(default=10, ge=1)
    """Tries of one request; the pauses between ten of them add up to about a minute and a half."""
    first_pause: float = Field(default=0.5, gt=0)
    """Seconds up to which the first pause between two tries is drawn; the limit doubles with each further one."""
    total_seconds: float = Field(default=600, gt=0)
    """Limit of one try, the generation included."""
    idle_seconds: float = Field(default=60, gt=0)
    """Limit of connecting, of sending, and of a silence amid an answer."""
    max_answer_bytes: int = Field(default=8 * 2**20, ge=1)
    """Limit of one answer."""
    extra: dict[str, Any] = Field(default_factory=dict[str, Any])
    """Further fields of each request (top_k, ...); null takes out one that the server refuses, such as {seed: null}."""

    # An address may hold a password.
    model_config = ConfigDict(hide_input_in_errors=True)

    @model_validator(mode="after")
    def _usable_address(self) -> Self:
        if self.base_url is not None:
            try:
                url = urlsplit(self.base_url)
                usable = url.scheme in ("http", "https") and url.hostname and url.port != 0
            except ValueError:  # brackets or a port that are none
                url, usable = urlsplit(""), False
            if not usable or "@" in url.netloc or url.query:
                raise ValueError(
                    "the engine's base_url must be http(s)://HOST[:PORT]/PATH without user, password or query, such as "
                    "http://localhost:8000/v1. A key goes into the environment variable that api_key_env names."
                )
        if taken := sorted(key for key, value in self.extra.items() if key in _FIELDS and value is not None):
            raise ValueError(f"the engine's extra sets {taken}, which the recipe sets elsewhere; only null is allowed there")
        return self

    @model_validator(mode="after")
    def _one_server(self) -> Self:
        if self.serve_adapters is not None and (self.serve is None or "{adapters}" not in self.serve_adapters.split()):
            raise ValueError("serve_adapters belongs to serve, and must have the word {adapters}, for NAME=FOLDER of each")
        if self.serve is None:
            if self.base_url is None or self.model is None:
                raise ValueError("kind openai needs base_url and model, of a server that runs already, or serve, a command")
        elif self.base_url is not None:
            raise ValueError("serve starts a server of its own; set base_url=null, or serve=null to use the one at base_url")
        elif "{model}" not in self.serve or "{port}" not in self.serve:
            raise ValueError(
                "serve must say {model} and {port} where the model's folder and the port belong, such as"
                " vllm serve {model} --host 127.0.0.1 --port {port} --generation-config vllm"
            )
        return self


def _kind(value: object) -> str | None:
    """The kind of a section, given as a mapping or as itself; None for what is no section."""
    if isinstance(value, dict):
        return str(cast("dict[str, object]", value).get("kind", "transformers"))
    return value.kind if isinstance(value, TransformersSection | VllmSection | OpenAISection | RaySection) else None


ReplicaSection = Annotated[
    Annotated[TransformersSection, Tag("transformers")] | Annotated[VllmSection, Tag("vllm")], Discriminator(_kind)
]


class RaySection(Section):
    """Replicas of an engine on the nodes of a Ray cluster, which share the requests."""

    kind: Literal["ray"]
    """A Ray cluster, or this machine as one; every node sees the model's folder and has selfsteer installed."""
    address: str | None = None
    """auto: the cluster that this machine is a node of; host:port or ray://host:port: that one; one on this machine, for the
    run, when empty. A cluster without token authentication is refused."""
    replicas: int = Field(default=1, ge=1)
    """Copies of the model, each an actor on one node."""
    cpus: float = Field(default=1, gt=0)
    """CPUs that each replica takes."""
    gpus: float = Field(default=0, ge=0)
    """GPUs that each replica takes."""
    replica: ReplicaSection = TransformersSection()
    """The engine that each replica holds: kind transformers or vllm, each with fields of its own."""
    in_flight: int | None = Field(default=None, ge=1)
    """Unfinished requests at a replica at most; twice what it samples side by side when empty."""
    restarts: int = Field(default=3, ge=0)
    """Replicas that may die in a stage and are replaced; one more stops the run."""
    start_seconds: float = Field(default=1800, gt=0)
    """Time until one replica at least must be ready, waiting for room on a busy cluster included."""

    @property
    def dtype(self) -> DTypeName:
        """Arithmetic of the replicas."""
        return self.replica.dtype

    @property
    def most_in_flight(self) -> int:
        """`in_flight`, or its default."""
        if self.in_flight is not None:
            return self.in_flight
        return 2 * (self.replica.batch_size if self.replica.kind == "transformers" else self.replica.max_num_seqs)

    @model_validator(mode="after")
    def _room_for_the_copies(self) -> Self:
        if self.replica.kind == "vllm":
            needed = self.replica.replicas * self.replica.tensor_parallel_size
            if needed > max(1, self.gpus):
                raise ValueError(f"the vLLM of a replica needs {needed} GPUs, and gpus gives it {self.gpus:g}")
        return self


EngineSection = Annotated[
    Annotated[TransformersSection, Tag("transformers")]
    | Annotated[VllmSection, Tag("vllm")]
    | Annotated[OpenAISection, Tag("openai")]
    | Annotated[RaySection, Tag("ray")],
    Discriminator(_kind),
]
"""What turns prompts into responses, by its kind."""


def runs_already(engine: EngineSection | None) -> bool:
    """Whether this is a server that nobody here starts: it holds what it holds, and its name is all that is known of it."""
    return engine is not None and engine.kind == "openai" and engine.serve is None


def context_limit(engine: EngineSection | None) -> int | None:
    """The most tokens of a prompt and its response together that the section allows; None where the model alone says it."""
    if engine is not None and engine.kind == "ray":
        return context_limit(engine.replica)
    return engine.max_model_len if engine is not None and engine.kind == "vllm" else None


def takes_adapters(engine: EngineSection) -> bool:
    """Whether this engine can apply adapters that are not merged, another one to each request."""
    if engine.kind == "openai":
        return engine.serve_adapters is not None
    return True


def sampling_identity(engine: EngineSection) -> dict[str, Any]:
    """What of the engine's settings changes, beyond rounding, what is sampled from a model; empty where nothing does.

    How it is computed (kind, dtype, batches, GPUs) and where (endpoints, paths, commands) is not part of it: a run may
    continue on another engine, and keeps its samples.
    """
    if engine.kind == "ray":
        return sampling_identity(engine.replica)
    if engine.kind == "openai":
        # What the server holds is known where the stage has started it, and what it is sent where that is token ids.
        found: dict[str, Any] = {"model": engine.model} if engine.model else {}
        found |= {"send": engine.send} if engine.send == "messages" else {}
        found |= {"extra": engine.extra} if engine.extra else {}
        return {"openai": found} if found else {}
    if engine.kind == "vllm" and engine.extra:
        return {"vllm": engine.extra}
    return {}
