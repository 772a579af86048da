"""A chat model small enough for every test: random weights, its own tokenizer, no downloads."""

import json
from pathlib import Path

import torch
from gguf import GGUFWriter
from peft import LoraConfig, get_peft_model
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BloomConfig,
    Gemma2Config,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RwkvConfig,
    XLNetConfig,
)

SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "What is the capital of France? The capital of France is Paris.",
    "Explain how rainbows form when sunlight passes through drops of water.",
    "Answer accurately and in detail; be careless and vague instead.",
)
SPECIAL_TOKENS = ("<|pad|>", "<|im_start|>", "<|im_end|>")
PAD_ID, START_ID, END_ID = range(3)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 400 tokens with ChatML's special tokens, end token <|im_end|>."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        SENTENCES, vocab_size=400, min_frequency=1, special_tokens=list(SPECIAL_TOKENS), show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )


def gapped_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer with 110 ids that no token has before the last one, that of <|im_end|>: 509."""
    tokenizer = tiny_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"]["<|im_end|>"] = 509
    state["added_tokens"] = [each | {"id": 509} if each["id"] == END_ID else each for each in state["added_tokens"]]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )


def tiny_model(*, seed: int = 0, vocab_size: int = 400, max_positions: int = 512, width: int = 32) -> LlamaForCausalLM:
    """Two layers of Llama with four query heads on two key-value heads, about 31,000 random weights."""
    random_state = torch.get_rng_state()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_positions,
        initializer_range=0.2,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        bos_token_id=START_ID,
        eos_token_id=END_ID,
    )
    model = LlamaForCausalLM(config).eval()
    torch.set_rng_state(random_state)
    return model


_SMALL = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2}

OTHER_KINDS: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**_SMALL, num_attention_heads=4, intermediate_size=64),
    "bloom": BloomConfig(vocab_size=400, hidden_size=32, n_layer=2, n_head=4),
    "gemma2": Gemma2Config(
        **_SMALL, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=16
    ),
    "gpt2": GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4),
    "mamba": MambaConfig(**_SMALL, state_size=8),
    "rwkv": RwkvConfig(**_SMALL),
    "xlnet": XLNetConfig(vocab_size=400, d_model=32, n_layer=2, n_head=4, d_inner=64),
}
"""Models that attend by other means than Llama's, or not at all, or to both sides."""


def other_model(kind: str) -> PreTrainedModel:
    """One of `OTHER_KINDS` with random weights, large enough to tell tokens apart."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(OTHER_KINDS[kind])
        for weight in model.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.2)
    model.generation_config = GenerationConfig(pad_token_id=PAD_ID, bos_token_id=START_ID, eos_token_id=END_ID)
    return model.eval()


def other_model_dir(folder: Path, kind: str) -> str:
    """Save one of `OTHER_KINDS` with the tiny tokenizer; returns its path."""
    other_model(kind).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def tiny_adapter(folder: Path, base: str, *, seed: int) -> None:
    """A random LoRA adapter on the model folder `base`, in folder/adapter, and the model with it merged in folder/model."""
    random_state = torch.get_rng_state()
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.set_rng_state(random_state)
    adapted.save_pretrained(str(folder / "adapter"))
    adapted.merge_and_unload().save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "model")


def tiny_model_dir(folder: Path, *, seed: int = 0, max_positions: int = 512, spare_rows: int = 0, width: int = 32) -> str:
    """Save the tiny model and its tokenizer as an ordinary Hugging Face folder; returns its path.

    spare_rows: of the embedding, that no token has.
    """
    tokenizer = tiny_tokenizer()
    model = tiny_model(seed=seed, vocab_size=len(tokenizer) + spare_rows, max_positions=max_positions, width=width)
    model.generation_config = GenerationConfig(pad_token_id=PAD_ID, bos_token_id=START_ID, eos_token_id=END_ID)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tiny_gguf(file: Path, *, pre: str | None = "smollm", **changes: object) -> str:
    """The tiny model as llama.cpp would store it; changes: entries of its metadata in place of the right ones, or None."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    spelled = {number: token for token, number in tokenizer.get_vocab().items()}
    entries: dict[str, object] = {
        "llama.context_length": 512,
        "llama.embedding_length": 32,
        "llama.block_count": 2,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-6,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": 8,
        "llama.vocab_size": len(spelled),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [spelled[number] for number in range(len(spelled))],
        "tokenizer.ggml.token_type": [
            3 if number in tokenizer.added_tokens_decoder else 1 for number in range(len(spelled))
        ],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in backend["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": START_ID,
        "tokenizer.ggml.eos_token_id": END_ID,
        "tokenizer.ggml.padding_token_id": PAD_ID,
        "tokenizer.chat_template": tokenizer.chat_template,
    } | changes
    writer = GGUFWriter(str(file), "llama")
    add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
    for key, value in entries.items():
        if value is not None:
            add[type(value)](key, value)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        if ".q_proj." in name or ".k_proj." in name:  # llama.cpp rotates neighbours, transformers halves
            heads = 4 if ".q_proj." in name else 2
            weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        for theirs, ours in _GGUF_NAMES:
            name = name.replace(theirs, ours)
        writer.add_tensor(name, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(file)


_GGUF_NAMES = (
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("model.layers", "blk"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
)
