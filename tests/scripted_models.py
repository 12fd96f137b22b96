"""Models that always say the same: each token of a script is followed by the next one, whatever came before.

A Llama without attention and without experts: its one layer adds nothing, and the head holds for every token the
axis of the one before. So real tokenizers, templates, parsers and stop tokens can be tested with known replies.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

HIDDEN = 512


def save_scripted_model(
    folder: Path, replies: Sequence[Sequence[str]], *, end: str, template: str, special: Sequence[str] = ()
) -> Path:
    """Save a checkpoint that continues the first token of a reply with the others and ``end``.

    Args:
        folder: Where to.
        replies: Tokens; none twice in all replies, so that each has one successor.
        end: The token that ends a turn, after which generation stops.
        template: The chat template.
        special: Further special tokens.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    controls = ["<bos>", end, *special]
    words = [word for reply in replies for word in reply if word not in controls]
    assert len(set(words)) == len(words)
    texts = [*letters, *controls, *words]
    assert len(texts) <= HIDDEN  # One axis each.
    ids = {text: index for index, text in enumerate(texts)}
    config = LlamaConfig(
        vocab_size=len(texts),
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        bos_token_id=ids["<bos>"],
        eos_token_id=ids[end],
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    successor = torch.full((len(texts),), ids[end])
    for reply in replies:
        for word, following in zip(reply, [*reply[1:], end], strict=True):
            successor[ids[word]] = ids[following]
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        embedding = torch.nn.init.eye_(model.model.embed_tokens.weight)
        model.lm_head.weight.zero_().index_add_(0, successor, embedding)
    model.to(torch.bfloat16).save_pretrained(folder)
    added = [{"id": ids[text], "content": text, "special": text in controls} for text in texts[len(letters) :]]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    bpe = {"type": "BPE", "vocab": {letter: ids[letter] for letter in letters}, "merges": []}
    document = {"model": bpe, "added_tokens": added, "pre_tokenizer": byte_level, "decoder": byte_level}
    (folder / "tokenizer.json").write_text(json.dumps(document))
    settings = {"bos_token": "<bos>", "eos_token": end, "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(template)
    return folder
