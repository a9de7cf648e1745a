"""Licences: names out of cards, texts and metadata, and what they mean together."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimfuse.pipeline.licences import UNKNOWN, Licence, licence_of, licences

APACHE = (
    "                                 Apache License\n                           Version 2.0, Jan"
)
BSD = "Redistribution and use in source and binary forms, with or without\nmodification, are\n"


def card(folder: Path, front: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(f"---\n{front}\n---\n# A model\nlicense: none\n")
    return folder


@pytest.mark.parametrize(
    ("front", "name"),
    [
        ("license: apache-2.0", "apache-2.0"),
        ("language: en\nlicense: MIT\ntags: [a]", "mit"),
        ("license: other\nlicense_name: llama-3.2", "llama3.2"),
        ("license: llama3", "llama3"),
        ("license: GPL-3.0-or-later", "gpl-3.0-or-later"),
        ("license: [mit]", "mit"),
        ("license: home-made", "home-made"),
        ("license: unknown", UNKNOWN),
        ("license: other", UNKNOWN),
        ("license: [unclosed", UNKNOWN),
        ("- license: mit", UNKNOWN),
        ("tags: [a]", UNKNOWN),
    ],
)
def test_a_card_names_the_licence_in_its_front_matter_alone(
    front: str, name: str, tmp_path: Path
) -> None:
    assert licence_of(card(tmp_path / "m", front)).name == name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (APACHE, "apache-2.0"),
        ("Copyright (c) 2020 A\nPermission is hereby\ngranted, free of charge, to", "mit"),
        (BSD + "Neither the name of the copyright holder", "bsd-3-clause"),
        (BSD, "bsd-2-clause"),
        ("GNU GENERAL PUBLIC LICENSE\n   Version 3, 29 June 2007", "gpl-3.0"),
        ("GNU LESSER GENERAL PUBLIC LICENSE\n  Version 2.1, Feb", "lgpl-2.1"),
        ("GNU AFFERO GENERAL PUBLIC LICENSE Version 3", "agpl-3.0"),
        ("Attribution-NonCommercial-ShareAlike 4.0 International", "cc-by-nc-sa-4.0"),
        ("Attribution-NoDerivatives 4.0 International", "cc-by-nd-4.0"),
        ("Creative Commons Attribution 4.0 International", "cc-by-4.0"),
        ("LLAMA 3.2 COMMUNITY LICENSE AGREEMENT", "llama3.2"),
        ("Gemma Terms of Use", "gemma"),
        ("All rights reserved.", UNKNOWN),
    ],
)
def test_a_text_is_known_by_its_words(text: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "LICENSE.txt").write_text(text)
    found = licence_of(tmp_path)
    assert found.name == name
    assert found.source == ("" if name == UNKNOWN else "LICENSE.txt")


def test_the_card_goes_before_the_text_and_the_text_before_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    site = tmp_path / "site"
    (site / "words-1.dist-info").mkdir(parents=True)
    meta = "Metadata-Version: 2.1\nName: words\nVersion: 1\nClassifier: License :: OSI Approved :: "
    (site / "words-1.dist-info" / "METADATA").write_text(f"{meta}MIT License\n")
    monkeypatch.syspath_prepend(site)
    assert licence_of(folder, "package:words/model") == Licence("mit", "metadata of words")
    assert licence_of(folder, "package:gone") == licence_of(folder) == Licence(UNKNOWN)
    (folder / "COPYING").write_text(APACHE)
    assert licence_of(folder, "package:words").source == "COPYING"
    assert licence_of(card(folder, "license: cc0-1.0"), "package:words") == Licence(
        "cc0-1.0", "README.md"
    )


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("License-Expression: Apache-2.0", "apache-2.0"),
        ("License: Apache License, Version 2.0", "apache-2.0"),
        ("License: BSD 3-Clause", "bsd-3-clause"),
        ("License: GPLv3", "gpl-3.0"),
        ("License: GPL-2.0-only", "gpl-2.0"),
        ("License: UNKNOWN", UNKNOWN),
        ("Classifier: License :: OSI Approved :: Apache Software License", "apache-2.0"),
        ("Classifier: License :: OSI Approved", UNKNOWN),
    ],
)
def test_a_packages_metadata_is_asked_last(
    field: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "w-1.dist-info").mkdir()
    meta = f"Metadata-Version: 2.4\nName: w\nVersion: 1\n{field}\n"
    (tmp_path / "w-1.dist-info" / "METADATA").write_text(meta)
    monkeypatch.syspath_prepend(tmp_path)
    assert licence_of(tmp_path, "package:w").name == name


def of(tmp_path: Path, *names: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    folders = {
        f"p{i}": (card(tmp_path / f"p{i}", f"license: {name}"), None)
        for i, name in enumerate(names)
    }
    found = licences(folders)
    assert [licence.name for licence in found.found.values()] == list(names)
    return found.inherited, found.conflicts


@pytest.mark.parametrize(
    "names",
    [
        ("mit", "apache-2.0"),
        ("cc-by-4.0", "bsd-3-clause"),
        ("llama3.2", "mit"),
        ("cc-by-nc-4.0", "apache-2.0"),
        ("gpl-3.0", "apache-2.0"),
        ("gpl-2.0-or-later", "gpl-3.0"),
        ("gpl-2.0-or-later", "apache-2.0"),
        ("cc-by-sa-4.0", "gpl-3.0"),
        ("cc-by-nc-sa-4.0", "cc-by-nc-4.0"),
        ("gemma", "cc-by-nc-4.0"),
    ],
    ids=str,
)
def test_licences_that_can_all_be_kept_to(names: tuple[str, ...], tmp_path: Path) -> None:
    assert of(tmp_path, *names)[1] == ()


@pytest.mark.parametrize(
    "names",
    [
        ("gpl-3.0", "cc-by-nc-4.0"),
        ("gpl-2.0", "apache-2.0"),
        ("gpl-2.0", "gpl-3.0"),
        ("cc-by-sa-4.0", "cc-by-nc-sa-4.0"),
        ("agpl-3.0", "llama3.1"),
        ("cc-by-sa-4.0", "gemma"),
    ],
    ids=str,
)
def test_licences_that_exclude_each_other_in_any_order(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    for one, other in (names, names[::-1]):
        (told,) = of(tmp_path, one, other)[1]
        assert told == f"p0's licence, {one}, and p1's, {other}, can't both hold for one model"


def test_no_derivatives_and_what_is_not_known_are_told_of_a_single_parent(tmp_path: Path) -> None:
    assert "doesn't allow to pass on" in of(tmp_path, "cc-by-nc-nd-4.0")[1][0]
    empty = tmp_path / "empty"
    empty.mkdir()
    found = licences({"a": (empty, None)})
    assert found.unknown == ("the licence of a is unknown: neither its card nor a file says it",)
    (empty / "README.md").write_text("---\nlicense: home-made\n---\n")
    assert "not known here" in licences({"a": (empty, None)}).unknown[0]
    (empty / "README.md").unlink()
    assert found.found["a"] == Licence(UNKNOWN) and found.inherited == ()


def test_what_is_inherited_names_the_parents_it_comes_from(tmp_path: Path) -> None:
    inherited, _ = of(tmp_path, "cc-by-nc-sa-4.0", "mit", "cc-by-nc-4.0")
    assert inherited == (
        "the fused model is for non-commercial use only (p0: cc-by-nc-sa-4.0, p2: cc-by-nc-4.0)",
        "the fused model must be passed on under the same licence (p0: cc-by-nc-sa-4.0)",
    )
    assert of(tmp_path, "gemma")[0] == (
        "the maker's terms of use hold for the fused model and go with it (p0: gemma)",
    )
    assert of(tmp_path, "mit", "apache-2.0")[0] == ()
