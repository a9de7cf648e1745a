"""Finished folders of random models, small enough to be exported in a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from slimfuse_export import quantize_dynamic_int8
from tiny_text import POSITIONS, tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from slimfuse.batch import Batch
from slimfuse.onnx import export_onnx
from slimfuse.tasks import TASKS
from slimfuse.tasks.image_classification import make_processor

IMAGES = "image-classification"
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 24, "max_position_embeddings": POSITIONS}  # fmt: skip


def save(
    folder: Path, auto: Any, config: Any, kept: Any, example: Batch, output: str = "logits"
) -> Path:
    """Save a random model with its preprocessor, its graph and that in INT8."""
    torch.manual_seed(0)
    model = auto.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)  # answers far from each other
    model.save_pretrained(folder)
    task = "text-classification" if isinstance(kept, PreTrainedTokenizerFast) else IMAGES
    TASKS[task].save(kept, folder)
    graphs = [folder / "onnx" / f"model{kind}.onnx" for kind in ("", "_quantized")]
    graphs[0].parent.mkdir()
    export_onnx(model, example, graphs[0], opset=20, output=output)
    quantize_dynamic_int8(*graphs)
    return folder


def save_bert(folder: Path, auto: Any, output: str = "logits", **more: Any) -> Path:
    """Save a BERT with a given class on top."""
    kept = tokenizer(["[MASK]"])
    kept.add_special_tokens({"mask_token": "[MASK]"})
    config = AutoConfig.for_model("bert", vocab_size=len(kept), **SIZES, **more)
    return save(folder, auto, config, kept, _texts(kept), output)


def save_gpt2(folder: Path) -> Path:
    """Save a GPT-2 whose tokenizer has no padding token."""
    plain = tokenizer()
    plain.backend_tokenizer.post_processor = None
    kept = PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer, unk_token="[UNK]", eos_token="[SEP]",
        pad_token="[PAD]", model_max_length=POSITIONS,
    )  # fmt: skip
    kept.model_input_names = ["input_ids", "attention_mask"]
    config = AutoConfig.for_model(
        "gpt2", vocab_size=len(kept), n_embd=16, n_layer=1, n_head=2, n_positions=POSITIONS,
        eos_token_id=3, bos_token_id=3,
    )  # fmt: skip
    save(folder, AutoModelForCausalLM, config, kept, _texts(kept))
    kept.pad_token = None
    TASKS["causal-lm"].save(kept, folder)
    return folder


def save_vit(folder: Path, auto: Any) -> Path:
    """Save a ViT for 8 × 8 images."""
    sizes = {key: size for key, size in SIZES.items() if "position" not in key}
    config = AutoConfig.for_model("vit", image_size=8, patch_size=4, num_labels=5, **sizes)
    example = Batch({"pixel_values": torch.randn(2, 3, 8, 8)})
    return save(folder, auto, config, make_processor(8, [0.3] * 3, [0.4] * 3), example)


def _texts(kept: Any) -> Batch:
    return Batch(dict(kept(["the old cat", "a b c"], return_tensors="pt", padding=True)))
