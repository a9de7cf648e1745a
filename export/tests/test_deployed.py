"""Folders whose answers are known beforehand, opened and asked."""

import json
import math

import deployed_folders as folders
import numpy as np
import pytest
from PIL import Image
from slimfuse_export import ExportError
from slimfuse_export.deployed import Options, open_deployed
from slimfuse_export.deployed.generation import choose
from slimfuse_export.deployed.texts import Tokens


@pytest.fixture
def colours(tmp_path):
    return open_deployed(folders.colours(tmp_path / "run" / "model"))


@pytest.fixture
def sorts(tmp_path):
    return open_deployed(folders.sorts(tmp_path / "sorts"))


def edit(folder, name, **changes):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_image_gets_its_label_and_the_best_scores(colours):
    assert (colours.description.task, colours.description.name) == ("image-classification", "run")
    (answer,) = colours.predict([folders.picture("green")], Options(top_k=2))
    assert answer["label"] == "green"
    # logits 0, 4, 0: the softmax by hand
    assert answer["score"] == pytest.approx(math.e**4 / (math.e**4 + 2), rel=1e-5)
    assert [row["label"] for row in answer["scores"]] == ["green", "red"]


@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "RGB"), ("GIF", "P"), ("WEBP", "RGB"),
                                            ("BMP", "RGB"), ("PNG", "RGBA")])  # fmt: skip
def test_images_of_every_format_are_read(colours, kind, mode):
    (answer,) = colours.predict([folders.picture("blue", kind=kind, mode=mode)])
    assert answer["label"] == "blue"


def test_an_image_is_turned_as_its_record_says(colours, tmp_path):
    image = Image.new("RGB", (8, 8), "red")
    image.paste((0, 0, 255), (0, 0, 8, 4))  # blue above, red below
    record = image.getexif()
    record[0x0112] = 3  # turned by 180°
    image.save(tmp_path / "turned.png", exif=record)
    pixels = colours.prepare(tmp_path / "turned.png").value
    assert pixels[0, 0, 0] == 1  # red above
    assert pixels[2, -1, 0] == 1


def test_bad_inputs_are_told_in_their_places(colours, tmp_path):
    whole = folders.picture("red", kind="BMP")
    items = [whole, b"", whole[: len(whole) // 2], tmp_path / "none.png", b"text", whole]
    found = list(colours.predict(items, batch=4))
    assert [isinstance(answer, ExportError) for answer in found] == [False, *[True] * 4, False]
    assert [str(found[i].what) for i in (1, 2, 3)] == [
        "the file is no image", "the image can't be decoded", "the image does not exist",
    ]  # fmt: skip


def test_too_many_pixels_are_refused_before_decoding(colours):
    flat = folders.picture(size=(300, 200))
    with pytest.raises(ExportError, match="too many pixels"):
        colours.prepare(flat, most_pixels=300 * 200 - 1)
    assert colours.prepare(flat, most_pixels=300 * 200).key == (3, 8, 8)


def test_a_narrow_image_is_not_blown_up(tmp_path):
    folder = folders.colours(tmp_path / "narrow")
    edit(folder, "preprocessor_config.json", size={"shortest_edge": 300}, do_center_crop=True,
         crop_size={"height": 8, "width": 8})  # fmt: skip
    model = open_deployed(folder)
    with pytest.raises(ExportError, match="too narrow"):
        model.prepare(folders.picture(size=(1, 500)))
    assert model.prepare(folders.picture(size=(10, 500))).key == (3, 8, 8)


def test_a_text_gets_its_label_whatever_is_beside_it(sorts):
    texts = ["the old cat", "elm", "old oak the the the the the"]
    together = list(sorts.predict(texts))
    assert [answer["label"] for answer in together] == ["animal", "plant", "plant"]
    # three words and two around them, one of which is worth 8
    assert together[0]["score"] == pytest.approx(1 / (1 + math.exp(-8 / 5)), rel=1e-5)
    assert together == list(sorts.predict(texts, batch=1))


def test_a_long_text_is_cut_or_refused(sorts):
    long = " ".join(["cat"] * (folders.LIMIT - 1))
    (answer,) = sorts.predict([long])
    assert answer["truncated"] is True
    assert len(sorts.prepare(long).value) == folders.LIMIT
    with pytest.raises(ExportError, match="too long"):
        sorts.prepare(long, Options(truncate=False))
    (answer,) = sorts.predict([" ".join(["cat"] * (folders.LIMIT - 2))])
    assert "truncated" not in answer


def test_several_labels_and_numbers(tmp_path):
    several = folders.sorts(tmp_path / "several", "multi_label_classification")
    (answer,) = open_deployed(several).predict(["cat oak"])
    assert answer["labels"] == ["animal", "plant"]
    assert answer["scores"][0]["score"] == pytest.approx(1 / (1 + math.exp(-2)), rel=1e-5)
    value = folders.sorts(tmp_path / "value", "regression")
    (answer,) = open_deployed(value).predict(["cat oak elm"])
    assert answer == {"values": {"animal": pytest.approx(1.6), "plant": pytest.approx(3.2)}}


@pytest.mark.parametrize(("mode", "pooling"), [("mean_tokens", "mean"), ("cls_token", "cls")])
def test_sentences_are_pooled_as_the_folder_says(tmp_path, mode, pooling):
    model = open_deployed(folders.sentences(tmp_path / "model", mode))
    assert (model.description.task, model.description.pooling) == ("sentence-embedding", pooling)
    rows = folders.embeddings()
    ids = [folders.number(word) for word in ("[CLS]", "old", "cat", "[SEP]")]
    wanted = rows[ids].mean(0) if pooling == "mean" else rows[ids[0]]
    first, other = (answer["embedding"] for answer in model.predict(["old cat", "the new dog"]))
    # rounded to seven digits
    np.testing.assert_allclose(first, wanted / np.linalg.norm(wanted), atol=1e-6)
    assert np.linalg.norm(other) == pytest.approx(1, abs=1e-6)
    assert len(model.prepare("cat " * 20).value) == folders.LIMIT - 2  # sentence-transformers' own


def test_features_are_means_or_every_tokens(tmp_path):
    folder = folders.states(tmp_path / "features", "BertModel")
    rows = folders.embeddings()[[folders.number(w) for w in ("[CLS]", "dog", "[SEP]")]]
    (answer, _) = open_deployed(folder).predict(["dog", "the old dog"])
    np.testing.assert_allclose(answer["embedding"], rows.mean(0), atol=1e-6)
    (answer, _) = open_deployed(folder, pooling="none").predict(["dog", "the old dog"])
    np.testing.assert_allclose(answer["features"], rows, atol=1e-6)
    with pytest.raises(ExportError, match="isn't pooled"):
        open_deployed(folders.sorts(tmp_path / "sorts"), pooling="cls")


def test_masks_are_filled(tmp_path):
    model = open_deployed(folders.states(tmp_path / "masked", "BertForMaskedLM"))
    found = list(model.predict(["the [MASK] cat", "the cat", "[MASK] [MASK]"], Options(top_k=2)))
    assert found[0]["text"] == "the oak cat"
    assert found[0]["masks"][0][0]["token"] == "oak"
    assert isinstance(found[1], ExportError)
    assert found[1].allowed == "[MASK]"
    assert [len(mask) for mask in found[2]["masks"]] == [2, 2]


def test_texts_go_on_until_their_end_their_length_or_the_limit(tmp_path):
    model = open_deployed(folders.states(tmp_path / "causal", "GPT2LMHeadModel"))
    found = list(model.predict(["the", "new new", "old"]))
    assert found[0] == {"text": "old cat dog", "tokens": 3, "finish": "end"}
    assert (found[1]["tokens"], found[1]["finish"]) == (folders.LIMIT - 2, "limit")
    assert found[2]["text"] == "cat dog"
    (short,) = model.predict(["the"], Options(max_new_tokens=2))
    assert short == {"text": "old cat", "tokens": 2, "finish": "length"}
    empty, full = model.predict(["", "new " * folders.LIMIT])
    assert (str(empty.what), str(full.what)) == (
        "the text has no tokens", "the text leaves no place to go on",
    )  # fmt: skip


def test_drawn_texts_hang_on_their_seed_alone(tmp_path):
    model = open_deployed(folders.states(tmp_path / "causal", "GPT2LMHeadModel"))
    warm = Options(temperature=5.0, seed=4)
    alone = list(model.predict(["the"], warm))
    assert alone == list(model.predict(["the", "old"], warm))[:1]
    assert alone != list(model.predict(["the"], Options(temperature=5.0, seed=5)))


def test_tokens_are_drawn_as_often_as_they_should():
    rng = np.random.default_rng(0)
    logits = np.log(np.array([0.2, 0.5, 0.3], np.float32))
    drawn = np.bincount([choose(logits, 1.0, rng) for _ in range(4000)]) / 4000
    # five standard deviations of a share of one half in 4000
    np.testing.assert_allclose(drawn, [0.2, 0.5, 0.3], atol=5 * 0.5 / 4000**0.5)
    assert {choose(logits, 0.0, rng) for _ in range(5)} == {1}
    assert {choose(logits, 1e-6, rng) for _ in range(5)} == {1}  # no overflow


def test_without_a_mask_only_texts_of_one_length_run_together(tmp_path):
    folder = folders.states(tmp_path / "plain", "GPT2LMHeadModel")
    import onnx

    graph = onnx.load(folder / "onnx" / "model.onnx")
    del graph.graph.input[1]
    onnx.save(graph, folder / "onnx" / "model.onnx")
    model = open_deployed(folder)
    assert not model.preparation.batches_lengths
    found = list(model.predict(["the", "the old", "cat"]))
    assert [answer["text"] for answer in found] == ["old cat dog", "cat dog", "dog"]


def test_padding_is_masked_and_on_the_right(sorts):
    made = sorts.preparation.collate([Tokens((7, 8, 9), (0, 1, 1)), Tokens((5,), (0,))])
    assert made["input_ids"].tolist() == [[7, 8, 9], [5, 0, 0]]
    assert made["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("config.json", {"architectures": ["BertForTokenClassification"]}, "task isn't known"),
        ("config.json", {"problem_type": "ranking"}, "kind of labels"),
        ("config.json", {"id2label": {"0": "a", "2": "b"}}, "leaves classes out"),
        ("tokenizer_config.json", None, "can't be read"),
        ("tokenizer.json", None, "tokenizer can't be opened"),
    ],
)
def test_odd_files_of_a_text_model_are_refused(tmp_path, name, changes, said):
    folder = folders.sorts(tmp_path / "sorts")
    (folder / name).write_text("{") if changes is None else edit(folder, name, **changes)
    with pytest.raises(ExportError, match=said):
        open_deployed(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"do_pad": True}, "do_pad"),
        ({"size": {"longest_edge": 9}}, "size"),
        ({"do_normalize": True}, "image_mean"),
        ({"do_center_crop": True}, "crop_size"),
        ({"do_normalize": True, "image_mean": [0.5] * 4, "image_std": [1] * 4}, "other channels"),
    ],
)
def test_unknown_image_settings_are_refused(tmp_path, changes, said):
    folder = folders.colours(tmp_path / "model")
    edit(folder, "preprocessor_config.json", **changes)
    with pytest.raises(ExportError) as caught:
        open_deployed(folder)
    assert said in str(caught.value)


def test_a_pooling_outside_of_the_folder_is_refused(tmp_path):
    folder = folders.sentences(tmp_path / "model")
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["path"] = "../1_Pooling"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ExportError, match="out of the folder"):
        open_deployed(folder)


def test_options_are_checked_at_once():
    with pytest.raises(ExportError, match="option") as caught:
        Options(top_k=0, temperature=-1)
    assert "top_k 0, temperature -1" in str(caught.value)
