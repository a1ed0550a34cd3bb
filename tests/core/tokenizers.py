"""Tokenizers of the other kind than the fixture `tokenizer_path`: two tokenizer.json as they are published."""

import json
from pathlib import Path
from typing import Any

CORPUS = ["the answer is in the question", "once upon a time there was a town", "what is 10 + 32? é 😀"] * 3


def byte_level(folder: Path, config: dict[str, Any] | None = None, template: bool = False) -> Path:
    """A GPT-2-like tokenizer.json, whose own post-processing, truncation and padding we must not follow."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Fast

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    fast.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>", "<|eot_id|>")])
    fast.post_processor = processors.ByteLevel(trim_offsets=True)
    fast.enable_truncation(4)
    fast.enable_padding(length=64)
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template:
        (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return folder / "tokenizer.json"


def byte_fallback(folder: Path) -> Path:
    """LLaMA's tokenizer as Hugging Face writes it: byte pieces, and a decoder that fuses them."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, normalizers

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abcdehlnostx", "▁a", "he"]
    model = models.BPE(
        {p: i for i, p in enumerate(pieces)}, [("▁", "a"), ("h", "e")], byte_fallback=True, unk_token="<unk>"
    )
    fast = Fast(model)
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"
