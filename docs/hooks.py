"""What the site needs beyond MkDocs: links into the repository, line numbers of quoted code, the notebook as a page."""

import base64
import json
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ("own_loss.ipynb",)
_OUTSIDE = re.compile(r"\[([^\]]+)\]\((\.\./[^)#]+)(#[^)]*)?\)")
_CODE = re.compile(r"(<!-- generated: code (?P<words>.*?) -->\n.*?\n```python)\n", re.DOTALL)


def on_files(files: Files, config) -> Files:
    """Add a page for each notebook, with the pictures in its outputs."""
    for name in NOTEBOOKS:
        page, pictures = notebook_page(json.loads((ROOT / "docs" / name).read_text()), name)
        files.append(File.generated(config, f"{Path(name).stem}.md", content=page))
        for path, content in pictures.items():
            files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Number the lines of quoted code as in its file, and point links out of ``docs`` to the repository.

    Without ``repo_url`` in mkdocs.yml such a link becomes plain text. One to a file that is not there fails.
    """
    markdown = _CODE.sub(_with_line_numbers, markdown)
    return _OUTSIDE.sub(lambda link: _outside_link(link, page.file.src_uri, config.repo_url), markdown)


def _with_line_numbers(part: re.Match) -> str:
    generate = _generator()
    path, symbol, between = generate.split_code(part["words"])
    _, start = generate.code_lines(path, symbol, between)
    return f'{part[1]} linenums="{start}"\n'


def _generator():
    """The module ``generate`` beside this one."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("generate", Path(__file__).with_name("generate.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _outside_link(link: re.Match, page: str, repo_url: str | None) -> str:
    text, target, anchor = link[1], link[2], link[3] or ""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    if not (ROOT / path).exists():
        raise FileNotFoundError(f"docs/{page} links to {target}: there is no {path}.")
    return f"[{text}]({repo_url.rstrip('/')}/blob/main/{path}{anchor})" if repo_url else text


def notebook_page(notebook: dict, name: str) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and the pictures in its outputs by their paths in the site."""
    parts, pictures = [], {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                path = f"images/{Path(name).stem}_{len(pictures) + 1}.png"
                pictures[path] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![Output of the cell above]({path})")
            elif text := "".join(output.get("text", data.get("text/plain", ""))).rstrip():
                parts.append(f"```text\n{text}\n```")
    title, *rest = parts
    return "\n\n".join(
        [title, f"This page is the notebook [{name}]({name}), as it was last run.", *rest]
    ) + "\n", pictures
