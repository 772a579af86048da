"""One vLLM engine in a process of its own, perhaps in another Python environment than the rest.

Imports the standard library and vLLM only, never selfsteer, and runs on any Python that vLLM runs on. Speaks JSON lines:

    stdin   {"engine": {vLLM's engine arguments}, "adapters": {name: path}, "end_ids": [...], "logps": false}
            {"id": ..., "prompt_ids": [...], "temperature": ..., "top_p": ..., "max_tokens": ..., "seed": ...,
             "adapter": name or null, "top_logps": 0}   and so on
    stdout  {"ready": {"version": ..., "seeded": true}}
            {"id": ..., "token_ids": [...], "finish_reason": "stop", "logps": [...] or null}    as each is finished; with
             "first_logps": [[token id, log-probability], ...]    where top_logps asked for so many likely first tokens
            {"id": ..., "refused": why}       a request that vLLM does not take
            {"fatal": why}                    before the process ends with status 1

The end of stdin ends the process, so none outlives the one that started it, however that one ends. What vLLM prints goes
to stderr. Left out on purpose: text. The caller has the tokenizer, so this process needs none.
"""

# pyright: basic, reportMissingImports=false
# vLLM is in another environment than the one that is checked.
import json
import os
import queue
import signal
import sys
import threading
import time

# This folder has modules named like the libraries they are about; as the folder of the script it comes first on the path.
_HERE = os.path.dirname(os.path.abspath(__file__))

sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != _HERE]

_END = None

GRACE = 15.0
"""Seconds to the end after the end of stdin, whatever vLLM is doing."""


def main() -> int:
    """Serve requests until the end of stdin."""
    # What libraries and their child processes print must not get between the lines of the protocol.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(message):
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    start = json.loads(sys.stdin.readline() or "null")
    if start is None:
        return 0
    inbox = queue.SimpleQueue()
    threading.Thread(target=_read, args=(inbox,), daemon=True).start()  # now: starting may take minutes
    # In this process: an engine core in a further one would outlive it when it is killed.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    try:
        import vllm
    except (ImportError, OSError) as error:  # OSError: a library that was built for another torch
        say({"fatal": f"{sys.executable} can't import vLLM ({error})"})
        return 1
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.platforms import current_platform
    from vllm.v1.engine.llm_engine import LLMEngine

    arguments = start["engine"]
    try:
        engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        say({"fatal": f"vLLM does not start: {error}"})
        raise
    # vLLM's sampler for CPUs dies on a seed of a request's own ("CPU Generator does not use offset").
    seeded = not current_platform.is_cpu()
    adapters = {name: LoRARequest(name, i, path) for i, (name, path) in enumerate(start["adapters"].items(), start=1)}
    limit = engine.vllm_config.model_config.max_model_len
    version = vllm.__version__  # pyright: ignore[reportAttributeAccessIssue]
    say({"ready": {"version": version, "seeded": seeded}})

    wanted = {}  # how many first tokens each request under way asks for
    while True:
        while not inbox.empty() or not engine.has_unfinished_requests():
            request = inbox.get()
            if request is _END:
                engine.engine_core.shutdown()
                # Python's own way out takes apart all that was imported: seconds, in which a GPU is not free.
                os._exit(0)
            if len(request["prompt_ids"]) >= limit:
                why = f"a prompt of {len(request['prompt_ids'])} tokens, and no more than {limit} with its response"
                say({"id": request["id"], "refused": why})
                continue
            prompt = {"prompt_token_ids": request["prompt_ids"]}
            wanted[request["id"]] = request["top_logps"]
            adapter = adapters[request["adapter"]] if request["adapter"] else None
            engine.add_request(request["id"], prompt, _sampling(vllm, request, start, seeded), lora_request=adapter)
        for output in engine.step():
            if output.finished:
                say(_answer(output, start["logps"], wanted.pop(output.request_id)))


def _read(inbox):
    for line in sys.stdin:
        inbox.put(json.loads(line))
    inbox.put(_END)
    time.sleep(GRACE)
    if os.getpgrp() == os.getpid():  # as it is started; what it has started goes with it
        os.killpg(os.getpid(), signal.SIGKILL)


def _sampling(vllm, request, start, seeded):
    from vllm.sampling_params import RequestOutputKind

    return vllm.SamplingParams(
        temperature=request["temperature"],
        top_p=request["top_p"],
        max_tokens=request["max_tokens"],
        seed=request["seed"] if seeded else None,
        stop_token_ids=start["end_ids"],
        # 0: of the sampled token alone
        logprobs=request["top_logps"] if request["top_logps"] else 0 if start["logps"] else None,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _answer(output, wants_logps, top_logps):
    (completion,) = output.outputs
    ids = list(completion.token_ids)
    logps = None
    if wants_logps and completion.logprobs is not None:
        logps = [of_position[token].logprob for of_position, token in zip(completion.logprobs, ids, strict=True)]
    said = {"id": output.request_id, "token_ids": ids, "finish_reason": completion.finish_reason, "logps": logps}
    if top_logps and completion.logprobs:
        said["first_logps"] = [[token, found.logprob] for token, found in completion.logprobs[0].items()]
    return said


if __name__ == "__main__":
    sys.exit(main())
