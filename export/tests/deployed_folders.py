"""Finished folders whose answers are known beforehand, made without torch."""

import io
import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]",
         "cat", "dog", "oak", "elm", "the", "old", "new", "</s>")  # fmt: skip
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
SIDE, LIMIT, WIDTH = 8, 12, 6
FOLLOWS = {"the": "old", "old": "cat", "cat": "dog", "dog": "</s>", "new": "new", "[MASK]": "oak"}
PIXELS = ("pixel_values", TensorProto.FLOAT, ["batch_size", 3, SIDE, SIDE])
TOKENS = [(name, TensorProto.INT64, ["batch_size", "sequence_length"])
          for name in ("input_ids", "attention_mask")]  # fmt: skip


def number(word):
    return WORDS.index(word)


def save(folder, nodes, weights, inputs, output, config, **files):
    """Write a folder of one graph."""
    (folder / "onnx").mkdir(parents=True)
    graph = helper.make_graph(
        nodes,
        "known",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(output[0], TensorProto.FLOAT, output[1])],
        [numpy_helper.from_array(np.asarray(a), name) for name, a in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, str(folder / "onnx" / "model.onnx"))
    for name, content in {"config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def colours(folder: Path) -> Path:
    """Images: a class's logit is four times the mean of its channel."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["pixel_values"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("Mul", ["flat", "four"], ["logits"]),
    ]
    config = {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "id2label": {str(i): name for i, name in enumerate(COLOURS)},
    }
    processor = {"image_processor_type": "ViTImageProcessor",
                 "do_resize": True, "size": {"height": SIDE, "width": SIDE}, "resample": 2,
                 "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": False}  # fmt: skip
    return save(
        folder, nodes, {"four": np.float32(4)}, [PIXELS], ("logits", ["batch_size", 3]),
        config, preprocessor_config=processor,
    )  # fmt: skip


def picture(colour="red", size=(11, 7), kind="PNG", mode="RGB") -> bytes:
    """A file with an image of one colour."""
    out = io.BytesIO()
    Image.new("RGB", size, COLOURS[colour]).convert(mode).save(out, kind)
    return out.getvalue()


def save_tokenizer(folder: Path, *, around: bool) -> None:
    """Write a tokenizer of whole words; around: [CLS] and [SEP] stand around texts."""
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([w for w in WORDS if w.startswith(("[", "<"))])
    if around:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            special_tokens=[("[CLS]", number("[CLS]")), ("[SEP]", number("[SEP]"))],
        )
    made.save(str(folder / "tokenizer.json"))
    settings = {"pad_token": "[PAD]", "mask_token": "[MASK]", "eos_token": "</s>",
                "model_max_length": LIMIT}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def table() -> np.ndarray:
    """Logits (words, words): a word is followed by the one that FOLLOWS names."""
    found = np.zeros((len(WORDS), len(WORDS)), np.float32)
    for word, then in FOLLOWS.items():
        found[number(word), number(then)] = 5
    return found


def embeddings() -> np.ndarray:
    """(words, WIDTH), all different."""
    return np.random.default_rng(3).standard_normal((len(WORDS), WIDTH)).astype(np.float32)


def kinds() -> np.ndarray:
    """(words, 2): cat and dog are animals, oak and elm plants, all other words nothing."""
    found = np.zeros((len(WORDS), 2), np.float32)
    for word, column in (("cat", 0), ("dog", 0), ("oak", 1), ("elm", 1)):
        found[number(word), column] = 8
    return found


def states(folder: Path, task: str) -> Path:
    """Texts: a token's output is its row of a table: `embeddings`, or `table` of a language model.

    task: BertModel, BertForMaskedLM or GPT2LMHeadModel.
    """
    rows, name = (embeddings(), "last_hidden_state") if task == "BertModel" else (table(), "logits")
    shape = ["batch_size", "sequence_length", rows.shape[1]]
    nodes = [helper.make_node("Gather", ["rows", "input_ids"], [name])]
    config = {"architectures": [task], "eos_token_id": number("</s>"), "n_positions": LIMIT}
    config["model_type"] = "gpt2" if task == "GPT2LMHeadModel" else "bert"
    save(folder, nodes, {"rows": rows}, TOKENS, (name, shape), config)
    save_tokenizer(folder, around=task != "GPT2LMHeadModel")
    return folder


def sentences(folder: Path, mode: str = "mean_tokens") -> Path:
    """A sentence encoder of `embeddings`."""
    states(folder, "BertModel")
    parts = (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"}
               for kind, path in parts]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{mode}": True}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": LIMIT - 2}))
    return folder


def sorts(folder: Path, problem: str | None = None) -> Path:
    """Texts: a class's logit is the mean of `kinds` over the real tokens."""
    nodes = [
        helper.make_node("Gather", ["rows", "input_ids"], ["each"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["column"]),
        helper.make_node("Mul", ["each", "column"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "middle"], ["sum"], keepdims=0),
        helper.make_node("ReduceSum", ["mask", "middle"], ["count"], keepdims=1),
        helper.make_node("Div", ["sum", "count"], ["logits"]),
    ]
    weights = {"rows": kinds(), "last": np.array([2]), "middle": np.array([1])}
    config = {"architectures": ["BertForSequenceClassification"],
              "id2label": {"0": "animal", "1": "plant"}, "problem_type": problem}  # fmt: skip
    save(folder, nodes, weights, TOKENS, ("logits", ["batch_size", 2]), config)
    save_tokenizer(folder, around=True)
    return folder
