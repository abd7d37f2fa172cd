"""Small tokenizers of three ways that language models join text: SentencePiece with byte tokens, byte-level BPE, Metaspace."""

from __future__ import annotations

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SAMPLE = [
    "The capital of France is Paris, and the river there is called the Seine.",
    "Once upon a time there was a little girl who liked to read books about ships.",
    "Grüße aus München! Où est la gare? ¿Dónde está la estación? Привет, мир.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))  # 3",
] * 4
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


@cache
def llama():
    """Metaspace by normaliser, `<0xE2>` tokens for what the vocabulary lacks: Llama 2, Mistral, Mixtral."""
    names = [*SPECIAL[:3], *(f"<0x{b:02X}>" for b in range(256))]
    bare = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    bare.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    few = [line for line in SAMPLE if line.isascii()]
    bare.train_from_iterator(few, trainers.BpeTrainer(vocab_size=500, special_tokens=names, show_progress=False))
    made = _as_bytes(bare, names)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _fast(made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _as_bytes(bare, names):
    """The same tokenizer with its byte tokens as ordinary ones: only the first three are special."""
    import json

    told = json.loads(bare.to_str())
    told["added_tokens"] = [t for t in told["added_tokens"] if t["content"] in names[:3]]
    return Tokenizer.from_str(json.dumps(told))


@cache
def byte_level():
    """GPT-2, Llama 3, Qwen: every byte has a letter."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(SAMPLE, trainer)
    return _fast(made, eos_token="<|im_end|>", bos_token="<s>")


@cache
def metaspace():
    """T5, Gemma 1 and others: a Metaspace pre-tokenizer and decoder."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.train_from_iterator(SAMPLE, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL[:3], show_progress=False))
    return _fast(made, eos_token="</s>", unk_token="<unk>")


def _fast(made, **more):
    made.add_special_tokens([AddedToken(name, special=True) for name in more.values()])
    return PreTrainedTokenizerFast(tokenizer_object=made, **more)


def files_of(tokenizer, folder):
    """As a checkpoint has them."""
    tokenizer.save_pretrained(folder)
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name.startswith(("tokenizer", "special", "chat"))}
