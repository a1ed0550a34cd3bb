"""Tokenizers of the other kind than the fixture `tokenizer_path`: two tokenizer.json as they are published."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

START, END, TOOL = "<|im_start|>", "<|im_end|>", "<tool>"
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


def cut_by_words(special: Sequence[str], digits: int, vocab_size: int, texts: Sequence[str]) -> Any:
    """What LLaMA 3 and many since have: pieces of bytes, of texts cut by a pattern; a word has so many digits."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Fast

    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ).replace("DIGITS", str(digits))
    fast = Fast(models.BPE(ignore_merges=digits == 3))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    fast.train_from_iterator(texts, trainer)
    fast.add_special_tokens([AddedToken(name, special=True) for name in special])
    return fast


def llama3_style(folder: Path) -> Path:
    """A tokenizer.json like Llama 3's: its pattern, digits by threes, line ends with what stands before them."""
    texts = [*CORPUS, "Response:\n\nHuman:\n ### ::\n\n((  \n\n"] * 3
    names = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    fast = cut_by_words(names, 3, 340, texts)
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": names[0], "eos_token": names[-1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


def token(text: str, **flags: bool) -> dict[str, Any]:
    """An added token as tokenizer files have it."""
    usual = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"content": text} | usual | flags


def chatml(folder: Path, model: Path, by: str, **more: Any) -> Path:
    """A folder with three tokens beside a tokenizer.model, named as newer and as older folders do."""
    from sentencepiece import SentencePieceProcessor

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    count = SentencePieceProcessor(model_file=str(model)).vocab_size()
    names = dict(zip((START, END, TOOL), range(count, count + 3), strict=True))
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": END, "unk_token": "<unk>"} | more
    if by == "added_tokens_decoder":
        entries = {str(number): token(text, special=text != TOOL) for text, number in names.items()}
        config["added_tokens_decoder"] = {"0": token("<unk>"), "1": token("<s>"), "2": token("</s>")} | entries
    else:
        (folder / "added_tokens.json").write_text(json.dumps(names))
        roles = {"eos_token": token(END), "additional_special_tokens": [START]}
        (folder / "special_tokens_map.json").write_text(json.dumps(roles))
        del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
