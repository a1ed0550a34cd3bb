"""Models whose next token follows from the last one alone, as a table says: what they answer is known beforehand.

The embedding is one-hot, the blocks add nothing, and the output layer holds the table.
"""

import itertools
import json
import shutil
from pathlib import Path

import torch

from llama_acc.core.data.templates import get_template
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.transformer import shapes_of
from llama_acc.core.model.vision_config import VISION_FILE, TinyVision
from llama_acc.core.tokenizer import find_tokenizer, load_tokenizer

_SEES = TinyVision(image_size=16, patch_size=8, width=8, hidden_dim=8, n_layers=1, n_heads=2)


def write_chain(
    folder: Path,
    tokenizer_path: Path | None = None,
    *,
    answer: str,
    after: str,
    endless: str | None = None,
    endless_after: str = "",
    end: int | None = None,
    max_seq_len: int = 512,
    captions: bool = False,
) -> Path:
    """Writes a model, as Meta lays them out.

    Args:
        folder: where to.
        tokenizer_path: what is copied there; None = the tokenizer is there.
        answer: said after a prompt whose last token is that of `after`, then the end.
        after: see `answer`.
        endless: said again and again after a prompt that ends with `endless_after`.
        endless_after: see `endless`.
        end: the token that ends the answer; None = EOS.
        max_seq_len: the model's context.
        captions: it was trained to caption images, each of which ends like the token `after`.

    Returns:
        The folder.
    """
    folder.mkdir(exist_ok=True)
    if tokenizer_path is not None:
        shutil.copy(tokenizer_path, folder)
    path = find_tokenizer(folder)
    assert path is not None
    tokenizer = load_tokenizer(path)
    said = tokenizer.encode("x" + answer)[len(tokenizer.encode("x")) :]
    chain = [tokenizer.encode("x" + after)[-1], *said, tokenizer.eos_id if end is None else end]
    assert len(set(chain)) == len(chain), f"the answer has a token twice: {chain}"
    follows = dict(itertools.pairwise(chain))
    if endless is not None:
        word = tokenizer.encode("x" + endless)[-1]
        assert word not in chain
        follows |= {tokenizer.encode("x" + endless_after)[-1]: word, word: word}
    config = ModelConfig(
        dim=-(-tokenizer.vocab_size // 4) * 4,
        n_layers=1,
        n_heads=2,
        vocab_size=tokenizer.vocab_size,
        multiple_of=4,
        max_seq_len=max_seq_len,
        vision=_SEES if captions else None,
    )
    tensors = {name: torch.zeros(shape) for name, shape in shapes_of(config).items()}
    for name in tensors:
        if name.endswith("norm.weight"):
            tensors[name].fill_(1.0)
    tensors["tok_embeddings.weight"].fill_diagonal_(1.0)
    for token, following in follows.items():
        tensors["output.weight"][following, token] = 10.0
    if captions:
        tensors["end_img"][0, 0, chain[0]] = 1.0
        (folder / VISION_FILE).write_bytes(_SEES.to_json())
        (folder / "template.json").write_text(get_template("caption").to_json())
    torch.save(tensors, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(config.to_params()), encoding="utf-8")
    return folder
