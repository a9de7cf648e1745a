"""Every figure of the README, of docs/results.md and of docs/peers.md is one of its record's."""

from __future__ import annotations

from pathlib import Path

import pytest
from figures import Figure, figures, is_measured, recorded
from pages import HOME, README, links, passages

RESULTS = HOME / "benchmarks" / "results"
TOLD = (README, HOME / "docs" / "results.md", HOME / "docs" / "peers.md")


def unfounded(page: Path, text: str | None = None) -> list[str]:
    """Return the figures that no record of their passage has, and results without a record."""
    found = []
    for passage in passages(page, text):
        if passage.sources:
            found += [
                f"{passage}: {figure.text}"
                for figure in figures(passage.text)
                if not any(recorded(figure, source) for source in passage.sources)
            ]
        elif is_measured(passage.text):
            found.append(f"{passage}: no record is linked")
    return found


@pytest.mark.parametrize("page", TOLD, ids=lambda p: p.name)
def test_every_figure_is_recorded(page: Path) -> None:
    assert unfounded(page) == []


def test_every_linked_result_has_its_data_and_its_command() -> None:
    makefile = (HOME / "Makefile").read_text()
    for page in TOLD:
        for link in links(page.read_text()):
            if "benchmarks/results/" in link:
                record = (page.parent / link).resolve()
                assert record.with_suffix(".json").exists()
                script = f"benchmarks/{record.stem.replace('-', '_')}.py"
                assert (HOME / script).exists() and (
                    script in makefile or script in page.read_text()
                )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("**88.2 ± 0.3**", "**88.3 ± 0.3**"),  # a mean
        ("78.8 ± 0.9", "78.8 ± 0.8"),  # a spread
        ("(1.75 – 1.80)", "(1.75 – 1.81)"),  # an interval's end
        ("+2.0 ± 1.0", "+2.1 ± 1.0"),  # a paired difference
        ("[table](benchmarks/results/knowledge.md)", "no table"),
    ],
)
def test_a_changed_figure_is_found(before: str, after: str) -> None:
    text = README.read_text()
    assert text.count(before) == 1
    assert len(unfounded(README, text.replace(before, after))) == 1


def test_figures_are_read_as_they_are_written() -> None:
    told = (
        "Of 10 000, **88.2 ± 0.4** and −.5 %, 1,325 in `6.6` ([x](y/7.md)); 4e-3 (arXiv 1910.05653)"
    )
    found = list(figures(told))
    assert [[n.value for n in f.parts] for f in found] == [
        [10000],
        [88.2, 0.4],
        [-0.5],
        [1325],
        [0.004],
    ]
    assert [f.parts[0].decimals for f in found] == [0, 1, 1, 0, 3]


def test_a_record_must_have_the_decimals_that_are_shown(tmp_path: Path) -> None:
    record = tmp_path / "x.md"
    record.write_text("| a | 88.24 | 0.4 |\n| b | 0.731 |\n")

    def known(text: str) -> bool:
        (figure,) = figures(text)
        assert isinstance(figure, Figure)
        return recorded(figure, record)

    assert known("88.2 ± 0.4") and known("88.24") and known("73 %") and known("73.1 %")
    assert not known("88.240") and not known("88.2 ± 0.40") and not known("88.3 ± 0.4")
    assert not known("0.4 ± 88.2") and not known("73.10 %")
    record.with_suffix(".json").write_text('{"seeds": [88.0, 88.48]}')  # mean 88.24 ± 3.05
    assert not known("88.2 ± 0.4") and known("88.24")
