"""GGUF files: a tiny Llama written by the format's own writer, converted, and what goes wrong."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from slimfuse.data import gguf
from slimfuse.data.gguf import convert, converted, find_gguf
from slimfuse.errors import ParentError

needed = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None, reason="the Python package gguf is not installed"
)
TOKENS = ["<s>", "</s>", *sorted(ByteLevel.alphabet()), "th", "the"]
MERGES = ["t h", "th e"]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def llama() -> Any:
    config = LlamaConfig(
        hidden_size=24, num_attention_heads=6, num_key_value_heads=3, num_hidden_layers=2,
        intermediate_size=20, vocab_size=len(TOKENS), max_position_embeddings=40,
        bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Return rows in llama.cpp's order: rotary pairs side by side, not in halves."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def write(file: Path, model: Any, **changes: Any) -> Path:
    from gguf import GGUFWriter

    config = model.config
    writer = GGUFWriter(file, changes.get("architecture", "llama"))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_license("other")
    writer.add_license_name('the "tiny" terms')
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(MERGES)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, value in model.state_dict().items():
        part = name.removesuffix(".weight")
        if part.startswith("model.layers."):
            _, _, i, rest = part.split(".", 3)
            part = f"blk.{i}.{NAMES[rest]}"
        else:
            part = NAMES[part]
        kept = changes.get("without") != part
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        count = heads.get(part.rpartition(".")[2])
        if kept:
            turned = value if count is None else interleaved(value, count)
            writer.add_tensor(f"{part}.weight", turned.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "slimfuse" / "gguf"


@needed
def test_a_file_becomes_an_ordinary_folder_that_says_the_same(tmp_path: Path, cache: Path) -> None:
    model = llama()
    file = write(tmp_path / "tiny.gguf", model)
    folder = converted(file, ("llama",))
    assert folder.parent == cache and list(cache.iterdir()) == [folder]
    read = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "the other ünïcode"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert "the" in tokenizer.convert_ids_to_tokens(ids[0])
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == text
    with torch.no_grad():
        wanted, found = model(ids).logits, read(ids).logits
    assert torch.equal(found, wanted)  # float32 in, float32 out
    assert read.config.eos_token_id == 1
    assert 'license_name: "the \\"tiny\\" terms"' in (folder / "README.md").read_text()


@needed
def test_a_file_is_converted_once_and_never_by_halves(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "tiny.gguf", llama())

    def dies(*_: object) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(gguf, "_save_model", dies)
        with pytest.raises(ParentError, match="can't be converted") as caught:
            converted(file, ("llama",), where="parents.a.from")
    assert caught.value.got == "tiny.gguf: RuntimeError: no memory"
    assert caught.value.where == "parents.a.from"
    assert not any(cache.iterdir())
    folder = converted(file, ("llama",))
    monkeypatch.setattr(gguf, "convert", dies)
    assert converted(file.rename(tmp_path / "renamed.gguf"), ("llama",)) == folder


@needed
def test_a_model_of_another_family_is_told(tmp_path: Path) -> None:
    file = write(tmp_path / "tiny.gguf", llama(), architecture="mamba")
    with pytest.raises(ParentError, match="another family") as caught:
        convert(file, tmp_path / "out", ("qwen2", "llama"))
    assert (caught.value.got, caught.value.allowed) == ("mamba", "llama, qwen2")


@needed
def test_a_missing_weight_is_told(tmp_path: Path) -> None:
    file = write(tmp_path / "tiny.gguf", llama(), without="blk.1.ffn_up")
    with pytest.raises(ParentError, match="can't be converted") as caught:
        convert(file, tmp_path / "out", ("llama",))
    assert "model.layers.1.mlp.up_proj.weight" in str(caught.value.got)


@needed
@pytest.mark.parametrize("size", [0, 100, 4000, -100])
def test_a_file_that_was_cut_off_is_told(size: int, tmp_path: Path) -> None:
    file = write(tmp_path / "tiny.gguf", llama())
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ParentError, match="can't be read") as caught:
        convert(file, tmp_path / "out", ("llama",))
    assert "cut off" in str(caught.value.hint)


def test_without_the_package_the_way_to_get_it_is_told(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    there = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "gguf" else there(name)
    )
    with pytest.raises(ParentError, match="can't be read here") as caught:
        converted(tmp_path / "tiny.gguf", ("llama",))
    assert caught.value.hint == 'pip install "slimfuse[gguf]"'
    assert caught.value.got == "tiny.gguf, without the Python package gguf"


def test_a_file_is_found_by_its_path_or_alone_in_a_folder(tmp_path: Path) -> None:
    assert find_gguf(tmp_path) is None and find_gguf(tmp_path / "none.gguf") is None
    (tmp_path / "a.gguf").touch()
    assert find_gguf(tmp_path) == find_gguf(tmp_path / "a.gguf") == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").touch()
    assert find_gguf(tmp_path) is None
    (tmp_path / "b.gguf").unlink()
    (tmp_path / "config.json").write_text(json.dumps({}))
    assert find_gguf(tmp_path) is None
