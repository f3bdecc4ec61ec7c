"""What mkdocs.yml asks of Python: links out of docs/ lead to the repository."""

from __future__ import annotations

import re
from typing import Any

# Of docs/api, `../` is docs itself.
_OUTWARD = re.compile(r"\]\(\.\./")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: object) -> str:
    """A page's text: `../bench/x.py` is a file of the checkout, on the site one of its address."""
    if "/" in page.file.src_uri:
        return markdown
    return _OUTWARD.sub(f"]({config['repo_url']}/blob/main/", markdown)
