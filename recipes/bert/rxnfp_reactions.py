"""Made-up chemical reactions as SMILES: `python recipes/bert/rxnfp_reactions.py FOLDER`.

Five textbook reactions between groups of one list, 7 220 in all, in train.txt and test.txt; a pair
of groups stands in one of them only. They are plausible on paper; nobody ran them.
"""

from __future__ import annotations

import random
import sys
from itertools import product
from pathlib import Path

ALKYL = (
    "C", "CC", "CCC", "C(C)C", "CCCC", "CC(C)C", "CCCCC", "C1CC1", "C1CCC1", "C1CCCC1", "C1CCCCC1",
    "CCOC", "CCOCC", "CCN(C)C", "CC(F)(F)F", "CCC#N", "CCC=C", "CC1CC1", "CCN1CCOCC1",
    "Cc1ccccc1",
)  # fmt: skip
ARYL = (
    "c1ccccc1", "c1ccc(C)cc1", "c1ccccc1C", "c1ccc(OC)cc1", "c1ccc(F)cc1", "c1ccc(Cl)cc1",
    "c1cccc(Cl)c1", "c1ccc(C(F)(F)F)cc1", "c1ccc(C#N)cc1", "c1ccc(C(C)=O)cc1", "c1ccc(SC)cc1",
    "c1ccncc1", "c1cccnc1", "c1ccc2ccccc2c1", "c1ccsc1", "c1ccoc1", "c1ccc([N+](=O)[O-])cc1",
    "c1ccc(C(C)C)cc1",
)  # fmt: skip
TEST_SHARE = 0.1


def reactions(one: str, two: str) -> list[str]:
    """Return every kind of reaction of two groups, which begin where they are bound.

    What only helps stands among the reactants, as rxnfp's models know it.
    """
    return [
        f"OC(=O){one}.N{two}>>O=C(N{two}){one}",
        f"ClC(=O){one}.N{two}.CCN(CC)CC>>O=C(N{two}){one}",
        f"OC(=O){one}.OC{two}.OS(=O)(=O)O>>O=C(OC{two}){one}",
        f"BrC{one}.O{two}.[Na]O>>C(O{two}){one}",
        f"ClS(=O)(=O){one}.N{two}.c1ccncc1>>O=S(=O)(N{two}){one}",
    ]


def main(folder: Path) -> None:
    """Write both files."""
    pairs = list(product((*ALKYL, *ARYL), repeat=2))
    random.Random(0).shuffle(pairs)  # noqa: S311 - no secret
    tested = round(TEST_SHARE * len(pairs))
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("test", pairs[:tested]), ("train", pairs[tested:])):
        lines = [line for pair in part for line in reactions(*pair)]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
