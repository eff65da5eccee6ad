"""SmolLM2-135M-Instruct on a host that has it not: of the parts that were brought, or a stand-in of its shape.

    python -m tests.gpu.stand_in [PART …]

The stand-in has random weights, and a tokenizer trained on what text lies around. Its speed is that of the real one,
and edits are held against formulas, which need no meaning; what it answers means nothing. With the parts of the
packaged model (tests/gpu/kit/pack.py --model) it is the real one.
"""

from __future__ import annotations

import json
import lzma
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from loadtests.harness.model import MODEL_FOLDER, convert, made_whole

SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 8192,
    "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "initializer_range": 0.05,
}  # fmt: skip
UNKNOWN, BEGIN, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARK, TOKENS, FILES = "RANDOM-WEIGHTS", 8192, 400


def make(folder: Path) -> None:
    """The stand-in."""
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=TOKENS, special_tokens=[UNKNOWN, BEGIN, END], initial_alphabet=letters,
                                  show_progress=False)  # fmt: skip
    text = sorted(Path(str(torch.__file__)).parent.glob("_*/**/*.py"))[:FILES]
    tokenizer.train(list(map(str, text)), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END, "pad_token": END,
             "unk_token": UNKNOWN, "model_max_length": SHAPE["max_position_embeddings"]}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    (folder / "chat_template.jinja").write_text(CHAT)
    (folder / MARK).write_text("A stand-in: the shape of SmolLM2-135M-Instruct, random weights, its own tokenizer.\n")


def main(parts: Sequence[Path]) -> None:
    """The command."""
    if MODEL_FOLDER.is_dir() and not (parts and (MODEL_FOLDER / MARK).is_file()):
        print(f"{MODEL_FOLDER} is there already")
        return
    if MODEL_FOLDER.is_dir():
        MODEL_FOLDER.rename(MODEL_FOLDER.with_name(f"{MODEL_FOLDER.name}-random"))
    with made_whole(MODEL_FOLDER) as folder:
        if parts:
            with tempfile.NamedTemporaryFile(suffix=".gguf") as whole:
                whole.write(lzma.decompress(b"".join(part.read_bytes() for part in sorted(parts))))
                whole.flush()
                convert(Path(whole.name), folder)
        else:
            folder.mkdir()
            make(folder)
    print(f"{MODEL_FOLDER}: {'the real model' if parts else 'random weights'}")


if __name__ == "__main__":
    main([Path(word) for word in sys.argv[1:]])
