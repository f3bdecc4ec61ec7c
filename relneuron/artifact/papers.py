"""The papers behind the methods, and how each is written in a list of references.

Who goes back to which stands with the method (`artifact/stage.py`) and the option
(`artifact/options.py`); `study/cite.py` asks them. Titles, authors and pages are those of the
publishers' pages, of a paper that is on arXiv alone those of its last version there.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

import relneuron


@dataclass(frozen=True)
class Paper:
    """A reference.

    authors  "Family, Given", or "{a group}"
    venue    the book of proceedings, if there is one
    """

    title: str
    authors: tuple[str, ...]
    year: int | None = None
    arxiv: str = ""
    venue: str = ""
    pages: str = ""
    doi: str = ""
    note: str = ""

    @property
    def key(self) -> str:
        """The name of a BibTeX entry, of ASCII letters: family, year, first long word of title."""
        family, is_person, _ = _ascii(self.authors[0]).partition(",")
        family = family if is_person else ""
        words = (word for word in re.findall(r"[a-z]+", _ascii(self.title)) if len(word) > 3)
        return f"{re.sub('[^a-z]', '', family)}{self.year or ''}{next(words, '')}"

    def bibtex(self) -> str:
        """The BibTeX entry; UTF-8, the title's capitals kept by braces."""
        fields = {
            "title": f"{{{self.title}}}",
            "author": " and ".join(self.authors),
            "booktitle": self.venue,
            "pages": self.pages.replace("-", "--"),
            "year": str(self.year or ""),
            "doi": self.doi,
            "eprint": self.arxiv,
            "archivePrefix": "arXiv" if self.arxiv else "",
            "note": self.note,
        }
        said = [f"  {name} = {{{value}}}," for name, value in fields.items() if value]
        return "\n".join((f"@{'inproceedings' if self.venue else 'misc'}{{{self.key},", *said, "}"))

    def text(self) -> str:
        """One line for a reader: authors, title, where and when."""
        names = [" ".join(reversed(author.strip("{}").split(", "))) for author in self.authors]
        who = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
        parts = [who, self.title, self.venue, f"Pages {self.pages}" if self.pages else ""]
        where = f"arXiv:{self.arxiv}" if self.arxiv else f"doi:{self.doi}" if self.doi else ""
        parts += [str(self.year or ""), where, self.note]
        return " ".join(part if part.endswith(("!", "?")) else f"{part}." for part in parts if part)


def _ascii(text: str) -> str:
    """A text in small letters without accents."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()


_EMNLP = "Proceedings of the {} Conference on Empirical Methods in Natural Language Processing"
_ACL = (
    "Proceedings of the {} Annual Meeting of the Association for Computational Linguistics "
    "(Volume 1: Long Papers)"
)

RELATIONS = Paper(
    "On Relation-Specific Neurons in Large Language Models",
    (
        "Liu, Yihong",
        "Chen, Runsheng",
        "Hirlimann, Lea",
        "Hakimi, Ahmad Dawar",
        "Wang, Mingyang",
        "Kargaran, Amir Hossein",
        "Rothe, Sascha",
        "Yvon, François",
        "Schütze, Hinrich",
    ),
    2025,
    "2502.17355",
    _EMNLP.format(2025),
    "992-1022",
    "10.18653/v1/2025.emnlp-main.52",
)
EXPERTS = Paper(
    "Self-conditioning Pre-Trained Language Models",
    ("Suau, Xavier", "Zappella, Luca", "Apostoloff, Nicholas"),
    2022,
    "2110.02802",
    "Proceedings of the 39th International Conference on Machine Learning",
    "4455-4473",
)
HARNESS = Paper(
    "The Language Model Evaluation Harness",
    (
        *("Gao, Leo", "Tow, Jonathan", "Abbasi, Baber", "Biderman, Stella", "Black, Sid"),
        *("DiPofi, Anthony", "Foster, Charles", "Golding, Laurence", "Hsu, Jeffrey"),
        *("Le Noac'h, Alain", "Li, Haonan", "McDonell, Kyle", "Muennighoff, Niklas"),
        *("Ociepa, Chris", "Phang, Jason", "Reynolds, Laria", "Schoelkopf, Hailey"),
        *("Skowron, Aviya", "Sutawika, Lintang", "Tang, Eric", "Thite, Anish", "Wang, Ben"),
        *("Wang, Kevin", "Zou, Andy"),
    ),
    2024,
    doi="10.5281/zenodo.12608602",
)
LAPE = Paper(
    "Language-Specific Neurons: The Key to Multilingual Capabilities in Large Language Models",
    (
        "Tang, Tianyi",
        "Luo, Wenyang",
        "Huang, Haoyang",
        "Zhang, Dongdong",
        "Wang, Xiaolei",
        "Zhao, Wayne Xin",
        "Wei, Furu",
        "Wen, Ji-Rong",
    ),
    2024,
    "2402.16438",
    _ACL.format("62nd"),
)
MMNEURON = Paper(
    "MMNeuron: Discovering Neuron-Level Domain-Specific Interpretation in Multimodal Large "
    "Language Model",
    ("Huo, Jiahao", "Yan, Yibo", "Hu, Boren", "Yue, Yutao", "Hu, Xuming"),
    2024,
    "2406.11193",
    _EMNLP.format(2024),
    "6801-6816",
    "10.18653/v1/2024.emnlp-main.387",
)
GAIN = Paper(
    "Neuron-Level Knowledge Attribution in Large Language Models",
    ("Yu, Zeping", "Ananiadou, Sophia"),
    2024,
    "2312.12141",
    _EMNLP.format(2024),
)
KNOWLEDGE = Paper(
    "Knowledge Neurons in Pretrained Transformers",
    (
        "Dai, Damai",
        "Dong, Li",
        "Hao, Yaru",
        "Sui, Zhifang",
        "Chang, Baobao",
        "Wei, Furu",
    ),
    2022,
    "2104.08696",
    _ACL.format("60th"),
    "8493-8502",
    "10.18653/v1/2022.acl-long.581",
)
QUERIES = Paper(
    "Identifying Query-Relevant Neurons in Large Language Models for Long-Form Texts",
    ("Chen, Lihu", "Dejl, Adam", "Toni, Francesca"),
    2024,
    "2406.10868",
)
LOCALIZATION = Paper(
    "Knowledge Localization: Mission Not Accomplished? Enter Query Localization!",
    ("Chen, Yuheng", "Cao, Pengfei", "Chen, Yubo", "Liu, Kang", "Zhao, Jun"),
    2024,
    "2405.14117",
)
CRANE = Paper(
    "CRANE: Causal Relevance Analysis of Language-Specific Neurons in Multilingual Large Language "
    "Models",
    ("Le, Yifan", "Li, Yunliang"),
    2026,
    "2601.04664",
)
ATTNLRP = Paper(
    "AttnLRP: Attention-Aware Layer-Wise Relevance Propagation for Transformers",
    (
        "Achtibat, Reduan",
        "Hatefi, Sayed Mohammad Vakilzadeh",
        "Dreyer, Maximilian",
        "Jain, Aakriti",
        "Wiegand, Thomas",
        "Lapuschkin, Sebastian",
        "Samek, Wojciech",
    ),
    2024,
    "2402.05602",
)
SAFETY = Paper(
    "Towards Understanding Safety Alignment: A Mechanistic Perspective from Safety Neurons",
    ("Chen, Jianhui", "Wang, Xiaozhi", "Yao, Zijun", "Bai, Yushi", "Hou, Lei", "Li, Juanzi"),
    2024,
    "2406.14144",
    note="First version: Finding Safety Neurons in Large Language Models",
)
ANLS = Paper(
    "Scene Text Visual Question Answering",
    (
        "Biten, Ali Furkan",
        "Tito, Rubèn",
        "Mafla, Andres",
        "Gomez, Lluis",
        "Rusiñol, Marçal",
        "Valveny, Ernest",
        "Jawahar, C. V.",
        "Karatzas, Dimosthenis",
    ),
    2019,
    "1905.13648",
)
SOFTWARE = Paper(
    "relneuron: find the neurons of a language model that carry a relation, and switch them off",
    ("{The relneuron authors}",),
    note=f"Version {relneuron.__version__}",
)
