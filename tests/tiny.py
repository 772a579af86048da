"""A chat model small enough for every test: random weights, its own tokenizer, no downloads."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
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


def tiny_model(*, seed: int = 0, vocab_size: int = 400, max_positions: int = 512) -> LlamaForCausalLM:
    """Two layers of Llama with four query heads on two key-value heads, about 31,000 random weights."""
    random_state = torch.get_rng_state()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
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


def tiny_model_dir(folder: Path, *, seed: int = 0, max_positions: int = 512) -> str:
    """Save the tiny model and its tokenizer as an ordinary Hugging Face folder; returns its path."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(seed=seed, vocab_size=len(tokenizer), max_positions=max_positions)
    model.generation_config = GenerationConfig(pad_token_id=PAD_ID, bos_token_id=START_ID, eos_token_id=END_ID)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
